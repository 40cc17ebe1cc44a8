"""Public ops `augment` and `normalize`: from uint8 images on the device to network input."""

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _library, _triton
from fastfuse.kernels.augment import reference

_dispatch.register("augment", {"triton": _triton.why_not, "reference": None})


def augment(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    padding: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
) -> Tensor:
    """Draw a batch of augmented, normalised images from a resident uint8 set, without a host wait.

    Each sample is reflect-padded by `padding` on all sides, flipped left to right where its flag says so, cropped back
    to [H, W] at its offset, and mapped to (x / 255 - mean) / std: Pad(reflect), HFlip, RandomCrop of the published
    recipes, each sample with its own draw. The padded image is never built.

    Args:
        images: uint8 [N, H, W, C], the whole set.
        indices: int64 [B], which images; each in 0 .. N - 1 (not checked: that would wait for the device).
        offsets: int64 [B, 2], row and column of the crop in the padded image; each in 0 .. 2 * padding (not checked).
        flips: bool [B].
        mean: float32 [C], in units where white is 1.
        std: float32 [C], same units.
        padding: pixels added on each side, 0 <= padding < min(H, W).
        dtype: floating type of the result; the arithmetic is done in at least float32.
        memory_format: `torch.contiguous_format` or `torch.channels_last` (no extra copy).
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        Tensor [B, C, H, W] of `dtype` in `memory_format`. Not differentiable.

    Raises:
        InputError: a shape, type, device or padding that does not fit.
        BackendUnavailableError: the backend asked for cannot serve here.
    """
    backend = _dispatch.resolve("augment", backend, images)
    _check_images(images, mean, std, dtype, memory_format)
    _check("indices", indices, torch.int64, ("B",), images.device)
    _check("offsets", offsets, torch.int64, (indices.shape[0], 2), images.device)
    _check("flips", flips, torch.bool, (indices.shape[0],), images.device)
    height, width = images.shape[1:3]
    if not 0 <= padding < min(height, width):
        raise InputError(
            f"padding must be at least 0 and smaller than both sides of the {height}x{width} images "
            f"(a reflection shows each pixel once), got {padding}"
        )
    if backend == "triton":
        channels_last = memory_format == torch.channels_last
        return torch.ops.fastfuse.augment_fwd(
            images, indices, offsets, flips, mean.detach(), std.detach(), padding, dtype, channels_last
        )
    return reference.augment(
        images,
        indices,
        offsets,
        flips,
        mean=mean,
        std=std,
        padding=padding,
        dtype=dtype,
        memory_format=memory_format,
    )


def normalize(
    images: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Map uint8 images [B, H, W, C] to (x / 255 - mean) / std, as [B, C, H, W]: the un-augmented `augment`.

    Arguments, result and errors are those of `augment`; both share one arithmetic, so an image that is neither
    shifted nor flipped comes out with the same bits.
    """
    _check_images(images, mean, std, dtype, memory_format)
    return reference.normalize(images, mean=mean, std=std, dtype=dtype, memory_format=memory_format)


def _check_images(
    images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    _check("images", images, torch.uint8, ("N", "H", "W", "C"), images.device)
    _check("mean", mean, torch.float32, (images.shape[3],), images.device)
    _check("std", std, torch.float32, (images.shape[3],), images.device)
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating point type, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise InputError(f"memory_format must be torch.contiguous_format or torch.channels_last, got {memory_format}")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int | str, ...], device: torch.device) -> None:
    """Require dtype, device and shape; a size given as a letter is free."""
    fits = len(sizes) == tensor.ndim and all(
        isinstance(want, str) or want == have for want, have in zip(sizes, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device != device:
        expected = ", ".join(map(str, sizes))
        raise InputError(
            f"{name} must be {dtype} [{expected}] on {device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _on_cpu(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    padding: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    form = {"dtype": dtype, "memory_format": _memory_format(channels_last)}
    found = reference.augment(images, indices, offsets, flips, mean=mean, std=std, padding=padding, **form)
    return found.contiguous(memory_format=_memory_format(channels_last))


def _empty(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    padding: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    height, width, channels = images.shape[1:]
    shape = (indices.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=_memory_format(channels_last))


_library.define(
    "augment_fwd",
    "(Tensor images, Tensor indices, Tensor offsets, Tensor flips, Tensor mean, Tensor std, int padding, "
    "ScalarType dtype, bool channels_last) -> Tensor",
    fake=_empty,
    closed_form=_on_cpu,
    launcher="fastfuse.kernels.augment.triton_kernels:forward",
)
