"""The Triton kernels of concat_fuse against its reference: results, statistics, gradients, layouts, compilation."""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.kernels.concat_fuse import layout, op, triton_launch
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.op_cases import FORMATS
from tests.kernels.test_golden_ops import CASES, Arrays, leaf, norm, trained

# The interpreter is slow: `make test` has this operator in test_backends_agree.py, the rest runs with the long tests.
pytestmark = pytest.mark.long

LAST = torch.channels_last
NAMES = ("depthwise", "weight1", "bias1", "pointwise", "weight2", "bias2")
# channels of each map, outputs, batch, (height, width), reason
SHAPES = [
    ((3, 5), 4, 2, (5, 3), "two widths, none a power of two"),
    ((4,), 18, 1, (6, 5), "trans-fusion: one map, more outputs than inputs, a batch of one"),
    ((34, 2), 40, 1, (9, 8), "more channels, outputs and positions than one tile"),
]
each_shape = pytest.mark.parametrize(
    ("channels", "outputs", "batch", "size"), [pytest.param(*case[:-1], id=case[-1]) for case in SHAPES]
)
MODES = {"batch statistics": (True, True), "running statistics": (False, False), "first frozen": (False, True)}


class Inputs:
    """Maps, parameters and running statistics, the same numbers in every dtype and format.

    The seed is one where no value before a ReLU lies within a rounding of zero: there eager and the kernels may cut
    different elements off, a jump in the gradients that no budget of roundings holds.
    """

    def __init__(self, channels, outputs, batch, size, dtype=torch.float32, formats=None, *, parameters=None, seed=1):
        self.generator = torch.Generator().manual_seed(seed)
        parameters, total = parameters or dtype, sum(channels)
        formats = formats or [torch.contiguous_format] * len(channels)
        maps = [self.draw(batch, c, *size).to(dtype) for c in channels]
        self.maps = [x.contiguous(memory_format=f).requires_grad_() for x, f in zip(maps, formats, strict=True)]
        values = [self.draw(total, 1, 3, 3), 1 + self.draw(total) / 4, self.draw(total) / 4]
        values += [self.draw(outputs, total, 1, 1), 1 + self.draw(outputs) / 4, self.draw(outputs) / 4]
        self.parameters = [x.to(parameters).requires_grad_() for x in values]
        statistics = [self.draw(c) for c in (total, total, outputs, outputs)]
        self.statistics = [(x.abs() + 1 if i % 2 else x / 4).to(parameters) for i, x in enumerate(statistics)]

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).half().double()

    @property
    def leaves(self):
        return [*self.parameters, *self.maps]

    def module(self, modes, **options):
        depthwise, weight1, bias1, pointwise, weight2, bias2 = self.parameters
        norm1 = functional.BatchNorm(weight1, bias1, *self.statistics[:2], modes[0], 0.3, 1e-3)
        norm2 = functional.BatchNorm(weight2, bias2, *self.statistics[2:], modes[1])
        return functional.Fusion(self.maps, depthwise, norm1, pointwise, norm2, **options)

    def call(self, modes, backend, **options):
        return functional.concat_fuse_all([self.module(modes, **options)], backend=backend)[0]

    def evaluate(self, modes, backend, function=None):
        """Results, running statistics and gradients by name; every result has its own cotangent."""
        found = (function or self.call)(modes, backend)
        cotangents = [self.draw(*x.shape).to(x.dtype) for x in found]
        gradients = torch.autograd.grad(found, self.leaves, cotangents)
        names = [*NAMES, *(f"map {s}" for s in range(len(self.maps)))]
        statistics = dict(zip(("mean1", "var1", "mean2", "var2"), self.statistics, strict=True))
        return found._asdict() | statistics | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_shape
def test_kernels_stay_within_the_budget(channels, outputs, batch, size, dtype, mode, nan_filled):
    formats = [FORMATS[(s + len(mode)) % 2] for s in range(len(channels))]
    arguments = channels, outputs, batch, size
    ours = Inputs(*arguments, dtype, formats).evaluate(MODES[mode], "triton")
    truth = Inputs(*arguments, torch.float64, formats).evaluate(MODES[mode], "reference")
    eager = Inputs(*arguments, dtype, formats).evaluate(MODES[mode], "reference")
    for name, found in ours.items():
        assert_within_budget(found, truth[name], eager[name], what=name)


