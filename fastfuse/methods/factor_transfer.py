"""FT: a student whose translated last map learns its teacher's paraphrased one (Kim et al., arXiv 1802.04977)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.losses import ParameterGroups, feed
from fastfuse.losses._checks import check_number
from fastfuse.methods.base import network_group
from fastfuse.methods.taught import Taught, cross_entropy
from fastfuse.models._blocks import last_channels
from fastfuse.nn.factor import FactorNetwork, Paraphraser, Translators


class FactorTransfer(Taught):
    """loss = CE + factor_weight * |Tr(F) / |Tr(F)| - Enc(F_T) / |Enc(F_T)||, mean over all elements.

    Args:
        make_networks, num_classes: see `Taught`.
        teachers: one, with a last map of the student's height and width.
        paraphrasers: the state dict of a trained `Paraphraser` of each teacher, where targets are paraphrased.
        factor_weight: beta.
        factor_ratio: k, channels of a paraphrased factor per channel of the teacher's map.
        factor_targets: what the translated map learns, "paraphrased" or the teacher's "raw" last map.
        teacher_reduction: "sum" or "mean" over teachers.
        translator_norm: batch norms in the translators.

    Attributes:
        translators: one for each teacher; trained as the student is, not deployed.
    """

    name = "ft"
    defaults = feed.FT_DEFAULTS

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teachers: Sequence[nn.Module] = (),
        paraphrasers: Sequence[Mapping[str, Tensor]] = (),
        factor_weight: float = 500.0,
        factor_ratio: float = 0.5,
        factor_targets: str = "paraphrased",
        teacher_reduction: str = "sum",
        translator_norm: bool = False,
    ) -> None:
        check_number("--factor-weight", factor_weight)
        check_number("--factor-ratio", factor_ratio, positive=True)
        _check_choice("--factor-targets", factor_targets, feed.TARGETS)
        _check_choice("--teacher-reduction", teacher_reduction, feed.REDUCTIONS)
        if factor_targets == "paraphrased":
            teachers = paraphrased(teachers, paraphrasers, factor_ratio)
        elif paraphrasers:
            raise InputError("--factor-targets raw uses no paraphrasers: leave them out, or give paraphrased")
        super().__init__(make_networks, num_classes, teachers=teachers)
        self.factor_weight, self.teacher_reduction = factor_weight, teacher_reduction
        widths = [last_channels(teacher) for teacher in teachers]
        self.translators = Translators(last_channels(self.peers[0]), widths, norm=translator_norm)

    def wanted(self, output: Any) -> Tensor:
        """See `Taught.wanted`."""
        return output.features[-1]

    def terms(self, student: Any, targets: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """See `Taught.terms`."""
        translated = self.translators(student.features[-1])
        return {
            "student0_ce": cross_entropy(student.logits, labels),
            "student0_factor": feed.term(
                translated, targets, factor_weight=self.factor_weight, reduction=self.teacher_reduction
            ),
        }

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = [self.peers, self.translators]
        return ParameterGroups([network_group(list(module.parameters()), **settings) for module in own], [])


def paraphrased(
    teachers: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]], factor_ratio: float
) -> list[nn.Module]:
    """Networks that give the factor of each teacher's last map in its place.

    Raises:
        InputError: not one paraphraser for each teacher, or one of other channels.
    """
    if len(states) != len(teachers):
        raise InputError(
            f"{len(teachers)} teachers with {len(states)} paraphrasers: paraphrased factors need one trained by method "
            "paraphraser for each teacher"
        )
    found: list[nn.Module] = []
    for i, (teacher, state) in enumerate(zip(teachers, states, strict=True)):
        channels = last_channels(teacher)
        module = Paraphraser(channels, feed.factor_width(channels, factor_ratio))
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise InputError(
                f"paraphraser {i} does not fit a map of {channels} channels and --factor-ratio {factor_ratio}: train "
                "it on this teacher, with this ratio"
            ) from error
        found.append(FactorNetwork(teacher, module.encoder))
    return found


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown_name(option, value, known)
