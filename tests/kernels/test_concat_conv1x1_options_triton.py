"""concat_conv1x1 with scale, shift and ReLU on load, with statistics of its result, and on slices of stacked maps."""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.kernels.concat_fuse import closed_form, triton_products
from fastfuse.testing import assert_within_budget, relative_l2
from tests.kernels.op_cases import FORMATS
from tests.kernels.test_concat_conv1x1_triton import LAST, draw, each_shape

SMALL = (3, 2), 4, 2, (5, 3)
NAMES = ("result", "mean", "variance", "weight", "scale", "shift")


class Inputs:
    """Maps, weight, scale and shift, the same numbers in every dtype and format; all take gradients.

    Values before the ReLU are sums of products of half-precision numbers: none is cut off by a rounding. The seed is
    one where eager in half precision is not right by luck where there are but two values to average.
    """

    def __init__(self, channels, outputs, batch, size, dtype=torch.float32, formats=None, vectors=None):
        formats = formats or [torch.contiguous_format] * len(channels)
        self.maps, self.weight, self.grad = draw(channels, outputs, batch, size, dtype, formats)
        self.generator = torch.Generator().manual_seed(sum(channels) + 1)
        total, vectors = sum(channels), vectors or torch.promote_types(dtype, torch.float32)
        values = [1 + self.draw(total) / 2, self.draw(total) / 2]
        self.scale, self.shift = (x.half().to(vectors).requires_grad_() for x in values)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @property
    def leaves(self):
        return [self.weight, self.scale, self.shift, *self.maps]

    def detached(self):
        """Maps, weight, and scale and shift, as schemas take them."""
        weight, *affine = (x.detach() for x in self.leaves[:3])
        return [x.detach() for x in self.maps], weight, affine

    def call(self, backend="triton", affine=True, statistics=True):
        options = {"scale": self.scale, "shift": self.shift} if affine else {}
        return functional.concat_conv1x1(self.maps, self.weight, statistics=statistics, backend=backend, **options)

    def evaluate(self, backend="triton", function=None):
        """Map, mean, variance, and the gradients of all leaves; every result has its own cotangent."""
        results = (function or self.call)(backend)[:3]
        self.cotangents = [self.draw(*x.shape).to(x.dtype) for x in results]
        return [*results, *torch.autograd.grad(results, self.leaves, self.cotangents)]


