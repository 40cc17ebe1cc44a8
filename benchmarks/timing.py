"""Fair timing: providers take turns in one process, so that a drifting clock or a busy neighbour hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one provider, one entry per turn."""

    samples_ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, ms."""
        return statistics.median(self.samples_ms)

    def quantile(self, q: float) -> float:
        """Quantile q in [0, 1], linear between samples, ms."""
        return float(np.quantile(self.samples_ms, q))

    def overlaps(self, other: "Timing") -> bool:
        """Whether the ranges from p20 to p80 have a point in common: then noise may explain the difference."""
        return self.quantile(0.2) <= other.quantile(0.8) and other.quantile(0.2) <= self.quantile(0.8)


def measure_in_turn(
    providers: Mapping[str, Callable[[], object]], *, repeats: int, calls: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Time the providers A B A B ..., after `warmup` calls of each.

    Args:
        providers: what to call, by name; the order of the turns.
        repeats: turns of each provider, at least 1.
        calls: calls per turn, between two device synchronisations; the sample is their mean.
        warmup: untimed calls of each provider before the first turn.
        device: the device that the calls keep busy.
    """
    for call in providers.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            _synchronise(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            _synchronise(device)
            samples[name].append((time.perf_counter() - start) / calls * 1e3)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
