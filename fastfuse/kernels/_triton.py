"""What the Triton kernels share: when they can run, the constants of their launches, and device helpers.

Only `triton_kernels.py` files and their launchers import this module's device helpers; `why_not` needs no triton.
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels._limits import check_span

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# <architecture>.json: launch -> dtype and memory format -> {"constants", "microseconds", ...}, see benchmarks/tune.py.
TABLES = Path(__file__).with_name("tables")
# What `trying` puts in the place of a launch's constants.
_tried: dict[str, dict[str, int]] = {}


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # an import hook or an entry of sys.modules forbids it
        return False


# Looked up once, here: a look-up inside why_not could not be traced by torch.compile of torch 2.11.
_INSTALLED = _installed()


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors; slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(tensor: Tensor | None) -> str | None:
    """Why Triton kernels cannot serve a tensor, or this machine at all; None if they can."""
    if not _INSTALLED:
        return "triton is not installed"
    if tensor is None:
        usable = torch.cuda.is_available() or interpreting()
        return None if usable else "this machine has no CUDA device (TRITON_INTERPRET=1 interprets the kernels)"
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreting()):
        return f"its kernels run on CUDA tensors, this one is on {tensor.device}"
    if tensor.is_floating_point() and tensor.dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, this tensor is {tensor.dtype}"
    return None


def launch_constants(launch: str, like: Tensor, dtype: torch.dtype | None = None, **written: int) -> SimpleNamespace:
    """The constants of a launch, by name: as measured on this architecture where its table has a row, else as written.

    Args:
        launch: name of the row.
        like: a map of the launch, for architecture, dtype and memory format.
        dtype: of the arithmetic, where it is not that of `like`.
        written: the constants, with the values of a launch that has no row.
    """
    row = _tried.get(launch)
    if row is None:
        row = launch_table(architecture(like)).get(launch, {}).get(kind_of(like, dtype), {}).get("constants", {})
    return SimpleNamespace(**{name: row.get(name, value) for name, value in written.items()})


def kind_of(like: Tensor, dtype: torch.dtype | None = None) -> str:
    """What one row of a table serves: a dtype and a memory format."""
    layout = "channels_last" if like.dim() == 4 and like.stride(1) == 1 else "contiguous"
    return f"{str(dtype or like.dtype).removeprefix('torch.')} {layout}"


def architecture(like: Tensor) -> str | None:
    """Of the GPU that holds a tensor, as `sm_90`; None on a CPU."""
    return _architecture(like.device.index) if like.is_cuda else None


@cache
def _architecture(device: int | None) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def launch_table(architecture: str | None) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of an architecture; none where nothing was measured."""
    path = TABLES / f"{architecture}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def trying(launch: str, **constants: int) -> Iterator[None]:
    """Launch with other constants for a while, whatever the table says; to measure and to test them."""
    before = _tried.get(launch)
    _tried[launch] = constants
    try:
        yield
    finally:
        _tried.pop(launch)
        if before is not None:
            _tried[launch] = before


def map_strides(x: Tensor, *, far: bool = False) -> tuple[Tensor, int, int, int]:
    """A map [B, C, H, W] or [B, H, W] as kernels address it: strides of sample, channel and position (N = H W).

    Contiguous and channels-last tensors are taken as they are; only where height and width do not collapse into one
    stride (a cropped view) a contiguous copy is made.

    Args:
        x: the map.
        far: whether the kernels count in 64 bits within a sample too.

    Returns:
        The tensor and its three strides, in elements; the channel stride of an attention map is 0.

    Raises:
        InputError: a sample is too large for kernels that are not `far`.
    """
    if not far:
        check_span(x)
    height_stride, width_stride = x.stride()[-2:]
    if x.shape[-2] > 1 and x.shape[-1] > 1 and height_stride != x.shape[-1] * width_stride:
        x = x.contiguous()
        height_stride, width_stride = x.stride()[-2:]
    position = width_stride if x.shape[-1] > 1 else height_stride
    return x, x.stride(0), x.stride(1) if x.dim() == 4 else 0, position


def empty_map(
    like: Tensor, channels: int | None = None, *, size: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised map [B, channels, *size], by default as `like` in each of these, that kernels can address.

    Channels-last where `like` is so, or a slice of the channels of such a map, and not contiguous as well; else
    contiguous.
    """
    dense = like.is_contiguous(memory_format=torch.channels_last)
    last = (dense or like.stride(1) == 1 < like.stride(3)) and not like.is_contiguous()
    shape = like.shape[0], like.shape[1] if channels is None else channels, *(like.shape[2:] if size is None else size)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def map_like(x: Tensor) -> Tensor:
    """Uninitialised memory in the very format of a map [B, C, H, W] or [B, H, W], with one stride for its positions."""
    return map_strides(torch.empty_like(x), far=True)[0]
