"""ResNet for small images (He et al., 2016, section 4.2) with its three stages tapped, and its branch-sharing form."""

from collections import OrderedDict

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import NetworkOutput, initialise, pooled

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


class CifarResNet(nn.Module):
    """ResNet-(6n+2) with 16, 32 and 64 channels.

    Args:
        depth: 6n + 2 (20, 32, 56, 110, ...).
        num_classes: K.
    """

    feature_channels = WIDTHS

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

    def forward(self, images: Tensor) -> NetworkOutput:
        """[B, 3, H, W] to logits [B, K] and the maps of the three stages (16, 32, 64 channels)."""
        shallow = self.layer1(self.relu(self.bn1(self.conv1(images))))
        middle = self.layer2(shallow)
        deep = self.layer3(middle)
        return NetworkOutput(self.fc(pooled(deep)), (shallow, middle, deep))


class BranchedCifarResNet(nn.Module):
    """FFL-S: stem, layer1 and layer2 shared; one last stage and one classifier per branch (Kim et al., 2019).

    Args:
        depth: 6n + 2.
        num_classes: K.
        branches: number of sub-networks, 2 as published.
    """

    feature_channels = WIDTHS

    def __init__(self, depth: int, num_classes: int, branches: int = 2) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, 1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, 2)
        self.branches = nn.ModuleList(_stage(WIDTHS[1], WIDTHS[2], blocks, 2) for _ in range(branches))
        self.classifiers = nn.ModuleList(nn.Linear(WIDTHS[2], num_classes) for _ in range(branches))
        initialise(self)

    def forward(self, images: Tensor) -> list[NetworkOutput]:
        """[B, 3, H, W] to one (logits, features) per branch; the first two maps are the shared ones."""
        shallow = self.layer1(self.relu(self.bn1(self.conv1(images))))
        middle = self.layer2(shallow)
        outputs = []
        for branch, classifier in zip(self.branches, self.classifiers, strict=True):
            deep = branch(middle)
            outputs.append(NetworkOutput(classifier(pooled(deep)), (shallow, middle, deep)))
        return outputs

    def plain_state_dict(self, branch: int) -> dict[str, Tensor]:
        """The weights of one sub-network under the keys of `CifarResNet`: it loads there with `strict=True`.

        Raises:
            InputError: there is no such branch.
        """
        if not 0 <= branch < len(self.branches):
            raise InputError(f"branch {branch} does not exist: there are branches 0 to {len(self.branches) - 1}")
        own = {f"branches.{branch}.": "layer3.", f"classifiers.{branch}.": "fc."}
        plain = OrderedDict()
        for key, value in self.state_dict().items():
            for prefix, renamed in own.items():
                if key.startswith(prefix):
                    key = renamed + key.removeprefix(prefix)
            if not key.startswith(("branches.", "classifiers.")):
                plain[key] = value
        return plain
