"""ONE's terms and gradients against the equations, and its ramp-up."""

import math

import pytest
import torch
from torch import Tensor

from fastfuse.losses import one
from tests.losses import batches, published


def rows(branches: int) -> tuple[list[Tensor], Tensor, Tensor]:
    return [batches.logits(6) for _ in range(branches)], batches.logits(6), torch.randint(batches.CLASSES, (6,))


@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize(
    ("temperature", "epsilon"),
    [(3.0, 0.0), (1.5, 0.0), (3.0, 1e-7), (3.0, 0.05)],
    ids=["published", "T", "1e-7", "0.05"],
)
def test_terms_and_gradients_equal_the_equations(branches: int, temperature: float, epsilon: float) -> None:
    logits, gated, labels = rows(branches)
    ours = one.terms(logits, gated, labels, progress=20.0, temperature=temperature, kl_target_epsilon=epsilon)
    weight = math.exp(-5 * (1 - 20 / 80) ** 2)
    wanted = {"gated_ce": published.cross_entropy(gated, labels)}
    for i, row in enumerate(logits):
        wanted[f"student{i}_ce"] = published.cross_entropy(row, labels)
        wanted[f"student{i}_kl"] = weight * published.kl(row, gated, temperature, epsilon)
    assert batches.differing(ours, wanted) == {} and set(ours) == set(wanted)
    leaves = dict(zip([*map(str, range(branches)), "gated"], [*logits, gated], strict=True))
    for name in wanted:
        found, right = (
            dict(
                zip(
                    leaves,
                    torch.autograd.grad(x[name], list(leaves.values()), allow_unused=True, retain_graph=True),
                    strict=True,
                )
            )
            for x in (ours, wanted)
        )
        assert batches.differing(found, right) == {}, name
        # The ensemble is a constant teacher: only its own cross-entropy reaches it.
        assert (found["gated"] is not None and found["gated"].any().item()) == (name == "gated_ce")


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.0067), (40.0, 0.2865), (80.0, 1.0), (300.0, 1.0)])
def test_the_ramp_weighs_the_kl_terms_alone(progress: float, factor: float) -> None:
    logits, gated, labels = rows(3)
    full = one.terms(logits, gated, labels)
    exact = math.exp(-5 * (1 - min(progress, 80) / 80) ** 2)
    assert exact == pytest.approx(factor, abs=5e-5)
    for given in (progress, torch.tensor(progress, dtype=torch.float64)):
        for name, term in one.terms(logits, gated, labels, progress=given).items():
            weight = exact if name.endswith("_kl") else 1.0
            assert term.item() == pytest.approx(weight * full[name].item(), rel=1e-12), name


def test_no_ramp() -> None:
    logits, gated, labels = rows(2)
    without, full = (
        one.terms(logits, gated, labels, progress=0.0, rampup_epochs=0),
        one.terms(logits, gated, labels, progress=80.0),
    )
    assert {n: t.item() for n, t in without.items()} == pytest.approx({n: t.item() for n, t in full.items()}, rel=1e-12)


def test_the_defaults_are_the_published_ones() -> None:
    assert one.DEFAULTS == {"temperature": 3.0, "rampup_epochs": 80, "kl_target_epsilon": 0.0}
