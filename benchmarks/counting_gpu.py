"""What one step does on a GPU, seen from the driver: it also sees compiled regions and replayed graphs."""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")
WAIT = "synchronizing CUDA operation"


@dataclass(frozen=True)
class GpuCounts:
    """What one step asked of the device.

    Attributes:
        kernels: kernels, copies and fills that the device ran.
        launches: calls of the host that started them; a replayed graph is one.
        waits: operations in which the host waited for the device.
    """

    kernels: int
    launches: int
    waits: int


def count_on_gpu(step: Callable[[], object], device: torch.device) -> GpuCounts:
    """Run `step` twice and count; all zeros but `waits` where the profiler cannot see the device."""
    waits = _waits(step)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize(device)
    kernels, launches = tally(seen.events())
    return GpuCounts(kernels, launches, waits)


def tally(events: Iterable[Any]) -> tuple[int, int]:
    """Kernels, and calls that start some, among a profiler's events; ranges that programs mark are neither."""
    kernels = launches = 0
    for event in events:
        if event.device_type == DeviceType.CUDA:
            kernels += not event.is_user_annotation
        else:
            launches += LAUNCH.match(event.name) is not None
    return kernels, launches


def _waits(step: Callable[[], object]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(WAIT in str(warning.message) for warning in caught)
