"""The diversity operators through their Triton kernels: against the reference, recordings and the closed form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels import _dispatch, _triton
from fastfuse.kernels.diversity_target import closed_form, reference, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2

LAST = torch.channels_last
formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
modes = pytest.mark.parametrize("mode", ["published", "normalized"])
# The interpreter is slow: half precision, of which single cases are below, runs with the long tests.
dtypes = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16", marks=pytest.mark.long)],
)


def draw(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def run(x, y, backend, cotangent=1.0, **options):
    """The loss and the gradient of x; the target too where y has channels."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = functional.diversity_loss(x, y, backend=backend, **options)
    (loss * cotangent).sum().backward()
    assert y.grad is None
    mode = options.get("mode", "published")
    return [loss, x.grad, *([functional.diversity_target(y, mode=mode, backend=backend)] if y.dim() == 4 else [])]


def fits_budget(x, y, **options):
    ours, eager = (run(x, y, backend, **options) for backend in ("triton", "reference"))
    truth = run(x.double(), y.double(), "reference", **options)
    for name, a, t, e in zip(("loss", "gradient", "target"), ours, truth, eager, strict=False):
        assert_within_budget(a, t, e, what=name)
    return ours


CASES = [
    pytest.param((2, 5, 7, 7), (2, 3, 7, 7), {}, id="channels differ, 49 positions of a block of 64"),
    pytest.param((2, 4, 4, 8), (2, 4, 4, 8), {"mode": "normalized"}, id="no empty lanes; n = 1"),
    pytest.param((2, 70, 8, 8), (2, 3, 8, 8), {}, id="more channels than one tile"),
    pytest.param((1, 3, 5, 3), (1, 2, 5, 3), {"reduction": "sum"}, id="a batch of one, odd sides, summed"),
    pytest.param((3, 1, 1, 3), (3, 1, 1, 3), {"cotangent": -2.0}, id="three positions, the fewest: k = 1"),
    pytest.param((2, 4, 5), (2, 3, 4, 5), {}, id="x is a ready map"),
    pytest.param((2, 3, 4, 5), (2, 4, 5), {}, id="y is a ready map"),
    pytest.param(
        (2, 3, 6, 1), (2, 2, 6, 1), {"reduction": "none", "cotangent": torch.tensor([3.0, -1.0])}, id="one column"
    ),
]


@dtypes
@formats
@pytest.mark.parametrize(("x", "y", "options"), CASES)
def test_equals_the_reference(x, y, options, memory_format, dtype, nan_filled):
    fits_budget(draw(x, dtype, memory_format), draw(y, dtype, memory_format), **options)


def test_bfloat16_of_mixed_formats(nan_filled):
    x, y = draw((2, 5, 4, 3), torch.bfloat16), draw((2, 3, 4, 3), torch.bfloat16, torch.channels_last)
    fits_budget(x, y)


def test_maps_of_different_dtype(nan_filled):
    fits_budget(draw((2, 5, 4, 3), torch.float16), draw((2, 3, 4, 3)))


def test_the_largest_map(nan_filled):
    """1,024 positions: the kernel's sort at its full width."""
    y = draw((1, 2, 32, 32))
    truth, eager = functional.diversity_target(y.double()), functional.diversity_target(y)
    assert_within_budget(functional.diversity_target(y, backend="triton"), truth, eager)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, 1:, 1:-1], id="cropped: rows are not adjacent"),
        pytest.param(lambda x: x.transpose(2, 3), id="height and width swapped: dense, but no single stride"),
        pytest.param(lambda x: x[:, ::2], id="every second channel"),
    ],
)
def test_views(view, nan_filled):
    fits_budget(view(draw((2, 4, 5, 6))), view(draw((2, 6, 5, 6))))


@formats
def test_results_have_the_memory_format_of_their_map(memory_format):
    x, y = (draw((2, 3, 4, 5), memory_format=memory_format) for _ in range(2))
    _, gradient, target = run(x, y, "triton")
    assert gradient.is_contiguous(memory_format=memory_format) and target.is_contiguous(memory_format=memory_format)


@modes
def test_every_tie_at_the_threshold_gets_half(mode):
    """Four of nine positions share the third smallest value: their target is n / 2, the published sign(0) = 0."""
    attention = torch.tensor([1.0, 2, 3, 3, 3, 3, 4, 5, 6])
    y = torch.stack([attention.sqrt(), -attention.sqrt()]).view(1, 2, 3, 3)[:, :, :, [2, 0, 1]]
    norm = functional.attention_map(y).norm()
    n = norm if mode == "published" else torch.tensor(1.0)
    unit = functional.attention_map(y).flatten() / norm
    tied = functional.attention_map(y).flatten() == functional.attention_map(y).flatten().kthvalue(3).values
    assert tied.sum() == 4
    shift = functional.diversity_target(y, mode=mode, backend="triton") - y
    torch.testing.assert_close((shift[0, 0].flatten() * 2 / norm + unit)[tied], n.expand(4) / 2)
    fits_budget(draw((1, 2, 3, 3)), y, mode=mode)


