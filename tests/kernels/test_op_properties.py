"""What holds for every operator whatever it computes: layouts, precisions, compilation, where gradients stop."""

import pytest
import torch

from fastfuse.testing import relative_l2
from tests.kernels.op_cases import CASES, FORMATS

HALVES = [torch.float16, torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)


def evaluate(case, tensors):
    """Outputs and gradients of a fixed random combination of them."""
    outputs = case.outputs(tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    total = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(total, tensors[: len(case.shapes)])


@each_case
def test_channels_last_equals_contiguous(case):
    plain, strided = ([*r[0], *r[1]] for r in (evaluate(case, case.tensors(memory_format=f)) for f in FORMATS))
    for a, b in zip(plain, strided, strict=True):
        assert relative_l2(b, a) <= 1e-13


@pytest.mark.parametrize("dtype", HALVES)
@each_case
def test_half_precision(case, dtype):
    """Truth: the same rounded inputs in float64. Losses are summed in float32 and never rounded to half precision."""
    tensors = case.tensors(dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    outputs, gradients = evaluate(case, tensors)
    true_outputs, true_gradients = evaluate(case, exact)
    rounding = torch.finfo(dtype).eps
    for x, truth in zip(outputs, true_outputs, strict=True):
        # Attention maps and statistics of channels are given as they are summed.
        assert x.dtype == (torch.float32 if case.is_loss or x.dim() in (1, 3) else dtype)
        assert relative_l2(x, truth) <= (2e-6 if case.is_loss else 4 * rounding)
    for x, truth in zip(gradients, true_gradients, strict=True):
        assert x.dtype == dtype
        assert relative_l2(x, truth) <= (2 if case.is_loss else 8) * rounding


@each_case
def test_autocast(case):
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = case.outputs(tensors)
    gradients = torch.autograd.grad(sum(x.float().sum() for x in outputs), tensors[: len(case.shapes)])
    truth = case.outputs(case.tensors(torch.float64))
    for x, true in zip(outputs, truth, strict=True):
        if case.is_loss:
            assert x.dtype == torch.float32
        assert relative_l2(x, true) <= (2e-6 if case.is_loss else 0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@each_case
def test_compiles_in_one_graph(case):
    torch.compiler.reset()
    tensors = case.tensors()
    compiled = torch.compile(case.call, fullgraph=True, backend="eager")(*tensors)
    compiled = (compiled,) if isinstance(compiled, torch.Tensor) else tuple(compiled)
    for x, eager in zip(compiled, case.outputs(tensors), strict=True):
        assert torch.equal(x, eager)


TRACED = [
    case
    for case in CASES
    if case.reason
    in (
        "attention_mse: maps of different width",
        "diversity_loss as published",
        "peer_kl_ce: the middle one of three heads",
        "feature_kl over channels",
        "concat_conv1x1 of scaled and shifted maps with statistics, a batch of one",
        "concat_fuse on batch statistics",
        "deep_to_shallow to odd sizes, a batch of one",
    )
]


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.reason)
def test_compiled_backward(case):
    torch.compiler.reset()
    compiled = case._replace(call=torch.compile(case.call, fullgraph=True, backend="aot_eager"))
    expected, found = (evaluate(c, c.tensors()) for c in (case, compiled))
    for x, eager in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert relative_l2(x, eager) <= 1e-13
