"""aggregate_distance's kernels, in the interpreter where there is no GPU, and the closed form that CPU tensors take."""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels.aggregate_distance import closed_form, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
X = (2, 3, 5, 4)
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)]


def tensors(count, shape=X, dtype=torch.float64, formats=(), weights=torch.float32):
    """Weights, target and maps that take gradients; formats[i] is that of the target (0) or of map i - 1."""
    generator = torch.Generator().manual_seed(5)
    shares = torch.rand(count, generator=generator, dtype=torch.float64).softmax(0).to(DEVICE, weights)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(count + 1)]
    formats = (*formats, *[torch.contiguous_format] * (count + 1 - len(formats)))
    found = [x.contiguous(memory_format=f) for x, f in zip(found, formats, strict=True)]
    return [x.requires_grad_() for x in (shares, *found)]


def evaluate(given, backend, reduction="mean", call=functional.aggregate_distance, cotangent=0.75):
    """Distance and the gradients that are required."""
    weights, target, *maps = given
    distance = call(maps, weights, target, reduction=reduction, backend=backend)
    wanted = [x for x in given if x.requires_grad]
    return [distance, *torch.autograd.grad(distance, wanted, torch.full_like(distance, cotangent))]


def agree(given, reduction="mean"):
    """Kernel and reference on the same tensors, within the error budget."""
    ours, eager = (evaluate(given, backend, reduction) for backend in ("triton", "reference"))
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    for i, (a, t, e) in enumerate(zip(ours, evaluate(exact, "reference", reduction), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "shape", "formats"),
    [
        pytest.param(1, X, (), id="one map: the ordinary feature distance, scaled"),
        pytest.param(3, X, (LAST,) * 4, id="three maps, all channels-last: a flat walk"),
        pytest.param(2, X, (LAST,), id="target channels-last, maps not: tiles"),
        pytest.param(2, X, (torch.contiguous_format, LAST, LAST), id="maps channels-last, target not"),
        pytest.param(5, (1, 1, 1, 1), (), id="a single element; more maps, so a smaller tile"),
        pytest.param(2, (3, 7, 41, 5), (), id="more elements than one tile"),
        pytest.param(2, (2, 1, 9, 7), (LAST,), id="one channel: both formats are one"),
    ],
)
def test_equals_the_reference(count, shape, formats, dtype, nan_filled):
    given = tensors(count, shape, dtype, formats)
    gradients = agree(given)[1:]
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in given]
    agree(given, "sum")


def test_the_most_maps(nan_filled):
    agree(tensors(24, (1, 2, 3, 3), torch.float32))


