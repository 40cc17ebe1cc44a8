"""How a device runs the steps: what "auto" comes to, and what it cannot do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastfuse.errors import InputError


def pick_mode(name: str, device: torch.device) -> str:
    """A mode by name; "auto" is a CUDA graph on a GPU, where launches are the cost, and eager on a CPU.

    Compiling for a CPU takes minutes that only long runs earn back: it is there to be asked for.

    Raises:
        InputError: the device cannot do it.
    """
    on_gpu = device.type == "cuda"
    if name == "auto":
        return "graphed" if on_gpu else "eager"
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


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Whether GPUs may round the factors of float32 products to TF32, in this process, for a while."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
