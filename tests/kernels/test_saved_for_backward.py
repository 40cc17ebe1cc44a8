"""What operators keep for their backward: of the size of feature maps nothing but inputs, outputs, and one map for each
convolution that a norm follows.

Kernels are launched into nothing: what is kept does not depend on values.
"""

import pytest
import torch

from benchmarks.kernel_cases import cases
from fastfuse.kernels import _triton

NORMED = ("concat_fuse", "deep_to_shallow")  # whose convolutions a norm follows
CASES = [case for case in cases(batch=2) if case.quick and case.op != "augment"]


@pytest.fixture
def launched_into_nothing(monkeypatch):
    if not _triton.interpreting():
        pytest.skip("sees what is kept where Triton's interpreter would run the kernels, not on a machine with a GPU")
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.shape}")
def test_one_map_for_each_convolution_before_a_norm_and_no_other(case, launched_into_nothing):
    given, kept = case.make(torch.device("cpu"), torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = case.call(given, "triton")
    outputs = [x for x in ([found] if isinstance(found, torch.Tensor) else found) if isinstance(x, torch.Tensor)]
    known = {x.untyped_storage().data_ptr() for x in [*given, *outputs]}
    others = {place: x for x in kept if (place := x.untyped_storage().data_ptr()) not in known}
    maps = [x for x in others.values() if x.dim() == 4]
    convolutions = [x for x in given if x.dim() == 4 and x.shape[2:] in ((1, 1), (3, 3))]
    assert len(maps) <= (len(convolutions) if case.op in NORMED else 0), [x.shape for x in maps]
    small = sum(x.numel() for x in others.values() if x.dim() != 4)
    assert small <= sum(x.numel() for x in given) / 10, "attention maps, statistics"
