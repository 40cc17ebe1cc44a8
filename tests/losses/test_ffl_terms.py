"""FFL's terms and gradients against the equations; its fused head reaches the sub-networks; its ramp-up."""

import math

import pytest
import torch
from torch import Tensor

from fastfuse import FusionLoss
from tests.losses import batches, published

BOUND = 1e-10
HYPER = {"temperature": 3.0, "kl_target_epsilon": 0.0}
# channels of the sub-networks, size of their last map, deviations of hyper-parameters
CASES = {
    "published: two sub-networks": ([8, 8], 4, {}),
    "three sub-networks": ([8, 8, 8], 2, {}),
    "five sub-networks": ([4] * 5, 2, {}),
    "other channels per sub-network: the fused map takes the widest": ([6, 9, 4], 3, {}),
    "maps that are not square": ([8, 8], (2, 5), {}),
    "one pixel: last stage of a small image": ([8, 8], 1, {}),
    "the offset of the published program's targets": ([8, 8], 4, {"kl_target_epsilon": 1e-7}),
    "a large offset, which is not renormalised": ([8, 8], 4, {"kl_target_epsilon": 0.05}),
    "another temperature": ([8, 8], 4, {"temperature": 1.3}),
}


def prepared(case: str, **deviations: float) -> tuple[FusionLoss, dict]:
    students, deep, changed = CASES[case]
    loss = FusionLoss(students, batches.CLASSES, method="ffl", **(HYPER | changed | deviations))
    return published.scramble(loss.double()), batches.arguments(students, deep=deep)


@pytest.mark.parametrize("case", CASES)
def test_terms_gradients_and_statistics_equal_the_equations(case: str) -> None:
    loss, given = prepared(case)
    state = published.trainable_copy(loss)
    last = [maps[-1] for maps in given["features"]]
    factor = math.exp(-5 * (1 - 30 / 80) ** 2)
    hyper = HYPER | CASES[case][2]
    terms = published.flat(published.ffl(state, hyper, last, given["logits"], given["labels"], factor=factor))
    output = loss(**given, progress=30)
    assert set(output.terms) == set(terms)
    assert batches.differing(output.terms, {name: term.detach() for name, term in terms.items()}) == {}

    ours = _gradients(output.loss, batches.leaves(given) | dict(loss.named_parameters()))
    wanted = batches.leaves(given) | {name: t for name, t in state.items() if t.requires_grad}
    wanted = _gradients(sum(terms.values()), wanted)
    assert batches.differing(ours, wanted) == {}
    assert set(ours) == set(wanted)
    buffers = dict(loss.named_buffers())
    assert batches.differing(buffers, {name: t for name, t in state.items() if "running" in name}) == {}


def _gradients(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def test_the_fused_head_teaches_through_its_input_but_targets_are_constant() -> None:
    """Maps get gradients from the fused head's losses alone, logits from their own head's: the ensemble is a target."""
    loss, given = prepared("published: two sub-networks")
    state = published.trainable_copy(loss)
    last = [maps[-1] for maps in given["features"]]
    terms = published.ffl(state, HYPER, last, given["logits"], given["labels"])
    leaves = batches.leaves(given)
    ours = _gradients(loss(**given).loss, leaves)
    fused = _gradients(sum(terms["fusion"].values()), leaves)
    for i in range(2):
        own = _gradients(sum(terms[f"student{i}"].values()), leaves)
        assert fused[f"student{i}.maps.0"].abs().max() > 1e-3
        assert batches.error(ours[f"student{i}.maps.0"], fused[f"student{i}.maps.0"]) <= BOUND
        assert batches.error(ours[f"student{i}.logits"], own[f"student{i}.logits"]) <= BOUND


def test_defaults_are_the_published_ones() -> None:
    assert FusionLoss([8, 8], 5, method="ffl").hyperparameters == {
        "temperature": 3.0,
        "rampup_epochs": 80,
        "kl_target_epsilon": 0.0,
    }


@pytest.mark.parametrize(
    ("progress", "factor"), [(0, 0.0067), (40, 0.2865), (79, 0.9992), (80, 1.0), (81, 1.0), (300, 1.0)]
)
def test_ramp_up_weighs_the_kl_terms_and_nothing_else(progress: int, factor: float) -> None:
    loss, given = prepared("published: two sub-networks")
    full = loss(**given).terms
    exact = math.exp(-5 * (1 - min(progress, 80) / 80) ** 2)
    assert exact == pytest.approx(factor, abs=5e-5)
    for given_progress in (progress, torch.tensor(float(progress), dtype=torch.float64)):
        for name, term in loss(**given, progress=given_progress).terms.items():
            weight = exact if name.endswith("_kl") else 1.0
            assert term.item() == pytest.approx(weight * full[name].item(), rel=1e-12), name


@pytest.mark.parametrize(("rampup", "progress"), [(0, 0), (80, None)], ids=["length 0", "no progress given"])
def test_no_ramp(rampup: float, progress: float | None) -> None:
    loss, given = prepared("published: two sub-networks", rampup_epochs=rampup)
    full = loss(**given, progress=80).loss.item()
    assert loss(**given, progress=progress).loss.item() == pytest.approx(full, rel=1e-12)
    ramped, _ = prepared("published: two sub-networks")
    ramped.load_state_dict(loss.state_dict())
    assert ramped(**given, progress=0).loss.item() < full


def test_shallow_maps_are_not_used() -> None:
    """FFL fuses last maps; with maps of all stages given, the others get no gradient and no transform is built."""
    torch.manual_seed(3)
    loss = FusionLoss([[4, 8], [4, 8]], batches.CLASSES, method="ffl").double()
    assert not list(loss.transforms.parameters())
    given = batches.arguments([[4, 8], [4, 8]])
    found = _gradients(loss(**given).loss, batches.leaves(given))
    assert found["student0.maps.0"] is None and found["student1.maps.0"] is None
    assert found["student0.maps.1"].any() and found["student1.maps.1"].any()
