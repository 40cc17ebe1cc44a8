"""The Triton kernels of deep_to_shallow against its reference: values, statistics, gradients, layouts, schemas."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels.deep_to_shallow import closed_form, triton_kernels
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.op_cases import FORMATS

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long

LAST = torch.channels_last
# shape of the deep map, channels of the stages, sizes, reason
SHAPES = [
    ((2, 3, 4, 3), (5,), [(7, 6)], "an odd height only"),
    ((2, 5, 3, 2), (4, 3), None, "two stages, doubled twice"),
    ((1, 3, 3, 4), (2, 4), [(12, 13), (6, 7)], "odd widths, a batch of one"),
    ((3, 3, 7, 7), (2,), [(13, 13)], "more positions than one tile, across samples"),
    ((2, 35, 2, 2), (33,), None, "more channels than one tile of float32 on either side"),
    ((3, 2, 1, 1), (1, 3), [(2, 1), (1, 1)], "a single position and a single channel, where layouts look alike"),
]
each_shape = pytest.mark.parametrize(
    ("shape", "channels", "sizes"), [pytest.param(*case[:-1], id=case[-1]) for case in SHAPES]
)
CHAIN = SHAPES[1][:2]
FIELDS = ("weight", "gamma", "beta", "running mean", "running variance")


def draw(shape, channels, dtype=torch.float32, formats=FORMATS[:1] * 3):
    """The deep map, and weight, gamma, beta, running mean and variance of each stage: the same numbers in any dtype.

    `formats` are those of the map, of the weights and of the cotangents.
    """
    generator = torch.Generator().manual_seed(shape[0] + channels[0])

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).half().to(dtype)

    x = normal(*shape).contiguous(memory_format=formats[0]).requires_grad_()
    stages = []
    for deep, shallow in pairwise((shape[1], *channels)):
        weight = normal(deep, shallow, 3, 3).contiguous(memory_format=formats[1]).requires_grad_()
        gamma, beta = (1 + normal(shallow) / 2).requires_grad_(), normal(shallow).requires_grad_()
        stages.append([weight, gamma, beta, normal(shallow), 0.5 + normal(shallow).abs()])
    return x, stages


def chain(tensors, training):
    return [functional.Stage(s[0], functional.BatchNorm(*s[1:], training)) for s in tensors]


def evaluate(backend, x, tensors, training, sizes=None, cotangent_format=FORMATS[0]):
    """Maps, running statistics, then the gradients of x and of every stage's weight, gamma and beta, with names."""
    maps = functional.deep_to_shallow(x, chain(tensors, training), sizes=sizes, backend=backend)
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for y in maps:
        values = torch.randn(y.shape, generator=generator, dtype=torch.float64).half().to(y.dtype)
        cotangents.append(values.contiguous(memory_format=cotangent_format))
    leaves = {"gradient of x": x} | {
        f"gradient of stage {j}'s {field}": t
        for j, stage in enumerate(tensors)
        for field, t in zip(FIELDS, stage, strict=True)
    }
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    gradients = torch.autograd.grad(maps, list(leaves.values()), cotangents)
    found = {f"map {i}": y for i, y in enumerate(maps)}
    for j, stage in enumerate(tensors):
        found |= {f"{field} of stage {j}": t for field, t in zip(FIELDS[3:], stage[3:], strict=True)}
    return found | dict(zip(leaves, gradients, strict=True))


def compare(found, truth, eager):
    for name, ours in found.items():
        assert_within_budget(ours, truth[name], eager[name], what=name)


LAYOUTS = {
    "contiguous": FORMATS[:1] * 3,
    "channels_last": [LAST] * 3,
    "mixed": [LAST, FORMATS[0], FORMATS[0]],
    "mixed otherwise": [FORMATS[0], LAST, LAST],
}


