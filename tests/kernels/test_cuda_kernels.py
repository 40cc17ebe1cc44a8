"""The kernels in CUDA C++, run on the host where there is no GPU (see cuda_on_host), against the references.

On a GPU the same cases run on the device: they are those marked `gpu`.
"""

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels import _dispatch
from fastfuse.testing import assert_within_budget, in_other_orders
from tests.kernels.op_cases import CASES, FORMATS
from tests.kernels.test_backends_agree import eagerly, run

LAST = torch.channels_last
SINGLE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
WITH_CUDA = ("attention_map", "attention_mse", "concat_fuse", "diversity")
COVERED = [case for case in CASES if case.reason.startswith(WITH_CUDA)]


def exactly(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def agree(case, tensors, monkeypatch):
    found = run(case, tensors, "cuda", monkeypatch)
    truth = run(case, exactly(tensors), "reference", monkeypatch)
    for i, (a, t, *e) in enumerate(zip(found, truth, *eagerly(case, tensors, monkeypatch), strict=True)):
        assert_within_budget(a, t, e, what=f"{case.reason}, result {i}")
    return found


def test_every_op_with_a_cuda_path_is_covered():
    ops = {op for op in _dispatch.ops() if "cuda" in _dispatch._ops[op]}
    assert ops == {op for op in ops if any(case.reason.startswith(op.removesuffix("_target")) for case in COVERED)}
    assert ops, "no op has a path in CUDA C++"


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.reason)
def test_equals_the_reference(case, memory_format, emulated, monkeypatch):
    tensors = case.tensors(SINGLE, memory_format)
    found = agree(case, tensors, monkeypatch)
    # Threads that do not wait for each other where they must see other values in another order.
    monkeypatch.setenv("FASTFUSE_EMULATED_ORDER", "backward")
    for a, b in zip(found, run(case, tensors, "cuda", monkeypatch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.reason)
def test_a_captured_graph_replays_on_new_inputs(case, monkeypatch):
    monkeypatch.setattr(_dispatch, "_process_default", "cuda")
    static = [x.detach().cuda().requires_grad_(x.requires_grad) for x in case.tensors(SINGLE)]
    wanted = [x for x in static if x.requires_grad]

    def forward_backward():
        outputs = [x for x in case.outputs(static) if x is not None]
        return [*outputs, *torch.autograd.grad([x.sum() for x in outputs], wanted, allow_unused=True)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward()
    with torch.no_grad():
        for x in static:
            x.mul_(1.5).add_(0.1)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, forward_backward(), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.reason)
def test_equals_the_reference_on_a_gpu(case, memory_format, dtype, monkeypatch):
    tensors = [x.detach().cuda().requires_grad_(x.requires_grad) for x in case.tensors(dtype, memory_format)]
    agree(case, tensors, monkeypatch)


def maps(*shapes, dtype=SINGLE, last=False):
    found = []
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        x = x.abs() if len(shape) == 3 else x
        x = x.to(dtype)
        found.append((x.contiguous(memory_format=LAST) if last and len(shape) == 4 else x).requires_grad_())
    return found


def losses_and_gradients(tensors, backend, **options):
    half = len(tensors) // 2
    losses = functional.attention_mse(tensors[:half], tensors[half:], backend=backend, **options)
    cotangent = torch.linspace(0.5, 2, losses.numel()).view(losses.shape).to(losses)
    return [losses, *torch.autograd.grad(losses, tensors, cotangent)]


@pytest.mark.parametrize(
    ("inputs", "targets", "dtype", "last"),
    [
        pytest.param([(2, 16, 8, 8)], [(2, 24, 8, 8)], BF16, False, id="8 positions at a time"),
        pytest.param([(2, 16, 8, 8)], [(2, 24, 8, 8)], HALF, True, id="8 channels at a time"),
        pytest.param([(1, 8, 33, 32)], [(1, 12, 33, 32)], SINGLE, False, id="more positions than one turn takes"),
        pytest.param([(1, 300, 3, 3)], [(1, 288, 3, 3)], SINGLE, True, id="more channels than a warp takes at once"),
        pytest.param([(1, 300, 3, 3)], [(1, 33, 3, 3)], BF16, False, id="odd extents, one value at a time"),
        pytest.param([(2, 5, 1, 1)], [(2, 7, 1, 1)], SINGLE, True, id="one position"),
        pytest.param([(2, 16, 4, 4)], [(2, 4, 4)], HALF, False, id="a ready map in half precision"),
    ],
)
def test_attention_mse_by_every_way_through_a_map(inputs, targets, dtype, last, emulated):
    tensors = maps(*inputs, *targets, dtype=dtype, last=last)
    ours, eager = (losses_and_gradients(tensors, backend) for backend in ("cuda", "reference"))
    for i, (a, t, e) in enumerate(zip(ours, losses_and_gradients(exactly(tensors), "reference"), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    assert [g.stride() for g in ours[1:]] == [x.stride() for x in tensors]


def test_attention_mse_of_many_pairs_takes_several_launches(emulated):
    tensors = maps(*[(1, 2, 2, 3)] * 40, *[(1, 3, 2, 3)] * 40)
    for a, e in zip(losses_and_gradients(tensors, "cuda"), losses_and_gradients(tensors, "reference"), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=["no samples", "no channels"])
def test_empty_maps(shape, emulated):
    tensors = maps(shape, shape)
    for a, e in zip(losses_and_gradients(tensors, "cuda"), losses_and_gradients(tensors, "reference"), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_maps_of_zeros_have_no_gradient(emulated):
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    y = torch.randn(2, 3, 4, 4)
    loss = functional.attention_mse(x, y, backend="cuda")
    torch.testing.assert_close(loss, functional.attention_mse(x, y, backend="reference"))
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def fusion(widths, outputs, size, training, dtype=SINGLE, last=False, wanted=True):
    """A module's maps, parameters and running statistics."""
    total = sum(widths)
    features = [
        x.requires_grad_(wanted) for x in maps(*[(size[0], w, *size[1:]) for w in widths], dtype=dtype, last=last)
    ]
    shapes = (total, 1, 3, 3), (total,), (total,), (outputs, total, 1, 1), (outputs,), (outputs,)
    parameters = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    running = [torch.rand(n, dtype=torch.float64).add(0.5).to(dtype) for n in (total, total, outputs, outputs)]
    return features, parameters, running, training


def fuse(modules, backend):
    """Results of all modules, running statistics afterwards, and gradients."""
    made, after, wanted = [], [], []
    for features, parameters, running, (first, second) in modules:
        depthwise, weight1, bias1, pointwise, weight2, bias2 = parameters
        own = [x.clone() for x in running]
        norms = (
            functional.BatchNorm(weight1, bias1, *own[:2], first),
            functional.BatchNorm(weight2, bias2, *own[2:], second),
        )
        made.append(functional.Fusion(features, depthwise, norms[0], pointwise, norms[1]))
        after += own
        wanted += [x for x in (*features, *parameters) if x.requires_grad]
    outputs = [x for found in functional.concat_fuse_all(made, backend=backend) for x in found]
    cotangents = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x) for x in outputs]
    return [*outputs, *after, *torch.autograd.grad(outputs, wanted, cotangents)]


def doubled(module):
    features, parameters, running, training = module
    return exactly(features), exactly(parameters), [x.double() for x in running], training


BOTH, FROZEN = (True, True), (False, True)


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(lambda: [fusion([4, 6], 5, (2, 5, 3), BOTH, HALF, last=True)], id="two channels at a time"),
        pytest.param(lambda: [fusion([3, 5], 5, (2, 5, 3), BOTH, HALF, last=True)], id="one channel at a time, half"),
        pytest.param(lambda: [fusion([35, 3], 4, (2, 7, 11), BOTH, last=True)], id="tiles of 32, several shares"),
        pytest.param(lambda: [fusion([6, 2], 4, (3, 4, 4), FROZEN, last=True)], id="running statistics, channels-last"),
        pytest.param(lambda: [fusion([6, 3], 8, (3, 6, 5), FROZEN)], id="running statistics"),
        pytest.param(
            lambda: [fusion([2, 1], 16, (2, 20, 19), BOTH)], id="the backward's channel exceeds shared memory"
        ),
        pytest.param(lambda: [fusion([2, 1], 16, (3, 20, 19), BOTH)], id="the forward's does too"),
        pytest.param(lambda: [fusion([6], 7, (3, 4, 4), BOTH, wanted=False)], id="no gradients of the maps"),
        pytest.param(
            lambda: [fusion([6], 7, (3, 4, 4), BOTH, last=True, wanted=False)], id="nor of channels-last ones"
        ),
        pytest.param(lambda: [fusion([3, 3], 3, (2, 4, 4), BOTH), fusion([3], 6, (2, 4, 4), BOTH)], id="two modules"),
        pytest.param(
            lambda: [fusion([2, 4], 3, (2, 4, 3), BOTH, last=True), fusion([3], 6, (2, 4, 3), BOTH, last=True)],
            id="two modules, channels-last",
        ),
    ],
)
def test_concat_fuse_by_every_way_through_a_map(modules, emulated):
    made = modules()
    ours, truth = fuse(made, "cuda"), fuse([doubled(m) for m in made], "reference")
    eager = in_other_orders(lambda: fuse(made, "reference"))
    for i, (a, t, *e) in enumerate(zip(ours, truth, *eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")


def test_concat_fuse_of_more_modules_than_a_launch_takes(emulated):
    made = [fusion([2], 2, (2, 3, 3), BOTH) for _ in range(9)]
    together, alone = fuse(made, "cuda"), [fuse([module], "cuda") for module in made]
    # Of each module three results, four running statistics, seven gradients.
    expected = [x for start, end in ((0, 3), (3, 7), (7, 14)) for found in alone for x in found[start:end]]
    for a, e in zip(together, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_concat_fuse_of_too_many_maps_is_refused(emulated):
    with pytest.raises(BackendUnavailableError, match="at most 20 maps of a module, this one has 21"):
        fuse([fusion([1] * 21, 2, (2, 2, 2), BOTH)], "cuda")


@pytest.mark.parametrize("mode", ["published", "normalized"])
@pytest.mark.parametrize(
    ("x", "y", "dtype", "last"),
    [
        pytest.param([(2, 4, 8, 8)], [(2, 8, 8, 8)], HALF, True, id="channels-last"),
        pytest.param([(1, 3, 32, 32)], [(1, 2, 32, 32)], SINGLE, False, id="as many positions as there may be"),
        pytest.param(
            [(2, 5, 3, 1), (1, 4, 7, 7)], [(2, 3, 3, 1), (1, 6, 7, 7)], BF16, False, id="odd shapes in a list"
        ),
    ],
)
def test_diversity(x, y, dtype, last, mode, emulated):
    def evaluate(x, y, backend):
        losses, shifted = functional.diversity(x, y, mode=mode, reduction="sum", backend=backend)
        return [losses, *shifted, *torch.autograd.grad(losses.sum(), x)]

    x, y = maps(*x, dtype=dtype, last=last), maps(*y, dtype=dtype, last=last)
    ours, eager = evaluate(x, y, "cuda"), evaluate(x, y, "reference")
    for i, (a, t, e) in enumerate(zip(ours, evaluate(exactly(x), exactly(y), "reference"), eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    assert [a.stride() for a in ours[1:]] == [one.stride() for one in (*y, *x)]


def test_diversity_keeps_ties(emulated):
    """Half of the values equal the threshold: each becomes n / 2."""
    y = torch.tensor([1.0, 2, 2, 2, 3, 4]).sqrt().view(1, 1, 2, 3)
    for a, e in zip(*(functional.diversity(y, y, backend=backend) for backend in ("cuda", "reference")), strict=True):
        torch.testing.assert_close(a, e)


def test_diversity_of_many_maps_takes_several_launches(emulated):
    x, y = maps(*[(1, 2, 2, 3)] * 30), maps(*[(1, 3, 2, 3)] * 30)
    losses, shifted = functional.diversity(x, y, backend="cuda")
    expected, others = functional.diversity(x, y, backend="reference")
    for a, e in zip([losses, *shifted], [expected, *others], strict=True):
        torch.testing.assert_close(a, e)


def test_compiles_in_one_graph(emulated):
    torch.compiler.reset()
    tensors = maps((2, 3, 5, 4), (1, 4, 3, 3), (2, 7, 5, 4), (1, 2, 3, 3), last=True)
    call = torch.compile(functional.attention_mse, fullgraph=True, backend="aot_eager")
    found, eager = (f(tensors[:2], tensors[2:], backend="cuda") for f in (call, functional.attention_mse))
    assert torch.equal(found, eager)
    for a, e in zip(torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(eager.sum(), tensors), strict=True):
        assert torch.equal(a, e) and a.stride() == e.stride()
