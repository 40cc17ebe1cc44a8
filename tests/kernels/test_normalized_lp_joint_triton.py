"""The joint form of normalized_lp alone: both distances from one read, the gradients added in registers.

What it shares with its parts is in test_pair_losses_triton.py and test_normalized_lp_triton.py.
"""

import pytest
import torch

from fastfuse import functional
from fastfuse.kernels.normalized_lp import triton_joint
from tests.kernels.pairs import BF16, DEEP, HALF, JOINT, LAST, SINGLE, X, agree, evaluate, maps

pytestmark = pytest.mark.long
each_p = pytest.mark.parametrize("p", [2, 1])


@each_p
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("shapes", "formats", "reduction"),
    [
        pytest.param([X], (), "mean", id="one pair"),
        pytest.param([X], (LAST, LAST), "none", id="channels-last, a loss per sample"),
        pytest.param([X], (LAST,), "sum", id="formats mixed in a pair"),
        pytest.param([X, DEEP], (LAST, None, None, LAST), "mean", id="formats mixed among pairs of different shapes"),
        pytest.param([X, (1, 5, 3, 1)], (), "sum", id="batches of two sizes"),
        pytest.param([(2, 6, 1, 1)], (LAST,), "mean", id="one position: both formats are one, attention says nothing"),
        pytest.param([(2, 1, 7, 5)], (LAST,), "none", id="one channel: both formats are one"),
        pytest.param([(1, 9, 23, 29)], (), "mean", id="odd extents, several blocks of positions"),
        pytest.param([(1, 17, 5, 7)], (LAST, LAST), "mean", id="odd channels, channels-last, a batch of one"),
    ],
)
def test_equals_the_reference(shapes, formats, reduction, dtype, p, nan_filled):
    tensors = maps(*shapes, *shapes, dtype=dtype, formats=formats)
    gradients = agree(JOINT[p], tensors, reduction)
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@each_p
@pytest.mark.parametrize("formats", [(), (LAST,) * 4, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_many_tiles(p, formats, monkeypatch, nan_filled):
    """Several tiles along channels and positions, more than the combining kernel takes at once."""
    monkeypatch.setattr(triton_joint, "TILE", 16)
    monkeypatch.setattr(triton_joint, "LONG_SIDE", 4)
    for name in ("COMBINE_BLOCK", "MAP_BLOCK", "REDUCE_BLOCK"):
        monkeypatch.setattr(triton_joint, name, 2)
    agree(JOINT[p], maps((3, 6, 5, 4), (3, 9, 3, 3), (3, 6, 5, 4), (3, 9, 3, 3), formats=formats))


@each_p
def test_is_both_of_its_parts(p):
    """The same losses, and the sum of their gradients, as the two operators give."""
    tensors = maps(X, DEEP, X, DEEP, formats=(LAST,) * 4)
    inputs, targets = tensors[:2], tensors[2:]
    both = functional.normalized_lp_joint(inputs, targets, p=p, backend="triton")
    parts = (
        functional.normalized_lp(inputs, targets, p=p, backend="triton"),
        functional.attention_mse(inputs, targets, backend="triton"),
    )
    weights = [torch.tensor([0.5, 2.0]).to(both.feature), torch.tensor([3.0, -1.0]).to(both.feature)]
    for ours, part in zip(both, parts, strict=True):
        torch.testing.assert_close(ours, part, rtol=1e-6, atol=0)
    ours, apart = (torch.autograd.grad(losses, tensors, weights) for losses in (both, parts))
    for a, b in zip(ours, apart, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["feature", "attention"])
def test_one_of_the_two_alone(kind):
    """A loss that nobody uses adds nothing to the gradient."""
    tensors = maps(X, X)
    ours, eager = (
        torch.autograd.grad(getattr(functional.normalized_lp_joint(*tensors, backend=backend), kind), tensors)
        for backend in ("triton", "reference")
    )
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, ran):
        self.kernel, self.ran = kernel, ran

    def __getitem__(self, grid):
        self.ran.append(self.kernel.__name__.removeprefix("normalized_lp_").removesuffix("_kernel"))
        return self.kernel[grid]


@pytest.mark.parametrize("pairs", [1, 24])
@each_p
def test_launches_do_not_grow_with_the_pairs(p, pairs, monkeypatch):
    """Eight transforms of three stages take as many as one pair; the wider ones of unequal shapes too."""
    ran = []
    for name in [name for name in vars(triton_joint) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_joint, name, Counted(getattr(triton_joint, name), ran))
    shapes = [(1, 1 + i % 3, 2, 1 + i % 2) for i in range(pairs)]
    evaluate(JOINT[p], maps(*shapes, *shapes), "triton")
    again = ["fwd_joint_distance"] if p == 1 else []
    assert ran == ["fwd_joint", *again, "fwd_joint_combine", "fwd_reduce", "bwd_joint"]
