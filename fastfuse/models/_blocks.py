"""What the networks share: their output type, their stages, initialisation and pooling."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError


class NetworkOutput(NamedTuple):
    """What every network returns.

    Attributes:
        logits: [B, K] class scores before the softmax.
        features: one map [B, C_l, H_l, W_l] per tapped stage, shallow to deep.
    """

    logits: Tensor
    features: tuple[Tensor, ...]


class Staged(nn.Module):
    """A chain of stages and a head: the forward of all our networks, from its start or from behind any stage.

    Attributes:
        stage_modules: names of the children that make up each tapped stage in the order of their calls, the stem with
            the first; the rest is the head. The last one of a stage is an `nn.Sequential` of its blocks.
        feature_channels: C of each tapped map, shallow to deep.
        raw_taps: the last map is tapped as the last block gives it, whatever the head makes of it; of one network,
            `network.raw_taps = True`.
        done_stages: stages that others run: what `forward` reads is what the last one of them gives.
    """

    stage_modules: ClassVar[tuple[tuple[str, ...], ...]]
    feature_channels: tuple[int, ...]
    raw_taps: bool = False
    done_stages: int = 0
    fc: nn.Module

    def forward(self, images: Tensor) -> NetworkOutput:
        """[B, 3, H, W] to logits [B, K] and the tapped maps, shallow to deep."""
        return self.resume(images, self.done_stages)

    def resume(self, x: Tensor, stage: int) -> NetworkOutput:
        """What is left of a forward behind a stage.

        Args:
            x: what the last block of that stage gives, [B, C, H, W]; of stage 0 the images.
            stage: number of stages that are done, 0 to all of them.

        Returns:
            The logits and the tapped maps of the stages that are run here; none behind the last one.

        Raises:
            InputError: no such stage.
        """
        if not 0 <= stage <= len(self.stage_modules):
            raise InputError(f"a network of {len(self.stage_modules)} stages has no stage {stage} to resume from")
        maps = []
        for names in self.stage_modules[stage:]:
            for name in names:
                x = getattr(self, name)(x)
            maps.append(x)
        logits, tapped = self.head(x)
        return NetworkOutput(logits, (*maps[:-1], x if self.raw_taps else tapped) if maps else ())

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last stage's map to logits [B, K], and the map that is tapped in its place."""
        return self.fc(pooled(x)), x

    @property
    def stage_blocks(self) -> tuple[tuple[str, ...], ...]:
        """Per tapped stage the paths of the blocks that give maps of its resolution and width; the last is its end."""
        return tuple(
            tuple(f"{names[-1]}.{i}" for i, _ in enumerate(self.get_submodule(names[-1]).children()))
            for names in self.stage_modules
        )


class Widening(Staged):
    """A network whose blocks widen their stage: the last block of a stage alone has the width of its tap."""

    @property
    def stage_blocks(self) -> tuple[tuple[str, ...], ...]:
        """See `Staged.stage_blocks`: one per stage."""
        return tuple(paths[-1:] for paths in super().stage_blocks)


def initialise(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (kh kw C_out))), batch norm weight 1 and bias 0, linear layers as PyTorch does.

    Source: the published FFSD and FFL networks.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def last_channels(network: nn.Module) -> int:
    """C of the last map that a network taps, which has `feature_channels`."""
    tapped: Any = network
    return tapped.feature_channels[-1]


def pooled(feature: Tensor) -> Tensor:
    """Mean over the whole map: [B, C, H, W] to [B, C]."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(feature, 1), 1)
