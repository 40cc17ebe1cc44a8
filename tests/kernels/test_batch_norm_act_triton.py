"""The Triton kernels of batch_norm_act against its reference: values, statistics, gradients, layouts."""

import copy
from itertools import product

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels.batch_norm_act import triton_kernels
from fastfuse.testing import assert_within_budget
from tests.kernels.batch_norm_cases import ENDINGS, FIELDS, LAST, MODES, compare, draw, evaluate, three
from tests.kernels.op_cases import FORMATS


@pytest.fixture(params=["own", "chunks"])
def plan(request, monkeypatch):
    """Small batches by one program as they come, or in chunks of 16 or 32 positions, as large ones are."""
    if request.param == "chunks":
        monkeypatch.setattr(triton_kernels, "OWN_TILES", 0)
        monkeypatch.setattr(triton_kernels, "TILE_BYTES", 512)
        monkeypatch.setattr(triton_kernels, "WIDEST", 4)
        monkeypatch.setattr(triton_kernels, "NARROWEST", 4)
    return request.param


SHAPES = [
    ((2, 6, 5, 7), "odd sides, channels that fill no block"),
    ((1, 2, 9, 16), "a batch of one"),
    ((4, 12, 1, 1), "a single position, where layouts look alike"),
    ((2, 1, 3, 1), "a single channel"),
]
LAYOUTS = {
    "contiguous": FORMATS[:1] * 3,
    "channels_last": [LAST] * 3,
    "mixed": [LAST, FORMATS[0], FORMATS[0]],
    "mixed otherwise": [FORMATS[0], LAST, LAST],
}
# The first shape in every way and both modes; the others, dtypes and layouts take turns.
GRID = [
    pytest.param(*case, id=f"{case[1]}-{case[2]}-{case[3]}-{case[4]}")
    for i, (shape, _) in enumerate(SHAPES)
    for e, (ending, training) in enumerate(product(ENDINGS, MODES))
    if shape[1] % ending.get("attention_groups", 1) == 0 and (i == 0 or (e + i) % 5 == 0)
    for case in [
        (shape, ending, training, (torch.float32, torch.float16)[(e + i) % 5 == 0], list(LAYOUTS)[(e + i) % 4])
    ]
]


@pytest.mark.parametrize(("shape", "ending", "training", "dtype", "layout"), GRID)
def test_kernels_stay_within_the_budget(shape, ending, training, dtype, layout, plan, nan_filled):
    formats = LAYOUTS[layout]
    found, truth, eager = three(shape, dtype, training, formats, **ending)
    compare(found, truth, eager)
    if shape[2] > 1 and shape[1] > 1:
        for name in found.keys() & {"out", "gradient of x"}:
            assert found[name].is_contiguous(memory_format=formats[0]), "results take the layout of x"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_kernels_stay_within_the_budget_everywhere(ending, training, layout, dtype, plan, nan_filled):
    compare(*three((3, 10, 5, 7), dtype, training, LAYOUTS[layout], **ending))


@pytest.mark.long
@pytest.mark.parametrize("training", MODES)
def test_as_large_as_needs_several_blocks_chunks_and_tiles(training, nan_filled):
    """The launcher's own sizes: 130 channels of two networks are two blocks each; 2048 positions are 32 tiles."""
    shape = (2, 130, 32, 32)
    plan = triton_kernels.plan_of(draw(shape)[0], 2)
    assert plan.grid[0] == 4 and plan.grid[1] > 8 and plan.chunk > plan.tile["BLOCK_P"]
    compare(*three(shape, torch.float32, training, attention_groups=2))


