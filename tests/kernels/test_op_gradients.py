"""Gradients of every operator and every argument that takes one, against finite differences in float64."""

import pytest
import torch

from tests.kernels.op_cases import CASES, FORMATS


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_gradient_equals_finite_differences(case, memory_format):
    tensors = case.tensors(memory_format=memory_format)
    assert torch.autograd.gradcheck(lambda *x: case.outputs(x), tensors, eps=1e-6, atol=1e-7, rtol=1e-5)
