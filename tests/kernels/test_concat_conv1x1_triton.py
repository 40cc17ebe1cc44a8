"""The Triton kernels of concat_conv1x1 against its reference: values, gradients, layouts, schemas, compilation."""

from itertools import product

import pytest
import torch

from fastfuse import functional
from fastfuse.kernels.concat_fuse import closed_form, reference
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.op_cases import FORMATS

LAST = torch.channels_last
# channels of each map, outputs, batch, (height, width), reason
SHAPES = [
    ((3, 5), 4, 2, (5, 7), "two widths, none a power of two"),
    ((40, 1, 70), 7, 2, (3, 5), "maps of less than one channel tile, of a single channel, of more than one tile"),
    ((20,), 80, 1, (7, 7), "one map, a batch of one, more outputs than one tile"),
    ((2, 2), 3, 3, (11, 13), "more positions than one tile, across samples"),
    ((6, 4), 5, 2, (1, 1), "a single position, where layouts cannot be told apart"),
]
each_shape = pytest.mark.parametrize(
    ("channels", "outputs", "batch", "size"), [pytest.param(*case[:-1], id=case[-1]) for case in SHAPES]
)


def draw(channels, outputs, batch, size, dtype, formats):
    """Maps, weight and a gradient of the result, the same numbers in every dtype and format."""
    generator = torch.Generator().manual_seed(len(channels))
    shapes = [(outputs, sum(channels), 1, 1), *((batch, c, *size) for c in channels), (batch, outputs, *size)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).half().to(dtype) for shape in shapes]
    maps = [x.contiguous(memory_format=f).requires_grad_() for x, f in zip(values[1:-1], formats, strict=True)]
    return maps, values[0].requires_grad_(), values[-1]


def evaluate(function, maps, weight, grad):
    """The result, then the gradients of the weight and of every map."""
    out = function(maps, weight)
    return [out, *torch.autograd.grad(out, [weight, *maps], grad.to(out.dtype))]


def on_triton(maps, weight):
    return functional.concat_conv1x1(maps, weight, backend="triton")


