"""The kernels of normalized_lp, in the interpreter where there is no GPU, and the closed form that CPU tensors take."""

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels.normalized_lp import closed_form, layout, op, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
X, ROWS, DEEP = (2, 3, 5, 4), (2, 7), (2, 9, 3, 3)
REDUCTIONS = ["mean", "sum", "none"]
each_p = pytest.mark.parametrize("p", [2, 1])


def maps(*shapes, dtype=SINGLE, formats=(), gradient=True):
    """Random tensors; formats[i] is that of map i, contiguous if there is none."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        last = i < len(formats) and formats[i] == LAST and len(shape) == 4
        found.append((x.contiguous(memory_format=LAST) if last else x).requires_grad_(gradient))
    return found


def evaluate(tensors, backend, p=2, reduction="mean", call=functional.normalized_lp):
    """Losses of pairs (first half: inputs, second half: targets) and gradients of those tensors that take one."""
    pairs = len(tensors) // 2
    losses = call(tensors[:pairs], tensors[pairs:], p=p, reduction=reduction, backend=backend)
    cotangent = torch.linspace(0.5, 2, losses.numel(), device=DEVICE).view(losses.shape).to(losses)
    wanted = [x for x in tensors if x.requires_grad]
    return [losses, *(torch.autograd.grad(losses, wanted, cotangent) if wanted else ())]


def agree(tensors, p=2, reduction="mean"):
    """Kernels and reference on the same tensors, within the error budget."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    ours, eager = (evaluate(tensors, backend, p, reduction) for backend in ("triton", "reference"))
    for i, (a, t, e) in enumerate(zip(ours, evaluate(exact, "reference", p, reduction), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return ours


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
    gradients = agree(tensors, p, reduction)[1:]
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in tensors]


@each_p
@pytest.mark.parametrize("formats", [(LAST,) * 4, (LAST,)], ids=["flat", "mixed"])
def test_many_tiles(p, formats, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE", 16)
    monkeypatch.setattr(triton_kernels, "COMBINE_BLOCK", 2)
    monkeypatch.setattr(triton_kernels, "REDUCE_BLOCK", 2)
    agree(maps((3, 3, 5, 4), (3, 5, 3, 3), (3, 3, 5, 4), (3, 5, 3, 3), formats=formats), p)


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    wide = maps((2, 8, 5, 4), gradient=False)[0]
    return {
        "a student's channels in a stack of students": wide[:, 3:6],
        "the same, channels-last": wide.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": maps((2, 3, 8, 4), gradient=False)[0][:, :, 1:6],
        "cropped across: neither": maps((2, 3, 5, 8), gradient=False)[0][..., 1:5],
        "height and width swapped": maps((2, 3, 4, 5), gradient=False)[0].transpose(2, 3),
        "every other sample": maps((4, 3, 5, 4), gradient=False)[0][::2],
        "one sample for all": maps((1, 3, 5, 4), gradient=False)[0].expand(2, 3, 5, 4),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


@pytest.mark.parametrize("view", views())
def test_views(view, nan_filled):
    agree([views()[view].requires_grad_(), *maps(X)])
    agree([*maps(X, formats=(LAST,)), views()[view].requires_grad_()], p=1)


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
    agree([x.clone(memory_format=torch.preserve_format).requires_grad_(), y.requires_grad_()])
    agree([y, x.requires_grad_()], p=1)


def test_only_views_without_a_common_stride_are_copied():
    for name, x in views().items():
        copied = layout.addressable(x) is not x
        assert copied == (name in ("cropped across: neither", "height and width swapped"))
    x = maps(X, formats=(LAST,))[0]
    assert layout.addressable(x) is x and layout.gradient_like(x).stride() == x.stride()


def launches(monkeypatch):
    """Numbers of pairs of the calls of the forward launcher from now on."""
    seen = []
    forward = triton_kernels.forward
    monkeypatch.setattr(triton_kernels, "forward", lambda *a: seen.append(len(a[0])) or forward(*a))
    return seen


def test_pairs_of_one_kind_share_a_launch(monkeypatch, nan_filled):
    seen = launches(monkeypatch)
    (a, b), (x, y, z) = maps(X, X, dtype=HALF), maps(X, X, X)
    agree([a, x, b, y], reduction="none")
    assert seen == [1, 1], "half against half, float32 against float32"
    agree([a, b, y, z])
    assert seen == [1, 1, 2], "half against float32, twice"
    monkeypatch.setattr(op, "MAX_PAIRS", 2)
    agree([x, y, z, y, z, x])
    assert seen == [1, 1, 2, 2, 1], "more pairs than one launch takes"


@each_p
def test_a_single_pair_gives_no_list(p):
    x, y = maps(X, X)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (2,))):
        ours, eager = (
            functional.normalized_lp(x, y, p=p, reduction=reduction, backend=b) for b in ("triton", "reference")
        )
        assert ours.shape == shape
        torch.testing.assert_close(ours, eager)
        (own,), (other,) = (torch.autograd.grad(loss.sum(), x) for loss in (ours, eager))
        torch.testing.assert_close(own, other)


@each_p
@pytest.mark.parametrize(
    ("shapes", "reduction"),
    [
        *[pytest.param([(0, 3, 5, 4)], reduction, id=f"no samples, {reduction}") for reduction in REDUCTIONS],
        pytest.param([X, (0, 7)], "sum", id="no samples in one pair of two"),
        pytest.param([(2, 0)], "none", id="no elements"),
        pytest.param([(2, 0), (2, 7)], "sum", id="no elements in one pair of two"),
    ],
)
def test_nothing_to_add(shapes, reduction, p, nan_filled):
    """No samples: nan, 0 or no losses, as eager has it; no elements: nan. Other pairs are not disturbed."""
    tensors = maps(*shapes, *shapes)
    ours, eager = (evaluate(tensors, backend, p, reduction) for backend in ("triton", "reference"))
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def nearly_equal():
    """x and a y that is a multiple of it but for the least bit: 1 - cos between 1e-10 and 1e-3."""
    x = maps((2, 4, 40, 40), gradient=False)[0]
    channels = torch.tensor([1.0, 0.0, 3.0, 1e-3], device=DEVICE)[:, None, None]
    ramp = torch.linspace(0.98, 1.02, 40, device=DEVICE)[:, None]
    noise = torch.randn_like(x)
    return {
        "noise, 1e-2, scales 3 apart": (x, 3 * x + 1e-2 * noise),
        "noise, 1e-4, scales 1e-5 apart": (x, 1e-5 * (x + 1e-4 * noise)),
        "tiles of different scale": (x, x * ramp),
        "a dead channel and one of small values": (x * channels, 2 * x * channels + 1e-2 * noise * channels),
        "a channel that is dead in one map only": (x, x * (channels > 0)),
    }


@each_p
@pytest.mark.parametrize("name", nearly_equal())
def test_maps_that_nearly_agree(name, p, nan_filled):
    """Where 2 - 2 cos keeps few digits in float32, or none. The tiles (two to a sample) have ratios of their own."""
    agree([x.requires_grad_() for x in nearly_equal()[name]], p, "none")


@each_p
def test_equal_directions_have_no_distance(p):
    """Exactly 0, and no gradient of |e| from elements that rounding made differ."""
    x = maps(X)[0]
    for scale in (1, 2):
        losses, *gradients = evaluate([x, (scale * x.detach()).requires_grad_()], "triton", p)
        assert losses.item() == 0
        assert not any(g.any() for g in gradients)


@each_p
def test_one_element(p):
    """Its direction is its sign: distances 0 and 2^p, and nothing but rounding to move along."""
    x, y = torch.tensor([[0.3], [-2.0]], device=DEVICE), torch.tensor([[0.7], [1.1]], device=DEVICE)
    losses, *gradients = evaluate([x.requires_grad_(), y.requires_grad_()], "triton", p, "none")
    torch.testing.assert_close(losses, torch.tensor([[0.0, 2.0**p]], device=DEVICE))
    assert all(g.abs().max() < 1e-5 for g in gradients)


@each_p
@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)], ids=["input", "target", "both"])
def test_zero_maps(zeros, p, nan_filled):
    """Losses are eager's; a zero map gets no gradient, where eager gives the other's direction times 1e12."""
    tensors = [torch.zeros_like(x) if i in zeros else x.detach() for i, x in enumerate(maps(X, X))]
    tensors = [x.requires_grad_() for x in tensors]
    ours, eager = (evaluate(tensors, backend, p, "none") for backend in ("triton", "reference"))
    torch.testing.assert_close(ours[0], eager[0])
    for i in range(2):
        expected = torch.zeros_like(tensors[i]) if i in zeros else eager[1 + i]
        torch.testing.assert_close(ours[1 + i], expected, atol=1e-8, rtol=1e-5)
        assert i not in zeros or not ours[1 + i].any()


