"""What a step does on the device, seen on a CPU: the operators that it runs, and a stand-in for CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse.train import graph as module

# Besides reads: a tensor made of numbers of the host would be a copy that waits, and that a capture refuses.
WAITS = {"lift_fresh", "_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_to_copy"}


class Seen(TorchDispatchMode):
    """Names of the operators of whatever runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # A change of dtype is work; a change of device would wait.
        if name != "_to_copy" or (kwargs or {}).get("device", args[0].device) != args[0].device:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def capturing() -> Iterator[None]:
    """A block in which optimizers, however they ask, take the current stream for one that is being captured."""
    stream = SimpleNamespace(is_capturing=lambda: True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
        patch.setattr(torch.accelerator, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


class Recorded:
    """Stands in for a CUDA graph: it keeps the function, and a replay calls it."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.function()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """CUDA graphs on a CPU: as on a GPU, a capture runs nothing and a replay repeats the captured calls.

    Returns:
        All graphs that are captured from now on.
    """
    graphs: list[Recorded] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextmanager
    def nothing(*_: object, **__: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(recorded: Recorded, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        # The work of the capture is undone, since a real one only notes it.
        saved = [(x, x.detach().clone()) for x in recorded.state()]
        graphs.append(recorded)
        try:
            with capturing():
                yield
        finally:
            with torch.no_grad():
                for x, before in saved:
                    x.copy_(before)

    original = module.Captured.__init__

    def init(self, function, state, pool=None, **form):
        made = Recorded()
        made.function, made.state = function, state
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
        original(self, function, state, pool, **form)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(module.Captured, "__init__", init)
    return graphs
