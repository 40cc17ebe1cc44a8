"""The Triton kernels of deep_to_shallow against its reference: values, statistics, gradients, layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.testing import assert_within_budget
from tests.kernels.deep_to_shallow_cases import (
    CHAIN,
    LAYOUTS,
    SHAPES,
    cast,
    chain,
    compare,
    count_launches,
    draw,
    evaluate,
    leaves,
    three,
)  # fmt: skip

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long

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
MANY = (2, 2, 24, 24), (3,), None, torch.float32, "contiguous", True
GRID.append(pytest.param(*MANY, id="sums of more than one share"))


@pytest.mark.parametrize(("shape", "channels", "sizes", "dtype", "layout", "training"), GRID)
def test_kernels_stay_within_the_budget(shape, channels, sizes, dtype, layout, training, nan_filled):
    formats = LAYOUTS[layout]
    found, truth, eager = three(
        lambda backend, dtype: evaluate(backend, *draw(shape, channels, dtype, formats), training, sizes, formats[2]),
        dtype,
    )
    compare(found, truth, eager)
    for name, ours in found.items() if shape[2:] != (1, 1) else ():
        if name.startswith("map"):
            assert ours.is_contiguous(memory_format=formats[0]), "a map takes the layout of x"
        if name == "gradient of x" or name.startswith("gradient of weight"):
            assert ours.is_contiguous(memory_format=formats["weight" in name]), "no layout is changed"


def test_statistics_survive_a_mean_a_thousand_times_the_deviation(nan_filled):
    """Sum and sum of squares in float32 would lose the variance; so would tiles whose means are not merged."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(3, 1, 7, 7, generator=generator, dtype=torch.float64).half()
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1:, 1:] = 1  # each output position gets one input value

    def run(backend, dtype):
        x, ones = values.to(dtype).requires_grad_(), torch.ones(1, dtype=dtype)
        stage = [kernel.to(dtype).requires_grad_(), ones.clone(), 0 * ones, 0 * ones, ones.clone()]
        return evaluate(backend, x, [stage], True)

    found, truth, eager = three(run)
    assert truth["running mean of stage 0"] > 99 and truth["running variance of stage 0"] < 1.1
    for name in ("map 0", "running mean of stage 0", "running variance of stage 0"):
        assert_within_budget(found[name], truth[name], eager[name], what=name)


def test_strided_inputs_are_read():
    """A crop, a slice of a wider weight, and an expanded gradient have odd strides."""
    x, stages = draw((2, 4, 5, 6), (3,))
    wide, (weight, *norm) = x.detach(), stages[0]

    def run(backend, dtype):
        own = [wide.to(dtype)[:, 1:, 1:4, 2:5].requires_grad_(), weight.detach().to(dtype)[1:, :2].requires_grad_()]
        stage = functional.Stage(own[1], functional.BatchNorm(*(t.detach().to(dtype)[:2] for t in norm), True))
        (out,) = functional.deep_to_shallow(own[0], [stage], backend=backend)
        found = [out, *torch.autograd.grad(out.square().sum() + out.sum(), own)]
        (out,) = functional.deep_to_shallow(own[0], [stage], backend=backend)
        return [*found, *torch.autograd.grad(out[..., :1].sum(), own)]

    compare(*three(run))


@pytest.mark.parametrize("training", [True, False])
def test_no_sample_gives_empty_maps_zero_gradients_and_leaves_the_statistics(training, nan_filled):
    found, eager = (evaluate(b, *draw((0, 5, 3, 2), (4, 3)), training) for b in ("triton", "reference"))
    for name, ours in found.items():
        assert ours.shape == eager[name].shape and torch.equal(ours, eager[name]), name


@pytest.mark.parametrize("wanted", [0, 1], ids=["the shallow map", "the deeper map"])
def test_a_map_that_nobody_used_has_no_gradient(wanted):
    """Of the shallow map alone, stage 0 learns through stage 1; of the deeper one alone, stage 1 learns nothing."""

    def run(backend, dtype):
        x, tensors = draw(*CHAIN, dtype)
        used = functional.deep_to_shallow(x, chain(tensors, True), backend=backend)[wanted]
        cotangent = torch.randn(used.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return torch.autograd.grad(used, leaves(x, tensors), cotangent, allow_unused=True)

    results = three(run)
    compare(*results)
    assert [g is None for g in results[0][4:]] == [wanted == 1] * 3


def test_not_a_number_is_passed_on():
    x, tensors = draw(*CHAIN)
    with torch.no_grad():
        x[0, 0, 0, 0] = float("nan")
        eager, ours = (functional.deep_to_shallow(x, chain(tensors, False), backend=b) for b in ("reference", "triton"))
    assert ours[0].isnan().any()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, eager, strict=True))