# Each shape in each dtype and, between them, in each layout and mode; the first shape in all layouts and modes.
GRID = [
    pytest.param(*case[:-1], dtype, layout, training, id=f"{case[-1]}-{dtype}-{layout}-{training}")
    for i, case in enumerate(SHAPES)
    for d, dtype in enumerate((torch.float32, torch.float16))
    for k, layout in enumerate(LAYOUTS)
    for training in (True, False)
    if i == d == 0 or (k, training) == ((i + 2 * d) % 4, (i + d) % 3 > 0)
]
WIDE = (2, 66, 2, 1), (65,), None, torch.float16, "channels_last", True
GRID.append(pytest.param(*WIDE, id="more channels than one tile of float16 on either side"))


@pytest.mark.parametrize(("shape", "channels", "sizes", "dtype", "layout", "training"), GRID)
def test_kernels_stay_within_the_budget(shape, channels, sizes, dtype, layout, training, nan_filled):
    formats = LAYOUTS[layout]
    found, truth, eager = (
        evaluate(backend, *draw(shape, channels, dtype, formats), training, sizes, formats[2])
        for backend, dtype in (("triton", dtype), ("reference", torch.float64), ("reference", dtype))
    )
    compare(found, truth, eager)
    for name, ours in found.items() if shape[2:] != (1, 1) else ():
        if name.startswith("map"):
            assert ours.is_contiguous(memory_format=formats[0]), "a map takes the layout of x"
        if name.endswith("x") or name.endswith("weight"):
            assert ours.is_contiguous(memory_format=formats[name.endswith("weight")]), "no layout is changed"


def test_statistics_survive_a_mean_a_thousand_times_the_deviation(nan_filled):
    """Sum and sum of squares in float32 would lose the variance; so would tiles whose means are not merged."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(3, 1, 7, 7, generator=generator, dtype=torch.float64).half()
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1:, 1:] = 1  # each output position gets one input value
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, ones = values.to(dtype).requires_grad_(), torch.ones(1, dtype=dtype)
        stage = [kernel.to(dtype).requires_grad_(), ones.clone(), 0 * ones, 0 * ones, ones.clone()]
        results.append(evaluate(backend, x, [stage], True))
    found, truth, eager = results
    assert truth["running mean of stage 0"] > 99 and truth["running variance of stage 0"] < 1.1
    for name in ("map 0", "running mean of stage 0", "running variance of stage 0"):
        assert_within_budget(found[name], truth[name], eager[name], what=name)


def test_strided_inputs_are_read():
    """A crop, a slice of a wider weight, and an expanded gradient have odd strides."""
    x, stages = draw((2, 4, 5, 6), (3,))
    wide, (weight, *norm) = x.detach(), stages[0]
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        leaves = [wide.to(dtype)[:, 1:, 1:4, 2:5].requires_grad_(), weight.detach().to(dtype)[1:, :2].requires_grad_()]
        stage = functional.Stage(leaves[1], functional.BatchNorm(*(t.detach().to(dtype)[:2] for t in norm), True))
        (out,) = functional.deep_to_shallow(leaves[0], [stage], backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum() + out.sum(), leaves)])
        results[-1] += torch.autograd.grad(
            functional.deep_to_shallow(leaves[0], [stage], backend=backend)[0][..., :1].sum(), leaves
        )
    for ours, truth, eager in zip(*results, strict=True):
        assert_within_budget(ours, truth, eager)


@pytest.mark.parametrize("training", [True, False])
def test_no_sample_gives_empty_maps_zero_gradients_and_leaves_the_statistics(training, nan_filled):
    found, eager = (evaluate(b, *draw((0, 5, 3, 2), (4, 3)), training) for b in ("triton", "reference"))
    for name, ours in found.items():
        assert ours.shape == eager[name].shape and torch.equal(ours, eager[name]), name


@pytest.mark.parametrize("wanted", [0, 1], ids=["the shallow map", "the deeper map"])
def test_a_map_that_nobody_used_has_no_gradient(wanted):
    """Of the shallow map alone, stage 0 learns through stage 1; of the deeper one alone, stage 1 learns nothing."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, tensors = draw(*CHAIN, dtype)
        maps = functional.deep_to_shallow(x, chain(tensors, True), backend=backend)
        leaves = [x, *(t for stage in tensors for t in stage[:3])]
        cotangent = torch.randn(maps[wanted].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        results.append(torch.autograd.grad(maps[wanted], leaves, cotangent, allow_unused=True))
    for ours, truth, eager in zip(*results, strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None:
            assert_within_budget(ours, truth, eager)
    assert [g is None for g in results[0][4:]] == [wanted == 1] * 3


def test_not_a_number_is_passed_on():
    x, tensors = draw(*CHAIN)
    with torch.no_grad():
        x[0, 0, 0, 0] = float("nan")
        eager, ours = (functional.deep_to_shallow(x, chain(tensors, False), backend=b) for b in ("reference", "triton"))
    assert ours[0].isnan().any()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, eager, strict=True))