def test_large_maps_are_pooled_in_parts(monkeypatch, nan_filled):
    """Maps of more positions than one program takes: made so by smaller programs, as the interpreter is slow."""
    monkeypatch.setattr(triton_launch, "MOST_POSITIONS", 16)
    arguments = (3, 2), 4, 2, (5, 7)
    with torch.no_grad():
        ours, eager = (Inputs(*arguments).call((True, True), backend) for backend in ("triton", "reference"))
        truth = Inputs(*arguments, torch.float64).call((True, True), "reference")
    for name, found in ours._asdict().items():
        assert_within_budget(found, getattr(truth, name), getattr(eager, name), what=name)


@pytest.mark.parametrize("shares", [2, 32], ids=["shares of several tiles", "a tile each"])
def test_positions_are_shared_out(shares, monkeypatch, nan_filled):
    """More positions than a tile, in shares of several tiles, the last ones ragged."""
    monkeypatch.setattr(triton_launch, "SHARES", shares)
    arguments = (3, 2), 4, 3, (9, 11)
    ours = Inputs(*arguments).evaluate((True, True), "triton")
    eager, truth = (Inputs(*arguments, d).evaluate((True, True), "reference") for d in (torch.float32, torch.float64))
    for name, found in ours.items():
        assert_within_budget(found, truth[name], eager[name], what=name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_layouts_are_kept(memory_format):
    found = Inputs((3, 2), 4, 2, (5, 3), formats=[memory_format] * 2).evaluate((False, False), "triton")
    for name in ("fused", "map 0", "map 1"):
        assert found[name].is_contiguous(memory_format=memory_format), name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_kernels_reproduce_the_recordings(memory_format):
    arrays = Arrays(min((case for case in CASES if case["kind"] == "fusion_module"), key=lambda c: c["shape"])["case"])
    single = {k: x.detach().float() for k, x in trained(arrays.under("param/")).items()}
    parameters = {k: x if "running" in k or "tracked" in k else leaf(x) for k, x in single.items()}
    features = [leaf(x.float(), memory_format) for x in arrays["xs"]]
    norms = [norm(parameters, name, True) for name in ("norm1", "norm2")]
    weights = parameters["depthwise.weight"], parameters["pointwise.weight"]
    found = functional.concat_fuse(features, weights[0], norms[0], weights[1], norms[1], backend="triton")
    logits = torch.nn.functional.linear(found.pooled, parameters["classifier.weight"], parameters["classifier.bias"])
    total = (logits * arrays["cotangent_logits"]).sum() + (found.fused * arrays["cotangent_fused"]).sum()
    total.backward()
    pairs = [(logits, arrays["logits"]), (found.fused, arrays["fused"])]
    pairs.append((torch.stack([x.grad for x in features]), arrays["grad_xs"]))
    pairs += [(parameters[k].grad, x) for k, x in arrays.under("grad/").items()]
    pairs += [(parameters[k], x) for k, x in arrays.under("after/").items() if "tracked" not in k]
    assert all(relative_l2(ours, recorded) <= 5e-6 for ours, recorded in pairs)


def test_statistics_do_not_cancel():
    """A map far from zero: sum and sum of squares in float32 would leave nothing of its variance."""
    runs = {}
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        inputs = Inputs((3,), 4, 3, (5, 5), dtype)
        with torch.no_grad():
            inputs.maps[0].add_(1000)
            inputs.parameters[0].copy_(torch.eye(9)[4].view(1, 1, 3, 3).expand(3, 1, 3, 3))
        inputs.call((True, True), backend)
        runs[backend] = inputs.statistics
    for ours, truth in zip(runs["triton"], runs["reference"], strict=True):
        assert relative_l2(ours, truth) <= 1e-5


@pytest.mark.parametrize("asked", [("fused",), ("attention",), ("pooled",), ("fused", "pooled")], ids="+".join)
def test_only_what_is_asked_for_is_given_and_may_be_used_alone(asked, nan_filled):
    options = {name: name in asked for name in ("fused", "attention", "pooled")}
    runs = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        inputs = Inputs((3, 2), 4, 2, (5, 3), dtype)
        found = inputs.call((True, True), backend, **options)
        assert {name: x is not None for name, x in found._asdict().items()} == options
        runs.append(torch.autograd.grad(getattr(found, asked[-1]).square().sum(), inputs.leaves))
    assert all(relative_l2(ours, truth) <= 1e-5 for ours, truth in zip(*runs, strict=True))


def test_asking_for_nothing_is_refused():
    with pytest.raises(InputError, match="nothing is asked for: set one of fused, attention and pooled"):
        Inputs((3,), 4, 2, (5, 3)).call((True, True), "reference", fused=False, attention=False, pooled=False)


def fusion_and_mirror(dtype, size=(5, 3)):
    """A fusion module whose maps take no gradient, and a trans-fusion of which only the attention is wanted."""
    fusion, mirror = Inputs((3, 2), 4, 2, (5, 3), dtype), Inputs((4,), 18, 2, size, dtype, seed=4)
    for x in fusion.maps:
        x.requires_grad_(False)
    return fusion, mirror


def together(backend, dtype, modes, size=(5, 3)):
    """Results, gradients and running statistics of both modules in one call."""
    fusion, mirror = fusion_and_mirror(dtype, size)
    asked = {"fused": False, "pooled": False}
    both = [fusion.module(modes[0]), mirror.module(modes[1], **asked)]
    found = [x for module in functional.concat_fuse_all(both, backend=backend) for x in module if x is not None]
    assert len(found) == 4
    leaves = [*fusion.parameters, *mirror.leaves]
    cotangents = [fusion.draw(*x.shape).to(x.dtype) for x in found]
    return [*found, *torch.autograd.grad(found, leaves, cotangents), *fusion.statistics, *mirror.statistics]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("modes", "size", "launch_sets"),
    [
        pytest.param([(True, True)] * 2, (5, 3), 1, id="alike: one launch each"),
        pytest.param([(False, True)] * 2, (5, 3), 1, id="both first norms frozen"),
        pytest.param([(True, True), (False, False)], (5, 3), 2, id="modes differ"),
        pytest.param([(True, True)] * 2, (4, 3), 2, id="sizes differ"),
    ],
)
def test_modules_share_their_launches(modes, size, launch_sets, dtype, monkeypatch, nan_filled):
    calls, forward = [], torch.ops.fastfuse.concat_fuse_fwd
    monkeypatch.setattr(torch.ops.fastfuse, "concat_fuse_fwd", lambda *a: calls.append(a) or forward(*a))
    ours = together("triton", dtype, modes, size)
    assert len(calls) == launch_sets
    eager, truth = (together("reference", d, modes, size) for d in (dtype, torch.float64))
    for i, (a, t, e) in enumerate(zip(ours, truth, eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")


@pytest.fixture(scope="module", params=[(True, True), (False, False)], ids=str)
def modes_and_gradients(request):
    inputs = Inputs((3, 2), 4, 2, (5, 3))
    return request.param, torch.autograd.grad(inputs.call(request.param, "triton").fused.square().sum(), inputs.leaves)


@pytest.mark.parametrize("needed", [(0,), (2,), (3,), (5,), (6,), (3, 4, 5)], ids=str)
def test_only_needed_gradients_are_computed(needed, modes_and_gradients, monkeypatch):
    modes, expected = modes_and_gradients
    inputs = Inputs((3, 2), 4, 2, (5, 3))
    for i, x in enumerate(inputs.leaves):
        x.requires_grad_(i in needed)
    seen, backward = [], torch.ops.fastfuse.concat_fuse_bwd
    monkeypatch.setattr(
        torch.ops.fastfuse, "concat_fuse_bwd", lambda *arguments: seen.append(arguments[-1]) or backward(*arguments)
    )
    inputs.call(modes, "triton").fused.square().sum().backward()
    assert [list(needs) for needs in seen] == [[i in needed for i in range(8)]]
    for i, x in enumerate(inputs.leaves):
        assert torch.equal(x.grad, expected[i]) if i in needed else x.grad is None


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False)], ids=str)
@each_shape
def test_closed_form_equals_autograd(channels, outputs, batch, size, modes, monkeypatch):
    """The eager formulas, reached through the same autograd function, in float64."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = channels, outputs, batch, size, torch.float64, [LAST] * len(channels)
    ours = Inputs(*arguments)

    def closed(modes, _):
        return op._kernels([ours.module(modes)], "triton")[0]

    found = ours.evaluate(modes, None, closed)
    truth = Inputs(*arguments).evaluate(modes, "reference")
    for name, expected in truth.items():
        assert relative_l2(found[name], expected) <= 1e-12, name


def schema_arguments(inputs, modes, asked):
    running = inputs.statistics
    split = [[x for i, x in enumerate(running) if modes[i // 2] == mode] for mode in (False, True)]
    maps, parameters = ([x.detach() for x in tensors] for tensors in (inputs.maps, inputs.parameters))
    numbers = 0.1, 1e-5, 0.1, 1e-5
    (module,) = layout.modules_of(maps, [len(maps)], parameters, running, modes, numbers, asked)
    return maps, [len(maps)], parameters, *split, layout.empty_results(module), modes, numbers, asked


@pytest.mark.parametrize(
    ("interpreter", "memory_format", "modes"),
    [
        pytest.param("1", LAST, (True, True), id="kernels: channels-last, batch statistics"),
        pytest.param("1", FORMATS[0], (False, False), id="kernels: contiguous, running statistics"),
        pytest.param("0", LAST, (False, False), id="closed form: channels-last, running statistics"),
        pytest.param("0", FORMATS[0], (True, True), id="closed form: contiguous, batch statistics"),
    ],
)
def test_schemas_hold(interpreter, memory_format, modes, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    inputs = Inputs((3, 2), 4, 2, (5, 3), formats=[memory_format] * 2)
    asked = (modes[0], True, modes[0])
    arguments = schema_arguments(inputs, modes, asked)
    torch.library.opcheck(torch.ops.fastfuse.concat_fuse_fwd.default, arguments)
    torch.ops.fastfuse.concat_fuse_fwd(*arguments)
    maps, counts, parameters, _, _, made, training, options, _ = arguments
    *results, hidden, pre, statistics1, statistics2 = made
    assert [x.numel() > 0 for x in results] == list(asked)
    used = [*statistics1.unbind(), *statistics2.unbind()] if modes[0] else inputs.statistics
    cotangents = [x if given else None for x, given in zip(results, asked, strict=True)]
    needs = [True] * 8 if modes[0] else [False, True] * 4
    backward = cotangents, maps, counts, parameters, used, [hidden, pre], training, options, needs
    torch.library.opcheck(torch.ops.fastfuse.concat_fuse_bwd.default, backward)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode):
    eager = Inputs((3, 2), 4, 2, (5, 3), formats=[LAST] * 2)
    expected = eager.evaluate(MODES[mode], "triton")
    ours = Inputs((3, 2), 4, 2, (5, 3), formats=[LAST] * 2)
    found = ours.evaluate(MODES[mode], "triton", torch.compile(ours.call, fullgraph=True, backend="aot_eager"))
    for name, x in expected.items():
        assert torch.equal(found[name], x) and found[name].stride() == x.stride(), name


@pytest.mark.parametrize("mode", MODES)
def test_no_sample_leaves_the_statistics_alone(mode, nan_filled):
    runs = [Inputs((3, 2), 4, 0, (5, 3)) for _ in range(3)]
    ours, eager = (x.evaluate(MODES[mode], b) for x, b in zip(runs, ("triton", "reference"), strict=False))
    for name, x in eager.items():
        assert ours[name].shape == x.shape and torch.equal(ours[name], x), name
    assert all(torch.equal(a, b) for a, b in zip(runs[0].statistics, runs[2].statistics, strict=True))


def test_half_maps_with_float32_parameters_under_autocast():
    arguments = (3, 5), 4, 2, (5, 7)
    runs = []
    for backend in ("triton", "reference"):
        inputs = Inputs(*arguments, torch.float16, parameters=torch.float32)
        with torch.autocast("cpu", torch.float16):
            runs.append(inputs.evaluate((True, True), backend))
    truth = Inputs(*arguments, torch.float64).evaluate((True, True), "reference")
    ours, eager = runs
    for name, found in ours.items():
        assert_within_budget(found, truth[name], eager[name], what=name)


def test_not_a_number_is_passed_on():
    inputs = Inputs((3,), 4, 2, (5, 3))
    with torch.no_grad():
        inputs.maps[0][0, 0, 0, 0] = float("nan")
    found = inputs.call((True, True), "triton")
    assert found.fused.isnan().any() and found.attention.isnan().any() and found.pooled.isnan().any()


def test_what_kernels_cannot_serve_is_refused():
    single = Inputs((3,), 4, 1, (1, 1))
    with pytest.raises(InputError, match="norm1 in training mode needs more than one value per channel"):
        single.call((True, True), "triton")
    assert single.call((False, False), "triton").fused.shape == (1, 4, 1, 1)
    strided = Inputs((3,), 4, 2, (5, 3))
    strided.statistics[2] = torch.zeros(8)[::2]
    with pytest.raises(InputError, match=r"norm2\.running_mean must be contiguous for the kernels"):
        strided.call((True, True), "triton")
    mixed = Inputs((3,), 4, 2, (5, 3), torch.float16, parameters=torch.float32)
    with pytest.raises(TypeError, match=r"wise is torch\.float32, features"):
        mixed.call((True, True), "triton")