def test_the_same_call_gives_the_same_bits():
    runs = [evaluate("triton", *draw((2, 2, 9, 9), (1,)), True) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_autocast_computes_in_half_and_leaves_gradients_in_float32():
    def run(backend, dtype):
        x, tensors = draw(*CHAIN, dtype)
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            return evaluate(backend, x, tensors, True)

    results = three(run)
    assert results[0]["map 0"].dtype == torch.float16
    assert results[0]["gradient of weight of stage 0"].dtype == torch.float32
    compare(*results)


def test_backward_on_running_statistics_does_not_see_a_later_update():
    x, tensors = draw((2, 3, 2, 2), (3,))
    gradients = []
    for updated in (False, True):
        (out,) = functional.deep_to_shallow(x, chain(tensors, False), backend="triton")
        if updated:
            functional.deep_to_shallow(x, chain(tensors, True), backend="triton")
        gradients.append(torch.autograd.grad(out.sum(), x)[0])
    assert torch.equal(*gradients)


# The tensors that take gradients, with the number of the kernels that run for them in the backward of a single stage.
NEEDS = {"x": {"gradients": 1}, "weight": {"weight": 1, "gradients": 1}, "gamma": {}, "beta": {}}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", NEEDS)
def test_only_needed_gradients_are_computed(needed, training, monkeypatch):
    x, [stage] = draw((2, 3, 3, 2), (4,))
    x, *stage = (t.detach().requires_grad_(i == list(NEEDS).index(needed)) for i, t in enumerate((x, *stage)))
    ran, shapes = count_launches(monkeypatch), []
    backward = torch.ops.fastfuse.deep_to_shallow_bwd

    def spy(*arguments):
        shapes.append([g.shape for g in backward(*arguments)])
        return backward(*arguments)

    monkeypatch.setattr(torch.ops.fastfuse, "deep_to_shallow_bwd", spy)
    out = functional.deep_to_shallow(x, chain([stage], training), backend="triton")[0]
    assert ran == {"fwd_phases": 1} | ({"fwd_statistics": 1, "fwd_normalise": 1} if training else {})
    ran.clear()
    out.sum().backward()
    (wanted,) = (t for t in (x, *stage) if t.requires_grad)
    assert shapes == [[wanted.grad.shape]]
    expected = {"norm": 1} | NEEDS[needed] | ({"sums": 1} if training or needed in ("gamma", "beta") else {})
    assert ran == {f"bwd_{name}": 2 * launches for name, launches in expected.items()}, "the spy runs it twice"


def test_a_chain_without_gradients_writes_nothing_but_its_maps(monkeypatch):
    x, tensors = draw(*CHAIN)
    forward, kept = torch.ops.fastfuse.deep_to_shallow_fwd, []

    def spy(*arguments):
        kept.append(len(arguments[7]))
        return forward(*arguments)

    monkeypatch.setattr(torch.ops.fastfuse, "deep_to_shallow_fwd", spy)
    with torch.no_grad():
        functional.deep_to_shallow(x, chain(tensors, False), backend="triton")
    assert kept == [0, 0]
    frozen = [[s[0], *(t.detach() for t in s[1:])] for s in tensors]
    compare(*three(lambda b, dtype: evaluate(b, x.detach().to(dtype).requires_grad_(), cast(frozen, dtype), False)))
    assert kept == [0] * 4, "norms that do not learn keep nothing either"


GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = [c for c in json.loads((GOLDEN / "ops.json").read_text())["cases"] if c["kind"] == "deep_to_shallow"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"case {case['case']}")
def test_recorded_values(case):
    """The published program's maps, gradients and running statistics, recorded in float64."""
    with np.load(GOLDEN / "ops.npz", allow_pickle=False) as file:
        arrays = {k.partition("/")[2]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case['case']}/")}
    names = ("deconv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    results = []
    for backend in ("triton", "reference"):
        tensors = [[arrays[f"param/stages.{j}.{n}"].float() for n in names] for j in range(case["stages"])]
        learned = {f"grad/stages.{j}.{n}": t for j, s in enumerate(tensors) for n, t in zip(names[:3], s, strict=False)}
        for leaf in learned.values():
            leaf.requires_grad_()
        maps = functional.deep_to_shallow(arrays["x"].float(), chain(tensors, True), backend=backend)[::-1]
        given = [arrays[f"cotangent{j}"].float() for j in range(case["stages"])]
        found = {f"train_map{j}": y for j, y in enumerate(maps)}
        found |= dict(zip(learned, torch.autograd.grad(maps, list(learned.values()), given), strict=True))
        for j, stage in enumerate(tensors):
            found |= {f"after/stages.{j}.{n}": t for n, t in zip(names[3:], stage[3:], strict=True)}
        again = functional.deep_to_shallow(arrays["x"].float(), chain(tensors, False), backend=backend)[::-1]
        results.append(found | {f"eval_map{j}": y for j, y in enumerate(again)})
    compare(results[0], arrays, results[1])