def test_recorded_values(golden):
    with np.load(golden / "ops.npz", allow_pickle=False) as file:
        names = [key.removesuffix("/feature_mse/loss") for key in file if key.endswith("feature_mse/loss")]
        assert len(names) == 5
        for name in names:
            x, y = (torch.from_numpy(file[f"{name}/{k}"]).to(DEVICE, SINGLE) for k in "xy")
            found = []
            for backend in ("triton", "reference"):
                leaf = x.clone().requires_grad_()
                loss = functional.normalized_lp(leaf, y, backend=backend)
                found.append([loss, *torch.autograd.grad(loss, leaf)])
            truth = [torch.from_numpy(file[f"{name}/feature_mse/{k}"]) for k in ("loss", "grad_x")]
            for a, t, e in zip(found[0], truth, found[1], strict=True):
                assert_within_budget(a, t.view(a.shape), e, what=name)


@each_p
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_closed_form_equals_autograd(reduction, p):
    tensors = maps(X, ROWS, DEEP, X, ROWS, DEEP, dtype=torch.float64, formats=(LAST,))
    expected = evaluate(tensors, "reference", p, reduction)
    plain = [x.detach() for x in tensors]
    losses, stats = closed_form.forward(plain[:3], plain[3:], p, reduction)
    cotangent = torch.linspace(0.5, 2, losses.numel(), device=DEVICE).view(losses.shape).to(losses)
    gradients = closed_form.backward(cotangent, stats, plain[:3], plain[3:], [0, 1, 2], [True] * 6, p, reduction)
    for a, e in zip([losses, *gradients], expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [(), (LAST,) * 4, (LAST,)], ids=["contiguous", "channels_last", "mixed"])
