"""Every backend equals the reference within the error budget: the catalogue of calls, forward and every gradient.

On a CPU the Triton kernels run in the interpreter; on a GPU they run, and are captured in a CUDA graph and replayed.
"""

import pytest
import torch

from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels import _dispatch
from fastfuse.testing import assert_within_budget, in_other_orders
from tests.kernels.op_cases import CASES, FORMATS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def moved(tensors, device):
    return [x.detach().to(device).requires_grad_(x.requires_grad) for x in tensors]


def run(case, tensors, backend, monkeypatch):
    """Outputs and gradients of a case; every output has its own fixed cotangent."""
    monkeypatch.setattr(_dispatch, "_process_default", backend)
    outputs = [x for x in case.outputs(tensors) if x is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    wanted = [x for x in tensors if x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return [*outputs, *[torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]]


def eagerly(case, tensors, monkeypatch):
    """Results of the reference as several machines would round them: where the tensors are, and on several CPUs.

    A GPU knows one order of summation: its luck on small tensors is no more of a budget than a CPU's.
    """
    devices = dict.fromkeys((tensors[0].device.type, "cpu"))
    return [
        found
        for device in devices
        for found in in_other_orders(lambda device=device: run(case, moved(tensors, device), "reference", monkeypatch))
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.float16, id="float16", marks=pytest.mark.long),
        pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_triton_equals_the_reference(case, memory_format, dtype, device, monkeypatch, nan_filled):
    # In bfloat16 another draw: in the first one a value before a ReLU lies within a rounding of zero, where eager and
    # the kernels may cut different elements off, and eager is right by luck in the mean of a few values.
    tensors = moved(case.tensors(dtype, memory_format, draw=int(dtype == torch.bfloat16)), device)
    try:
        ours = run(case, tensors, "triton", monkeypatch)
    except BackendUnavailableError as error:
        assert "no triton kernel" in str(error)
        pytest.skip(str(error))
    eager = eagerly(case, tensors, monkeypatch)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    truth = run(case, exact, "reference", monkeypatch)
    for i, (a, t, *e) in enumerate(zip(ours, truth, *eager, strict=True)):
        assert_within_budget(a, t, e, what=f"{case.reason}, result {i}")


# Two samples so far apart that the second one's elements lie beyond what 32 bits count.
FAR = 2**31 - 8


WITH_TWO_SAMPLES = [case for case in CASES if any(len(shape) == 4 and shape[0] == 2 for shape in case.shapes)]


def far_apart(x):
    """The same map with its samples FAR elements apart; memory that is never touched costs nothing."""
    if x.dim() != 4 or x.shape[0] != 2:
        return x
    with torch.no_grad():
        place = torch.empty(FAR + x[0].numel(), dtype=x.dtype, device=x.device)
        found = place.as_strided(x.shape, (FAR, *x.stride()[1:])).copy_(x)
    return found.requires_grad_(x.requires_grad)


@pytest.mark.long
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", WITH_TWO_SAMPLES, ids=lambda case: case.reason)
def test_offsets_beyond_32_bits(case, memory_format, device, monkeypatch):
    near = moved(case.tensors(torch.float16, memory_format), device)
    far = [far_apart(x) for x in near]
    for a, b in zip(*(run(case, tensors, "triton", monkeypatch) for tensors in (far, near)), strict=True):
        torch.testing.assert_close(a, b)


ONE_OF_EACH = list({case.reason.split(":")[0].split()[0]: case for case in CASES}.values())
OF_MAPS = [case for case in ONE_OF_EACH if len(case.shapes[0]) == 4]
COUNT_IN_32_BITS = ("attention_m", "normalized_lp", "concat_", "deep_to_shallow", "grouped_conv")


def channels_far_apart(x):
    """The same map, its channels so far apart that the last one lies beyond what 32 bits count."""
    if x.dim() != 4 or x.shape[1] == 1 or x.shape[2:] in ((1, 1), (3, 3)):  # weights stay as they are
        return x
    batch, channels, height, width = x.shape
    step = 2**31 // (channels - 1) + 1
    with torch.no_grad():
        place = torch.empty((channels - 1) * step + batch * height * width, dtype=x.dtype, device=x.device)
        found = place.as_strided(x.shape, (height * width, step, width, 1)).copy_(x)
    return found.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", OF_MAPS, ids=lambda case: case.reason)
def test_a_sample_beyond_32_bits_is_refused_or_right(case, device, monkeypatch):
    near = moved(case.tensors(torch.float16), device)
    far = [channels_far_apart(x) for x in near]
    assert any(a is not b for a, b in zip(near, far, strict=True))
    if case.reason.startswith(COUNT_IN_32_BITS):
        with pytest.raises(InputError, match=r"a sample of a map \[.*\] spans 2,147,.* elements"):
            run(case, far, "triton", monkeypatch)
        return
    for a, b in zip(*(run(case, tensors, "triton", monkeypatch) for tensors in (far, near)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.reason)
def test_a_penalty_on_a_gradient_is_refused(case, device, monkeypatch):
    """Its own gradient is computed by no kernel: it must not silently be zero, whatever the cotangents are."""
    monkeypatch.setattr(_dispatch, "_process_default", "triton")
    tensors = moved(case.tensors(torch.float32), device)
    outputs = case.outputs(tensors)
    wanted = [x for x in tensors if x.requires_grad]
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs if x.requires_grad), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_a_captured_graph_replays_on_new_inputs(case, monkeypatch):
    monkeypatch.setattr(_dispatch, "_process_default", "auto")
    static = moved(case.tensors(torch.float32), "cuda")

    def forward_backward():
        outputs = case.outputs(static)
        return outputs, torch.autograd.grad(
            [x.float().sum() for x in outputs], [x for x in static if x.requires_grad], allow_unused=True
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = forward_backward()
    with torch.no_grad():
        for x in static:
            x.mul_(1.5).add_(0.1)
    graph.replay()
    torch.cuda.synchronize()
    again, fresh = forward_backward()
    for a, b in zip([*outputs, *gradients], [*again, *fresh], strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)
