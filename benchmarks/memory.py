"""Memory that a program holds on a GPU, the same for eager steps and for captured ones.

What the allocator reserves is counted, not what tensors fill: a captured graph keeps its buffers between replays, where
no tensor is seen, and it is the reserved memory that another program cannot have.
"""

from collections.abc import Callable

import torch

from benchmarks.report import MISSING, Value


def held(device: torch.device) -> int:
    """Bytes reserved now by all that lives; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def peak_mb(step: Callable[[], object], before: int, device: torch.device) -> Value:
    """MiB reserved at most while `step` runs, less what was held before its program was built."""
    if device.type != "cuda":
        return MISSING
    held(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_reserved(device) - before) / 2**20
