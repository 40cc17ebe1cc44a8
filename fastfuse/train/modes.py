"""How a device runs the steps: what "auto" comes to, and what it cannot do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastfuse.errors import InputError


def pick_mode(name: str, device: torch.device, *, processes: int = 1) -> str:
    """A mode by name; "auto" is a CUDA graph on a GPU, where launches are the cost, and eager on a CPU.

    Compiling for a CPU takes minutes that only long runs earn back: it is there to be asked for. So are the graphs of
    several processes: their collectives have not been replayed on several GPUs yet.

    Args:
        name: as --mode.
        device: where the steps run.
        processes: how many train together.

    Raises:
        InputError: the device cannot do it.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        return "graphed" if on_gpu and processes == 1 else "eager"
    if name.startswith("graphed") and not on_gpu:
        raise InputError(f"--mode {name} needs a CUDA device, not {device}: give --mode eager or compiled, or auto")
    if name == "compiled" and not on_gpu:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise InputError(
                f"--mode compiled needs a C++ compiler, and there is no {compiler}: install it or name one in CXX"
            )
    return name


def pick_amp(name: str, device: torch.device) -> str:
    """A precision by name; "auto" is bfloat16 on a GPU, and float32 on a CPU, of which many have nothing faster."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "off"


# The gradient scaler halves its scale after each; from where it begins, so many in a row leave nothing to halve.
_OVERFLOWS = 32


def pick_max_bad_steps(number: int | None, amp: str) -> int:
    """How many steps in a row may have a loss or gradient that is not finite; where not said, none but with fp16."""
    if number is not None:
        return number
    return _OVERFLOWS if amp == "fp16" else 0


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Whether GPUs may round the factors of float32 products to TF32, in this process, for a while."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def reproducible(*, on: bool) -> Iterator[None]:
    """Only operators whose results do not depend on how threads are scheduled, in this process, for a while.

    An operator that has no such form on a GPU raises a RuntimeError that names it.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    memory: Any = torch.utils.deterministic  # a module with a property, which its types do not know
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it finds faults, and costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
