"""ONE's gate against its equations."""

import pytest
import torch
from torch import Tensor

from fastfuse.nn.gate import Gate, gated


def written_out(gate: Gate, shared: Tensor) -> Tensor:
    pooled = shared.sum((2, 3)) / (shared.shape[2] * shared.shape[3])
    linear = pooled @ gate.linear.weight.T + gate.linear.bias
    mean, variance = linear.mean(0), ((linear - linear.mean(0)) ** 2).mean(0)
    normed = (linear - mean) / (variance + 1e-5).sqrt() * gate.norm.weight + gate.norm.bias
    e = normed.clamp_min(0).exp()
    return e / e.sum(1, keepdim=True)


@pytest.mark.parametrize("branches", [2, 3, 5])
def test_weights_and_gradients_equal_the_equations(branches: int) -> None:
    gate = Gate(6, branches).double()
    with torch.no_grad():
        gate.norm.weight.uniform_(0.5, 1.5)
        gate.norm.bias.uniform_(-0.5, 0.5)
    shared = torch.randn(7, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    ours, wanted = gate(shared), written_out(gate, shared)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(ours.sum(1), torch.ones(7, dtype=torch.float64))
    leaves = [shared, *gate.parameters()]
    direction = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, leaves, direction) for x in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_evaluation_takes_running_statistics() -> None:
    gate = Gate(4, 3).double()
    for _ in range(3):
        gate(torch.randn(5, 4, 2, 2, dtype=torch.float64))
    one = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in gate.named_buffers()}
    first, second = gate.eval()(one), gate(one.repeat(3, 1, 1, 1))
    torch.testing.assert_close(second, first.repeat(3, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in gate.named_buffers())


def test_the_ensemble_is_the_weighted_sum() -> None:
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    logits = [torch.tensor([[4.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 8.0], [9.0, 9.0]])]
    assert torch.equal(gated(weights, logits), torch.tensor([[1.0, 6.0], [1.0, 2.0]]))
