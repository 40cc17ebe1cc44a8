"""Networks that return (logits, features): no hooks, no state on the module."""

import re
from typing import Any

from torch import nn

from fastfuse.errors import InputError, unknown_name

# Options of the Wide ResNets, see `WideResNet`.
_WRN_OPTIONS = ("conv_bias", "stride_on", "shortcut_input", "last_norm_momentum")

# The names that help and errors list; any valid depth of either family can be built.
NAMES = ("resnet20", "resnet32", "resnet56", "resnet110", "wrn16_2", "wrn28_10", "wrn40_2")


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network by name.

    Args:
        name: `resnet{6n+2}` or `wrn{6n+4}_{k}`, for example resnet32 or wrn16_2.
        num_classes: K, at least 1.
        options: the named deviations of a Wide ResNet (see `WideResNet`).

    Raises:
        InputError: an unknown name (the near ones are listed), depth, or option.
    """
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, not {num_classes}")
    if match := re.fullmatch(r"resnet(\d+)", name):
        if options:
            raise InputError(f"{name} has no option {', '.join(sorted(options))}: those belong to the wrn models")
        from fastfuse.models.cifar_resnet import CifarResNet

        return CifarResNet(int(match[1]), num_classes)
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        from fastfuse.models.wide_resnet import WideResNet

        for option in options:
            if option not in _WRN_OPTIONS:
                raise unknown_name(f"option of {name}", option, _WRN_OPTIONS)
        return WideResNet(int(match[1]), int(match[2]), num_classes, **options)
    raise unknown_name("model", name, NAMES)


def branched(name: str, num_classes: int, *, branches: int, **options: Any) -> nn.Module:
    """The same network with a shared trunk and one last stage per branch.

    Raises:
        InputError: a model that has no branch-sharing form.
    """
    match = re.fullmatch(r"resnet(\d+)", name)
    if not match or options:
        build(name, num_classes, **options)  # an unknown name or option is that error first
        raise InputError(f"{name} has no branch-sharing form; choose resnet20, resnet32, resnet56 or resnet110")
    from fastfuse.models.cifar_resnet import BranchedCifarResNet

    return BranchedCifarResNet(int(match[1]), num_classes, branches)
