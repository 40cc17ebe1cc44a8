"""The kernels of normalized_lp alone, and some of its joint form's; test_pair_losses_triton.py has what they share."""

import pytest
import torch

from fastfuse.kernels.normalized_lp import layout, triton_kernels
from tests.kernels.pairs import (
    BF16,
    DEEP,
    DEVICE,
    HALF,
    JOINT,
    LAST,
    LP,
    ROWS,
    SINGLE,
    X,
    agree,
    each_lp,
    evaluate,
    launches,
    maps,
    nearly_equal,
    views,
)

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long
each_p = pytest.mark.parametrize("p", [2, 1])


@each_p
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("shapes", "formats", "reduction"),
    [
        pytest.param([X], (), "mean", id="one pair"),
        pytest.param([X], (LAST, LAST), "none", id="channels-last: a flat walk, a loss per sample"),
        pytest.param([X], (LAST,), "sum", id="formats mixed in a pair: the walk follows the first"),
        pytest.param([X, ROWS, DEEP], (LAST, None, None, LAST), "mean", id="rows and maps of different shapes"),
        pytest.param([X, (1, 5, 3)], (), "sum", id="batches of two sizes, three dimensions"),
        pytest.param([(1, 3, 2, 5, 3)], (), "mean", id="a batch of one, five dimensions"),
        pytest.param([(2, 6, 1, 1)], (LAST,), "mean", id="one position: both formats are one"),
        pytest.param([(1, 9, 23, 29)], (), "mean", id="an odd count of elements, more than one tile"),
    ],
)
def test_equals_the_reference(shapes, formats, reduction, dtype, p, nan_filled):
    tensors = maps(*shapes, *shapes, dtype=dtype, formats=formats)
    gradients = agree(LP[p], tensors, reduction)
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@each_p
@pytest.mark.parametrize("formats", [(LAST,) * 4, (LAST,)], ids=["flat", "mixed"])
def test_many_tiles(p, formats, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    monkeypatch.setattr(triton_kernels, "COMBINE_BLOCK", 2)
    monkeypatch.setattr(triton_kernels, "REDUCE_BLOCK", 2)
    agree(LP[p], maps((3, 3, 5, 4), (3, 5, 3, 3), (3, 3, 5, 4), (3, 5, 3, 3), formats=formats))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(torch.randn(2, 7, 3).transpose(0, 1), torch.randn(7, 2, 3), id="samples in the middle"),
        pytest.param(torch.randn(5, 2).t(), torch.randn(2, 5), id="rows that are columns"),
        pytest.param(
            torch.randn(2, 3, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d),
            torch.randn(2, 3, 2, 3, 4),
            id="volumes, channels-last and not",
        ),
        pytest.param(torch.randn(2, 3, 4, 3, 4)[:, :, ::2], torch.randn(2, 3, 2, 3, 4), id="a cropped volume"),
    ],
)
def test_views_of_other_dimensions(x, y, nan_filled):
    x, y = x.to(DEVICE), y.to(DEVICE)
    agree(LP[2], [x.clone(memory_format=torch.preserve_format).requires_grad_(), y.requires_grad_()])
    agree(LP[1], [y, x.requires_grad_()])


def test_only_views_without_a_common_stride_are_copied():
    for name, x in views().items():
        copied = layout.addressable(x) is not x
        assert copied == (name in ("cropped across: neither", "height and width swapped"))
    x = maps(X, formats=(LAST,))[0]
    assert layout.addressable(x) is x and layout.gradient_like(x).stride() == x.stride()


@pytest.mark.parametrize("loss", [LP[2], JOINT[2]], ids=["alone", "joint"])
def test_pairs_of_one_kind_share_a_launch(loss, monkeypatch, nan_filled):
    seen = launches(monkeypatch, loss)
    (a, b), (x, y, z) = maps(X, X, dtype=HALF), maps(X, X, X)
    agree(loss, [a, x, b, y], "none")
    assert seen == [1, 1], "half against half, float32 against float32"
    agree(loss, [a, b, y, z])
    assert seen == [1, 1, 2], "half against float32, twice"


@each_p
@pytest.mark.parametrize(
    ("shapes", "reduction"),
    [
        pytest.param([X, (0, 7)], "sum", id="no samples in one pair of two"),
        pytest.param([(2, 0)], "none", id="no elements"),
        pytest.param([(2, 0), (2, 7)], "sum", id="no elements in one pair of two"),
    ],
)
def test_nothing_to_add_in_rows(shapes, reduction, p, nan_filled):
    tensors = maps(*shapes, *shapes)
    ours, eager = (evaluate(LP[p], tensors, backend, reduction) for backend in ("triton", "reference"))
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@each_p
def test_one_element(p):
    """Its direction is its sign: distances 0 and 2^p, and nothing but rounding to move along."""
    x, y = torch.tensor([[0.3], [-2.0]], device=DEVICE), torch.tensor([[0.7], [1.1]], device=DEVICE)
    losses, *gradients = evaluate(LP[p], [x.requires_grad_(), y.requires_grad_()], "triton", "none")
    torch.testing.assert_close(losses, torch.tensor([[0.0, 2.0**p]], device=DEVICE))
    assert all(g.abs().max() < 1e-5 for g in gradients)


@each_lp
@pytest.mark.parametrize("name", nearly_equal())
def test_maps_that_nearly_agree(loss, name, nan_filled):
    """Where 2 - 2 cos keeps few digits in float32, or none. The tiles (two to a sample) have ratios of their own."""
    agree(loss, [x.requires_grad_() for x in nearly_equal()[name]], "none")


@each_lp
def test_equal_directions_have_no_distance(loss):
    """Exactly 0, and no gradient of |e| from elements that rounding made differ."""
    x = maps(X)[0]
    for scale in (1, 2):
        for found in evaluate(loss, [x, (scale * x.detach()).requires_grad_()], "triton"):
            assert not found.any()


@each_lp
@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)], ids=["input", "target", "both"])
def test_zero_maps(loss, zeros, nan_filled):
    """Losses are eager's; a zero map gets no gradient, where eager gives the other's direction times 1e12."""
    tensors = [torch.zeros_like(x) if i in zeros else x.detach() for i, x in enumerate(maps(X, X))]
    tensors = [x.requires_grad_() for x in tensors]
    ours, eager = (evaluate(loss, tensors, backend, "none") for backend in ("triton", "reference"))
    for a, e in zip(ours[:-2], eager[:-2], strict=True):
        torch.testing.assert_close(a, e)
    for i in range(2):
        expected = torch.zeros_like(tensors[i]) if i in zeros else eager[i - 2]
        torch.testing.assert_close(ours[i - 2], expected, atol=1e-8, rtol=1e-5)
        assert i not in zeros or not ours[i - 2].any()
