"""Every kernel keeps to its own memory, and needs no order of programs or threads that a GPU does not keep."""

import pytest
import torch
import triton
import triton.language as tl

from fastfuse.kernels import _dispatch
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.kernels.op_cases import CASES, FORMATS
from tests.kernels.test_backends_agree import run
from tests.kernels.watched_memory import watched_memory
from tests.methods import making

LAST = torch.channels_last
FORMS = [pytest.param(torch.float32, form, id=f"float32-{form}") for form in FORMATS]
# Other tiles, and halves of the vectors.
FORMS += [pytest.param(torch.bfloat16, LAST, id="bfloat16-channels_last", marks=pytest.mark.long)]


@pytest.fixture
def watch():
    if torch.cuda.is_available():
        pytest.skip("looks into Triton's interpreter, which is not used on a machine with a GPU")
    with watched_memory() as watch:
        yield watch


@pytest.mark.parametrize(("dtype", "memory_format"), FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_kernels_touch_what_is_theirs(case, dtype, memory_format, watch, monkeypatch):
    run(case, case.tensors(dtype, memory_format), "triton", monkeypatch)
    assert watch.launches and watch.accesses


@pytest.mark.long
@pytest.mark.parametrize("name", ["ffsd", "ffl"])
def test_a_grouped_step_in_bfloat16_touches_what_is_its_own(name, watch, monkeypatch):
    """Kernels read slices of stacked maps, and write gradients into them, in the precision of a GPU's default."""
    method = making.make(name, 2, num_classes=5)
    assert method.arrange("grouped") == "grouped"
    step = TrainStep(method, build_optimizers(method), amp="bf16")
    monkeypatch.setattr(_dispatch, "_process_default", "triton")
    output = step(torch.randn(4, 3, 12, 12), torch.arange(4) % 5, torch.tensor(30.0))
    assert output.loss.isfinite() and watch.launches > 20


@triton.jit
def planted_kernel(x, out, count, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + 1, and a fault."""
    p = tl.program_id(0)
    i = p * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    if FAULT == "reads outside":
        inside = i <= count
    value = tl.load(x + i, mask=inside, other=None if FAULT == "no other" else 0.0) + 1
    if FAULT == "reads another's":
        value += tl.load(out + (i + BLOCK) % count, mask=inside, other=0.0)
    if FAULT == "writes outside":
        inside = i <= count
    if FAULT == "writes another's":
        i //= 2 * BLOCK
    if FAULT == "two values":
        i = p * BLOCK + tl.arange(0, BLOCK) // 2
    tl.store(out + i, value, mask=inside)
    if FAULT == "reads its own" or FAULT == "after a barrier":
        if FAULT == "after a barrier":
            tl.debug_barrier()
        mirrored = p * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
        value += tl.load(out + mirrored, mask=mirrored < count, other=0.0)
        if FAULT == "after a barrier":
            tl.debug_barrier()
        tl.store(out + i, value, mask=inside)
    if FAULT == "writes again":
        tl.store(out + i, value + 1, mask=inside)


FAULTS = {
    "reads outside": "reads outside of what it was given, 1 times",
    "writes outside": "writes outside of what it was given, 1 times",
    "reads another's": "reads what another program writes|writes what another program reads",
    "writes another's": "writes two values to one element|writes what another program writes",
    "two values": "writes two values to one element",
    "no other": "reads what a mask leaves out",
    "reads its own": "reads what it has written itself, without a barrier",
    "writes again": "writes again what it has written, without a barrier",
}


def launch_planted(fault):
    x, out = torch.arange(11.0), torch.zeros(11)
    planted_kernel[(3,)](x, out, 11, fault, BLOCK=4)
    return x, out


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, watch):
    with pytest.raises(Exception, match=FAULTS[fault]):
        launch_planted(fault)


def test_what_is_in_order_passes(watch):
    x, out = launch_planted("none")
    assert torch.equal(out, x + 1) and watch.accesses == 22
    launch_planted("after a barrier")
    planted_kernel[(3,)](x, x, 11, "none", BLOCK=4)  # in place
    assert torch.equal(x, torch.arange(11.0) + 1) and watch.launches == 3
