"""The Triton kernels of grouped_conv against torch's own convolution: values, gradients, layouts, schemas."""

from itertools import product

import pytest
import torch

from benchmarks.kernel_cases import cases
from fastfuse import functional
from fastfuse.kernels import _dispatch
from fastfuse.kernels.grouped_conv import closed_form, triton_launch
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.op_cases import FORMATS

LAST = torch.channels_last
# groups, channels in and out of a group, kernel, stride, batch, (height, width), reason
SHAPES = [
    (2, 3, 5, 3, 1, 2, (5, 7), "no size a power of two"),
    (3, 4, 2, 3, 2, 2, (5, 6), "every other position, of an odd and an even side"),
    (2, 3, 4, 1, 2, 2, (5, 4), "a shortcut: three of four phases of the map have no gradient"),
    (1, 20, 70, 3, 2, 1, (7, 7), "one group, a batch of one, more than one tile of channels in and out"),
    (2, 5, 3, 5, 3, 2, (7, 8), "a wide kernel: phases with two taps and with one"),
    (3, 2, 2, 3, 1, 3, (11, 7), "more positions than one tile, across samples"),
    (2, 4, 4, 3, 1, 2, (1, 1), "a single position: only the middle tap"),
]
each_shape = pytest.mark.parametrize("shape", [pytest.param(case[:-1], id=case[-1]) for case in SHAPES])


