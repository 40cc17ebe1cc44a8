"""Inputs of batch_norm_act, and what one call of a backend gives."""

import torch

from fastfuse import functional
from fastfuse.testing import assert_within_budget
from tests.kernels.op_cases import FORMATS

LAST = torch.channels_last
MODES = [True, False]
FIELDS = ("weight", "bias", "running mean", "running variance")
# The bare norm, with ReLU, and a residual block's end: alone, linear, and with its attention map of two networks.
ENDINGS = [
    {"residual": False, "relu": False},
    {"residual": False},
    {"residual": False, "attention_groups": 2},
    {},
    {"relu": False},
    {"attention_groups": 2},
    {"relu": False, "attention_groups": 2},
]


def draw(shape, dtype=torch.float32, formats=FORMATS[:1] * 2, residual=True):
    """x, residual, and the norm's vectors; the same numbers, which half precision holds, in any dtype and format."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).half().to(dtype)

    c = shape[1]
    x, other = (normal(*shape).contiguous(memory_format=f).requires_grad_() for f in formats)
    norm = [(1 + normal(c) / 2).requires_grad_(), normal(c).requires_grad_(), normal(c), 0.5 + normal(c).abs()]
    return x, other if residual else None, norm


def evaluate(backend, x, residual, norm, training, cotangent_format=FORMATS[0], **options):
    """Results, running statistics, and the gradients of x, residual, weight and bias, by name."""
    bn = functional.BatchNorm(*norm, training, momentum=0.3, eps=1e-3)
    found = functional.batch_norm_act(x, bn, residual=residual, backend=backend, **options)
    outputs = {name: y for name, y in found._asdict().items() if y is not None}
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for y in outputs.values():
        values = torch.randn(y.shape, generator=generator, dtype=torch.float64).half().to(y.dtype)
        cotangents.append(values.contiguous(memory_format=cotangent_format))
    leaves = dict(zip(("x", "residual", *FIELDS), (x, residual, *norm), strict=True))
    leaves = {f"gradient of {name}": t for name, t in leaves.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    running = dict(zip(FIELDS[2:], norm[2:], strict=True))
    return outputs | running | dict(zip(leaves, gradients, strict=True))


def three(shape, dtype, training, formats=FORMATS[:1] * 3, residual=True, **options):
    """The kernels, the truth in float64, and eager in the kernels' dtype."""
    return [
        evaluate(backend, *draw(shape, of, formats[:2], residual), training, formats[2], **options)
        for backend, of in (("triton", dtype), ("reference", torch.float64), ("reference", dtype))
    ]


def compare(found, truth, eager):
    assert found.keys() == truth.keys() == eager.keys()
    for name, ours in found.items():
        assert_within_budget(ours, truth[name], eager[name], what=name)
