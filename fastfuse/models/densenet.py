"""DenseNet for small images (Huang et al., 2017), without bottlenecks, as the published FFSD networks have it."""

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import Widening, initialise, pooled


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 3x3 convolution; what it makes is put behind what it reads."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C + growth, H, W]."""
        return torch.cat((x, self.conv1(self.relu(self.bn1(x)))), 1)


class Transition(nn.Module):
    """Batch norm, ReLU, 1x1 convolution to as many channels, 2x2 mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        # Odd sizes round up, as those of strided convolutions do: FFSD's transforms lead from n to 2n - 1 and 2n only.
        self.pool = nn.AvgPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, ceil(H / 2), ceil(W / 2)]."""
        return self.pool(self.conv1(self.relu(self.bn1(x))))


class DenseNet(Widening):
    """DenseNet-L-k: three dense blocks of (L - 4) / 3 layers, each adding k channels, and no compression between them.

    Taps are the results of the first two blocks, before the transition's batch norm and so signed, and the last ReLU.
    No dropout, which is the paper's choice as well for augmented images.

    Args:
        depth: L = 3n + 4 (40, 100, ...).
        growth: k.
        num_classes: K.
        first_channels: of the first convolution; None is 2k as published, the paper has 16.
    """

    stage_modules = (("conv1", "dense1"), ("trans1", "dense2"), ("trans2", "dense3"))

    def __init__(self, depth: int, growth: int, num_classes: int, *, first_channels: int | None = None) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3 or growth < 1:
            raise InputError(
                f"densenet{depth}_{growth}: the depth of a DenseNet is 3n + 4 with n >= 1, its growth at least 1"
            )
        first = 2 * growth if first_channels is None else first_channels
        if first < 1:
            raise InputError(f"first_channels must be at least 1, not {first}")
        layers = (depth - 4) // 3
        shallow, middle, deep = self.feature_channels = tuple(first + i * layers * growth for i in (1, 2, 3))

        def block(in_channels: int) -> nn.Sequential:
            return nn.Sequential(*(DenseLayer(in_channels + i * growth, growth) for i in range(layers)))

        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.dense1 = block(first)
        self.trans1 = Transition(shallow)
        self.dense2 = block(shallow)
        self.trans2 = Transition(middle)
        self.dense3 = block(middle)
        self.bn = nn.BatchNorm2d(deep)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(deep, num_classes)
        initialise(self)

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Staged.head`; the last map is tapped behind its activation."""
        deep = self.relu(self.bn(x))
        return self.fc(pooled(deep)), deep
