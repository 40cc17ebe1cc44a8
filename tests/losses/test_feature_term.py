"""The optional term that holds students' maps against the fused map, with its connectors."""

import pytest
import torch
from torch import Tensor

from fastfuse import FusionLoss
from tests.losses import batches, published


def gradients(loss: FusionLoss, total: Tensor, given: dict) -> dict[str, Tensor | None]:
    leaves = batches.leaves(given) | dict(loss.named_parameters())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))


def _mse(feature: Tensor, target: Tensor) -> Tensor:
    return ((feature - target) ** 2).sum() / feature.numel()


def _kl_over_positions(feature: Tensor, target: Tensor) -> Tensor:
    """T = 2.5; one distribution over the positions of every sample and channel."""
    rows = [x.flatten(0, 1).flatten(1) for x in (feature, target)]
    return published.kl(*rows, 2.5)


PLAIN = {
    "attention": lambda x, t: published.distance(published.attention(x), published.attention(t)),
    "mse": _mse,
    "kl": _kl_over_positions,
}


@pytest.mark.parametrize(
    ("method", "leader", "widths"),
    [
        pytest.param("ffsd", 8, {}, id="ffsd: equal widths need no connector"),
        pytest.param("ffsd", 5, {"student0": (8, 5), "student1": (8, 5)}, id="ffsd: to the leader's width"),
        pytest.param("ffl", None, {}, id="ffl: equal widths"),
        pytest.param("ffl", None, {"student1": (4, 8)}, id="ffl: to the widest sub-network's"),
    ],
)
@pytest.mark.parametrize("feature", PLAIN)
def test_feature_term(feature: str, method: str, leader: int | None, widths: dict) -> None:
    students = [8, 4 if "student1" in widths and method == "ffl" else 8]
    torch.manual_seed(4)
    loss = FusionLoss(
        students,
        batches.CLASSES,
        method=method,
        leader_channels=leader,
        feature=feature,
        feature_weight=0.7,
        feature_temperature=2.5,
    ).double()
    published.scramble(loss)
    plain = FusionLoss(students, batches.CLASSES, method=method, leader_channels=leader).double()
    plain.load_state_dict({k: v for k, v in loss.state_dict().items() if not k.startswith("connectors")})
    given = batches.arguments(students, leader)
    state = published.trainable_copy(loss)
    # By now the fused map that the term reads is known to be right (the terms' own tests).
    fused = published.fuse([maps[-1].detach() for maps in given["features"]], dict(state), "fusion").detach()
    if feature == "attention":
        assert not list(loss.connectors)
    else:
        assert {n: (c.conv.in_channels, c.conv.out_channels) for n, c in loss.connectors.items()} == widths
    connected = []
    for i, maps in enumerate(given["features"]):
        x, prefix = maps[-1], f"connectors.student{i}"
        if f"{prefix}.conv.weight" in state:
            x = torch.einsum("oc,bchw->bohw", state[f"{prefix}.conv.weight"][:, :, 0, 0], x)
            x = published.batch_norm(x, state, f"{prefix}.norm", True)
        connected.append(x)
    wanted = 0.7 * sum(PLAIN[feature](x, fused) for x in connected)

    output = loss(**given)
    assert batches.error(output.terms["feature"], wanted.detach()) <= 1e-10
    without = plain(**given)
    assert set(output.terms) - set(without.terms) == {"feature"}
    assert batches.differing(output.terms, without.terms, 1e-12) == {}
    # What the term adds to the gradients is its own gradient: students and connectors, not the fused map's makers.
    ours, base = gradients(loss, output.loss, given), gradients(plain, without.loss, given)
    leaves = batches.leaves(given) | {n: t for n, t in state.items() if t.requires_grad}
    added = dict(zip(leaves, torch.autograd.grad(wanted, list(leaves.values()), allow_unused=True), strict=True))
    for name, gradient in ours.items():
        parts = [g for g in (base.get(name), added[name]) if g is not None]
        assert batches.error(gradient, sum(parts) if parts else None) <= 1e-10, name
    assert added["student0.maps.0"].any()


@pytest.mark.parametrize("feature", ["attention", "mse", "kl"])
def test_feature_term_ignores_the_ramp(feature: str) -> None:
    """It is not part of the published methods: its weight is the one that was given."""
    loss = FusionLoss([8, 8], batches.CLASSES, method="ffl", feature=feature).double()
    given = batches.arguments([8, 8])
    assert loss(**given, progress=0).terms["feature"].item() == loss(**given).terms["feature"].item()
