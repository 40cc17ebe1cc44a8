"""The paraphraser of Factor Transfer, trained on its own (Kim et al., arXiv 1802.04977)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.losses import ParameterGroups, feed
from fastfuse.losses._checks import check_number
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.methods.taught import check_teachers
from fastfuse.models._blocks import last_channels
from fastfuse.nn.factor import Paraphraser
from fastfuse.nn.teachers import Teachers


class ParaphraserTraining(Method):
    """loss = mean |P(F_T) - F_T|: an autoencoder of a frozen teacher's last map. Labels are not used.

    Nothing that it trains classifies: the teacher is the head that evaluation sees, and the paraphraser's weights are
    deployed.

    Args:
        make_networks: not called: there is no student.
        num_classes: K.
        teachers: one.
        factor_ratio: k, channels of the factor per channel of the map.
    """

    name = "paraphraser"
    minimum_students = 1
    maximum_students = 1
    default_students = 1
    has_students = False
    teacher_count = 1
    deployed = "paraphraser"
    loop_only = "it trains no network that reads the images"
    defaults = {"factor_ratio": feed.FT_DEFAULTS["factor_ratio"]}  # noqa: RUF012 - a ClassVar[Mapping] in Method

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teachers: Sequence[nn.Module] = (),
        factor_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        check_teachers(type(self), len(teachers), 1)
        check_number("--factor-ratio", factor_ratio, positive=True)
        self.teachers = Teachers(teachers)
        channels = last_channels(teachers[0])
        self.paraphraser = Paraphraser(channels, feed.factor_width(channels, factor_ratio))

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`."""
        return self.teachers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        (teacher,) = outputs
        loss = self.error(teacher.features[-1])
        return MethodOutput(loss, {"teacher": teacher.logits}, {"reconstruction": loss.detach()})

    def error(self, feature: Tensor) -> Tensor:
        """Mean absolute error of the reconstruction of a map [B, C, H, W], 0-d."""
        return F.l1_loss(self.paraphraser(feature), feature)

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        return {"teacher": outputs[0].logits}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return {"paraphraser": self.paraphraser}

    def students(self) -> list[str]:
        """See `Method.students`: there are none."""
        return []

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        return ParameterGroups([network_group(list(self.paraphraser.parameters()), **settings)], [])

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`: the paraphraser's weights."""
        return self.paraphraser.state_dict()