def compare(found, truth, eager):
    names = ["result", "gradient of weight", *(f"gradient of map {s}" for s in range(len(found) - 2))]
    for name, ours, exact, plain in zip(names, found, truth, eager, strict=True):
        assert_within_budget(ours, exact, plain, what=name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_shape
def test_kernels_stay_within_the_budget(channels, outputs, batch, size, dtype, layout, nan_filled):
    alternating = [FORMATS[s % 2] for s in range(len(channels))]
    formats = {"contiguous": [FORMATS[0]] * len(channels), "channels_last": [LAST] * len(channels)}
    formats = formats.get(layout, alternating)
    arguments = channels, outputs, batch, size
    found = evaluate(on_triton, *draw(*arguments, dtype, formats))
    truth = evaluate(reference.concat_conv1x1, *draw(*arguments, torch.float64, formats))
    compare(found, truth, evaluate(reference.concat_conv1x1, *draw(*arguments, dtype, formats)))
    if layout == "channels_last":
        assert all(x.is_contiguous(memory_format=LAST) for x in (found[0], *found[2:])), "no layout is changed"


def test_strided_inputs_are_read_in_place():
    """A crop does not collapse into one position stride; a slice of a weight and an expanded gradient have odd ones."""
    wide, weight = torch.randn(2, 5, 6, 8), torch.randn(4, 9, 1, 1)
    maps = [wide[:, :3, 1:4, 2:6].requires_grad_(), wide[:, 3:, 2:5, :4].requires_grad_()]
    sliced = weight[:, 2:7].requires_grad_()
    transposed = torch.randn(5, 4, 1, 1).transpose(0, 1).requires_grad_()
    for w in (sliced, transposed):
        grad = torch.ones(()).expand(2, 4, 3, 4)
        eager = evaluate(reference.concat_conv1x1, maps, w, grad)
        exact = [x.detach().double().requires_grad_() for x in (w, *maps)]
        truth = evaluate(reference.concat_conv1x1, exact[1:], exact[0], grad.double())
        compare(evaluate(on_triton, maps, w, grad), truth, eager)


def test_no_sample_gives_an_empty_map_and_a_zero_gradient(nan_filled):
    maps, weight, grad = draw((3, 2), 4, 0, (5, 3), torch.float32, FORMATS)
    out, of_weight, *of_maps = evaluate(on_triton, maps, weight, grad)
    assert out.shape == (0, 4, 5, 3) and [x.shape for x in of_maps] == [x.shape for x in maps]
    assert of_weight.shape == weight.shape and (of_weight == 0).all()


def test_many_positions_are_summed_in_a_fixed_order():
    """The weight's gradient is split into partial sums; twice the same call gives the same bits."""
    maps, weight, grad = draw((2, 1), 3, 5, (16, 17), torch.float32, [LAST] * 2)
    runs = [evaluate(on_triton, maps, weight, grad)[1] for _ in range(2)]
    assert torch.equal(*runs)
    exact = evaluate(reference.concat_conv1x1, *draw((2, 1), 3, 5, (16, 17), torch.float64, [LAST] * 2))[1]
    assert relative_l2(runs[0], exact) <= 1e-6


@each_shape
@pytest.mark.parametrize("memory_format", FORMATS)
def test_closed_form_equals_autograd(channels, outputs, batch, size, memory_format):
    maps, weight, grad = draw(channels, outputs, batch, size, torch.float64, [memory_format] * len(channels))
    out, *gradients = evaluate(reference.concat_conv1x1, maps, weight, grad)
    detached = [x.detach() for x in maps]
    assert relative_l2(closed_form.concat_conv1x1_fwd(detached, weight.detach())[0], out) <= 1e-12
    given = [grad], [], detached, weight.detach(), []
    found = closed_form.concat_conv1x1_bwd(*given, [True] * (len(maps) + 1))
    for ours, expected in zip([found[-1], *found[:-1]], gradients, strict=True):
        assert relative_l2(ours, expected) <= 1e-12
    only = closed_form.concat_conv1x1_bwd(*given, [*[False] * (len(maps) - 1), True, False])
    assert len(only) == 1 and torch.equal(only[0], found[-2])


@pytest.mark.parametrize("interpreter", ["1", "0"], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [FORMATS[:1] * 2, FORMATS[1:] * 2, FORMATS], ids=["plain", "last", "mixed"])
def test_schemas_hold(formats, interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    maps, weight, grad = draw((3, 2), 4, 2, (5, 3), torch.float32, formats)
    maps, weight = [x.detach() for x in maps], weight.detach()
    torch.library.opcheck(torch.ops.fastfuse.concat_conv1x1_fwd.default, (maps, weight, [], False))
    for needs in product([True, False], repeat=3):
        arguments = [grad], [], maps, weight, [], needs
        torch.library.opcheck(torch.ops.fastfuse.concat_conv1x1_bwd.default, arguments)
        assert len(torch.ops.fastfuse.concat_conv1x1_bwd(*arguments)) == sum(needs)


def test_compiled_equals_eager():
    maps, weight, grad = draw((3, 2), 4, 2, (5, 3), torch.float32, [LAST] * 2)
    compiled = torch.compile(on_triton, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        evaluate(compiled, maps, weight, grad), evaluate(on_triton, maps, weight, grad), strict=True
    ):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)], ids=str
)
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    maps, weight, grad = draw((3, 2), 4, 2, (5, 3), torch.float32, FORMATS)
    tensors = [x.detach().requires_grad_(n) for x, n in zip([weight, *maps], needed, strict=True)]
    seen = []
    backward = torch.ops.fastfuse.concat_conv1x1_bwd
    monkeypatch.setattr(
        torch.ops.fastfuse, "concat_conv1x1_bwd", lambda *arguments: seen.append(arguments[-1]) or backward(*arguments)
    )
    on_triton(tensors[1:], tensors[0]).backward(grad)
    assert seen == [[*needed[1:], needed[0]]]
    assert [x.grad is not None for x in tensors] == list(needed)


def test_autocast_takes_maps_in_half_and_leaves_the_weights_gradient_in_float32():
    maps, weight, grad = draw((3, 2), 4, 2, (5, 3), torch.float32, FORMATS)
    with torch.autocast("cpu", torch.float16):
        found = evaluate(on_triton, maps, weight, grad)
        eager = evaluate(reference.concat_conv1x1, maps, weight, grad)
    truth = evaluate(reference.concat_conv1x1, *draw((3, 2), 4, 2, (5, 3), torch.float64, FORMATS))
    assert [x.dtype for x in found] == [torch.float16] + [torch.float32] * 3
    compare(found, truth, eager)


def test_unlike_dtypes_are_refused():
    maps, weight, _ = draw((3, 2), 4, 2, (5, 3), torch.float16, FORMATS)
    with pytest.raises(TypeError, match=r"weight is torch.float32, features\[0\] torch.float16; convert one of them"):
        on_triton(maps, weight.float())
