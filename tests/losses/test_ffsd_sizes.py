"""FFSD with last maps of several sizes: fusion reads regressed maps, students are compared at their own size."""

import copy

import pytest
import torch
from torch import Tensor

from fastfuse import FusionLoss
from tests.losses import batches, published
from tests.losses.test_regressors import gradients

HYPER = {
    "temperature": 2.0,
    "lambda_diversity": 0.3,
    "lambda_fusion": 10.0,
    "lambda_self_distillation": 1000.0,
    "diversity_mode": "published",
}
# channels of the students, sizes of their last maps, channels and size of the leader's
CASES = {
    "a larger map after a smaller one: repeated": ([(4, 8), (4, 8)], [4, 8], (4, 8), 4),
    "a smaller map after a larger one: means": ([(4, 8), (4, 8)], [8, 4], (4, 8), 4),
    "both ways, and a leader smaller than all": ([(4, 8), (6, 8), (4, 8)], [8, 4, 8], (5, 6), 2),
    "no leader": ([(4, 8), (4, 8)], [4, 8], None, None),
    "single maps, without transforms": ([(8,), (6,)], [8, 4], (8,), 4),
}


def at_size(x: Tensor, other: Tensor) -> Tensor:
    """Means over whole windows, or every position repeated."""
    if x.shape[2] < other.shape[2]:
        times = other.shape[2] // x.shape[2]
        return x.repeat_interleave(times, 2).repeat_interleave(times, 3)
    step = x.shape[2] // other.shape[2]
    return x.unfold(2, step, step).unfold(3, step, step).mean((4, 5))


def prepared(case: str) -> tuple[FusionLoss, dict]:
    students, sizes, leader, leader_size = CASES[case]
    torch.manual_seed(3)
    options = {"leader_channels": leader, "feature_sizes": sizes, "leader_size": leader_size}
    loss = FusionLoss(students, batches.CLASSES, method="ffsd", **HYPER, **options).double()
    given = batches.arguments(students, leader, deep=leader_size or 2)
    given["features"] = [batches.maps(4, c, size) for c, size in zip(students, sizes, strict=True)]
    return published.scramble(loss), given


@pytest.mark.parametrize("case", CASES)
def test_terms_gradients_and_statistics_equal_the_equations(case: str) -> None:
    loss, given = prepared(case)
    state = published.trainable_copy(loss)

    def joined(maps: list[Tensor]) -> list[Tensor]:
        # The helper brings maps to the smallest of those that it is given: a leader's smaller one is one of them.
        goal = [given["leader_features"][-1].detach()] if CASES[case][2] else []
        return published.regress([*maps, *goal], state)[: len(maps)]

    widths = [channels[-1] for channels in CASES[case][0]]
    sources = {i: i if widths[i] == widths[i - 1] else i - 1 for i in range(1, len(widths))}
    terms = published.flat(published.ffsd(state, HYPER, **given, trained_on=sources, together=joined, like=at_size))
    output = loss(**given)
    assert set(output.terms) == set(terms)
    assert batches.differing(output.terms, {name: term.detach() for name, term in terms.items()}) == {}
    ours = gradients(output.loss, batches.leaves(given) | dict(loss.named_parameters()))
    wanted = batches.leaves(given) | {name: t for name, t in state.items() if t.requires_grad}
    assert set(ours) == set(wanted)
    assert batches.differing(ours, gradients(sum(terms.values()), wanted)) == {}
    assert loss.regressors and all(ours[f"regressors.{name}.conv.weight"].any() for name in loss.regressors)


def test_the_fused_head_reaches_no_student() -> None:
    loss, given = prepared("a smaller map after a larger one: means")
    weights = dict(loss.fusion.named_parameters())
    changed, before = copy.deepcopy(loss), gradients(loss(**given).loss, batches.leaves(given))
    with torch.no_grad():
        for name, p in changed.fusion.named_parameters():
            p.copy_(weights[name] * 1.7)
    after = gradients(changed(**given).loss, batches.leaves(given))
    students = [name for name in before if name.startswith("student")]
    assert batches.differing({n: after[n] for n in students}, {n: before[n] for n in students}) == {}
