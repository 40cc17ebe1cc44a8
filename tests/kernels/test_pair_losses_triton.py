"""What the kernels of every loss of pairs of maps do alike: attention_mse, normalized_lp and its joint form.

In the interpreter where there is no GPU; the closed form that CPU tensors take is checked beside them.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels import _dispatch
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.pairs import (
    DEEP,
    DEVICE,
    HALF,
    LAST,
    REDUCTIONS,
    SINGLE,
    X,
    agree,
    each_loss,
    evaluate,
    launches,
    losses_of,
    maps,
    views,
)


@each_loss
@pytest.mark.parametrize("view", views())
def test_views(loss, view, nan_filled):
    agree(loss, [views()[view].requires_grad_(), *maps(loss.targets[0])])
    agree(loss, [*maps(loss.targets[0], formats=(LAST,)), views()[view].requires_grad_()])


@each_loss
def test_more_pairs_than_one_launch_takes(loss, monkeypatch, nan_filled):
    monkeypatch.setattr(loss.module, "MAX_PAIRS", 2)
    seen = launches(monkeypatch, loss)
    agree(loss, maps(X, DEEP, X, loss.targets[0], DEEP, loss.targets[0]))
    assert seen == [2, 1]


@each_loss
def test_a_single_pair_gives_no_list(loss):
    x, y = maps(X, loss.targets[0])
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (2,))):
        found = []
        for backend in ("triton", "reference"):
            losses = losses_of(loss.call(x, y, reduction=reduction, backend=backend))
            assert all(each.shape == shape for each in losses)
            found.append([*losses, *torch.autograd.grad(sum(each.sum() for each in losses), x)])
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager)


@each_loss
@pytest.mark.parametrize(
    ("shapes", "reduction"),
    [
        *[pytest.param([(0, 3, 5, 4)], reduction, id=f"no samples, {reduction}") for reduction in REDUCTIONS],
        pytest.param([X, (0, 3, 5, 4)], "sum", id="no samples in one pair of two"),
        pytest.param([(2, 3, 0, 4)], "none", id="no positions"),
        pytest.param([(2, 3, 0, 4), X], "mean", id="no positions in one pair of two"),
    ],
)
def test_nothing_to_add(loss, shapes, reduction, nan_filled):
    """No samples: nan, 0 or no losses, as eager has it; no positions: nan. Other pairs are not disturbed."""
    tensors = maps(*shapes, *shapes)
    ours, eager = (evaluate(loss, tensors, backend, reduction) for backend in ("triton", "reference"))
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@each_loss
def test_recorded_values(loss, golden):
    if not loss.recorded:
        pytest.skip("there are no recordings of p = 1")
    with np.load(golden / "ops.npz", allow_pickle=False) as file:
        ending = f"/{loss.recorded[0]}/loss"
        names = [key.removesuffix(ending) for key in file if key.endswith(ending)]
        assert len(names) == 5
        for name in names:
            x, y = (torch.from_numpy(file[f"{name}/{k}"]).to(DEVICE, SINGLE) for k in "xy")
            found = []
            for backend in ("triton", "reference"):
                leaf = x.clone().requires_grad_()
                losses = losses_of(loss.call(leaf, y, backend=backend))
                found.append([*losses, *torch.autograd.grad(sum(losses), leaf)])
            truth = [torch.from_numpy(file[f"{name}/{key}/loss"]) for key in loss.recorded]
            truth.append(sum(torch.from_numpy(file[f"{name}/{key}/grad_x"]) for key in loss.recorded))
            for a, t, e in zip(found[0], truth, found[1], strict=True):
                assert_within_budget(a, t.view(a.shape), e, what=name)


def closed_form(monkeypatch, loss):
    """CPU tensors, of any dtype, take the closed form from now on where kernels are asked for."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setitem(_dispatch._ops[loss.op], "triton", None)


@each_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_closed_form_equals_autograd(loss, reduction, monkeypatch):
    drawn = maps(*loss.inputs, *loss.targets, dtype=torch.float64, formats=(LAST,), gradient=False)
    tensors = [x.cpu().requires_grad_() for x in drawn]
    expected = evaluate(loss, tensors, "reference", reduction)
    closed_form(monkeypatch, loss)
    losses = losses_of(loss.call(tensors[:3], tensors[3:], reduction=reduction, backend="triton"))
    assert losses[0].grad_fn.name().startswith(("AttentionMse", "NormalizedLp"))
    for a, e in zip(evaluate(loss, tensors, "triton", reduction), expected, strict=True):
        assert relative_l2(a, e) <= 1e-12


