"""Networks of stages in parts: the maps of all their blocks, their first stages, and the norms behind the blocks."""

from typing import Any, cast

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import NetworkOutput, Staged
from fastfuse.models.densenet import DenseNet
from fastfuse.models.extract import Wrapper
from fastfuse.models.wide_resnet import WideResNet


class BlockMaps(Wrapper):
    """A network whose features are the maps of all its `stage_blocks`, stage after stage.

    No hooks: the forward can be traced, so that norms can be folded.

    Args:
        network: with stages, see `check_stages`.

    Attributes:
        paths: of the blocks, in the order of the features.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        staged: Any = network
        self.paths = [path for stage in staged.stage_blocks for path in stage]

    def forward(self, images: Tensor) -> NetworkOutput:
        """[B, 3, H, W] to logits [B, K] and the maps, shallow to deep."""
        network: Any = self.network
        x, maps = images, []
        for *stem, stage in network.stage_modules:
            for name in stem:
                x = getattr(network, name)(x)
            for i, block in enumerate(getattr(network, stage)):
                x = block(x)
                if f"{stage}.{i}" in self.paths:
                    maps.append(x)
        return NetworkOutput(network.resume(x, len(network.stage_modules)).logits, tuple(maps))


def front(network: nn.Module, images: Tensor, stages: int) -> Tensor:
    """What the last block of stage number `stages` gives: `network.resume(front(network, x, i), i)` is the rest."""
    x, staged = images, cast(Staged, network)
    for names in staged.stage_modules[:stages]:
        for name in names:
            x = getattr(network, name)(x)
    return x


def norms_behind(network: nn.Module) -> list[list[nn.BatchNorm2d]] | None:
    """For each block of `stage_blocks` the norm that reads what it gives, ahead of a ReLU.

    None: the blocks of this network end with a ReLU.
    """
    if isinstance(network, DenseNet):
        return [[network.trans1.bn1], [network.trans2.bn1], [network.bn]]
    if not isinstance(network, WideResNet):
        return None
    blocks: list[Any] = [network.get_submodule(path) for stage in network.stage_blocks for path in stage]
    norms = iter([*(block.bn1 for block in blocks[1:]), network.bn1])
    return [[next(norms) for _ in stage] for stage in network.stage_blocks]


def check_stages(network: nn.Module, role: str) -> None:
    """Refuse a network without `stage_modules`, `stage_blocks` and `resume`.

    Args:
        network: any.
        role: for the message, "teacher" or "student".

    Raises:
        InputError: it has none.
    """
    if not all(hasattr(network, name) for name in ("stage_modules", "stage_blocks", "resume", "feature_channels")):
        raise InputError(
            f"the {role} ({type(network).__name__}) has no stages of blocks: choose a network of this package, "
            "such as resnet32 or wrn16_2, without --taps"
        )
