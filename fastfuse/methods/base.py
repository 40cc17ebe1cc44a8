"""What every method is: networks, one forward that gives one scalar loss, and the network that it deploys."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.losses import ParameterGroups
from fastfuse.methods.branching import Branched
from fastfuse.nn import STRATEGIES, Networks
from fastfuse.nn.teachers import Teachers


class MethodOutput(NamedTuple):
    """One step's `loss` (0-d), detached `logits` [B, K] per head, and detached 0-d `terms` as they enter the sum."""

    loss: Tensor
    logits: dict[str, Tensor]
    terms: dict[str, Tensor]


# Where a method keeps its networks, if it has them side by side.
_PEERS = "peers."


class Method(nn.Module, ABC):
    """A way to train networks together. The loop knows nothing else of it.

    Class attributes:
        name: as on the command line.
        minimum_students, maximum_students: how many students it works with; no maximum is None.
        default_students: how many it has without a word.
        has_students: whether they are networks of it at all; else the numbers above only let it be built as others are.
        teacher_count: frozen teachers that it has without a word; 0 is a method without teachers.
        extra_network: "leader" or "teacher" of a method that trains one more network beside its students.
        takes_image_size: whether its constructor wants the images' (height, width), as networks of several
            architectures may give maps of several sizes.
        image_parts: parts of the training images that every batch has equally many of, in order.
        deployed: name of the network that is kept after training.
        defaults: its own hyper-parameters with their published values.
        loop_only: of a method without `peers`, why its networks run in no other way than "loop".
    """

    name: ClassVar[str]
    minimum_students: ClassVar[int]
    maximum_students: ClassVar[int | None] = None
    default_students: ClassVar[int] = 2
    has_students: ClassVar[bool] = True
    teacher_count: ClassVar[int] = 0
    extra_network: ClassVar[str | None] = None
    takes_image_size: ClassVar[bool] = False
    image_parts: ClassVar[int] = 1
    deployed: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    peers: Any  # the networks that run side by side (`Networks`, `Branched`), where a method has them
    loop_only: ClassVar[str] = "it holds no networks that read the images side by side"

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> MethodOutput:
        """One training forward.

        Args:
            images: [B, 3, H, W], normalised.
            labels: [B] int64.
            progress: 0-d, epochs done so far (0 in the first), for the ramps; stays on the device.
        """
        return self.losses(self.outputs(images), labels, progress)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B, K] of every head by name, without the ensemble; call it in eval mode."""
        return self.heads(self.answers(images))

    def answers(self, images: Tensor) -> Sequence[Any]:
        """What `heads` reads: `outputs`, without what is a target alone."""
        return self.outputs(images)

    @abstractmethod
    def outputs(self, images: Tensor) -> Sequence[Any]:
        """What each network gives, (logits, features)."""

    def targets(self, images: Tensor) -> list[Any]:
        """What frozen teachers make of the images; of a method with both, `outputs` is what `peers` give, then this."""
        return []

    @abstractmethod
    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """The losses of one batch from what `outputs` gave; see `forward`."""

    @abstractmethod
    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """The logits of every head by name from what `outputs` gave; see `predict`."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """What `--init` can load weights into, by name.

        Raises:
            InputError: the networks are stacked (see `arrange`), so that there are none of their own.
        """

    def arrange(self, strategy: str) -> str:
        """Choose how the networks are run, see `fastfuse.nn.Networks.arrange`.

        Call it after initial weights are loaded and the method is on its device, and before optimizers are made:
        parameters are others afterwards. State dicts, predictions and `deployed_state` are those of any strategy.

        Args:
            strategy: "loop", "branches", "grouped" or "auto".

        Returns:
            The strategy, which "auto" leaves open.

        Raises:
            InputError: a strategy that the networks, the method or the device do not have.
        """
        if strategy not in (*STRATEGIES, "auto"):
            raise unknown_name("strategy", strategy, (*STRATEGIES, "auto"))
        self.arrange_teachers(strategy)
        if side_by_side(self):
            return self.peers.arrange(strategy)
        if strategy not in ("loop", "auto"):
            raise InputError(f"{self.name} cannot run as {strategy}: {self.loop_only}; use --strategy loop")
        return "loop"

    def arrange_teachers(self, strategy: str) -> None:
        """Choose how frozen teachers are run, if there are any, see `fastfuse.nn.teachers`."""
        teachers = getattr(self, "teachers", None)
        if isinstance(teachers, Teachers):
            teachers.arrange(strategy)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What goes with parameter `name`, such as its momentum, by the names of networks that stand alone.

        Args:
            name: as `named_parameters` gives it.
            tensor: in the shape of that parameter.
        """
        if not name.startswith(_PEERS):
            return {name: tensor}
        return {_PEERS + part: own for part, own in self.peers.split(name.removeprefix(_PEERS), tensor).items()}

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: one tensor for parameter `name` from those by the names of single networks."""
        if not name.startswith(_PEERS):
            return tensors[name]
        own = {part.removeprefix(_PEERS): tensor for part, tensor in tensors.items() if part.startswith(_PEERS)}
        return self.peers.join(name.removeprefix(_PEERS), own)

    @abstractmethod
    def students(self) -> list[str]:
        """The heads whose mean logits make the ensemble, and whose union of right answers makes the oracle."""

    def ensembles(self) -> dict[str, list[str]]:
        """The heads of each ensemble by the prefix of its name: all students in one, unless there are replicas."""
        return {"": self.students()}

    @abstractmethod
    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """All parameters, once each, with the settings of `fastfuse.FusionLoss.parameter_groups`."""

    @abstractmethod
    def deployed_state(self) -> dict[str, Tensor]:
        """The weights of the deployed network alone, under the keys of the plain network."""

    def results(self) -> dict[str, Any]:
        """What a method found besides weights, by name, as JSON can hold it; it may wait for the device."""
        return {}

    def deployed_states(self) -> dict[str, dict[str, Tensor]]:
        """What is deployed, by name: one network, unless there are replicas."""
        return {self.deployed: self.deployed_state()}


def side_by_side(method: nn.Module) -> bool:
    """Whether a method has `peers`, whose strategy can be chosen; not the share of them that a replica has."""
    return isinstance(getattr(method, "peers", None), Networks | Branched)


def check_students(method: type[Method], students: int) -> None:
    """Refuse fewer students than a method needs, and more than it can have."""
    if students < method.minimum_students:
        raise InputError(
            f"{method.name} needs at least {method.minimum_students} students, not {students}; raise --students"
        )
    if method.maximum_students is not None and students > method.maximum_students:
        raise InputError(
            f"{method.name} trains at most {method.maximum_students} student, not {students}; lower --students, or "
            "train several seeds with --replicas"
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
