"""Random batches for the drop-in loss: maps and logits as leaves whose gradients can be asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CLASSES = 5


def maps(batch: int, channels: int | Sequence[int], deep: int | tuple[int, int] = 2) -> list[Tensor]:
    """Maps of a network tapped shallow to deep; each is twice as large as the next deeper one."""
    channels = [channels] if isinstance(channels, int) else list(channels)
    height, width = (deep, deep) if isinstance(deep, int) else deep
    sizes = [(height << level, width << level) for level in range(len(channels))][::-1]
    return [
        torch.randn(batch, c, *size, dtype=torch.float64).requires_grad_()
        for c, size in zip(channels, sizes, strict=True)
    ]


def logits(batch: int) -> Tensor:
    return torch.randn(batch, CLASSES, dtype=torch.float64).mul_(2).requires_grad_()


def arguments(
    students: Sequence[int | Sequence[int]],
    leader: int | Sequence[int] | None = None,
    *,
    batch: int = 4,
    deep: int | tuple[int, int] = 2,
) -> dict[str, Any]:
    """Keyword arguments of `FusionLoss.forward`."""
    found: dict[str, Any] = {
        "features": [maps(batch, channels, deep) for channels in students],
        "logits": [logits(batch) for _ in students],
        "labels": torch.randint(CLASSES, (batch,)),
    }
    if leader is not None:
        found |= {"leader_features": maps(batch, leader, deep), "leader_logits": logits(batch)}
    return found


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a batch that can have a gradient, by name: student0.logits, student0.maps.1, leader.maps.0."""
    found = {}
    for i, (own, row) in enumerate(zip(given["features"], given["logits"], strict=True)):
        found[f"student{i}.logits"] = row
        found |= {f"student{i}.maps.{stage}": m for stage, m in enumerate(own)}
    if "leader_logits" in given:
        found["leader.logits"] = given["leader_logits"]
        found |= {f"leader.maps.{stage}": m for stage, m in enumerate(given["leader_features"])}
    return found


def error(ours: Tensor | None, wanted: Tensor | None) -> float:
    """Largest difference relative to the largest wanted element; no gradient counts as a gradient of zeros.

    A gradient that is zero in exact arithmetic comes out as a few 1e-17 either way; differences of that size are none.
    """
    if ours is None or wanted is None:
        there = ours if wanted is None else wanted
        return 0.0 if there is None or not there.any() else float("inf")
    scale = wanted.abs().max().item()
    off = (ours - wanted).abs().max().item()
    return 0.0 if off <= 1e-15 else off / scale if scale else float("inf")


def differing(
    ours: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None], bound: float = 1e-10
) -> dict[str, float]:
    """The error of each wanted tensor whose error lies above the bound."""
    errors = {name: error(ours[name], tensor) for name, tensor in wanted.items()}
    return {name: e for name, e in errors.items() if e > bound}