class Calls(TorchDispatchMode):
    """Calls of our operators, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "fastfuse":
            self.seen.append((function, arguments))
        return function(*arguments, **(options or {}))


@each_loss
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernels", "closed form"])
@pytest.mark.parametrize(
    ("formats", "reduction"),
    [
        pytest.param((), "mean", id="contiguous"),
        pytest.param((LAST,) * 6, "none", id="channels-last"),
        pytest.param((LAST,), "sum", id="mixed"),
    ],
)
def test_schemas(loss, formats, interpreted, reduction, monkeypatch):
    """Shapes, dtypes and strides of the fakes are those of the real outputs, forward and backward."""
    tensors = maps(*loss.inputs, *loss.targets, dtype=HALF, formats=formats)
    tensors[1].requires_grad_(False)
    if not interpreted:
        tensors = [x.detach().cpu().requires_grad_(x.requires_grad) for x in tensors]
        closed_form(monkeypatch, loss)
    with Calls() as calls:
        evaluate(loss, tensors, "triton", reduction)
    assert [function.__name__.rpartition("_")[2] for function, _ in calls.seen] == ["fwd.default", "bwd.default"]
    for function, arguments in calls.seen:
        with torch.no_grad():
            torch.library.opcheck(function, arguments)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(loss, reduction):
    torch.compiler.reset()
    tensors = maps(X, DEEP, loss.targets[0], DEEP, formats=(LAST,))
    tensors[3].requires_grad_(False)
    compiled = torch.compile(loss.call, fullgraph=True, backend="aot_eager")
    found, eager = (evaluate(loss, tensors, "triton", reduction, call) for call in (compiled, loss.call))
    for a, e in zip(found, eager, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


WANTED = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0)]


@each_loss
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_only_wanted_gradients(loss, wanted, nan_filled, monkeypatch):
    """Memory is taken for the gradients that are asked for, and only the maps that they need are kept."""
    tensors = maps(X, DEEP, loss.targets[0], DEEP)
    for x, asked in zip(tensors, wanted, strict=True):
        x.requires_grad_(bool(asked))
    written = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: written.append(x) or empty_like(x, **k))
    found = evaluate(loss, tensors, "triton")
    assert len(written) == sum(wanted)
    monkeypatch.undo()
    for a, e in zip(found, evaluate(loss, tensors, "reference"), strict=True):
        torch.testing.assert_close(a, e)
    losses = losses_of(loss.call(tensors[:2], tensors[2:], backend="triton"))
    if any(wanted):
        assert len(losses[0].grad_fn.saved_tensors) == loss.saved(wanted)
    else:
        assert not losses[0].requires_grad


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expanded_cotangents(loss, reduction):
    """The sum over pairs sends every pair the same number, at stride 0."""
    tensors = maps(X, DEEP, loss.targets[0], DEEP)
    found = []
    for backend in ("triton", "reference"):
        losses = losses_of(loss.call(tensors[:2], tensors[2:], reduction=reduction, backend=backend))
        found.append(torch.autograd.grad([each.sum() for each in losses], tensors))
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


@each_loss
def test_same_bits_every_time(loss):
    tensors = maps((2, 7, 23, 29), (2, 7, 23, 29))
    first, second = (evaluate(loss, tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_loss
@pytest.mark.parametrize("which", range(4), ids=["first input", "second input", "first target", "second target"])
def test_float64_is_refused_wherever_it_stands(loss, which):
    tensors = maps(X, DEEP, loss.targets[0], DEEP)
    tensors[which] = tensors[which].double()
    with pytest.raises(BackendUnavailableError, match=rf"{loss.op} cannot run on backend 'triton': .*torch\.float64"):
        loss.call(tensors[:2], tensors[2:], backend="triton")
    assert all(each.dtype == torch.float64 for each in losses_of(loss.call(tensors[:2], tensors[2:])))