def test_schemas(formats, interpreted, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    ops = torch.ops.fastfuse
    tensors = maps(X, DEEP, X, DEEP, dtype=HALF, formats=formats, gradient=False)
    torch.library.opcheck(ops.normalized_lp_fwd.default, (tensors[:2], tensors[2:], 2, "mean"))
    arguments = (tensors[:2], tensors[2:], 1, "none")
    torch.library.opcheck(ops.normalized_lp_fwd.default, arguments)
    losses, stats = ops.normalized_lp_fwd(*arguments)
    arguments = (torch.ones_like(losses), stats, tensors[:2], tensors[2:], [0, 1], [True, False, True, True], 1, "none")
    torch.library.opcheck(ops.normalized_lp_bwd.default, arguments)


@pytest.mark.parametrize(("p", "reduction"), [(2, "mean"), (1, "none")])
def test_compiles_in_one_graph(p, reduction):
    torch.compiler.reset()
    tensors = maps(X, DEEP, X, DEEP, formats=(LAST,))
    tensors[3].requires_grad_(False)
    compiled = torch.compile(functional.normalized_lp, fullgraph=True, backend="aot_eager")
    found, eager = (evaluate(tensors, "triton", p, reduction, call) for call in (compiled, functional.normalized_lp))
    for a, e in zip(found, eager, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (0, 0, 0, 0)], ids=str)
def test_only_wanted_gradients(wanted, nan_filled, monkeypatch):
    """Memory is taken for the gradients that are asked for, and only the pairs that they need are kept."""
    tensors = maps(X, DEEP, X, DEEP)
    for x, asked in zip(tensors, wanted, strict=True):
        x.requires_grad_(bool(asked))
    written = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: written.append(x) or empty_like(x, **k))
    found = evaluate(tensors, "triton")
    assert len(written) == sum(wanted)
    monkeypatch.undo()
    for a, e in zip(found, evaluate(tensors, "reference"), strict=True):
        torch.testing.assert_close(a, e)
    losses = functional.normalized_lp(tensors[:2], tensors[2:], backend="triton")
    if any(wanted):
        assert len(losses.grad_fn.saved_tensors) == 1 + 2 * sum(wanted)


def test_expanded_cotangents():
    """The sum over pairs sends every pair the same number, at stride 0."""
    tensors = maps(X, DEEP, X, DEEP)
    for reduction in ("mean", "none"):
        ours, eager = (
            torch.autograd.grad(
                functional.normalized_lp(tensors[:2], tensors[2:], reduction=reduction, backend=backend).sum(), tensors
            )
            for backend in ("triton", "reference")
        )
        for a, e in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, e)


@each_p
def test_same_bits_every_time(p):
    tensors = maps((3, 7, 23, 29), (3, 7, 23, 29))
    first, second = (evaluate(tensors, "triton", p) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    x, y = maps(X, X)
    (slope,) = torch.autograd.grad(functional.normalized_lp(x, y, backend="triton").square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("which", range(4), ids=["first input", "second input", "first target", "second target"])
def test_float64_is_refused_wherever_it_stands(which):
    tensors = maps(X, DEEP, X, DEEP)
    tensors[which] = tensors[which].double()
    with pytest.raises(
        BackendUnavailableError, match=r"normalized_lp cannot run on backend 'triton': .*torch\.float64"
    ):
        functional.normalized_lp(tensors[:2], tensors[2:], backend="triton")
    assert functional.normalized_lp(tensors[:2], tensors[2:]).dtype == torch.float64