@formats
def test_ties_of_features_survive_the_channel_sums(memory_format, nan_filled):
    """Equal columns of 37 channels give equal sums at every position, so the same ties as in exact arithmetic."""
    y = draw((2, 37, 4, 4))
    y[:, :, 1:3] = y[:, :, :1, :1] / 8
    y = y.contiguous(memory_format=memory_format)
    attention = functional.attention_map(y).flatten(1)
    assert ((attention == attention.kthvalue(5).values[:, None]).sum(1) == 8).all()
    fits_budget(draw((2, 3, 4, 4), memory_format=memory_format), y)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the mean of no sample: 0 / 0
@modes
def test_a_batch_of_none(mode):
    x, y = draw((0, 3, 4, 4)), draw((0, 2, 4, 4))
    for reduction in ("mean", "sum", "none"):
        ours, eager = (run(x, y, backend, mode=mode, reduction=reduction) for backend in ("triton", "reference"))
        for a, e in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


def test_a_map_of_zeros_gets_no_gradient():
    x, y = draw((2, 3, 4, 4)), draw((2, 3, 4, 4))
    x[0] = 0
    loss, gradient, _ = run(x, y, "triton")
    assert loss.isfinite() and (gradient[0] == 0).all() and (gradient[1] != 0).any()


@modes
def test_nan_is_not_hidden(mode):
    y = draw((2, 3, 4, 4))
    y[1, 0, 2, 2] = torch.nan
    losses = functional.diversity_loss(draw((2, 3, 4, 4)), y, mode=mode, reduction="none", backend="triton")
    assert losses.isnan().tolist() == [False, True]


EQUAL = [(2, 3, 3, 4), (2, 3, 3, 4), (2, 3, 3, 4)], [(2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4)]
DIFFERENT = [(2, 3, 3, 5), (1, 20, 2, 3), (3, 1, 4, 3)], [(2, 5, 3, 5), (1, 1, 2, 3), (3, 2, 4, 3)]
LISTS = [
    pytest.param(EQUAL, {}, id="equal shapes"),
    pytest.param(DIFFERENT, {"mode": "normalized"}, id="another batch, width and size each, a batch of one"),
    pytest.param(DIFFERENT, {"reduction": "sum"}, id="the same, summed", marks=pytest.mark.long),
    pytest.param(EQUAL, {"reduction": "none"}, id="a loss per sample", marks=pytest.mark.long),
]


def run_list(x, y, backend, **options):
    """Losses, shifted maps, gradients of those x that take one; each loss and sample has its own cotangent."""
    losses, shifted = functional.diversity(x, y, backend=backend, **options)
    cotangent = torch.linspace(-1, 2, losses.numel()).view(losses.shape).to(losses.dtype)
    return [losses, *shifted, *torch.autograd.grad(losses, [a for a in x if a.requires_grad], cotangent)]


