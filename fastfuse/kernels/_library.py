"""Registration of the operators' schemas: `fastfuse::<op>_fwd` and `fastfuse::<op>_bwd`.

A schema has a fake that gives shapes, dtypes and strides, a closed-form implementation in eager tensor code for CPU
tensors, and a launcher for CUDA tensors that is imported when first executed. Under Triton's interpreter CPU tensors go
to the launcher too.

The backend "cuda" implements the same schemas once more, as `fastfuse_cuda::<op>_fwd` and `_bwd`: in C++
(csrc/registration.cpp repeats the schema), or by a launcher that joins pieces in C++ with Triton kernels.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _triton

_LIBRARY = torch.library.Library("fastfuse", "DEF")
_CUDA = torch.library.Library("fastfuse_cuda", "FRAGMENT")
_fakes: dict[str, Callable[..., Any]] = {}


def namespace(backend: str) -> Any:
    """The operators of a backend: those of torch.ops.fastfuse_cuda for "cuda", of torch.ops.fastfuse for "triton"."""
    return torch.ops.fastfuse_cuda if backend == "cuda" else torch.ops.fastfuse


def cuda_names() -> list[str]:
    """Names of all operators in the namespace fastfuse_cuda."""
    prefix = "fastfuse_cuda::"
    return sorted(n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix))


def adopt_fakes() -> None:
    """Give the operators that the C++ library registered the fakes of their counterparts."""
    for name in cuda_names():
        if name in _fakes:
            torch.library.register_fake(f"fastfuse_cuda::{name}", _fakes.pop(name), lib=_CUDA)


def launcher_of(where: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)


def define(
    name: str,
    signature: str,
    *,
    fake: Callable[..., Any],
    closed_form: Callable[..., Any],
    launcher: str,
    joined: str | None = None,
) -> None:
    """Register one schema.

    Args:
        name: `<op>_fwd` or `<op>_bwd`.
        signature: arguments and results, as torch.library takes them.
        fake: empty outputs for given inputs.
        closed_form: the same computation in eager tensor code.
        launcher: "module:function", loaded at the first call that runs kernels.
        joined: the same for the backend "cuda" where Python joins its pieces; None where C++ has the whole schema or
            the op has no such backend.
    """

    launch = _launch(launcher)

    def on_cpu(*arguments: Any) -> Any:
        return launch(*arguments) if _triton.interpreting() else closed_form(*arguments)

    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, launch, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"fastfuse::{name}", fake, lib=_LIBRARY)
    if joined is None:
        _fakes[name] = fake
        return
    _CUDA.define(name + signature)
    for key in ("CUDA", "CPU"):  # on CPU tensors its pieces are there for tests only
        _CUDA.impl(name, _launch(joined), key)
    torch.library.register_fake(f"fastfuse_cuda::{name}", fake, lib=_CUDA)


def _launch(where: str) -> Callable[..., Any]:
    """The launcher that "module:function" names, run on the device of the first tensor."""

    def launch(*arguments: Any) -> Any:
        first = next(x for a in arguments for x in (a if isinstance(a, list | tuple) else [a]) if isinstance(x, Tensor))
        if not first.is_cuda:
            return launcher_of(where)(*arguments)
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(first.device):
            return launcher_of(where)(*arguments)

    return launch
