"""FFSD's deep-to-shallow transform."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.nn._norm import batch_norm, count


class TransformStage(nn.Module):
    """Holds one transposed convolution and its norm; `DeepToShallow` runs the chain as one operator."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(
            in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)


class DeepToShallow(nn.Module):
    """Turns a deep map into maps of the shapes of the shallower stages.

    Args:
        feature_channels: channels of a network's tapped maps, shallow to deep, at least two.
    """

    def __init__(self, feature_channels: Sequence[int]) -> None:
        super().__init__()
        if len(feature_channels) < 2:
            raise InputError(f"a transform needs the channels of at least two stages, not {list(feature_channels)}")
        self.stages = nn.ModuleList(TransformStage(deep, shallow) for deep, shallow in pairwise(feature_channels[::-1]))

    def forward(
        self, deep: Tensor, *, sizes: Sequence[tuple[int, int]] | None = None, training: bool | None = None
    ) -> tuple[Tensor, ...]:
        """Shallow-looking maps of a deep one.

        Args:
            deep: [B, C, H, W].
            sizes: (height, width) of the maps to give, shallow to deep; None doubles at every stage.
            training: False uses running statistics whatever the module's mode, as the making of targets needs; None
                follows each norm's own mode.

        Returns:
            Maps in the order of a network's features without the last, shallow to deep.
        """
        (maps,) = transform_all([self], [deep], sizes=[sizes], training=training)
        return maps


def transform_all(
    transforms: Sequence[DeepToShallow],
    deep: Sequence[Tensor],
    *,
    sizes: Sequence[Sequence[tuple[int, int]] | None],
    training: bool | None = None,
    attention: bool = False,
) -> list[tuple[Tensor, ...]]:
    """What each of several transforms makes of its own deep map, all in one operator call.

    Args:
        transforms: the modules; those of one shape share their launches.
        deep, sizes: the arguments of each one's own call.
        training: as there, for all.
        attention: give attention maps [B, H, W] without gradients in place of the maps; needs running statistics.
    """
    counters: list[Tensor] = []
    chains = [
        [
            functional.Stage(s.deconv.weight, batch_norm(s.norm, training=training, counters=counters))
            for s in cast(Any, transform.stages)
        ]
        for transform in transforms
    ]
    count(counters)
    found: Any = functional.deep_to_shallow(deep, chains, sizes=sizes, attention=attention)
    return found  # a list, as deep is one
