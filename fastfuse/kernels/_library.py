"""Registration of the operators' schemas: `fastfuse::<op>_fwd` and `fastfuse::<op>_bwd`.

A schema has a fake that gives shapes, dtypes and strides, a closed-form implementation in eager tensor code for CPU
tensors, and a launcher for CUDA tensors that is imported when first executed. Under Triton's interpreter CPU tensors go
to the launcher too.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _triton

_LIBRARY = torch.library.Library("fastfuse", "DEF")


def launcher_of(where: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)


def define(
    name: str, signature: str, *, fake: Callable[..., Any], closed_form: Callable[..., Any], launcher: str
) -> None:
    """Register one schema.

    Args:
        name: `<op>_fwd` or `<op>_bwd`.
        signature: arguments and results, as torch.library takes them.
        fake: empty outputs for given inputs.
        closed_form: the same computation in eager tensor code.
        launcher: "module:function", loaded at the first call that runs kernels.
    """

    def launch(*arguments: Any) -> Any:
        first = next(x for a in arguments for x in (a if isinstance(a, list | tuple) else [a]) if isinstance(x, Tensor))
        if not first.is_cuda:
            return launcher_of(launcher)(*arguments)
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(first.device):
            return launcher_of(launcher)(*arguments)

    def on_cpu(*arguments: Any) -> Any:
        return launch(*arguments) if _triton.interpreting() else closed_form(*arguments)

    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, launch, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"fastfuse::{name}", fake, lib=_LIBRARY)
