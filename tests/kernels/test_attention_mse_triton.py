"""The kernels of attention_mse and attention_map alone; test_pair_losses_triton.py has what they share with others."""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels.attention_mse import closed_form, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.pairs import (
    ATTENTION,
    BF16,
    DEEP,
    DEEP_MAP,
    DEVICE,
    HALF,
    LAST,
    MAP,
    SINGLE,
    X,
    Y,
    agree,
    evaluate,
    exactly,
    launches,
    maps,
)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("inputs", "targets", "formats", "reduction"),
    [
        pytest.param([X], [X], (), "mean", id="one pair"),
        pytest.param([X], [Y], (LAST, LAST), "sum", id="another width, channels-last"),
        pytest.param([X], [Y], (LAST,), "none", id="formats mixed in a pair"),
        pytest.param([X], [MAP], (LAST,), "mean", id="features against a ready map"),
        pytest.param([MAP], [MAP], (), "none", id="ready maps alone"),
        pytest.param([X, DEEP], [Y, DEEP], (), "none", id="pairs of different shapes: one launch, a loss per sample"),
        pytest.param([X, DEEP], [Y, DEEP], (LAST,) * 4, "mean", id="the same, channels-last"),
        pytest.param([X, DEEP_MAP], [MAP, DEEP], (), "mean", id="ready maps on either side of a list"),
        pytest.param([X, (1, 4, 3, 3)], [Y, (1, 2, 3, 3)], (), "sum", id="batches of two sizes"),
        pytest.param([(1, 1, 1, 1)], [(1, 1, 1, 1)], (), "mean", id="one element: the distance is 0"),
        pytest.param([(3, 6, 1, 1)], [(3, 4, 1, 1)], (), "none", id="one position: the distance is 0"),
        pytest.param(
            [(1, 5, 13, 11)], [(1, 3, 13, 11)], (), "mean", id="odd extents, more positions than a tile's side"
        ),
        pytest.param([(1, 1, 7, 5)], [(1, 2, 7, 5)], (LAST,), "mean", id="one channel: both formats are one"),
    ],
)
def test_equals_the_reference(inputs, targets, formats, reduction, dtype, nan_filled):
    tensors = maps(*inputs, *targets, dtype=dtype, formats=formats)
    gradients = agree(ATTENTION, tensors, reduction)
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@pytest.mark.parametrize("formats", [(), (LAST,) * 4], ids=["contiguous", "channels_last"])
def test_several_tiles_of_channels_and_positions(formats, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    monkeypatch.setattr(triton_kernels, "LONG_SIDE", 4)
    monkeypatch.setattr(triton_kernels, "REDUCE_BLOCK", 2)
    agree(ATTENTION, maps((3, 7, 3, 3), (3, 5, 4, 4), (3, 9, 3, 3), (3, 2, 4, 4), formats=formats))


def test_half_precision_features_and_float32_maps_share_a_launch(monkeypatch, nan_filled):
    """What an autocast step holds: features in half precision, attention maps in float32, on either side."""
    seen = launches(monkeypatch, ATTENTION)
    half, single = maps(X, DEEP, X, dtype=HALF), maps(MAP, DEEP_MAP)
    agree(ATTENTION, [half[0], half[1], single[0], single[1]])
    assert seen == [2]
    agree(ATTENTION, [half[0], single[1], half[2], half[1]])
    assert seen == [2, 2]


def test_inputs_and_targets_of_two_dtypes_share_a_launch(monkeypatch, nan_filled):
    seen = launches(monkeypatch, ATTENTION)
    (x, deep), (y, goal) = maps(X, DEEP, dtype=HALF), maps(Y, DEEP)
    agree(ATTENTION, [x, deep, y, goal], "none")
    assert seen == [2]


def test_dtypes_that_cannot_share_a_launch_take_several(monkeypatch, nan_filled):
    seen = launches(monkeypatch, ATTENTION)
    half, single = maps(X, Y, dtype=HALF), maps(X, Y, DEEP, DEEP)
    agree(ATTENTION, [half[0], single[0], single[2], half[1], single[1], single[3]], "none")
    assert seen == [1, 2]


def test_maps_that_nearly_agree(nan_filled):
    """1 - cos between 1e-8 and 1e-4, where 2 - 2 cos keeps no digit in float32; scales differ by 3."""
    x = maps((4, 4, 12, 12), gradient=False)[0]
    for angle in (1e-2, 1e-3):
        y = 3 * x + angle * torch.randn_like(x)
        agree(ATTENTION, [x.clone().requires_grad_(), y.requires_grad_()], "none")


@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)], ids=["input", "target", "both"])
def test_zero_maps(zeros, nan_filled):
    """One zero map: distance 1 / N; two: 0. The gradient of a zero map is exactly 0, eager's too for features.

    The other map's gradient is 0 but for rounding: its length does not matter, its direction has nothing to turn to.
    """
    tensors = [torch.zeros_like(x) if i in zeros else x.detach() for i, x in enumerate(maps(X, Y))]
    tensors = [x.requires_grad_() for x in tensors]
    losses, *gradients = evaluate(ATTENTION, tensors, "triton", "none")
    torch.testing.assert_close(losses, torch.full_like(losses, 1 / 20 if len(zeros) == 1 else 0.0), atol=0, rtol=1e-6)
    assert not any(gradients[i].any() for i in zeros)
    for a, e in zip(gradients, evaluate(ATTENTION, tensors, "reference", "none")[1:], strict=True):
        torch.testing.assert_close(a, e, atol=1e-8, rtol=0)


