"""What a step does on the device, seen on a CPU: the operators that it runs, and a stand-in for CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """Stands in for a CUDA graph: a replay calls the function. As a real one, it keeps nothing that this needs alive.

    Attributes:
        stream: where it was captured.
        result: what the function gave then; a replay puts new values into the same tensors.
    """

    def __init__(self) -> None:
        self.replays = 0
        self.stream = self.result = None

    def replay(self) -> None:
        self.replays += 1
        function = self.function()
        assert function is not None, "what a graph reads and writes is gone, and it is replayed"
        found = function()
        with torch.no_grad():
            for place, value in zip(tree_leaves(self.result), tree_leaves(found), strict=True):
                if isinstance(place, torch.Tensor):
                    place.copy_(value)

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """CUDA graphs and streams on a CPU: as on a GPU, a capture runs nothing and a replay repeats the captured calls.

    Returns:
        All graphs that are captured from now on.
    """
    graphs: list[Recorded] = []

    class Stream:
        def __init__(self, *_: object) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    streams = [Stream()]  # the current one is the last

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    @contextmanager
    def graph(recorded: Recorded, pool: object, stream: Stream | None, capture_error_mode: str) -> Iterator[None]:
        # The work of the capture is undone, since a real one only notes it.
        saved = [(x, x.detach().clone()) for x in recorded.state()]
        del recorded.state
        recorded.stream = stream or Stream()
        graphs.append(recorded)
        try:
            with capturing(), on(recorded.stream):
                yield
        finally:
            with torch.no_grad():
                for x, before in saved:
                    x.copy_(before)

    original = module.Captured.__init__

    def init(self, function, state, pool=None, **form):
        made = Recorded()
        made.function, made.state = ref(function), state
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
        original(self, function, state, pool, **form)
        made.result = self.result

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(module.Captured, "__init__", init)
    return graphs