def compare(ours, truth, eager):
    names = [*NAMES, *(f"map {s}" for s in range(len(ours) - len(NAMES)))]
    for name, found, exact, plain in zip(names, ours, truth, eager, strict=True):
        assert_within_budget(found, exact, plain, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_shape
def test_kernels_stay_within_the_budget(channels, outputs, batch, size, dtype, nan_filled):
    formats = [FORMATS[(s + outputs) % 2] for s in range(len(channels))]
    arguments = channels, outputs, batch, size
    runs = [Inputs(*arguments, d, formats) for d in (dtype, torch.float64, dtype)]
    backends = "triton", "reference", "reference"
    compare(*(inputs.evaluate(backend) for inputs, backend in zip(runs, backends, strict=True)))


@pytest.mark.parametrize(("affine", "statistics"), [(True, False), (False, True)], ids=["affine", "statistics"])
def test_each_option_alone(affine, statistics, nan_filled):
    runs = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        inputs = Inputs(*SMALL, dtype)
        found = inputs.call(backend, affine, statistics)
        results = found[:3] if statistics else [found]
        cotangents = [inputs.draw(*x.shape).to(x.dtype) for x in results]
        gradients = torch.autograd.grad(results, inputs.leaves, cotangents, allow_unused=True)
        assert [g is not None for g in gradients[1:3]] == [affine] * 2
        runs.append([*results, *(g for g in gradients if g is not None)])
    assert all(relative_l2(ours, truth) <= 1e-6 for ours, truth in zip(*runs, strict=True))


@pytest.mark.parametrize("used", [(1,), (2,), (0, 2), (1, 2)], ids=["mean", "variance", "map+variance", "statistics"])
def test_gradients_of_some_results(used, nan_filled):
    """What of the results enters a loss; a sum's cotangent has no strides."""
    runs = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        inputs = Inputs(*SMALL, dtype, [LAST] * 2)
        found = inputs.call(backend)
        runs.append(torch.autograd.grad(sum(found[i].sum() * (i + 1) for i in used), inputs.leaves))
    assert all(relative_l2(ours, truth) <= 1e-5 for ours, truth in zip(*runs, strict=True))


# Of weight, scale, shift and two maps: each alone, and what must not be mixed up.
NEEDED = ["weight", "scale", "shift", "map0", "map1", "scale map1", "shift map0 map1", "weight scale shift"]


@pytest.mark.parametrize("needed", NEEDED)
def test_only_needed_gradients_are_given(needed, monkeypatch, nan_filled):
    """They are what they are where all are needed."""
    needed = [name in needed.split() for name in ("weight", "scale", "shift", "map0", "map1")]
    inputs = Inputs(*SMALL, formats=FORMATS)
    truth = torch.autograd.grad(inputs.call(statistics=False), inputs.leaves, inputs.grad)
    seen, backward = [], torch.ops.fastfuse.concat_conv1x1_bwd
    monkeypatch.setattr(torch.ops.fastfuse, "concat_conv1x1_bwd", lambda *a: seen.append(a[-1]) or backward(*a))
    for x, need in zip(inputs.leaves, needed, strict=True):
        x.requires_grad_(need)
    inputs.call(statistics=False).backward(inputs.grad)
    assert seen == [[*needed[3:], *needed[:3]]]
    for x, need, expected in zip(inputs.leaves, needed, truth, strict=True):
        assert torch.equal(x.grad, expected) if need else x.grad is None


@each_shape
def test_closed_form_equals_autograd(channels, outputs, batch, size):
    inputs = Inputs(channels, outputs, batch, size, torch.float64)
    truth = inputs.evaluate("reference")
    maps, weight, affine = inputs.detached()
    found = closed_form.concat_conv1x1_fwd(maps, weight, affine, True)
    for ours, expected in zip(found, truth[:3], strict=True):
        assert relative_l2(ours, expected) <= 1e-12
    needs = [True] * (len(maps) + 3)
    given = inputs.cotangents, found[:2], maps, weight, affine
    gradients = closed_form.concat_conv1x1_bwd(*given, needs)
    for ours, expected in zip([*gradients[len(maps) :], *gradients[: len(maps)]], truth[3:], strict=True):
        assert relative_l2(ours, expected) <= 1e-12
    some = closed_form.concat_conv1x1_bwd(*given, [*needs[:-3], False, False, True])
    assert len(some) == len(maps) + 1 and torch.equal(some[-1], gradients[-1])


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "interpreter", [pytest.param("1", marks=pytest.mark.long), "0"], ids=["kernels", "closed form"]
)
def test_schemas_hold(memory_format, interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    inputs = Inputs(*SMALL, formats=[memory_format] * 2)
    maps, weight, affine = inputs.detached()
    for vectors in (affine, []):
        forward = maps, weight, vectors, True
        torch.library.opcheck(torch.ops.fastfuse.concat_conv1x1_fwd.default, forward)
        out, mean, var = torch.ops.fastfuse.concat_conv1x1_fwd(*forward)
        for cotangents in ([inputs.grad, mean, None], [None, None, var]):
            needs = [True] * (3 + len(vectors))
            arguments = cotangents, [out, mean], maps, weight, vectors, needs
            torch.library.opcheck(torch.ops.fastfuse.concat_conv1x1_bwd.default, arguments)


def test_compiled_equals_eager():
    expected = Inputs(*SMALL, formats=[LAST] * 2).evaluate()
    ours = Inputs(*SMALL, formats=[LAST] * 2)
    found = ours.evaluate(function=torch.compile(ours.call, fullgraph=True, backend="aot_eager"))
    for x, eager in zip(found, expected, strict=True):
        assert torch.equal(x, eager) and x.stride() == eager.stride()


def test_compiled_without_the_statistics_in_the_loss():
    """Compiled graphs give zeros as the gradients of what is not used."""
    gradients = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        inputs = Inputs(*SMALL)
        gradients.append(torch.autograd.grad(wrap(inputs.call)().out, inputs.leaves, inputs.grad))
    assert all(relative_l2(ours, eager) <= 1e-6 for ours, eager in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom:UserWarning", "ignore:invalid value:RuntimeWarning")
def test_no_sample_has_no_statistics_and_zero_gradients(nan_filled):
    arguments = (3, 2), 4, 0, (5, 3)
    ours, eager = (Inputs(*arguments).evaluate(backend) for backend in ("triton", "reference"))
    for found, expected in zip(ours, eager, strict=True):
        assert found.shape == expected.shape and torch.equal(found.isnan(), expected.isnan())
    assert ours[0].shape == (0, 4, 5, 3) and ours[1].isnan().all() and ours[2].isnan().all()
    assert all((gradient == 0).all() for gradient in ours[3:])
    assert Inputs(*arguments).call().count == 0


def test_statistics_are_those_of_the_result_and_merge_in_a_fixed_order(monkeypatch):
    """Small tiles and few at once, so that many are merged in many turns; maps far from zero, where sums cancel."""
    monkeypatch.setattr(triton_products, "POSITIONS", 16)
    monkeypatch.setattr(triton_products, "MERGE_ROWS", 2)
    runs = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float32, "triton"), (torch.float64, "reference")):
        inputs = Inputs((2, 1), 3, 3, (7, 9), dtype)
        with torch.no_grad():
            for x in inputs.maps:
                x.add_(1000)
        runs.append(inputs.call(backend, affine=False))
    ours, again, truth = runs
    assert ours.count == truth.count == 3 * 7 * 9
    assert relative_l2(truth.mean, truth.out.mean((0, 2, 3))) <= 1e-13
    assert relative_l2(truth.var, truth.out.var((0, 2, 3), correction=0)) <= 1e-13
    assert relative_l2(ours.mean, truth.mean) <= 1e-6 and relative_l2(ours.var, truth.var) <= 1e-5
    assert torch.equal(ours.mean, again.mean) and torch.equal(ours.var, again.var)


