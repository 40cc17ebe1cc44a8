"""ResNet-18 and ResNet-34 for large images (He et al., 2016): torchvision's networks with their four stages tapped."""

from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import Staged


class ImageNetResNet(Staged):
    """The layers of a torchvision ResNet under their own names: state dicts load both ways with `strict=True`.

    Initialised as torchvision does, which is what the published FFSD networks do: convolutions N(0, sqrt(2 / (kh kw
    C_out))).

    Args:
        name: `resnet18` or `resnet34`.
        num_classes: K.

    Raises:
        InputError: torchvision cannot be imported.
    """

    feature_channels = (64, 128, 256, 512)
    stage_modules = (("conv1", "bn1", "relu", "maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    avgpool: nn.Module

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        for child, layer in _torchvision_models(name).get_model(name, num_classes=num_classes).named_children():
            self.add_module(child, layer)

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Staged.head`."""
        return self.fc(torch.flatten(self.avgpool(x), 1)), x


def _torchvision_models(name: str) -> Any:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise InputError(
            f"{name} needs torchvision, which cannot be imported ({error}): install the torchvision that belongs to "
            f"torch {torch.__version__}, or choose a model that needs none, such as resnet32"
        ) from error
    return models
