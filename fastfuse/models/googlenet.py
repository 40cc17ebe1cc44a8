"""GoogLeNet (Szegedy et al., 2015) for small images, with batch norm, as the published FFSD networks have it."""

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import Widening, initialise, pooled

# Table 1 of the paper, per module: 1x1; before the 3x3, 3x3; before the 5x5, 5x5; after the pooling.
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
STEM = 192


def _convolved(*widths: int, kernels: tuple[int, ...], bias: bool) -> list[nn.Module]:
    """Convolutions from width to width, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for i, kernel in enumerate(kernels):
        layers += [
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2, bias=bias),
            nn.BatchNorm2d(widths[i + 1]),
            nn.ReLU(inplace=True),
        ]
    return layers


class Inception(nn.Module):
    """Four branches over one map, their results side by side; all rectified.

    Args:
        in_channels: C.
        widths: a row of `STAGES`.
        conv_bias: as in `GoogLeNet`.
        split_5x5: as in `GoogLeNet`.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], *, conv_bias: bool, split_5x5: bool) -> None:
        super().__init__()
        one, before3, three, before5, five, projected = widths
        to_five = (before5, five, five) if split_5x5 else (before5, five)
        kernels = (1, 3, 3) if split_5x5 else (1, 5)
        self.branch1x1 = nn.Sequential(*_convolved(in_channels, one, kernels=(1,), bias=conv_bias))
        self.branch3x3 = nn.Sequential(*_convolved(in_channels, before3, three, kernels=(1, 3), bias=conv_bias))
        self.branch5x5 = nn.Sequential(*_convolved(in_channels, *to_five, kernels=kernels, bias=conv_bias))
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), *_convolved(in_channels, projected, kernels=(1,), bias=conv_bias)
        )
        self.out_channels = one + three + five + projected

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, H, W]."""
        return torch.cat((self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)), 1)


class GoogLeNet(Widening):
    """GoogLeNet with a stem of one 3x3 convolution at full resolution; a tap is the last module of each resolution.

    As published: no pooling in the stem, batch norm after every convolution, no auxiliary classifiers. What else
    deviates from the paper is an option whose default is the published one.

    Args:
        num_classes: K.
        conv_bias: whether convolutions carry a bias before their batch norm (published: True).
        split_5x5: two 3x3 convolutions, both of the 5x5's width, in its place (published: True; the paper has the 5x5).
        dropout: probability before the classifier (published: 0; the paper has 0.4).
    """

    # The pooling has no parameters and serves twice.
    stage_modules = (("stem", "stage1"), ("pool", "stage2"), ("pool", "stage3"))

    def __init__(
        self, num_classes: int, *, conv_bias: bool = True, split_5x5: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be from 0 to below 1, not {dropout}")
        self.stem = nn.Sequential(*_convolved(3, STEM, kernels=(3,), bias=conv_bias))
        channels, taps = STEM, []
        for stage, rows in enumerate(STAGES, 1):
            modules = []
            for widths in rows:
                modules.append(Inception(channels, widths, conv_bias=conv_bias, split_5x5=split_5x5))
                channels = modules[-1].out_channels
            taps.append(channels)
            self.add_module(f"stage{stage}", nn.Sequential(*modules))
        self.feature_channels = tuple(taps)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Staged.head`."""
        return self.fc(self.dropout(pooled(x))), x
