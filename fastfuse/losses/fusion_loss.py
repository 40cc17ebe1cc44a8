"""`FusionLoss`: the losses of FFSD, FFL and FFCL with the modules that they train, for any loop."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from fastfuse import functional
from fastfuse.errors import InputError, unknown_name
from fastfuse.losses import ffcl, ffl, ffsd
from fastfuse.losses._checks import (
    Batch,
    Expected,
    Maps,
    channel_list,
    check_fused_stages,
    check_networks,
    check_number,
    checked_batch,
    checked_sizes,
    resolve_hyperparameters,
    sizes_by_depth,
    with_copies,
)
from fastfuse.nn.connectors import Connector, Regressor, Size
from fastfuse.nn.fusion import FusionHead, TransFusion
from fastfuse.nn.transforms import DeepToShallow

METHODS = {"ffsd": ffsd, "ffl": ffl, "ffcl": ffcl}
FEATURE_TERMS = ("attention", "mse", "kl")
# Those that need the channels of both maps to be equal.
_CONNECTING = ("mse", "kl")


class FusionLossOutput(NamedTuple):
    """What `FusionLoss` returns.

    Attributes:
        loss: 0-d, the sum of all terms; call `backward()` on it once.
        terms: 0-d detached tensors by name, each as it enters the sum.
        fused_logits: [B, K], detached: the prediction of the fused head, of the last stage where several are fused.
        shallow_logits: the same of the other stages' heads, the second deepest stage's first.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    fused_logits: Tensor
    shallow_logits: Sequence[Tensor] = ()


class ParameterGroups(NamedTuple):
    """Parameter groups with their settings: `sgd` for torch.optim.SGD, `adam` for torch.optim.Adam (may be empty)."""

    sgd: list[dict[str, Any]]
    adam: list[dict[str, Any]]