def test_stacked_networks_are_normalised_one_by_one():
    """First principles: torch's own module on each network's channels, with its running statistics."""
    torch.manual_seed(0)
    modules = [torch.nn.BatchNorm2d(3, momentum=0.2, eps=1e-4) for _ in range(2)]
    for module in modules:
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
    stacked = [torch.cat([getattr(m, f) for m in modules]).detach() for f in ("weight", "bias")]
    stacked += [torch.zeros(6), torch.ones(6)]
    for _ in range(3):
        x, shortcut = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
        norm = functional.BatchNorm(*stacked, True, 0.2, 1e-4)
        found = functional.batch_norm_act(x, norm, residual=shortcut, attention_groups=2, backend="triton")
        parts = zip(modules, x.chunk(2, 1), shortcut.chunk(2, 1), strict=True)
        expected = [torch.relu(module(own) + rest) for module, own, rest in parts]
        torch.testing.assert_close(found.out, torch.cat(expected, 1))
        torch.testing.assert_close(found.attention, torch.stack([y.square().mean(1) for y in expected]))
    for i, field in enumerate(("running_mean", "running_var"), 2):
        torch.testing.assert_close(stacked[i], torch.cat([getattr(m, field) for m in modules]))


def test_statistics_survive_a_mean_a_thousand_times_the_deviation(plan, nan_filled):
    """Sum and sum of squares in float32 would lose the variance; so would chunks whose means are not merged."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, _, norm = draw((3, 2, 7, 7), dtype)
        results.append(evaluate(backend, (x.detach() + 1000).requires_grad_(), None, norm, True))
    assert results[1]["running mean"].min() > 290
    for name in ("out", "running mean", "running variance"):
        assert_within_budget(*(found[name] for found in results), what=name)


def test_statistics_survive_an_outlier_where_sums_would_start(plan):
    """A first value, and a first sample, far from the rest."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, _, norm = draw((4, 2, 5, 5), dtype)
        x = x.detach().clone()
        x[0, 0] += 3000
        x[0, 1, 0, 0] = -5000
        results.append(evaluate(backend, x.requires_grad_(), None, norm, True))
    for name in ("out", "running mean", "running variance"):
        assert_within_budget(*(found[name] for found in results), what=name)


