"""Which backend serves an op: names, resolution, and the reason why one cannot.

`auto` takes the backend that was measured to be the fastest on this GPU, where preferences.json has a row for the op
and the backend is usable, else the first usable one in the order in which the op registered them; tensors on a CPU take
the reference. An explicit request never falls back. FASTFUSE_BACKEND replaces `auto` for the whole process; it is read
at the first call that asks.
"""

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfuse.errors import BackendUnavailableError, unknown_name

BACKENDS = ("reference", "triton", "cuda")
# device name -> op, or "op kind" -> {"backend", "microseconds" by backend, "commit"}, by benchmarks/preferences.py.
PREFERENCES = Path(__file__).with_name("preferences.json")

# op -> backend -> a function that says why the backend cannot serve a tensor, or this machine at all (None: it can).
WhyNot = Callable[[Tensor | None], str | None]
_ops: dict[str, dict[str, WhyNot | None]] = {}
_process_default: str | None = None


def constant_to_the_compiler(function: Any) -> Any:
    """What `torch.compiler.assume_constant_result` does, which imports the compiler for it: 1.4 s of every start."""
    function._dynamo_marked_constant = True
    return function


def register(op: str, backends: Mapping[str, WhyNot | None]) -> None:
    """Declare an op and its backends, the preferred one first."""
    _ops[op] = dict(backends)


def ops() -> tuple[str, ...]:
    """All registered ops, sorted."""
    return tuple(sorted(_ops))


def backends(op: str) -> tuple[str, ...]:
    """Those of an op, the preferred one first."""
    if op not in _ops:
        raise unknown_name("op", op, _ops)
    return tuple(_ops[op])


def why_not(op: str, backend: str, tensor: Tensor | None = None) -> str | None:
    """Why a backend cannot serve an op for such a tensor, or on this machine at all; None if it can."""
    if op not in _ops:
        raise unknown_name("op", op, _ops)
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, (*BACKENDS, "auto"))
    if backend not in _ops[op]:
        return f"this version has no {backend} kernel for {op}"
    reason = _ops[op][backend]
    return None if reason is None else reason(tensor)


def resolve(op: str, backend: str = "auto", tensor: Tensor | None = None, *, kind: str = "") -> str:
    """The name of the backend that serves a call on tensors like the one given.

    Args:
        op: its name.
        backend: one of BACKENDS, or "auto".
        tensor: one of the call; without it, what holds for this machine.
        kind: of call, where one op has several whose fastest backends may differ.

    Raises:
        BackendUnavailableError: an explicit backend cannot serve; the text says why.
        InputError: no such op or backend.
    """
    global _process_default
    mend = "use backend='auto'"
    if backend == "auto":
        if _process_default is None:
            _process_default = os.environ.get("FASTFUSE_BACKEND") or "auto"
        backend, mend = _process_default, "unset FASTFUSE_BACKEND"
    if backend == "auto":
        if tensor is not None and tensor.device.type == "cpu":
            return "reference"
        if tensor is not None and tensor.device.type == "cuda":
            measured = _measured(f"{op} {kind}".strip(), tensor.device.index)
            if measured is not None and why_not(op, measured, tensor) is None:
                return measured
        return next(name for name in _ops[op] if why_not(op, name, tensor) is None)
    if (reason := why_not(op, backend, tensor)) is not None:
        raise BackendUnavailableError(f"{op} cannot run on backend {backend!r}: {reason}; {mend}")
    return backend


# A constant to torch.compile, which cannot trace how it is found.
@constant_to_the_compiler
def _measured(op: str, device: int | None) -> str | None:
    """The backend that was measured to be the fastest for an op, or a kind of its calls, on a GPU."""
    row = preferences().get(_gpu_name(device), {}).get(op)
    return None if row is None else row["backend"]


@cache
def preferences() -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of preferences.json."""
    return json.loads(PREFERENCES.read_text())


@cache
def _gpu_name(device: int | None) -> str:
    return torch.cuda.get_device_name(device)
