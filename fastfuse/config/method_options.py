"""Options that belong to some methods only; unset, a method takes its own value. Imports nothing heavy."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """Hyper-parameters of the methods, by the names of their options."""

    temperature: float | None = None
    """T of all KL terms (default: 2; ffl, one and ffcl 3; kd 4)."""
    rampup_epochs: float | None = None
    """Warm-up of the lambdas (ffsd, default 5) or of the KL terms (ffl, one and ffcl, default 80)."""
    lambda_diversity: float | None = None
    """ffsd: weight of diversity and of the students' self-distillation (default: 1e-5)."""
    lambda_fusion: float | None = None
    """ffsd: weight of the leader's attention terms (default: 10)."""
    lambda_self_distillation: float | None = None
    """ffsd: weight of the transforms' training (default: 1000)."""
    diversity_mode: str | None = None
    """ffsd: published or normalized scaling of the diversity target (default: published)."""
    kl_target_epsilon: float | None = None
    """ffl, one: added to KL targets (default: 0; their programs add 1e-7)."""
    sharing: str | None = None
    """ffl: shared (sub-networks are branches on one trunk) or separate networks (default: shared)."""
    branch_stage: int | None = None
    """ffl, one: stages that the sub-networks share (default: all but the last)."""
    kd_weight: float | None = None
    """kd: weight of the teacher's KL; cross-entropy has what is left to 1 (default: 0.9)."""
    at_weight: float | None = None
    """at: weight of the attention terms (default: 1000)."""
    factor_weight: float | None = None
    """ft, feed-*: weight of the factor terms (default: 500)."""
    factor_ratio: float | None = None
    """ft, feed-*, paraphraser: channels of a paraphrased factor per channel of the teacher's map (default: 0.5)."""
    factor_targets: str | None = None
    """feed-*: raw or paraphrased maps of the teachers (default: raw)."""
    teacher_reduction: str | None = None
    """feed-parallel: sum or mean over teachers (default: sum)."""
    translator_norm: bool | None = None
    """ft, feed-*: translators with batch norm (default: without, as published)."""
    dfa_weight: float | None = None
    """dfa: weight of the feature terms (default: 1)."""
    distance: str | None = None
    """dfa: l2 or ofd, the margin and partial-L2 form of overhaul distillation (default: l2)."""
    aggregation: str | None = None
    """dfa: searched, uniform, last or random weights of the teacher's maps (default: searched)."""
    gamma_st: float | None = None
    """dfa-search: weight of the path from student to teacher (default: 1)."""
    gamma_ts: float | None = None
    """dfa-search: weight of the path from teacher to student (default: 1)."""
    alpha_lr: float | None = None
    """dfa-search: learning rate of the aggregation weights (Adam; default: 3e-4)."""
    alpha_weight_decay: float | None = None
    """dfa-search: L2 of the aggregation weights, coupled (default: 1e-3)."""
    response_weight: float | None = None
    """ffcl: weight of the fused head's KL to each peer (default: 1)."""
    peer_weight: float | None = None
    """ffcl: weight of the KL between the peers (default: 1)."""
    fused_stages: int | None = None
    """ffcl: fuse the maps of so many of the deepest stages, each with a head of its own (default: 1)."""
    feature_distance: str | None = None
    """ffcl: attention, mse or kl from the fused map, the last two with connectors where widths differ (default:
    attention)."""
    feature_temperature: float | None = None
    """ffcl: T of --feature-distance kl, over positions (default: 1)."""
    attention_weight: float | None = None
    """ffcl: weight of the distances from the fused map (default: 10)."""
    regularization: str | None = None
    """ffcl: virtual (teacher), published (the program of Tf-KD), self (each network's own trained copy), or off
    (default: virtual)."""
    regularization_weight: float | None = None
    """ffcl: weight of the regularisation; cross-entropy has what is left to 1 (default: 0.1)."""
    regularization_temperature: float | None = None
    """ffcl: temperature of the virtual teacher, or of the copies (default: 20)."""
    detach_fusion: bool | None = None
    """ffcl: keep the fused head's gradient from the peers (default: no, as in ffl)."""


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """Where a method's teachers come from, and what is trained before it."""

    teachers: tuple[str, ...] = ()
    """Trained teachers: run folders, weight files of --teacher-model, torchvision:NAME or timm:NAME. Without any, they
    are trained first, into RUN/teachers. Of ffcl with --regularization self the copies: of each student, then of the
    teacher."""
    teacher_model: str | None = None
    """Network of the teachers that are weight files or trained first, and of ffcl's teacher (default: --model)."""
    teacher_count: int | None = None
    """Teachers to train first (default: the method's; feed-parallel 5, others 1)."""
    teacher_epochs: int | None = None
    """Epochs of a teacher, or of ffcl's copies, trained first (default: --epochs)."""
    paraphraser_epochs: int | None = None
    """ft, and feed-* with paraphrased targets: epochs of each paraphraser (default: --epochs)."""
    search_epochs: int | None = None
    """dfa: epochs of the search (default: --epochs)."""
    feed_stages: int | None = None
    """feed-sequential: students trained one after another (default: 5)."""
    aggregation_file: Path | None = None
    """dfa: the aggregation.json of another run, in place of a search."""


# Unset they take the method's own value.
METHOD_FIELDS = tuple(field.name for field in dataclasses.fields(MethodOptions))
TEACHER_FIELDS = tuple(field.name for field in dataclasses.fields(TeacherOptions))