def test_blocks_that_come_to_several_tiles(monkeypatch, nan_filled):
    """Nine tiles on four blocks, and more partial sums than the last kernel takes at once."""
    monkeypatch.setattr(triton_kernels, "TILES", ((24, 16),))
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 4)
    monkeypatch.setattr(triton_kernels, "FINISH_BLOCK", 2)
    agree(tensors(2, (1, 3, 9, 5), torch.float32))
    agree(tensors(2, (3, 3, 5, 3), torch.float32, (LAST,)))


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    channels, high, swapped, samples, one = (
        tensors(1, shape, torch.float32)[1].detach()
        for shape in ((2, 8, 5, 4), (2, 3, 8, 4), (2, 3, 4, 5), (4, 3, 5, 4), (1, 3, 5, 4))
    )
    return {
        "a network's channels in a stack of networks": channels[:, 3:6],
        "the same, channels-last": channels.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": high[:, :, 1:6],
        "height and width swapped": swapped.transpose(2, 3),
        "every other sample": samples[::2],
        "one sample for all": one.expand(X),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


@pytest.mark.parametrize("view", views())
def test_views(view, nan_filled):
    weights, target, first, second = tensors(2, dtype=torch.float32)
    own = views()[view].requires_grad_()
    agree([weights, target, first, own])
    agree([weights, own, first, second])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_a_view(dtype, nan_filled):
    """Strided, and one number for all maps; a gradient in the weights' own dtype."""
    weights, *others = tensors(6, dtype=torch.float32, weights=dtype)
    assert evaluate([weights.detach()[::2].requires_grad_(), *others[:4]], "triton")[1].dtype == dtype
    agree([weights.detach()[::2].requires_grad_(), *others[:4]])
    agree([weights.detach()[:1].expand(3).requires_grad_(), *others[:4]])


def test_dtypes_mixed(nan_filled):
    half, single = tensors(2, dtype=torch.float16), tensors(2, dtype=torch.float32)
    agree([half[0], half[1], single[2], half[3]])
    agree([half[0], single[1], half[2], half[3]])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batch(reduction, nan_filled):
    """The mean over nothing is not a number; no element has a gradient, and the weights' is zero."""
    given = tensors(2, (0, 3, 4, 4), torch.float32)
    ours, eager = (evaluate(given, backend, reduction) for backend in ("triton", "reference"))
    assert ours[0].isnan() if reduction == "mean" else ours[0] == 0
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
    assert ours[1].tolist() == [0, 0]


def test_a_stack_of_maps():
    stack, (weights, target) = torch.randn(3, *X, device=DEVICE), tensors(3, dtype=torch.float32)[:2]
    for a, e in zip(*(evaluate([weights, target, *stack], b) for b in ("triton", "reference")), strict=True):
        torch.testing.assert_close(a, e)
    ours, listed = (functional.aggregate_distance(m, weights, target, backend="triton") for m in (stack, list(stack)))
    assert torch.equal(ours, listed)


def nearly_met(count=4, noise=1e-3):
    """Maps of a common part, and a target that their sum meets but for a little noise."""
    weights, target, *maps = (x.detach() for x in tensors(count, (2, 4, 9, 7), torch.float32))
    with torch.no_grad():
        aggregate = sum(w * x for w, x in zip(weights, maps, strict=True))
        target = aggregate + noise * target
    return [x.requires_grad_() for x in (weights, target, *maps)]


def gram_form(given):
    """Distance and weights' gradient from exact products of the maps and the target, each rounded once."""
    weights, target, *maps = (x.detach().flatten() for x in given)
    rows = torch.stack([*maps, target]).double()
    products = (rows @ rows.T).float()
    gram, dots, square = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    distance = weights @ gram @ weights - 2 * dots @ weights + square
    return distance / len(target), 2 * (gram @ weights - dots) / len(target)


def test_a_small_residual_keeps_its_digits():
    """The squares of the residual and its products with the maps do; the Gram form does not, however it is summed."""
    given = nearly_met()
    agree(given)
    eager = evaluate(given, "reference", cotangent=1.0)
    truth = evaluate([x.detach().double().requires_grad_() for x in given], "reference", cotangent=1.0)
    for gram, true, own in zip(gram_form(given), truth, eager, strict=False):
        with pytest.raises(AssertionError, match="relative error"):
            assert_within_budget(gram, true, own)


def test_one_hot_weights_give_the_ordinary_distance():
    """DFA's special case: the last map alone."""
    _, target, *maps = tensors(3, dtype=torch.float32)
    last = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)
    found, expected = (
        functional.aggregate_distance(maps, last, target, backend="triton"),
        functional.feature_mse(maps[-1:], target, backend="reference"),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("count", [1, 3])
def test_closed_form_equals_autograd(count, reduction):
    given = tensors(count, formats=(LAST,), weights=torch.float64)
    expected = evaluate(given, "reference", reduction)
    weights, target, *maps = (x.detach() for x in given)
    cotangent = torch.tensor(0.75, dtype=torch.float64, device=DEVICE)
    distance, dots = closed_form.forward(maps, weights, target, True, reduction)
    found = closed_form.backward(cotangent, maps, weights, target, dots, [True] * len(given), reduction)
    for a, e in zip([distance, *found], expected, strict=True):
        assert relative_l2(a, e) <= 1e-12
    assert closed_form.forward(maps, weights, target, False, reduction)[1].numel() == 0


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 3, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_schemas(formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    weights, target, *maps = (x.detach() for x in tensors(2, dtype=torch.float16, formats=formats))
    ops = torch.ops.fastfuse
    for dots in (True, False):
        torch.library.opcheck(ops.aggregate_distance_fwd.default, (maps, weights, target, dots, "mean"))
    _, dots = ops.aggregate_distance_fwd(maps, weights, target, True, "mean")
    gradient = torch.ones((), device=DEVICE)
    for wanted in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        torch.library.opcheck(
            ops.aggregate_distance_bwd.default, (gradient, maps, weights, target, dots, wanted, "mean")
        )


def test_compiles_in_one_graph():
    torch.compiler.reset()
    given = tensors(2, dtype=torch.float32, formats=(LAST,))
    compiled = torch.compile(functional.aggregate_distance, fullgraph=True, backend="aot_eager")
    found, eager = (evaluate(given, "triton", call=call) for call in (compiled, functional.aggregate_distance))
    for a, e in zip(found, eager, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1), (1, 1, 0, 0), (1, 0, 1, 0)], ids=str)
def test_only_wanted_gradients(wanted, nan_filled, monkeypatch):
    given = tensors(2, dtype=torch.float32)
    for x, asked in zip(given, wanted, strict=True):
        x.requires_grad_(bool(asked))
    written, dots = [], []
    empty_like = torch.empty_like
    forward = triton_kernels.forward
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: written.append(x) or empty_like(x, **k))
    monkeypatch.setattr(triton_kernels, "forward", lambda *a: dots.append(a[3]) or forward(*a))
    found = evaluate(given, "triton")
    monkeypatch.undo()
    assert len(written) == sum(wanted), "memory for gradients that nobody asked for"
    assert dots == [bool(wanted[0])], "products with the maps are for the weights' gradient alone"
    for a, e in zip(found, evaluate(given, "reference"), strict=True):
        torch.testing.assert_close(a, e)


def test_same_bits_every_time():
    given = tensors(3, (3, 7, 41, 5), torch.float32)
    first, second = (evaluate(given, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("which", [0, 1, 3], ids=["weights", "target", "second map"])
def test_float64_is_refused_wherever_it_stands(which):
    given = tensors(2, dtype=torch.float32)
    given[which] = given[which].double()
    with pytest.raises(BackendUnavailableError, match=r"aggregate_distance cannot run on backend 'triton': .*float64"):
        functional.aggregate_distance(given[2:], given[0], given[1], backend="triton")
    assert functional.aggregate_distance(given[2:], given[0], given[1]).isfinite()


def test_the_sum_is_never_written(monkeypatch):
    """No memory of a map's size is asked for in the forward pass, and in the backward pass only for gradients."""
    given = tensors(2, (2, 8, 32, 32), torch.float32)
    asked = []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: asked.append(make(*a, **k)) or asked[-1])
    given[2].requires_grad_(False)
    evaluate(given, "triton")
    large = [x for x in asked if x.numel() >= given[1].numel()]
    assert len(large) == 2, "the target's gradient and the second map's"