@pytest.mark.parametrize("training", MODES)
def test_strided_inputs_are_read(training, plan):
    """Crops, slices of channels, and expanded gradients have odd strides."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, residual, norm = draw((2, 4, 5, 6), dtype, [LAST, FORMATS[0]])
        leaves = [x.detach()[:, 1:, 1:4, 2:5].requires_grad_(), residual.detach()[:, :3, :3, ::2].requires_grad_()]
        bn = functional.BatchNorm(*(t.detach()[:3] for t in norm), training)
        found = functional.batch_norm_act(leaves[0], bn, residual=leaves[1], attention_groups=3, backend=backend)
        summed = found.out.sum() + 3 * found.attention.sum()
        results.append([*found, *torch.autograd.grad(summed, leaves, retain_graph=True)])
        results[-1] += torch.autograd.grad(found.out[..., :1].square().sum(), leaves)
    for ours, truth, eager in zip(*results, strict=True):
        assert_within_budget(ours, truth, eager)


@pytest.mark.parametrize("training", MODES)
def test_no_sample_gives_empty_maps_zero_gradients_and_leaves_the_statistics(training, nan_filled):
    for ending in ENDINGS:
        found, eager = (
            evaluate(b, *draw((0, 4, 3, 2), residual=ending.get("residual", True)), training, **given)
            for given in [{k: v for k, v in ending.items() if k != "residual"}]
            for b in ("triton", "reference")
        )
        for name, ours in found.items():
            assert ours.shape == eager[name].shape and torch.equal(ours, eager[name]), name


def test_not_a_number_is_passed_on(plan):
    x, residual, norm = draw((2, 3, 4, 3))
    with torch.no_grad():
        x[0, 0, 0, 0] = residual[1, 1, 2, 1] = float("nan")
    for training in MODES:
        runs = [evaluate(b, x, residual, copy.deepcopy(norm), training) for b in ("triton", "reference")]
        assert runs[1]["out"].isnan().any() and not runs[1]["out"].isnan().all()
        for name, ours in runs[0].items():
            assert torch.equal(ours.isnan(), runs[1][name].isnan()), name


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, name, ran):
        self.kernel, self.ran = kernel, ran
        self.name = name.removeprefix("batch_norm_act_").removesuffix("_kernel")

    def __getitem__(self, grid):
        self.ran.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def ran(monkeypatch):
    """Names of the kernels that ran, in their order."""
    found = []
    for module in (triton_kernels.fwd, triton_kernels.bwd):
        for name in dir(module):
            if name.startswith("batch_norm_act_"):
                monkeypatch.setattr(module, name, Counted(getattr(module, name), name, found))
    return found


# Who takes a gradient -> backward kernels in training mode and on running statistics.
BOTH = ["bwd_sums", "bwd_input"]
NEEDS = {
    "x": (BOTH, BOTH[1:]),
    "residual": (BOTH[1:], BOTH[1:]),
    "weight": (BOTH, BOTH),
    "bias": (BOTH, BOTH),
    "x residual": (BOTH, BOTH[1:]),
    "x residual weight bias": (BOTH, BOTH),
}


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("needed", NEEDS)
def test_only_needed_gradients_are_computed(needed, training, plan, ran):
    x, residual, norm = draw((2, 4, 5, 6))
    tensors = dict(zip(("x", "residual", "weight", "bias"), (x, residual, *norm[:2]), strict=True))
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        own = {n: t.detach().to(dtype).requires_grad_(n in needed.split()) for n, t in tensors.items()}
        vectors = [own["weight"], own["bias"], *(t.clone().to(dtype) for t in norm[2:])]
        results.append(evaluate(backend, own["x"], own["residual"], vectors, training))
    compare(*results)
    expected = NEEDS[needed][not training] if plan == "chunks" else BOTH[1:]
    forward = ["fwd_moments", "fwd_apply"] if training and plan == "chunks" else ["fwd_apply"]
    assert ran == forward + expected


def test_the_attention_map_costs_a_launch_only_where_a_network_has_several_blocks(ran, monkeypatch):
    x, residual, norm = draw((2, 4, 5, 6))
    evaluate("triton", x, residual, copy.deepcopy(norm), True, attention_groups=2)
    assert ran == ["fwd_apply", "bwd_input"]
    monkeypatch.setattr(triton_kernels, "WIDEST", 1)
    evaluate("triton", x, residual, copy.deepcopy(norm), True, attention_groups=2)
    assert ran[2:] == ["fwd_apply", "fwd_attention", "bwd_input"]


@pytest.mark.parametrize("used", ["out", "attention"])
def test_a_result_that_nobody_used_has_no_gradient(used, plan):
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x, residual, norm = draw((2, 4, 3, 5), dtype)
        found = functional.batch_norm_act(
            x, functional.BatchNorm(*norm, True), residual=residual, relu=False, attention_groups=2, backend=backend
        )
        chosen = getattr(found, used)
        cotangent = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        results.append(torch.autograd.grad(chosen, [x, residual, *norm[:2]], cotangent))
    for ours, truth, eager in zip(*results, strict=True):
        assert_within_budget(ours, truth, eager)


def test_the_same_call_gives_the_same_bits(plan):
    runs = [evaluate("triton", *draw((2, 4, 5, 6)), True, attention_groups=2) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_half_precision_maps_with_float32_norms(plan):
    """What autocast gives in a network: gradients of the norm's parameters stay in float32."""
    results = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64), ("reference", torch.float16)):
        x, residual, norm = draw((2, 4, 3, 5), dtype)
        norm = [t.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_(t.requires_grad) for t in norm]
        results.append(evaluate(backend, x, residual, norm, True, attention_groups=2))
    assert results[0]["gradient of weight"].dtype == results[0]["attention"].dtype == torch.float32
    compare(*results)


def test_what_the_kernels_cannot_take_is_refused():
    x, _, norm = draw((1, 3, 2, 2))

    def call(x=x, **replaced):
        vectors = [replaced.get(field.replace(" ", "_"), t) for field, t in zip(FIELDS, norm, strict=True)]
        return functional.batch_norm_act(x, functional.BatchNorm(*vectors, True), backend="triton")

    with pytest.raises(InputError, match=r"norm.running_var must be contiguous"):
        call(running_variance=torch.ones(6)[::2])
    with pytest.raises(InputError, match=r"norm.weight is on meta, x on cpu"):
        call(weight=torch.ones(3, device="meta"))
    with pytest.raises(BackendUnavailableError, match="float64"):
        call(x.double())
