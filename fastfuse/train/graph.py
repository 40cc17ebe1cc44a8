"""Replay of device work as a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Compilation of kernels, choice of convolutions, buffers made on first use: all of it happens before a capture.
WARM_UP_CALLS = 3


class Captured(Generic[T]):
    """A function as one CUDA graph; a call is one launch.

    The function reads and writes tensors at fixed addresses and never reads one on the host.

    Args:
        function: the work; called with the same arguments in every replay.
        state: gives every tensor that the work changes and that lives on; put back after each warm-up call, since a
            second one may find a counter past its end.
        pool: as `CUDAGraph.pool` gives it: memory shared with other captures of which never two run at a time.
    """

    def __init__(self, function: Callable[[], T], state: Callable[[], Sequence[Tensor]], pool: Any = None) -> None:
        saved = [(x, x.detach().clone()) for x in state()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                function()
                with torch.no_grad():
                    for x, before in saved:
                        x.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as page-locking the next batch, is no part of the capture.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = function()

    def __call__(self) -> T:
        """Do the work; the result is the same tensors every time, with new values."""
        self.graph.replay()
        return self.result
