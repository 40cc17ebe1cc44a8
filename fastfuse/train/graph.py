"""Replay of device work as a CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Compilation of kernels, choice of convolutions, buffers made on first use: all of it happens before a capture.
WARM_UP_CALLS = 3
# DistributedDataParallel arranges its buckets anew in its second step and reads event timers in the first ten (and in
# every hundredth, which captures never reach: replays do not count). The number is that of PyTorch's notes on graphs.
WARM_UP_CALLS_TOGETHER = 11


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A block whose work goes to another stream, after what the current one has and before what it is given next.

    Args:
        stream: None: the current one.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def warm_up(
    function: Callable[[], Any],
    state: Callable[[], Sequence[Tensor]],
    *,
    calls: int = WARM_UP_CALLS,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Call what is to be captured, without a trace.

    Args:
        function, state: see `Captured`.
        calls: how often.
        stream: where; None: one of its own.
    """
    saved = [(x, x.detach().clone()) for x in state()]
    with beside(torch.cuda.Stream() if stream is None else stream):
        for _ in range(calls):
            function()
            with torch.no_grad():
                for x, before in saved:
                    x.copy_(before)


class Captured(Generic[T]):
    """A function as one CUDA graph; a call is one launch.

    The function reads and writes tensors at fixed addresses and never reads one on the host.

    Args:
        function: the work; kept, for what it alone holds must live as long as its replays read and write it.
        state: gives every tensor that the work changes and that lives on; put back after each warm-up call, since a
            second one may find a counter past its end.
        pool: as `CUDAGraph.pool` gives it: memory shared with other captures of which never two run at a time.
        warm: the caller has warmed up.
        stream: where to warm up and to capture; None: streams that nobody else knows.
    """

    def __init__(
        self,
        function: Callable[[], T],
        state: Callable[[], Sequence[Tensor]],
        pool: Any = None,
        *,
        warm: bool = False,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        if not warm:
            warm_up(function, state, stream=stream)
        self.function, self.graph = function, torch.cuda.CUDAGraph()
        self.result = self._capture(function, pool, stream)

    def _capture(self, function: Callable[[], T], pool: Any, stream: torch.cuda.Stream | None) -> T:
        """Note the work; the stream that was current is so again, whatever happens."""
        reason: Exception | None = None
        # What other threads do meanwhile, such as page-locking the next batch, is no part of the capture.
        capturing = torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), capturing:
                try:
                    return function()
                except Exception as error:
                    reason = error
                    raise
        except RuntimeError:
            # Ending a capture that was cut short can fail as well: it says less, and its stream stays the current one.
            if reason is not None:
                raise reason from None
            raise

    def __call__(self) -> T:
        """Do the work; the result is the same tensors every time, with new values."""
        self.graph.replay()
        return self.result
