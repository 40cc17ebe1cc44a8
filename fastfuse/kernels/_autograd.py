"""What the autograd functions of all ops share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_derivatives_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results raise when they are differentiated.

    torch's once_differentiable does so only where a cotangent requires a gradient. The results depend on the saved
    tensors too: a penalty on the gradient of a loss would silently have no gradient.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *cotangents: Tensor | None) -> Any:
        # Gradients are enabled here only under create_graph=True.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            cotangents = tuple(g if g is None else g.detach().requires_grad_() for g in cotangents)
        return once(ctx, *cotangents)

    return wrapper
