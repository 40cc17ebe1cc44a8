"""Networks that return (logits, features); ours without hooks, those of others by `extract`."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fastfuse.errors import InputError, unknown_name

# Options of the families, see their classes.
_WRN_OPTIONS = ("conv_bias", "stride_on", "shortcut_input", "last_norm_momentum")
_DENSENET_OPTIONS = ("first_channels",)
_GOOGLENET_OPTIONS = ("conv_bias", "split_5x5", "dropout")

# Networks for large images; their depths are none of the CIFAR ResNets, 6n + 2.
IMAGENET = ("resnet18", "resnet34")
# The names that help and errors list; any valid depth of the families for small images can be built.
NAMES = (
    *("resnet20", "resnet32", "resnet56", "resnet110"),
    *("wrn16_2", "wrn16_4", "wrn28_2", "wrn28_4", "wrn28_10", "wrn40_2"),
    *("densenet40_12", "googlenet"),
    *IMAGENET,
)


def build(name: str, num_classes: int, *, taps: Sequence[str] = (), **options: Any) -> nn.Module:
    """A network by name.

    Args:
        name: `resnet{6n+2}`, `wrn{6n+4}_{k}`, `densenet{3n+4}_{k}` or `googlenet`, for example resnet32 or wrn16_2; or
            `resnet18`, `resnet34`, which are ImageNet's and need torchvision; or a network of others,
            `torchvision:NAME`, `timm:NAME` or `package.module:factory` (see `fastfuse.models.foreign`).
        num_classes: K, at least 1.
        taps: layers whose maps are the features, shallow to deep, in place of the network's own.
        options: the named deviations of a family (see `WideResNet`, `DenseNet`, `GoogLeNet`); arguments of a network
            of others.

    Raises:
        InputError: an unknown name (the near ones are listed), depth, option or layer, or a network of a library that
            is not there.
    """
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, not {num_classes}")
    if taps:
        from fastfuse.models.foreign import tapped_at

        return tapped_at(build(name, num_classes, **options), name, taps)
    if ":" in name:
        from fastfuse.models.foreign import build_foreign

        return build_foreign(name, num_classes, **options)
    if match := re.fullmatch(r"resnet(\d+)", name):
        if options:
            raise InputError(f"{name} has no option {', '.join(sorted(options))}: only other families have any")
        if name in IMAGENET:
            from fastfuse.models.imagenet import ImageNetResNet

            return ImageNetResNet(name, num_classes)
        from fastfuse.models.cifar_resnet import CifarResNet

        return CifarResNet(int(match[1]), num_classes)
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        from fastfuse.models.wide_resnet import WideResNet

        _check_options(name, options, _WRN_OPTIONS)
        return WideResNet(int(match[1]), int(match[2]), num_classes, **options)
    if match := re.fullmatch(r"densenet(\d+)_(\d+)", name):
        from fastfuse.models.densenet import DenseNet

        _check_options(name, options, _DENSENET_OPTIONS)
        return DenseNet(int(match[1]), int(match[2]), num_classes, **options)
    if name == "googlenet":
        from fastfuse.models.googlenet import GoogLeNet

        _check_options(name, options, _GOOGLENET_OPTIONS)
        return GoogLeNet(num_classes, **options)
    raise unknown_name("model", name, NAMES)


def _check_options(name: str, options: Iterable[str], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
