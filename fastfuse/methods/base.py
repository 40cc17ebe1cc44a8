"""What every method is: networks, one forward that gives one scalar loss, and the network that it deploys."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.losses import ParameterGroups


class MethodOutput(NamedTuple):
    """One step's `loss` (0-d), detached `logits` [B, K] per head, and detached 0-d `terms` as they enter the sum."""

    loss: Tensor
    logits: dict[str, Tensor]
    terms: dict[str, Tensor]


class Method(nn.Module, ABC):
    """A way to train networks together. The loop knows nothing else of it.

    Class attributes:
        name: as on the command line.
        minimum_students: fewest students it works with.
        deployed: name of the network that is kept after training.
        defaults: its own hyper-parameters with their published values.
    """

    name: ClassVar[str]
    minimum_students: ClassVar[int]
    deployed: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> MethodOutput:
        """One training forward.

        Args:
            images: [B, 3, H, W], normalised.
            labels: [B] int64.
            progress: 0-d, epochs done so far (0 in the first), for the ramps; stays on the device.
        """

    @abstractmethod
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of every head by name, without the ensemble; call it in eval mode."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What `--init` can load weights into, by name."""

    @abstractmethod
    def students(self) -> list[str]:
        """The heads whose mean logits make the ensemble, and whose union of right answers makes the oracle."""

    @abstractmethod
    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """All parameters, once each, with the settings of `fastfuse.FusionLoss.parameter_groups`."""

    @abstractmethod
    def deployed_state(self) -> dict[str, Tensor]:
        """The weights of the deployed network alone, under the keys of the plain network."""


def check_students(method: type[Method], students: int) -> None:
    """Refuse fewer students than a method needs."""
    if students < method.minimum_students:
        raise InputError(
            f"{method.name} needs at least {method.minimum_students} students, not {students}; raise --students"
        )


def network_group(
    parameters: list[nn.Parameter],
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 1e-4,
    **others: Any,
) -> dict[str, Any]:
    """The SGD group of the networks themselves; `others` are settings of `FusionLoss`'s own parameters."""
    return {"params": parameters, "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
