"""Connectors that bring maps of different widths together."""

from torch import Tensor, nn


class Connector(nn.Module):
    """1x1 convolution without bias, then batch norm: C_in channels to C_out.

    Source: the connectors of overhaul distillation (arXiv 1904.01866), N(0, sqrt(2 / C_out)) initialisation.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, feature: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H, W]."""
        return self.norm(self.conv(feature))