# The tensors that take gradients, with the number of the kernels that run in the backward of a single stage.
NEEDS = [
    ("x", {"norm": 1, "input": 1}),
    ("weight", {"norm": 1, "weight": 1, "weight_merge": 1}),
    ("gamma", {}),
    ("beta", {}),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("needed", "expected"), NEEDS, ids=[name for name, _ in NEEDS])
def test_only_needed_gradients_are_computed(needed, expected, training, monkeypatch):
    x, [stage] = draw((2, 3, 3, 2), (4,))
    tensors = dict(zip(("x", *FIELDS), (x, *stage), strict=True))
    tensors = {name: t.detach().requires_grad_(name == needed) for name, t in tensors.items()}
    ran, shapes = {}, {}
    for module in (triton_kernels.conv, triton_kernels.norm):
        for name in dir(module):
            if name.startswith("deep_to_shallow_"):
                monkeypatch.setattr(module, name, Counted(getattr(module, name), name, ran))
    backward = torch.ops.fastfuse.deep_to_shallow_bwd
    monkeypatch.setattr(
        torch.ops.fastfuse,
        "deep_to_shallow_bwd",
        lambda *arguments: shapes.setdefault("gradients", backward(*arguments)),
    )
    x, *stage = tensors.values()
    functional.deep_to_shallow(x, chain([stage], training), backend="triton")[0].sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    assert len(shapes["gradients"]) == 1
    sums = {"sums": 1, "merge": 1} if training or needed in ("gamma", "beta") else {}
    forward = {"phases": 1} | ({"statistics": 1, "normalise": 1} if training else {})
    assert ran == {f"fwd_{n}": k for n, k in forward.items()} | {f"bwd_{n}": k for n, k in (expected | sums).items()}


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, name, ran):
        self.kernel, self.name, self.ran = kernel, name.removeprefix("deep_to_shallow_").removesuffix("_kernel"), ran

    def __getitem__(self, grid):
        self.ran[self.name] = self.ran.get(self.name, 0) + 1
        return self.kernel[grid]


def test_a_chain_without_gradients_writes_nothing_but_its_maps(monkeypatch):
    x, tensors = draw(*CHAIN)
    forward, kept = torch.ops.fastfuse.deep_to_shallow_fwd, []

    def spy(*arguments):
        found = forward(*arguments)
        kept.append(found[1].numel())
        return found

    monkeypatch.setattr(torch.ops.fastfuse, "deep_to_shallow_fwd", spy)
    with torch.no_grad():
        functional.deep_to_shallow(x, chain(tensors, False), backend="triton")
    assert kept == [0, 0]
    frozen = [[s[0], *(t.detach() for t in s[1:])] for s in tensors]
    found, truth, eager = (
        evaluate(backend, x.detach().to(dtype).requires_grad_(), cast(frozen, dtype), False)
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32))
    )
    assert kept == [0] * 4, "norms that do not learn keep nothing either"
    compare(found, truth, eager)


def cast(tensors, dtype):
    return [[t.detach().to(dtype).requires_grad_(t.requires_grad) for t in stage] for stage in tensors]


