"""Fusion head and trans-fusion of FFSD and FFL."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastfuse import functional
from fastfuse.nn._norm import batch_norm, count


class FusionOutput(NamedTuple):
    """`logits` [B, K], the `fused` map [B, C_out, H, W] and its `attention` map [B, H, W]."""

    logits: Tensor
    fused: Tensor
    attention: Tensor


class TransFusion(nn.Module):
    """Depthwise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU on the concatenation of its input maps.

    In FFSD it widens the leader's last map from C to the S C channels of the concatenated students' maps.

    Args:
        in_channels: channels of each input map; one entry for trans-fusion.
        out_channels: channels of the result.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        total = sum(in_channels)
        self.depthwise = nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False)
        self.norm1 = nn.BatchNorm2d(total)
        self.pointwise = nn.Conv2d(total, out_channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        for layer in (self.depthwise, self.pointwise):
            # N(0, sqrt(2 / (kh kw C_out))), as published.
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def given(self, features: Sequence[Tensor], counters: list[Tensor]) -> functional.Fusion:
        """What the operator is given for [B, C_s, H, W] maps: of trans-fusion only the attention map is wanted.

        The counters of norms in training mode are added to those given, for the caller to advance.
        """
        return functional.Fusion(
            features,
            self.depthwise.weight,
            batch_norm(self.norm1, counters=counters),
            self.pointwise.weight,
            batch_norm(self.norm2, counters=counters),
            fused=False,
            pooled=False,
        )

    def forward(self, features: Sequence[Tensor]) -> Any:
        """The attention map [B, H, W] of the result."""
        return _fused([(self, features)])[0].attention


class FusionHead(TransFusion):
    """The fusion module: fuses S students' last maps and classifies the result.

    Args:
        in_channels: channels of each student's last map.
        out_channels: channels of the fused map.
        num_classes: K.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, out_channels)
        self.classifier = nn.Linear(out_channels, num_classes)

    def given(self, features: Sequence[Tensor], counters: list[Tensor]) -> functional.Fusion:
        """What the operator is given: of the fusion module everything is wanted."""
        return super().given(features, counters)._replace(fused=True, pooled=True)

    def forward(self, features: Sequence[Tensor]) -> FusionOutput:
        """S maps [B, C_s, H, W] to logits [B, K], the fused map and its attention map."""
        return self.classify(_fused([(self, features)])[0])

    def classify(self, found: functional.ConcatFuse) -> FusionOutput:
        """The result of the operator with the logits."""
        made: Any = found  # with all three, as `given` asks
        return FusionOutput(self.classifier(made.pooled), made.fused, made.attention)


def fuse_all(heads: Sequence[FusionHead], features: Sequence[Sequence[Tensor]]) -> list[FusionOutput]:
    """Several fusion modules that do not depend on each other, each with its own maps [B, C_s, H, W]."""
    found = _fused(list(zip(heads, features, strict=True)))
    return [head.classify(made) for head, made in zip(heads, found, strict=True)]


def fuse_and_mirror(
    head: FusionHead, features: Sequence[Tensor], mirror: TransFusion, mirrored: Sequence[Tensor]
) -> tuple[FusionOutput, Tensor]:
    """Both modules, which do not depend on each other, in launches that they share.

    Args:
        head: the fusion module.
        features: the students' maps [B, C_s, H, W].
        mirror: trans-fusion.
        mirrored: the maps that it takes, the leader's.

    Returns:
        What the head gives, and the attention map [B, H, W] of trans-fusion.
    """
    fused, widened = _fused([(head, features), (mirror, mirrored)])
    mirrored_attention: Any = widened.attention  # wanted of every fusion
    return head.classify(fused), mirrored_attention


def _fused(given: Sequence[tuple[TransFusion, Sequence[Tensor]]]) -> list[functional.ConcatFuse]:
    counters: list[Tensor] = []
    found = functional.concat_fuse_all([module.given(maps, counters) for module, maps in given])
    count(counters)
    return found
