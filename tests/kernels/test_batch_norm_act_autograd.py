"""What batch_norm_act saves for its backward, its closed form, and how it is traced and compiled."""

import pytest
import torch

from fastfuse import functional
from fastfuse.kernels.batch_norm_act import closed_form
from fastfuse.testing import relative_l2
from tests.kernels.batch_norm_cases import ENDINGS, LAST, MODES, draw, evaluate
from tests.kernels.op_cases import FORMATS


def saved_maps(**options):
    x, residual, norm = draw((2, 4, 3, 5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        given = {"residual": residual} | options
        found = functional.batch_norm_act(x, functional.BatchNorm(*norm, True), backend="triton", **given)
    maps = {x.data_ptr(): "x", found.out.data_ptr(): "out", residual.data_ptr(): "residual"}
    return sorted(maps[p] for p in kept if p in maps)


def test_nothing_as_large_as_a_map_is_saved_besides_x_and_the_result():
    assert saved_maps() == ["out", "x"]
    assert saved_maps(relu=False, attention_groups=2) == ["out", "x"]
    assert saved_maps(relu=False) == ["x"]
    assert saved_maps(residual=None) == ["x"]


def test_backward_on_running_statistics_does_not_see_a_later_update():
    x, residual, norm = draw((2, 3, 2, 2))
    gradients = []
    for updated in (False, True):
        found = functional.batch_norm_act(x, functional.BatchNorm(*norm, False), residual=residual, backend="triton")
        if updated:
            functional.batch_norm_act(x, functional.BatchNorm(*norm, True), backend="triton")
        gradients.append(torch.autograd.grad(found.out.sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_closed_form_equals_autograd(ending, training, memory_format):
    options = {"residual": True, "relu": True, "attention_groups": None} | ending
    x, residual, norm = draw((2, 4, 3, 5), torch.float64, [memory_format] * 2, options.pop("residual"))
    mine = [t.detach().clone() for t in norm]
    found = functional.batch_norm_act(x, functional.BatchNorm(*norm, training), residual=residual, **options)
    outputs = [y for y in found if y is not None]
    cotangents = [torch.randn_like(y) for y in outputs]
    leaves = [t for t in (x, residual, *norm[:2]) if t is not None]
    truth = torch.autograd.grad(outputs, leaves, cotangents)
    used = (None, None, *mine[2:]) if training else (*mine[2:], None, None)
    x, residual = x.detach(), None if residual is None else residual.detach()
    relu, groups = options["relu"], options["attention_groups"] or 0
    out, attention, statistics = closed_form.forward(x, residual, *mine[:2], *used, 0.1, 1e-5, relu, groups)
    assert out.stride() == found.out.stride()
    given = [out, *([attention] if groups else []), *mine[2:]]
    for ours, expected in zip(given, [*outputs, *norm[2:]], strict=True):
        assert relative_l2(ours, expected) <= 1e-12
    needed = [True, residual is not None, True, True]
    rest = statistics, training, relu, needed
    cotangents = (*cotangents, None)[:2]
    for known in {True, residual is not None}:
        gradients = closed_form.backward(*cotangents, x, out if known else None, *mine[:2], *rest)
        for ours, expected in zip(gradients, truth, strict=True):
            assert relative_l2(ours, expected) <= 1e-12


@pytest.mark.parametrize(
    ("training", "interpreter"),
    [
        pytest.param(True, "1", id="kernels"),
        pytest.param(True, "0", id="closed form"),
        pytest.param(False, "0", id="eval"),
    ],
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_schemas_hold(training, memory_format, interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    x, residual, norm = draw((2, 4, 2, 2), torch.float32, [memory_format] * 2)
    x, residual, *norm = (t.detach() for t in (x, residual, *norm))
    used = (None, None, *norm[2:]) if training else (*norm[2:], None, None)
    arguments = (x, residual, *norm[:2], *used, 0.1, 1e-5, True, 2)
    forward, backward = torch.ops.fastfuse.batch_norm_act_fwd, torch.ops.fastfuse.batch_norm_act_bwd
    # The kernels need not be traced in all ways: what opcheck compiles is the schema and its fake.
    checks = {"test_utils": ("test_schema", "test_faketensor")} if interpreter == "1" else {}
    torch.library.opcheck(forward.default, arguments, **checks)
    out, attention, statistics = forward(*arguments)
    for needed in ([True] * 4, [False, True, False, True])[: 1 if interpreter == "1" else 2]:
        given = (
            torch.randn_like(out),
            torch.randn_like(attention),
            x,
            out,
            *norm[:2],
            statistics,
            training,
            True,
            needed,
        )
        torch.library.opcheck(backward.default, given, **checks)
        assert len(backward(*given)) == sum(needed)


def test_compiled_equals_eager():
    """The running statistics change inside the graph too."""
    torch.compiler.reset()

    def run(function):
        x, residual, norm = draw((2, 4, 3, 2), torch.float32, [LAST] * 2)
        found = function(x, residual, norm)
        total = sum(y.square().sum() for y in found)
        return [*found, *torch.autograd.grad(total, [x, residual, *norm[:2]]), *norm[2:]]

    def call(x, residual, norm):
        bn = functional.BatchNorm(*norm, True)
        first = functional.batch_norm_act(x, bn, backend="triton").out
        return functional.batch_norm_act(
            first, bn._replace(training=False), residual=residual, attention_groups=2, backend="triton"
        )

    for ours, expected in zip(run(torch.compile(call, fullgraph=True, backend="aot_eager")), run(call), strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()


def test_autocast_changes_nothing():
    """As of torch's own batch norm: half-precision maps come from the convolutions before it."""
    runs = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            runs.append(evaluate("triton", *draw((2, 4, 3, 5)), True, attention_groups=2))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
