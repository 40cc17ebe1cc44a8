"""Connectors that bring maps of different widths and sizes together."""

from collections.abc import Sequence

from torch import Tensor, nn

Size = tuple[int, int]


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


class Regressor(Connector):
    """A connector to a smaller map: strided convolution without bias or padding, then batch norm; C channels stay C.

    In each extent the stride is H_in // H_out and the kernel H_in - (H_out - 1) stride: the windows of average pooling
    between any two sizes, with learned weights; every position is read. N(0, sqrt(2 / (kh kw C))) initialisation.

    Args:
        channels: C.
        size: (H_in, W_in) of the maps that it is given.
        smaller: (H_out, W_out), neither above that of `size`.
    """

    def __init__(self, channels: int, size: Size, smaller: Size) -> None:
        super().__init__(channels, channels)
        stride = (size[0] // smaller[0], size[1] // smaller[1])
        kernel = (size[0] - (smaller[0] - 1) * stride[0], size[1] - (smaller[1] - 1) * stride[1])
        self.conv = nn.Conv2d(channels, channels, kernel, stride, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


def smallest(sizes: Sequence[Size]) -> Size:
    """The smallest height and the smallest width of several maps."""
    heights, widths = zip(*sizes, strict=True)
    return min(heights), min(widths)
