"""Wide ResNet for small images (Zagoruyko and Komodakis, 2016) with the variations of the published FFSD networks."""

from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import Staged, initialise, pooled


class WideBlock(nn.Module):
    """Pre-activation block. Options as in `WideResNet`."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, conv_bias: bool, stride_on: str, shortcut_input: str
    ) -> None:
        super().__init__()
        first, second = (1, stride) if stride_on == "conv2" else (stride, 1)
        self.shortcut_input = shortcut_input
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, first, padding=1, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, second, padding=1, bias=conv_bias)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=conv_bias))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        activated = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        convolved_shortcut = len(self.shortcut) > 0
        return out + self.shortcut(activated if convolved_shortcut and self.shortcut_input == "activated" else x)


class WideResNet(Staged):
    """WRN-d-k: widths 16k, 32k, 64k; taps after the first two stages (before their activation) and after the last ReLU.

    The published FFSD networks deviate from the paper of Wide ResNet; each deviation is an option whose default is the
    published one.

    Args:
        depth: 6n + 4 (16, 28, 40, ...).
        width: k.
        num_classes: K.
        conv_bias: whether convolutions carry a bias (published: True).
        stride_on: which 3x3 convolution of a block is strided, "conv2" (published) or "conv1".
        shortcut_input: what a 1x1 shortcut reads, the block's "raw" input (published) or the "activated" one.
        last_norm_momentum: PyTorch momentum of the last batch norm: 0.9 as published, 0.1 recommended.
    """

    stage_modules = (("conv1", "layer1"), ("layer2",), ("layer3",))

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        *,
        conv_bias: bool = True,
        stride_on: str = "conv2",
        shortcut_input: str = "raw",
        last_norm_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise InputError(
                f"wrn{depth}_{width}: the depth of a Wide ResNet is 6n + 4 with n >= 1, its width at least 1"
            )
        if stride_on not in ("conv1", "conv2"):
            raise InputError(f"stride_on is 'conv1' or 'conv2', not {stride_on!r}")
        if shortcut_input not in ("raw", "activated"):
            raise InputError(f"shortcut_input is 'raw' or 'activated', not {shortcut_input!r}")
        blocks = (depth - 4) // 6
        options: dict[str, Any] = {"conv_bias": conv_bias, "stride_on": stride_on, "shortcut_input": shortcut_input}
        self.feature_channels = (16 * width, 32 * width, 64 * width)

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            first = WideBlock(in_channels, out_channels, stride, **options)
            return nn.Sequential(
                first, *(WideBlock(out_channels, out_channels, 1, **options) for _ in range(blocks - 1))
            )

        shallow, middle, deep = self.feature_channels
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=conv_bias)
        self.layer1 = stage(16, shallow, 1)
        self.layer2 = stage(shallow, middle, 2)
        self.layer3 = stage(middle, deep, 2)
        self.bn1 = nn.BatchNorm2d(deep, momentum=last_norm_momentum)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(deep, num_classes)
        initialise(self)

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Staged.head`; the last map is tapped behind its activation."""
        deep = self.relu(self.bn1(x))
        return self.fc(pooled(deep)), deep