def test_a_ready_zero_map_gets_no_gradient(nan_filled):
    """Eager sends it the other map's direction times 1e12; the README says that kernels do not."""
    zero = torch.zeros(MAP, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(functional.attention_mse(zero, maps(MAP)[0], backend="triton"), zero)
    assert torch.equal(gradient, torch.zeros_like(zero))


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 2, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_schemas_of_attention_map(formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensors = maps(X, Y, dtype=HALF, formats=formats, gradient=False)
    torch.library.opcheck(torch.ops.fastfuse.attention_map_fwd.default, (tensors,))
    torch.library.opcheck(torch.ops.fastfuse.attention_map_bwd.default, (torch.ones(MAP, device=DEVICE), tensors, 10))


def test_gradients_of_a_view_whose_format_kernels_cannot_address():
    """The fake of its gradient's memory is the real one's: height and width swapped in memory."""
    x = maps((2, 3, 4, 5), gradient=False)[0].transpose(2, 3)
    losses, attention, stats = torch.ops.fastfuse.attention_mse_fwd([x.contiguous()], [x.contiguous()], "mean")
    torch.library.opcheck(
        torch.ops.fastfuse.attention_mse_bwd.default, (torch.ones_like(losses), attention, stats, [x], [0], [0], "mean")
    )


@pytest.mark.parametrize(
    ("shapes", "dtypes", "formats"),
    [
        pytest.param([X], [SINGLE], (), id="one map"),
        pytest.param([X, Y], [HALF, HALF], (LAST, LAST), id="two widths, channels-last"),
        pytest.param([X, Y, X], [SINGLE, BF16, HALF], (LAST,), id="three dtypes and both formats in one launch"),
        pytest.param([(1, 5, 13, 11)], [SINGLE], (), id="odd extents, more positions than a tile's side"),
        pytest.param([(0, 3, 2, 2)], [SINGLE], (), id="no samples"),
    ],
)
def test_attention_map_equals_the_reference(shapes, dtypes, formats, nan_filled):
    tensors = [
        maps(s, dtype=d, formats=formats[i : i + 1])[0] for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]

    def run(features, backend):
        found = functional.attention_map(features, backend=backend)
        cotangent = torch.linspace(-1, 1, found.numel(), device=DEVICE).view(found.shape).to(found)
        return [found, *torch.autograd.grad(found, features, cotangent)]

    ours, eager = (run(tensors, backend) for backend in ("triton", "reference"))
    for i, (a, t, e) in enumerate(zip(ours, run(exactly(tensors), "reference"), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    assert [g.stride() for g in ours[1:]] == [torch.empty_like(x).stride() for x in tensors]


def test_attention_map_compiles_and_takes_wanted_gradients_alone():
    torch.compiler.reset()
    x, y = maps(X, Y, formats=(LAST,))
    y.requires_grad_(False)
    compiled = torch.compile(functional.attention_map, fullgraph=True, backend="aot_eager")
    (found, own), (eager, other) = (
        (a := call([x, y], backend="triton"), *torch.autograd.grad(a.square().sum(), x))
        for call in (compiled, functional.attention_map)
    )
    assert torch.equal(found, eager) and torch.equal(own, other)
    assert own.stride() == x.stride()


def test_closed_form_of_attention_map_equals_autograd():
    tensors = maps(X, Y, dtype=torch.float64, formats=(LAST,))
    found = functional.attention_map(tensors, backend="reference")
    cotangent = torch.linspace(-1, 1, found.numel(), device=DEVICE, dtype=torch.float64).view(found.shape)
    expected = torch.autograd.grad(found, tensors, cotangent)
    assert relative_l2(closed_form.map_forward(tensors), found) <= 1e-12
    for a, e in zip(closed_form.map_backward(cotangent, [x.detach() for x in tensors], 10), expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


@pytest.mark.parametrize("which", range(2))
def test_attention_map_refuses_float64_wherever_it_stands(which):
    tensors = maps(X, Y)
    tensors[which] = tensors[which].double()
    with pytest.raises(BackendUnavailableError, match=r"torch\.float64"):
        functional.attention_map(tensors, backend="triton")