def test_scale_and_shift_under_autocast():
    runs = []
    for backend in ("triton", "reference"):
        inputs = Inputs(*SMALL)
        with torch.autocast("cpu", torch.float16):
            runs.append(inputs.evaluate(backend))
    assert [x.dtype for x in runs[0]] == [torch.float16] + [torch.float32] * 7
    compare(runs[0], Inputs(*SMALL, torch.float64).evaluate("reference"), runs[1])


def test_vectors_in_half_precision_get_gradients_in_their_dtype():
    runs = [Inputs(*SMALL, d, vectors=d) for d in (torch.float16, torch.float64, torch.float16)]
    backends = "triton", "reference", "reference"
    compare(*(inputs.evaluate(backend) for inputs, backend in zip(runs, backends, strict=True)))


def test_not_a_number_is_passed_on():
    inputs = Inputs(*SMALL)
    with torch.no_grad():
        inputs.maps[1][0, 0, 0, 0] = float("nan")
    found = inputs.call()
    assert found.out[0, :, 0, 0].isnan().all() and found.out[1].isfinite().all()
    assert found.mean.isnan().all() and found.var.isnan().all()


def test_vectors_that_kernels_cannot_walk_through_are_refused():
    inputs = Inputs(*SMALL)
    inputs.scale = torch.ones(10)[::2]
    with pytest.raises(InputError, match=r"scale must be contiguous for the kernels; call \.contiguous\(\) on it"):
        inputs.call()
    assert inputs.call("reference").out.shape == (2, 4, 5, 3)


@pytest.fixture
def read(monkeypatch):
    """The maps that launchers hand to the kernels."""
    seen, table_of = [], triton_products.table_of

    def noted(groups):
        found = table_of(groups)
        seen.append(found.pointers)
        return found

    monkeypatch.setattr(triton_products, "table_of", noted)
    return seen


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_slices_of_a_stacked_map_are_read_where_they_lie(memory_format, read):
    """[N, S C, H, W], S = 3: no copy of a map, forward or backward; results keep the memory format."""
    stacked = torch.randn(2, 6, 5, 3).contiguous(memory_format=memory_format)
    inputs = Inputs((2, 2, 2), 4, 2, (5, 3))
    inputs.maps = [x.requires_grad_() for x in stacked.chunk(3, 1)]
    truth = Inputs((2, 2, 2), 4, 2, (5, 3), torch.float64)
    truth.maps = [x.detach().double().requires_grad_() for x in inputs.maps]
    ours, exact = inputs.evaluate(), truth.evaluate("reference")
    of_maps = [pointers for pointers in read if len(pointers) == 3]
    assert len(of_maps) >= 3, "forward, gradients of maps, gradient of the weight"
    slices = [x.data_ptr() for x in inputs.maps]
    for pointers in of_maps:
        assert [x.data_ptr() for x in pointers] == slices
        assert {x.untyped_storage().data_ptr() for x in pointers} == {stacked.untyped_storage().data_ptr()}
    assert all(relative_l2(x, y) <= 1e-5 for x, y in zip(ours, exact, strict=True))
    assert all(x.is_contiguous(memory_format=memory_format) for x in (ours[0], *ours[6:]))


def test_a_stacked_tensor_is_taken_as_a_sequence(read):
    """[S, B, C, H, W]; its gradient comes in one piece."""
    inputs = Inputs((2, 2, 2), 4, 2, (5, 3))
    stacked = torch.stack([x.detach() for x in inputs.maps]).requires_grad_()
    out = functional.concat_conv1x1(stacked, inputs.weight, backend="triton")
    assert [x.data_ptr() for x in read[-1]] == [x.data_ptr() for x in stacked.detach()]
    assert torch.equal(out, inputs.call(affine=False, statistics=False))
    (gradient,) = torch.autograd.grad(out, stacked, inputs.grad)
    expected = torch.autograd.grad(inputs.call(affine=False, statistics=False), inputs.maps, inputs.grad)
    assert torch.equal(gradient, torch.stack(expected))