def draw(shape, dtype, memory_format=LAST):
    """Map, weight and a gradient of the result, the same numbers in every dtype and format."""
    groups, inputs, outputs, kernel, stride, batch, (height, width) = shape
    generator = torch.Generator().manual_seed(inputs)
    sizes = [
        (batch, groups * inputs, height, width),
        (groups * outputs, inputs, kernel, kernel),
        (batch, groups * outputs, -(-height // stride), -(-width // stride)),
    ]
    values = [torch.randn(size, generator=generator, dtype=torch.float64).half().to(dtype) for size in sizes]
    x, weight, grad = (value.contiguous(memory_format=memory_format) for value in values)
    return x.requires_grad_(), weight.requires_grad_(), grad


def evaluate(shape, tensors, backend):
    """The result, then the gradients of the map and of the weight."""
    x, weight, grad = tensors
    out = functional.grouped_conv(x, weight, groups=shape[0], stride=shape[4], backend=backend)
    return [out, *torch.autograd.grad(out, [x, weight], grad.to(out.dtype))]


def compare(found, truth, eager):
    for name, ours, exact, plain in zip(("result", "map", "weight"), found, truth, eager, strict=True):
        assert_within_budget(ours, exact, plain, what=name)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_shape
def test_kernels_stay_within_the_budget(shape, dtype, memory_format, nan_filled):
    found = evaluate(shape, draw(shape, dtype, memory_format), "triton")
    eager, truth = (evaluate(shape, draw(shape, t, memory_format), "reference") for t in (dtype, torch.float64))
    compare(found, truth, eager)
    assert all(x.is_contiguous(memory_format=memory_format) for x in found), "no layout is changed"


def test_views_are_read_in_place(nan_filled):
    """Channels of a wider stack, a crop, an expanded gradient, a weight whose taps come first in memory."""
    shape = (2, 3, 5, 3, 1, 2, (4, 5))
    wide = torch.randn(2, 8, 6, 7).contiguous(memory_format=LAST)
    taps = torch.randn(3, 3, 3, 10).permute(3, 2, 0, 1).requires_grad_()
    for x in (wide[:, 1:7, :4, :5], wide[:, 1:7].contiguous()[:, :, 1:5, 1:6], wide[..., :4, :5][:, 2:]):
        given = x.requires_grad_(), taps, torch.ones(()).expand(2, 10, 4, 5)
        exact = [t.detach().double().requires_grad_() for t in given]
        found, eager = evaluate(shape, given, "triton"), evaluate(shape, given, "reference")
        compare(found, evaluate(shape, exact, "reference"), eager)


def test_nothing_gives_nothing(nan_filled):
    """No sample: an empty map, and a weight whose gradient is zero."""
    shape = (2, 3, 5, 3, 2, 0, (5, 7))
    out, of_map, of_weight = evaluate(shape, draw(shape, torch.float32), "triton")
    assert out.shape == (0, 10, 3, 4) and of_map.shape == (0, 6, 5, 7)
    assert of_weight.shape == (10, 3, 3, 3) and (of_weight == 0).all()


def test_many_positions_are_summed_in_a_fixed_order(monkeypatch, nan_filled):
    """The weight's gradient is split into shares; twice the same call gives the same bits."""
    monkeypatch.setattr(triton_launch, "LEAST_POSITIONS", 40)
    shares = []
    original = triton_launch._weight_shares
    monkeypatch.setattr(triton_launch, "_weight_shares", lambda *a: shares.append(original(*a)) or shares[-1])
    shape = (2, 3, 4, 3, 1, 3, (11, 9))
    runs = [evaluate(shape, draw(shape, torch.float32), "triton")[2] for _ in range(2)]
    assert shares[0].shape[0] == 7 and torch.equal(*runs)
    assert relative_l2(runs[0], evaluate(shape, draw(shape, torch.float64), "reference")[2]) <= 1e-6


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@each_shape
def test_closed_form_equals_autograd(shape, memory_format):
    tensors = draw(shape, torch.float64, memory_format)
    truth = evaluate(shape, tensors, "reference")
    x, weight, grad = (t.detach() for t in tensors)
    found = [closed_form.forward(x, weight, shape[0], shape[4])]
    found += closed_form.backward(grad, x, weight, shape[0], shape[4], [True, True])
    assert all(relative_l2(a, b) <= 1e-12 for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("interpreter", ["1", "0"], ids=["kernels", "closed form"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_schemas_hold(memory_format, interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    x, weight, grad = (t.detach() for t in draw(SHAPES[1][:-1], torch.float32, memory_format))
    torch.library.opcheck(torch.ops.fastfuse.grouped_conv_fwd.default, (x, weight, 3, 2))
    for needs in product([True, False], repeat=2):
        torch.library.opcheck(torch.ops.fastfuse.grouped_conv_bwd.default, (grad, x, weight, 3, 2, needs))
        assert len(torch.ops.fastfuse.grouped_conv_bwd(grad, x, weight, 3, 2, needs)) == sum(needs)


def test_compiled_equals_eager():
    def call(x, weight):
        return functional.grouped_conv(x, weight, groups=3, stride=2, backend="triton")

    x, weight, grad = draw(SHAPES[1][:-1], torch.float32)
    runs = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(x, weight)
        runs.append([out, *torch.autograd.grad(out, [x, weight], grad)])
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["map", "weight"])
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    seen, backward = [], torch.ops.fastfuse.grouped_conv_bwd
    monkeypatch.setattr(torch.ops.fastfuse, "grouped_conv_bwd", lambda *a: seen.append(a[-1]) or backward(*a))
    *tensors, grad = draw(SHAPES[0][:-1], torch.float32)
    tensors = [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
    functional.grouped_conv(*tensors, groups=2, backend="triton").backward(grad)
    assert seen == [needed] and [x.grad is not None for x in tensors] == list(needed)


def test_autocast_takes_the_map_in_half_and_leaves_the_weights_gradient_in_float32():
    shape = SHAPES[0][:-1]
    with torch.autocast("cpu", torch.float16):
        found = evaluate(shape, draw(shape, torch.float32), "triton")
    assert [x.dtype for x in found] == [torch.float16, torch.float32, torch.float32]
    truth = evaluate(shape, draw(shape, torch.float64), "reference")
    assert all(relative_l2(a, b) <= 2e-3 for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("shape", [SHAPES[0][:-1], SHAPES[2][:-1]], ids=["3x3", "1x1"])
def test_the_backend_is_asked_for_by_the_kind_of_layer(shape, monkeypatch):
    """As benchmarks/kernel_cases.py names it: layers of other widths may be faster by other backends."""
    asked, resolve = [], _dispatch.resolve
    monkeypatch.setattr(_dispatch, "resolve", lambda *a, kind: asked.append(kind) or resolve(*a, kind=kind))
    evaluate(shape, draw(shape, torch.float32), "auto")
    assert asked == [f"{shape[1]} to {shape[2]}, {shape[3]}x{shape[3]}, stride {shape[4]}"]
    assert "16 to 32, 3x3, stride 2" in {case.kind for case in cases() if case.op == "grouped_conv"}


def test_torchs_own_is_preferred_until_these_kernels_were_measured_to_be_faster():
    x = torch.ones(1, 2, 3, 3, device="meta")
    assert _dispatch.resolve("grouped_conv", "auto", x) == "reference"
    assert _dispatch.resolve("grouped_conv", "triton", torch.ones(1)) == "triton"
