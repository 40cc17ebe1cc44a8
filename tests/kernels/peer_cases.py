"""Heads for peer_kl_ce, and what one call of a backend gives."""

import torch

from fastfuse import functional


def heads(count, batch, classes, dtype=torch.float32, spread=1.0, rise=0.0, offset=0.0, transposed=False):
    """Rows that take gradients, around a common one that rises; transposed: classes lie a batch apart in memory."""
    common = torch.randn(batch, classes, dtype=torch.float64) + torch.linspace(offset, offset + rise, classes)
    rows = [(common + spread * torch.randn(batch, classes, dtype=torch.float64)).to(dtype) for _ in range(count)]
    rows = [row.t().contiguous().t() for row in rows] if transposed else rows
    return [row.requires_grad_() for row in rows]


def evaluate(rows, labels, backend, **options):
    """The result and all gradients, each head's two losses weighted differently."""
    rows = [row.detach().requires_grad_() for row in rows]
    found = functional.peer_kl_ce(rows, labels, backend=backend, **options)
    weights = torch.arange(1, len(rows) + 1) / 4
    loss = (found.cross_entropy * weights).sum() + (found.divergence * weights.flip(0)).sum()
    return found, torch.autograd.grad(loss, rows)


def run(rows, labels, backend, **options):
    """Both losses and all gradients."""
    found, gradients = evaluate(rows, labels, backend, **options)
    return [found.cross_entropy, found.divergence, *gradients]
