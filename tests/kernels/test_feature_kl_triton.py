"""feature_kl's kernels alone; what it shares with feature_mse is in test_student_losses_triton.py."""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.kernels.feature_kl import triton_kernels
from tests.kernels.students import LAST, X, agree, evaluate, kl, single_maps

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long
each_over = pytest.mark.parametrize("over", ["positions", "channels"])


@pytest.mark.parametrize(
    ("over", "shape", "formats"),
    [
        pytest.param("positions", (1, 2, 56, 56), (), id="3136 positions of the first stage"),
        pytest.param("channels", (1, 2048, 1, 2), (LAST, LAST), id="2048 channels of the last stage"),
    ],
)
def test_the_longest_rows_of_imagenet_networks(over, shape, formats, nan_filled):
    agree(kl(over), single_maps(shape, shape, formats=formats), 1)


@each_over
def test_distributions_over_one_element(over):
    """Each is certain, so loss and gradients are zero."""
    tensors = single_maps(*[(2, 3, 1, 1) if over == "positions" else (2, 1, 3, 2)] * 2)
    assert all((x == 0).all() for x in evaluate(kl(over), tensors, 1, "triton"))


@each_over
@pytest.mark.parametrize("students", [2, 5], ids=["few", "so many that tiles are smaller"])
def test_blocks_that_come_to_several_tiles(students, over, monkeypatch, nan_filled):
    """Small tiles on three blocks: the normaliser is met piece by piece, and the last turn finds few rows or none."""
    for name, small in {"TILE_BYTES": 64, "PROGRAMS": 3, "LONGEST_PIECE": 8, "LONGEST_STRIDED_PIECE": 4}.items():
        monkeypatch.setattr(triton_kernels, name, small)
    monkeypatch.setattr(triton_kernels, "FINISH_BLOCK", 2)
    agree(kl(over), single_maps(*[(2, 3, 3, 4)] * (students + 1), formats=(LAST,)), students)


# In elements that do not exist; they are not used.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@each_over
@pytest.mark.parametrize(
    ("scale", "temperature"),
    [
        pytest.param(300.0, 1.0, id="exp of a logit overflows, most probabilities vanish"),
        pytest.param(1.0, 0.05, id="a cold softmax"),
        pytest.param(1.0, 1000.0, id="almost uniform distributions"),
    ],
)
def test_extreme_logits(scale, temperature, over, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "LONGEST_PIECE", 4)
    tensors = [(scale * x).detach().requires_grad_() for x in single_maps(X, X)]
    ours = agree(kl(over, temperature), tensors, 1)
    assert all(x.isfinite().all() for x in ours)


@each_over
def test_a_constant_added_to_all_logits_changes_nothing(over):
    x, y = single_maps(X, X)
    ours, shifted = (
        evaluate(kl(over), [v.detach().requires_grad_() for v in pair], 1, "triton")
        for pair in ((x, y), (x + 64, y - 32))
    )
    for a, b in zip(ours, shifted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "over": "samples"}], ids=str)
def test_refusals_are_those_of_the_reference(options):
    with pytest.raises(InputError, match=r"must be positive|is 'positions' or 'channels'"):
        functional.feature_kl(single_maps(X), single_maps(X), **options, backend="triton")
