"""Augmentation and normalisation in plain, traceable PyTorch: index arithmetic, one gather, one affine map."""

import torch
from torch import Tensor


def augment(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    padding: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Gather [B, H, W, C] uint8 windows of the flipped, reflect-padded images, then `normalize` them."""
    height, width = images.shape[1:3]
    rows = offsets[:, :1] + torch.arange(height, device=images.device) - padding
    columns = offsets[:, 1:] + torch.arange(width, device=images.device) - padding
    # Flipping the padded image maps column c to W - 1 - c, since the padding is the same on both sides.
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    rows, columns = _reflect(rows, height), _reflect(columns, width)
    windows = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
    return normalize(windows, mean=mean, std=std, dtype=dtype, memory_format=memory_format)


def normalize(
    images: Tensor, *, mean: Tensor, std: Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """(x / 255 - mean) / std per channel: uint8 [B, H, W, C] to `dtype` [B, C, H, W]; arithmetic in at least fp32."""
    # The change of layout happens on bytes, before they grow to floats; to channels-last it is a view.
    pixels = images.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    scaled = pixels.to(torch.promote_types(dtype, torch.float32)).div_(255)
    return scaled.sub_(mean[:, None, None]).div_(std[:, None, None]).to(dtype)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions in 1 - size .. 2 * size - 2 back into 0 .. size - 1, the border itself not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()
