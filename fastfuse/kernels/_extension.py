"""Finds and loads the compiled library of fastfuse/csrc on first need, and remembers why it cannot.

In this order: a library built beforehand into the package (`make build`, `pip install --no-build-isolation .`); one
compiled on an earlier first use and kept in the user's cache; else it is compiled now, once, if nvcc is there and
FASTFUSE_BUILD is not 0. Nothing happens at import.
"""

import fcntl
import hashlib
import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _build, _dispatch, _library, _triton

PACKAGE = Path(__file__).parent


def may_compile() -> bool:
    """Whether FASTFUSE_BUILD (auto, 0 or 1; unset means auto) lets a first use compile.

    Raises:
        InputError: it has another value.
    """
    mode = os.environ.get("FASTFUSE_BUILD") or "auto"
    if mode not in ("auto", "0", "1"):
        raise InputError(f"FASTFUSE_BUILD is auto, 0 or 1, not {mode!r}")
    return mode != "0"


def prebuilt() -> Path:
    """Where a library that was built into the package lies."""
    return PACKAGE / _build.library_name()


def cached() -> Path:
    """Where a library that was compiled on first use lies: one for each state of the sources and list of GPUs."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpus = hashlib.sha256(" ".join(_build.architectures()).encode()).hexdigest()[:8]
    return root / "fastfuse" / f"{_build.fingerprint()}-{gpus}" / _build.library_name()


def state() -> str:
    """What `fastfuse info` says: where the library comes from, or why there is none. Compiles and loads nothing."""
    if prebuilt().exists():
        return "prebuilt"
    if (reason := _absent()) is not None:
        return f"absent: {reason}"
    return f"compiled on first use, kept in {cached().parent}" + ("" if cached().exists() else " (not yet)")


def why_not(tensor: Tensor | None) -> str | None:
    """Why kernels in CUDA C++ cannot serve a tensor, or this machine at all; None if they can.

    Only a tensor that they could serve makes the library load, and compile if it must.
    """
    if tensor is None:
        return _absent() if torch.cuda.is_available() else "this machine has no CUDA device"
    if tensor.device.type != "cuda":
        return f"its kernels run on CUDA tensors, this one is on {tensor.device}"
    if tensor.is_floating_point() and tensor.dtype not in _triton.DTYPES:
        return f"its kernels take float32, float16 and bfloat16, this tensor is {tensor.dtype}"
    return unloadable()


@_dispatch.constant_to_the_compiler
def unloadable() -> str | None:
    """Load the library at the first call; the reason if it cannot be loaded."""
    return _loaded()


def _absent() -> str | None:
    """Why there is no library and none can be compiled; None if there is one or it can."""
    if torch.version.cuda is None:
        return "the installed PyTorch is built without CUDA"
    try:
        if prebuilt().exists() or cached().exists():
            return None
    except _build.CannotBuildError as error:
        return str(error)
    if not may_compile():
        return "its library is not built, and FASTFUSE_BUILD=0 forbids compiling it on first use; run make build"
    reason = _build.missing()
    return None if reason is None else f"its library is not built, and it cannot be compiled on first use: {reason}"


@cache
def _loaded() -> str | None:
    if (reason := _absent()) is not None:
        return reason
    try:
        path = prebuilt() if prebuilt().exists() else _compiled()
        load(path)
    except (_build.CannotBuildError, OSError, RuntimeError) as error:
        return f"its library cannot be loaded: {str(error).splitlines()[0]}"
    return None


def _compiled() -> Path:
    """The library in the cache, compiled by whichever process comes first while the others wait."""
    target = cached()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                print(f"fastfuse: compiling its CUDA kernels once, into {target.parent}", file=sys.stderr)
                _build.build(target)
    return target


def load(path: Path) -> None:
    """Load a library and give its operators the fakes of their counterparts.

    Raises:
        OSError: it does not fit the installed PyTorch.
    """
    torch.ops.load_library(path)
    _library.adopt_fakes()
