"""ResNet for small images (He et al., 2016, section 4.2) with its three stages tapped."""

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import Staged, initialise

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; keys as in torchvision."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _blocks_per_stage(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise InputError(
            f"resnet{depth}: the depth of a CIFAR ResNet is 6n + 2 with n >= 1, for example 20, 32, 56, 110; those of "
            "ImageNet are 18 and 34"
        )
    return (depth - 2) // 6


class CifarResNet(Staged):
    """ResNet-(6n+2) with 16, 32 and 64 channels.

    Args:
        depth: 6n + 2 (20, 32, 56, 110, ...).
        num_classes: K.
    """

    feature_channels = WIDTHS
    stage_modules = (("conv1", "bn1", "relu", "layer1"), ("layer2",), ("layer3",))

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, 1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, 2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, 2)
        self.fc = nn.Linear(WIDTHS[2], num_classes)
        initialise(self)
