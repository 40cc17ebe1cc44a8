"""Eager truth of attention_mse and attention_map."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.kernels._numerics import attention, normalize, reduce


def attention_map(features: Sequence[Tensor]) -> Tensor:
    """Attention of the channel concatenation of [B, C_s, H, W] maps, which is never built: the C-weighted mean."""
    channels = [feature.shape[1] for feature in features]
    total = sum(channels)
    return sum(attention(f) * (c / total) for f, c in zip(features, channels, strict=True))


def attention_mse(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """D2(att(x), att(target)): per sample, the mean over H W of the squared difference of the normalised maps."""
    difference = normalize(attention(x)) - normalize(attention(target))
    return reduce(difference.square().mean(1), reduction)
