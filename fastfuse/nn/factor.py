"""Paraphraser and translators of Factor Transfer (Kim et al., arXiv 1802.04977) and FEED (arXiv 1909.10754)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError

SLOPE = 0.1


class Translator(nn.Sequential):
    """Three 3x3 convolutions, LeakyReLU(0.1) after each: C to C, to m, to m channels; a map keeps its size.

    With `count` it holds so many side by side, which read one map: the first convolution of all is one dense
    convolution, the others are grouped.

    Args:
        in_channels: C.
        factor_channels: m.
        norm: batch norms before the LeakyReLUs, and convolutions without bias; published: neither.
        count: how many.
    """

    def __init__(self, in_channels: int, factor_channels: int, *, norm: bool = False, count: int = 1) -> None:
        _check_channels(in_channels, factor_channels)
        widths = (in_channels, in_channels, factor_channels, factor_channels)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in (1, 2, 3):
            # What the first one reads is there once, for all.
            reads, groups = (widths[0], 1) if i == 1 else (widths[i - 1] * count, count)
            layers[f"conv{i}"] = nn.Conv2d(reads, widths[i] * count, 3, padding=1, groups=groups, bias=not norm)
            if norm:
                layers[f"norm{i}"] = nn.BatchNorm2d(widths[i] * count)
            layers[f"act{i}"] = nn.LeakyReLU(SLOPE, inplace=True)
        super().__init__(layers)


class Translators(nn.Module):
    """Several translators of one map, each equal to one that stands alone; those of one width run together.

    Args:
        in_channels: C of the map.
        factor_channels: m of each translator.
        norm: see `Translator`.
    """

    def __init__(self, in_channels: int, factor_channels: Sequence[int], *, norm: bool = False) -> None:
        super().__init__()
        widths = list(factor_channels)
        if not widths:
            raise InputError("factor_channels must hold the width of at least one translator")
        self._members = [[i for i, width in enumerate(widths) if width == own] for own in dict.fromkeys(widths)]
        self.together = nn.ModuleList(
            Translator(in_channels, widths[own[0]], norm=norm, count=len(own)) for own in self._members
        )

    def forward(self, feature: Tensor) -> list[Tensor]:
        """[B, C, H, W] to one map [B, m, H, W] per translator, in the order of their widths; views of joint maps."""
        found: dict[int, Tensor] = {}
        for own, network in zip(self._members, self.together, strict=True):
            found |= zip(own, network(feature).chunk(len(own), 1), strict=True)
        return [found[i] for i in range(len(found))]


class Paraphraser(nn.Module):
    """A convolutional autoencoder of a teacher's map; what its encoder gives is the teacher's factor.

    Encoder: a translator. Decoder: its mirror image in 3x3 transposed convolutions. Biases, no batch norm, and a
    LeakyReLU(0.1) after each of the six, as published.

    Args:
        in_channels: C of the teacher's map.
        factor_channels: m, published as C / 2.
    """

    def __init__(self, in_channels: int, factor_channels: int) -> None:
        super().__init__()
        self.encoder = Translator(in_channels, factor_channels)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths = (factor_channels, factor_channels, in_channels, in_channels)
        for i in (1, 2, 3):
            layers[f"conv{i}"] = nn.ConvTranspose2d(widths[i - 1], widths[i], 3, padding=1)
            layers[f"act{i}"] = nn.LeakyReLU(SLOPE, inplace=True)
        self.decoder = nn.Sequential(layers)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, C, H, W] to its reconstruction."""
        return self.decoder(self.encoder(feature))


class FactorNetwork(nn.Module):
    """A network that gives the factor of its last map in that map's place.

    Args:
        network: gives (logits, features).
        encoder: of the paraphraser that was trained on its last map.
    """

    def __init__(self, network: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.network, self.encoder = network, encoder
        tapped: Any = network
        last: Any = encoder.conv3
        self.feature_channels = (*tapped.feature_channels[:-1], last.out_channels)

    def forward(self, images: Tensor) -> Any:
        """[B, 3, H, W] to what the network gives, with another last map."""
        output = self.network(images)
        return output._replace(features=(*output.features[:-1], self.encoder(output.features[-1])))


def _check_channels(in_channels: int, factor_channels: int) -> None:
    if in_channels < 1 or factor_channels < 1:
        raise InputError(
            f"{in_channels} channels cannot be turned into {factor_channels}: both must be at least 1; raise "
            "--factor-ratio"
        )