class FusionLoss(nn.Module):
    """Feature-fusion distillation as a loss: FFSD (arXiv 2103.14473), FFL (arXiv 1904.09058) or FFCL (IJDSN 2021).

    It owns what the terms train (fusion head, trans-fusion, transforms, connectors, regressors); give its
    `parameter_groups()` to the optimizers. One backward of `.loss` trains students, leader and these modules; targets
    are detached inside.

    Args:
        feature_channels: for each student, the channels of its last map, or of all its tapped maps, shallow to deep.
            Self-distillation and its transforms exist only where maps of two or more stages are given; the transform
            of student i learns from student i's own maps, or, where the last maps of students i - 1 and i differ in
            width, from those of student i - 1, whose map it must read.
        num_classes: K.
        method: "ffsd", "ffl", or "ffcl", whose equations are inferred (docs/methods/ffcl.md) and whose teacher is one
            of the students here.
        leader_channels: the same for the leader; None trains without one (its logits and maps are then not taken).
        temperature: T of all KL terms (2 for ffsd, 3 for ffl and ffcl).
        rampup_epochs: warm-up of the lambdas (ffsd, 5), of the KL terms (ffl, 80) or of all transfer (ffcl, 80); 0
            switches it off.
        lambda_diversity: weight of diversity and of the students' self-distillation (ffsd, 1e-5).
        lambda_fusion: weight of the leader's attention terms (ffsd, 10).
        lambda_self_distillation: weight of the transforms' training (ffsd, 1000).
        diversity_mode: "published" or "normalized" (ffsd); see `fastfuse.functional.diversity_loss`.
        kl_target_epsilon: added to KL targets (ffl, 0; its program adds 1e-7).
        response_weight, peer_weight: weights of the KL from the fused head and from the other students (ffcl, 1).
        fused_stages: how many stages are fused, the deepest ones, each by a head of its own (ffcl, 1); the students'
            maps of as many are needed.
        feature_distance: of every student's map from the fused map: "attention", or "mse" or "kl" with 1x1 connectors
            where channels differ (ffcl, "attention").
        attention_weight: weight of that distance (ffcl, 10).
        regularization: "virtual", "published", "self" or "off" (ffcl); see `fastfuse.losses.ffcl`.
        regularization_weight: of that term; cross-entropy has what is left to 1 (ffcl, 0.1).
        regularization_temperature: of its virtual teacher, or of the student's own trained copy (ffcl, 20).
        detach_fusion: keep the fused head's gradient from the students (ffcl, False, as ffl).
        feature: None for the published terms alone; "attention", "mse" or "kl" adds a term that holds every student's
            last map against the detached fused map, summed across students, with 1x1 connectors for "mse" and "kl"
            where channels differ.
        feature_weight: weight of that term.
        feature_temperature: T of "kl", taken over positions; that of `feature_distance` as well.
        feature_sizes: (height, width), or one number for both, of each student's last map. Where they differ, a learned
            regressor (`fastfuse.nn.connectors.Regressor`) brings every larger map to the fused map's size, which is
            the leader's, or the smallest height and width; None, or equal ones: no regressor. With several
            `fused_stages` those of each of these stages, shallow to deep. In ffl and ffcl all that follows reads the
            result; in ffsd the fusion head does, and a student is compared with the one before at
            its own size, to which that one's map, a target, is pooled or repeated.
        leader_size: the same of the leader's last map.

    Raises:
        InputError: too few students, channels that are no positive integers, an unknown method, term or mode, a
            hyper-parameter that the method does not have or whose value cannot be used.
    """

    def __init__(
        self,
        feature_channels: Sequence[int | Sequence[int]],
        num_classes: int,
        *,
        method: str = "ffsd",
        leader_channels: int | Sequence[int] | None = None,
        temperature: float | None = None,
        rampup_epochs: float | None = None,
        lambda_diversity: float | None = None,
        lambda_fusion: float | None = None,
        lambda_self_distillation: float | None = None,
        diversity_mode: str | None = None,
        kl_target_epsilon: float | None = None,
        response_weight: float | None = None,
        peer_weight: float | None = None,
        fused_stages: int | None = None,
        feature_distance: str | None = None,
        attention_weight: float | None = None,
        regularization: str | None = None,
        regularization_weight: float | None = None,
        regularization_temperature: float | None = None,
        detach_fusion: bool | None = None,
        feature: str | None = None,
        feature_weight: float = 1.0,
        feature_temperature: float = 1.0,
        feature_sizes: Sequence[int | tuple[int, int] | Sequence[int | tuple[int, int]]] | None = None,
        leader_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check_choices(method, feature, num_classes)
        check_number("feature_weight", feature_weight)
        check_number("feature_temperature", feature_temperature, positive=True)
        self.method = method
        self.feature = feature
        self.feature_weight = feature_weight
        self.feature_temperature = feature_temperature
        given = {
            "temperature": temperature,
            "rampup_epochs": rampup_epochs,
            "lambda_diversity": lambda_diversity,
            "lambda_fusion": lambda_fusion,
            "lambda_self_distillation": lambda_self_distillation,
            "diversity_mode": diversity_mode,
            "kl_target_epsilon": kl_target_epsilon,
            "response_weight": response_weight,
            "peer_weight": peer_weight,
            "fused_stages": fused_stages,
            "feature_distance": feature_distance,
            "attention_weight": attention_weight,
            "regularization": regularization,
            "regularization_weight": regularization_weight,
            "regularization_temperature": regularization_temperature,
            "detach_fusion": detach_fusion,
        }
        choices = {"diversity_mode": ffsd.DIVERSITY_MODES, "regularization": ffcl.REGULARIZATIONS}
        choices["feature_distance"] = FEATURE_TERMS
        self.hyperparameters = resolve_hyperparameters(method, METHODS[method].DEFAULTS, choices, given)
        self.feature_channels = [channel_list(c) for c in feature_channels]
        self.leader_channels = None if leader_channels is None else channel_list(leader_channels)
        check_networks(method, self.feature_channels, self.leader_channels)
        self.fused_stages = check_fused_stages(
            self.hyperparameters.get("fused_stages", 1), len(self.feature_channels[0])
        )
        by_depth = sizes_by_depth(feature_sizes, self.fused_stages)
        self._take_sizes(by_depth[0], leader_size)
        self._build_last(num_classes)
        self.shallow_fusions = nn.ModuleDict()
        self.shallow_sizes: list[list[tuple[int, int]] | None] = []
        for depth, own in enumerate(by_depth[1:], start=2):
            self._build_shallower(depth, own, num_classes)

    def forward(
        self,
        features: Sequence[Maps],
        logits: Sequence[Tensor],
        labels: Tensor,
        *,
        leader_features: Maps | None = None,
        leader_logits: Tensor | None = None,
        copy_logits: Sequence[Tensor] | None = None,
        progress: float | Tensor | None = None,
    ) -> FusionLossOutput:
        """The sum of all losses of one batch.

        Args:
            features: for each student its last map [B, C, H, W], or its maps of all stages, shallow to deep.
            logits: for each student [B, K].
            labels: [B] int64.
            leader_features, leader_logits: the same of the leader, if the loss was built with `leader_channels`.
            copy_logits: with regularization="self", for each student [B, K] of its trained copy; detached.
            progress: epochs done so far, 0 in the first epoch (a number or a 0-d tensor), for the ramp-ups;
                None takes the weights after the ramp.

        Returns:
            FusionLossOutput(loss, terms, fused_logits, shallow_logits).

        Raises:
            InputError, TypeError: numbers of students or stages, channels, batch sizes, devices or dtypes that do not
                fit together; the text names the argument.
        """
        own = self.fusion.classifier
        built_for = (self.feature_channels, self.leader_channels, own.out_features, own.weight)
        expected = Expected(*built_for, self.feature_sizes, self.fused_size, self.shallow_sizes)
        batch = checked_batch(expected, features, logits, labels, leader_features, leader_logits)
        batch = with_copies(batch, copy_logits, needed=self.hyperparameters.get("regularization") == "self")
        if self.method != "ffsd":  # whose students are compared with each other as they are
            together = [[*maps] for maps in batch.features]
            for depth in range(1, self.fused_stages + 1):
                found = self.brought_together([maps[-depth] for maps in together], depth)
                for maps, feature in zip(together, found, strict=True):
                    maps[-depth] = feature
            batch = batch._replace(features=together)
        losses = METHODS[self.method]
        weight = 1.0 if progress is None else losses.ramp(progress, self.hyperparameters["rampup_epochs"])
        (loss, terms), head_logits, fused_map = losses.terms(self, batch, weight)
        if self.feature is not None:
            term = self.feature_weight * self._feature_term(batch, fused_map)
            loss, terms = loss + term, {**terms, "feature": term.detach()}
        fused_logits, *shallower = (row.detach() for row in head_logits)
        return FusionLossOutput(loss, terms, fused_logits, shallower)

    def brought_together(self, maps: Sequence[Tensor], depth: int = 1) -> list[Tensor]:
        """The students' maps [B, C_s, H_s, W_s] of one stage at one height and width, as its fusion head reads them.

        Args:
            maps: of the last stage, or of another one.
            depth: the stage, counted from the last one, which is 1.
        """
        return _through(self.regressors, maps, depth)

    def connected(self, maps: Sequence[Tensor], depth: int = 1) -> list[Tensor]:
        """What `brought_together` gives with the channels of the fused map, for the distances that need them equal."""
        return _through(self.connectors, maps, depth)

    def fusions(self) -> dict[str, FusionHead]:
        """The fusion heads by name, the deepest stage's first: fusion, fusion2 and so on."""
        shallower: Any = self.shallow_fusions
        return {"fusion": self.fusion, **dict(shallower.items())}

    def fused_heads(self, features: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The logits [B, K] of every fusion head by name.

        Args:
            features: for each student the maps of all its stages, shallow to deep, or as many as are fused.
        """
        heads = enumerate(self.fusions().items(), start=1)
        return {
            name: head(self.brought_together([maps[-depth] for maps in features], depth)).logits
            for depth, (name, head) in heads
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(), .cuda() and their like do."""
        super()._apply(fn, recurse)
        self.weights.follow(fn(self.weights.fixed))
        return self

    def parameter_groups(
        self,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 1e-4,
        fusion_weight_decay: float = 1e-5,
        transform_lr: float = 1e-3,
        transform_weight_decay: float = 1e-4,
    ) -> ParameterGroups:
        """This loss's own parameters as optimizer groups; the defaults are the published settings.

        Args:
            lr, momentum, nesterov: of the SGD groups.
            weight_decay: of trans-fusion, which is part of the leader, of connectors and of regressors.
            fusion_weight_decay: of the fusion heads.
            transform_lr, transform_weight_decay: of the Adam group (coupled L2, as in torch.optim.Adam).
        """
        sgd = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        heads = [p for head in self.fusions().values() for p in head.parameters()]
        groups = [{"params": heads, **sgd, "weight_decay": fusion_weight_decay}]
        own = (self.trans_fusion, self.connectors, self.regressors)
        others = [p for m in own if m is not None for p in m.parameters()]
        if others:
            groups.append({"params": others, **sgd, "weight_decay": weight_decay})
        transforms = list(self.transforms.parameters())
        adam = (
            [{"params": transforms, "lr": transform_lr, "weight_decay": transform_weight_decay}] if transforms else []
        )
        return ParameterGroups(groups, adam)

    def _take_sizes(self, given: Sequence[Any] | None, leader_size: Any) -> None:
        """Of the last maps, and of what they are brought to where they differ."""
        sizes = checked_sizes(given, leader_size, len(self.feature_channels))
        self.feature_sizes: list[Size] | None = sizes[0] if sizes else None
        self.fused_size: Size | None = sizes[1] if sizes else None
        if sizes and self.method == "ffsd" and self.feature is not None:
            raise InputError(f"ffsd has no feature={self.feature!r} for last maps of several sizes: leave it out")

    def _build_last(self, num_classes: int) -> None:
        """What reads the last maps, and the transforms; initial weights are drawn in this order."""
        last = [channels[-1] for channels in self.feature_channels]
        self.regressors = nn.ModuleDict()
        if self.feature_sizes and self.fused_size:
            self._build_regressors(last, self.feature_sizes, self.fused_size)
        # The leader's transform reads the fused map, so the fused map has the leader's width where there is a leader.
        fused_channels = self.leader_channels[-1] if self.leader_channels else max(last)
        self.fusion = FusionHead(last, fused_channels, num_classes)
        self.trans_fusion = TransFusion([self.leader_channels[-1]], sum(last)) if self.leader_channels else None
        self.transforms = nn.ModuleDict()
        self.transform_sources: dict[str, int | str] = {}
        if self.method == "ffsd" and len(self.feature_channels[0]) > 1:
            self._build_transforms()
        self.weights = METHODS[self.method].weights_of(self)
        self.connectors = nn.ModuleDict()
        if self._connects():
            self._build_connectors(last, fused_channels)

    def _connects(self) -> bool:
        """Whether the feature term, or the method itself, measures through connectors how far the fused map is."""
        distance = self.hyperparameters.get("feature_distance")
        connecting = [d for d in (self.feature, distance) if d in _CONNECTING]
        if len(connecting) > 1:
            raise InputError(
                f"feature={self.feature!r} and feature_distance={distance!r} hold the same maps against each other "
                "through the same connectors: leave feature out"
            )
        return bool(connecting)

    def _build_regressors(self, channels: list[int], sizes: list[Size], goal: Size, depth: int = 1) -> None:
        for i, (own, size) in enumerate(zip(channels, sizes, strict=True)):
            if size != goal:
                self.regressors[_part(i, depth)] = Regressor(own, size, goal)

    def _build_connectors(self, channels: list[int], fused_channels: int, depth: int = 1) -> None:
        for i, own in enumerate(channels):
            if own != fused_channels:
                self.connectors[_part(i, depth)] = Connector(own, fused_channels)

    def _build_shallower(self, depth: int, given: Sequence[Any] | None, num_classes: int) -> None:
        channels = [own[-depth] for own in self.feature_channels]
        sizes = checked_sizes(given, None, len(channels))
        self.shallow_sizes.append(sizes[0] if sizes else None)
        if sizes:
            self._build_regressors(channels, *sizes, depth)
        self.shallow_fusions[f"fusion{depth}"] = FusionHead(channels, max(channels), num_classes)
        if self.hyperparameters.get("feature_distance") in _CONNECTING:
            self._build_connectors(channels, max(channels), depth)

    def _build_transforms(self) -> None:
        for i in range(1, len(self.feature_channels)):
            # Published: trained on student i's maps, used on student i-1's. Where their widths differ, student i-1's
            # maps serve for both, since the transform must be able to read that student's map.
            same_width = self.feature_channels[i][-1] == self.feature_channels[i - 1][-1]
            source = i if same_width else i - 1
            self.transforms[f"student{i}"] = DeepToShallow(self.feature_channels[source])
            self.transform_sources[f"student{i}"] = source
        if self.leader_channels is not None:
            self.transforms["leader"] = DeepToShallow(self.leader_channels)
            self.transform_sources["leader"] = "leader"

    def _feature_term(self, batch: Batch, fused_map: Tensor) -> Tensor:
        maps = [student[-1] for student in batch.features]
        if self.feature == "attention":
            return functional.attention_mse(maps, [fused_map] * len(maps)).sum()
        maps = self.connected(maps)
        if self.feature == "mse":
            return functional.feature_mse(maps, fused_map)
        return functional.feature_kl(maps, fused_map, temperature=self.feature_temperature)


def _check_choices(method: str, feature: str | None, num_classes: int) -> None:
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if feature is not None and feature not in FEATURE_TERMS:
        raise unknown_name("feature term", feature, FEATURE_TERMS)
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, not {num_classes}")


def _part(student: int, depth: int) -> str:
    """Where a regressor or connector of a student is kept: that of the last stage under the student's name alone."""
    return f"student{student}" if depth == 1 else f"student{student}_{depth}"


def _through(modules: nn.ModuleDict, maps: Sequence[Tensor], depth: int) -> list[Tensor]:
    """Each student's map of a stage through its own module, where it has one."""
    names = [_part(i, depth) for i in range(len(maps))]
    return [modules[n](x) if n in modules else x for n, x in zip(names, maps, strict=True)]