def test_backward_on_running_statistics_does_not_see_a_later_update():
    x, tensors = draw((2, 3, 2, 2), (3,))
    gradients = []
    for updated in (False, True):
        (out,) = functional.deep_to_shallow(x, chain(tensors, False), backend="triton")
        if updated:
            functional.deep_to_shallow(x, chain(tensors, True), backend="triton")
        gradients.append(torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(*gradients)


def test_the_same_call_gives_the_same_bits():
    runs = [evaluate("triton", *draw((2, 2, 9, 9), (1,)), True) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = [c for c in json.loads((GOLDEN / "ops.json").read_text())["cases"] if c["kind"] == "deep_to_shallow"]


@pytest.mark.parametrize(
    "case",
    [
        # 49 to 3136 positions: too many for the interpreter's pace.
        pytest.param(case, id=f"case {case['case']}", marks=[pytest.mark.long] if case["stages"] > 2 else [])
        for case in RECORDED
    ],
)
def test_recorded_values(case):
    """The published program's maps, gradients and running statistics, recorded in float64."""
    with np.load(GOLDEN / "ops.npz", allow_pickle=False) as file:
        arrays = {k.partition("/")[2]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case['case']}/")}
    names = ("deconv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    results = []
    for backend in ("triton", "reference"):
        tensors = [[arrays[f"param/stages.{j}.{n}"].float() for n in names] for j in range(case["stages"])]
        leaves = {f"grad/stages.{j}.{n}": t for j, s in enumerate(tensors) for n, t in zip(names[:3], s, strict=False)}
        for leaf in leaves.values():
            leaf.requires_grad_()
        maps = functional.deep_to_shallow(arrays["x"].float(), chain(tensors, True), backend=backend)[::-1]
        cotangents = [arrays[f"cotangent{j}"].float() for j in range(case["stages"])]
        found = {f"train_map{j}": y for j, y in enumerate(maps)}
        found |= dict(zip(leaves, torch.autograd.grad(maps, list(leaves.values()), cotangents), strict=True))
        for j, stage in enumerate(tensors):
            found |= {f"after/stages.{j}.{n}": t for n, t in zip(names[3:], stage[3:], strict=True)}
        again = functional.deep_to_shallow(arrays["x"].float(), chain(tensors, False), backend=backend)[::-1]
        results.append(found | {f"eval_map{j}": y for j, y in enumerate(again)})
    compare(results[0], arrays, results[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@each_shape
def test_closed_form_equals_autograd(shape, channels, sizes, memory_format, training):
    """One stage, the first: its own gradient and one carried from the next stage are added."""
    x, [tensors, *_] = draw(shape, channels, torch.float64, [memory_format] * 3)
    size = None if sizes is None else sizes[-1:]
    expected_tensors = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    stages = chain([expected_tensors], training)
    (out,) = functional.deep_to_shallow(x, stages, sizes=size, backend="reference")
    grads = [torch.randn_like(out) for _ in range(2)]
    expected = torch.autograd.grad(out, [x, *expected_tensors[:3]], sum(grads))
    x, tensors = x.detach(), [t.detach() for t in tensors]
    padding = [s - 2 * n + 1 for s, n in zip(out.shape[2:], x.shape[2:], strict=True)]
    for keep in {True, training}:
        running = [t.clone() for t in tensors[3:]]
        found = closed_form.stage_fwd(x, *tensors[:3], *running, padding, training, keep, 0.1, 1e-5, torch.float64)
        assert relative_l2(found.out, out) <= 1e-12 and found.out.stride() == out.stride()
        for ours, after in zip(running, expected_tensors[3:], strict=True):
            assert relative_l2(ours, after) <= 1e-12
        needed = [True, True, keep, True]
        kept = found.normed if keep else found.out
        gradients = closed_form.stage_bwd(*grads, x, *tensors[:3], kept, found.mean, found.rstd, training, keep, needed)
        for ours, truth in zip(gradients, [g for g, n in zip(expected, needed, strict=True) if n], strict=True):
            assert relative_l2(ours, truth) <= 1e-12


@pytest.mark.parametrize("interpreter", ["1", "0"], ids=["kernels", "closed form"])
@pytest.mark.parametrize("formats", [LAYOUTS["contiguous"], LAYOUTS["channels_last"]], ids=["plain", "last"])
def test_schemas_hold(formats, interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    x, [tensors] = draw((2, 2, 2, 2), (3,), torch.float32, formats)
    x, tensors = x.detach(), [t.detach() for t in tensors]
    modes = [
        (True, True, [True] * 4),
        (False, True, [False, False, True, False]),
        (False, False, [True, False, False, True]),
    ]
    for training, keep, needed in modes[:1] if interpreter == "1" else modes:
        arguments = (x, *tensors, (0, 1), training, keep, 0.1, 1e-5, torch.float32)
        torch.library.opcheck(torch.ops.fastfuse.deep_to_shallow_fwd.default, arguments)
        out, normed, mean, rstd = torch.ops.fastfuse.deep_to_shallow_fwd(*arguments)
        kept, grad = normed if keep else out, torch.randn_like(out)
        given = (grad, None, x, *tensors[:3], kept, mean, rstd, training, keep, needed)
        torch.library.opcheck(torch.ops.fastfuse.deep_to_shallow_bwd.default, given)
        assert len(torch.ops.fastfuse.deep_to_shallow_bwd(*given)) == sum(needed)


def test_compiled_equals_eager():
    """The running statistics change inside the graph too."""
    torch.compiler.reset()

    def run(function):
        x, tensors = draw((2, 2, 2, 2), (3, 2), torch.float32, LAYOUTS["channels_last"])
        maps = function(x, tensors)
        leaves = [x, *(t for stage in tensors for t in stage[:3])]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in maps), leaves)
        return [*maps, *gradients, *(t for stage in tensors for t in stage[3:])]

    def call(x, tensors):
        stages = [*chain(tensors[:1], True), *chain(tensors[1:], False)]
        return functional.deep_to_shallow(x, stages, sizes=[(7, 8), (4, 4)], backend="triton")

    for ours, expected in zip(run(torch.compile(call, fullgraph=True, backend="aot_eager")), run(call), strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()


def test_autocast_computes_in_half_and_leaves_gradients_in_float32():
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, tensors = draw(*CHAIN, dtype)
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            results.append(evaluate(backend, x, tensors, True))
    assert results[0]["map 0"].dtype == torch.float16
    assert results[0]["gradient of stage 0's weight"].dtype == torch.float32
    compare(*results)


def test_second_derivatives_are_refused():
    x, tensors = draw(*CHAIN)
    out = functional.deep_to_shallow(x, chain(tensors, True), backend="triton")[0]
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_the_kernels_cannot_take_is_refused():
    x, tensors = draw((1, 3, 2, 2), (4,))

    def call(x=x, **replaced):
        stage = [replaced.get(field.replace(" ", "_"), t) for field, t in zip(FIELDS, tensors[0], strict=True)]
        size = [(1, 1)] if x.shape[2] == 1 else None
        return functional.deep_to_shallow(x, chain([stage], True), sizes=size, backend="triton")

    with pytest.raises(TypeError, match=r"stages\[0\].weight is torch.float32, x is torch.float16; convert one"):
        call(x.half())
    with pytest.raises(InputError, match=r"stages\[0\].norm takes batch statistics, which one value per channel"):
        call(x[:, :, :1, :1])
    with pytest.raises(InputError, match=r"stages\[0\].norm.running_var must be contiguous"):
        call(running_variance=torch.ones(8)[::2])
    with pytest.raises(InputError, match=r"stages\[0\].norm.weight is on meta, x on cpu"):
        call(gamma=torch.ones(4, device="meta"))
    with pytest.raises(BackendUnavailableError, match="float64"):
        call(x.double())