def list_fits_budget(x, y, **options):
    ours, eager = (run_list(x, y, backend, **options) for backend in ("triton", "reference"))
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in x]
    truth = run_list(exact, [a.detach().double() for a in y], "reference", **options)
    for i, (a, t, e) in enumerate(zip(ours, truth, eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")


def launched(monkeypatch):
    """Names of the kernels that are launched from now on."""
    names = []
    for name in ("fwd_sample", "fwd_reduce", "bwd_map"):
        kernel = getattr(triton_kernels, f"diversity_target_{name}_kernel")
        monkeypatch.setattr(
            triton_kernels, kernel.__name__, Noted(kernel, lambda name=name: names.append(name)), raising=True
        )
    return names


class Noted:
    """A kernel whose launches are noted."""

    def __init__(self, kernel, note):
        self.kernel, self.note = kernel, note

    def __getitem__(self, grid):
        self.note()
        return self.kernel[grid]


@dtypes
@formats
@pytest.mark.parametrize(("shapes", "options"), LISTS)
def test_lists_take_one_launch_set(shapes, options, memory_format, dtype, monkeypatch, nan_filled):
    """The middle x needs no gradient, so none is computed: the launch covers two maps."""
    x, y = ([draw(shape, dtype, memory_format) for shape in side] for side in shapes)
    for i in (0, 2):
        x[i].requires_grad_()
    names = launched(monkeypatch)
    run_list(x, y, "triton", **options)
    reduced = ["fwd_reduce"] if options.get("reduction") != "none" else []
    assert names == ["fwd_sample", *reduced, "bwd_map"]
    list_fits_budget(x, y, **options)


@pytest.mark.parametrize("several", [False, True], ids=["one", "a list"])
def test_both_at_once_are_each_alone(several, monkeypatch):
    """The same bits, and the single form takes and gives tensors."""
    x, y = ([draw((2, c, 4, 3)) for _ in range(2)] for c in (3, 2))
    if not several:
        x, y = x[0], y[0]
    loss, shifted = functional.diversity(x, y, backend="triton")
    names = launched(monkeypatch)
    alone = functional.diversity_target(y, backend="triton")
    assert names == ["fwd_sample"], "no loss: nothing to add up"
    assert torch.equal(loss, functional.diversity_loss(x, y, backend="triton"))
    assert loss.shape == ((2,) if several else ()) and isinstance(shifted, list) == several
    for a, b in zip(shifted if several else [shifted], alone if several else [alone], strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_pairs_of_different_kinds_in_one_list(nan_filled):
    """Another dtype, or a ready map, takes launches of its own; the results stand in the order of the pairs."""
    x = [draw((2, 3, 3, 4)), draw((2, 3, 3, 4), torch.float16), draw((2, 3, 4)), draw((1, 2, 2, 5))]
    y = [draw((2, 2, 3, 4)), draw((2, 3, 3, 4), torch.float16), draw((2, 3, 3, 4)), draw((1, 3, 2, 5))]
    list_fits_budget([a.requires_grad_() for a in x], y)
    ready = [y[0], functional.attention_map(y[3])]
    assert_within_budget(
        functional.diversity_loss([x[0], x[3]], ready, backend="triton"),
        functional.diversity_loss([x[0].double(), x[3].double()], [a.double() for a in ready]),
        functional.diversity_loss([x[0], x[3]], ready),
    )
    targets = functional.diversity_target(y, backend="triton")
    assert [a.dtype for a in targets] == [a.dtype for a in y]
    for a, own in zip(targets, y, strict=True):
        assert_within_budget(a, functional.diversity_target(own.double()), functional.diversity_target(own))


def test_more_pairs_than_one_launch_takes(monkeypatch, nan_filled):
    monkeypatch.setattr("fastfuse.kernels.diversity_target.op.MAX_PAIRS", 2)
    x, y = ([draw((2, c, 2, 3)) for _ in range(5)] for c in (3, 2))
    list_fits_budget([a.requires_grad_() for a in x], y)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the mean of no sample: 0 / 0
def test_an_empty_batch_among_others(nan_filled):
    """The mean over nothing is not a number; the other pair has its loss and its gradient."""
    x, y = ([draw((b, 3, 3, 4)) for b in (0, 2)] for _ in range(2))
    ours, eager = (run_list([a.requires_grad_() for a in x], y, backend) for backend in ("triton", "reference"))
    assert ours[0].isnan().tolist() == [True, False]
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_gradients_that_nobody_asked_for_take_no_memory(monkeypatch):
    x, y = ([draw((2, 3, 3, 4)) for _ in range(3)] for _ in range(2))
    x[1].requires_grad_()
    losses, shifted = functional.diversity(x, y, backend="triton")
    assert losses.requires_grad and not any(a.requires_grad for a in shifted)
    written = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda a, **k: written.append(a) or empty_like(a, **k))
    losses.sum().backward()
    monkeypatch.undo()
    assert len(written) == 1 and x[1].grad.isfinite().all()


def test_more_samples_than_are_added_at_a_time(monkeypatch, nan_filled):
    monkeypatch.setattr("fastfuse.kernels.diversity_target.triton_kernels.REDUCE_BLOCK", 2)
    fits_budget(draw((5, 2, 2, 3)), draw((5, 2, 2, 3)))


FOLDER = Path(__file__).parents[1] / "golden"
RECORDED = [c for c in json.loads((FOLDER / "ops.json").read_text())["cases"] if c["kind"] == "feature"]


@pytest.mark.parametrize(
    "memory_format",
    [
        pytest.param(torch.contiguous_format, id="contiguous"),
        pytest.param(LAST, id="channels_last", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("case", RECORDED, ids=lambda c: f"recorded {c['shape']}{' with ties' if c['ties'] else ''}")
def test_equals_the_recording(case, memory_format, nan_filled):
    names = ("x", "y", "diversity_loss/loss", "diversity_loss/grad_x", "diversity_target")
    with np.load(FOLDER / "ops.npz") as file:
        x, y, *truth = (torch.from_numpy(file[f"{case['case']}/{name}"]) for name in names)
    x, y = (tensor.float().contiguous(memory_format=memory_format) for tensor in (x, y))
    for ours, recorded, eager in zip(run(x, y, "triton"), truth, run(x, y, "reference"), strict=True):
        assert_within_budget(ours, recorded, eager)


@pytest.mark.parametrize(("x", "y"), [((2, 3, 4, 5), (2, 2, 4, 5)), ((2, 4, 5), (2, 2, 4, 5))], ids=["maps", "ready"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@modes
def test_closed_form_is_the_derivative(x, y, reduction, mode):
    """Of a pair that is the second one in a list, the first being smaller in every way."""
    x, y = draw(x, torch.float64).requires_grad_(), draw(y, torch.float64)
    batch = 2 if reduction == "none" else 1
    smaller = [draw((batch, *([2] * (x.dim() - 3)), 3, 2), torch.float64), draw((batch, 1, 3, 2), torch.float64)]
    loss = reference.diversity_loss(x, y, mode, reduction)
    cotangent = torch.randn_like(torch.stack([loss, loss]))
    (truth,) = torch.autograd.grad(loss, x, cotangent[1])
    with torch.no_grad():
        ours, slope, shifted = closed_form.forward([smaller[0], x], [smaller[1], y], mode, reduction, True)
        (gradient,) = closed_form.backward(cotangent, slope, [x], [1], reduction)
    assert relative_l2(ours[1], loss) <= 1e-12 and relative_l2(gradient, truth) <= 1e-12
    assert relative_l2(ours[0], reference.diversity_loss(*smaller, mode, reduction)) <= 1e-12
    for found, own in zip(shifted, (smaller[1], y), strict=True):
        assert relative_l2(found, reference.diversity_target(own, mode)) <= 1e-12


@formats
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize(
    "shape", [pytest.param((2, 3, 3, 4), id="map"), pytest.param((2, 3, 4), id="ready map", marks=pytest.mark.long)]
)
def test_schemas(shape, interpreted, memory_format, monkeypatch):
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, y = draw(shape, memory_format=memory_format), draw((2, 2, *shape[-2:]), memory_format=memory_format)
    forward, backward = torch.ops.fastfuse.diversity_target_fwd, torch.ops.fastfuse.diversity_target_bwd
    torch.library.opcheck(forward, ([x, x.clone()], [y, y.clone()], "published", "none", True))
    torch.library.opcheck(forward, ([], [y], "normalized", "mean", True))
    losses, slope, shifted = forward([x, x], [y, y], "published", "mean", False)
    assert shifted == []
    torch.library.opcheck(backward, (losses, slope, [x], [1], "mean"))


@pytest.mark.parametrize(
    "memory_format",
    [
        pytest.param(torch.contiguous_format, id="contiguous", marks=pytest.mark.long),
        pytest.param(LAST, id="channels_last"),
    ],
)
def test_compiles_whole(memory_format):
    x, y = (draw((2, 3, 4, 5), memory_format=memory_format) for _ in range(2))
    x.requires_grad_()

    def both(x, y):
        loss, target = functional.diversity(x, y, backend="triton")
        return loss + functional.diversity_loss([x, 2 * x], [y, y], backend="triton").sum(), target

    eager, compiled = both(x, y), torch.compile(both, fullgraph=True, backend="aot_eager")(x, y)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()
    (a,), (b,) = (torch.autograd.grad(found[0], x) for found in (compiled, eager))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nothing_is_kept_where_no_gradient_is_needed():
    x, y = draw((2, 3, 4, 4)), draw((2, 3, 4, 4)).requires_grad_()
    assert functional.diversity_loss(x, y, backend="triton").grad_fn is None, "y is detached"
    assert functional.diversity_target(y, backend="triton").grad_fn is None


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.diversity_target(x, backend="triton"),
        lambda x: functional.diversity_loss(x, x, backend="triton"),
    ],
    ids=["target", "loss"],
)
def test_larger_maps_are_refused_with_the_reason(call):
    with pytest.raises(BackendUnavailableError, match="at most 1024 positions, this one has 1056"):
        call(torch.ones(1, 1, 33, 32))


def test_auto_takes_the_reference_for_larger_maps(monkeypatch):
    monkeypatch.setattr(_triton, "why_not", lambda tensor: None)
    monkeypatch.setattr(_dispatch, "_process_default", "auto")
    for height, backend in ((32, "triton"), (33, "reference")):
        x = torch.ones(1, 1, height, 32, device="meta")  # a CPU tensor takes the reference in any case
        assert _dispatch.resolve("diversity_target", "auto", x) == backend


def test_a_reference_map_in_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="float64"):
        functional.diversity_loss(draw((1, 2, 3, 3)), draw((1, 2, 3, 3), torch.float64), backend="triton")
