"""Worker processes that prepare what the training process will need next: torch's DataLoader, told what to do."""

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastfuse.errors import FastfuseError

# More do not decode faster than one GPU trains, and each holds two batches in shared memory.
MOST_WORKERS = 16
# How torch says in a worker that shared memory has run out.
_NO_MEMORY = "unable to allocate shared memory"
# Results that wait for each worker's turn.
_AHEAD = 2


def default_workers() -> int:
    """One for each core that this process may use but one, which trains; processes of one machine share the cores.

    At least 1 and at most `MOST_WORKERS`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = cores // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return min(max(own - 1, 1), MOST_WORKERS)


class Pool:
    """A function applied to items by processes that start with the first items and stay until `close`.

    Results come in the order of the items, whatever the number of processes. The processes end with this one, never
    hear of Ctrl-C or SIGTERM (the trainer finishes its step and writes a checkpoint first), and have one thread each.
    No random number of this process is drawn.

    Args:
        function: called in the processes, which are forks of this one.
        workers: how many; 0: this process applies the function itself, when a result is asked for.
    """

    def __init__(self, function: Callable[[Any], Any], *, workers: int) -> None:
        self.function, self.workers = function, workers
        self._items = _Items()
        self._loader: DataLoader | None = None
        self._results: Iterator[Any] = iter(())
        self._turn = 0

    def begin(self, items: Iterable[Any], *, pinned: bool = False) -> Iterator[Any]:
        """Start on other items, now; the results, as they are asked for. What an earlier call began is dropped.

        Args:
            items: looked at as the processes get to them.
            pinned: tensors of the results lie in page-locked memory; as the first call says.
        """
        self._items.items = items
        if self._loader is None:
            self._loader = self._made(pinned)
        with _interrupts_held_back():
            self._results = iter(self._loader)
        self._turn += 1
        return self._handed_out(self._turn)

    def close(self) -> None:
        """End the processes; `begin` starts new ones."""
        self._turn += 1
        results: Any = self._results
        self._loader, self._results = None, iter(())
        if (shut_down := getattr(results, "_shutdown_workers", None)) is not None:
            shut_down()
            # One that waits for a lock which a killed one held never ends, and would not hear torch's SIGTERM.
            for worker in results._workers:
                worker.kill()

    def _handed_out(self, turn: int) -> Iterator[Any]:
        while True:
            if turn != self._turn:
                raise RuntimeError("the processes were given other items since: start again before asking for more")
            try:
                result = next(self._results)
            except StopIteration:
                return
            except (OSError, EOFError) as error:  # the end of a worker, seen through what it had begun to send
                raise RuntimeError(f"DataLoader worker has gone: {type(error).__name__}") from error
            yield result

    def _made(self, pinned: bool) -> DataLoader:
        parallel: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": _AHEAD}
        parallel["multiprocessing_context"] = "fork"
        return DataLoader(
            _Applied(self.function),
            sampler=self._items,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=pinned,
            generator=torch.Generator(),  # else a seed for the workers is drawn from the global one
            **(parallel if self.workers else {}),
        )


def handed_over(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor for a result, its values not set; a process of a pool sends it without copying it again."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # As torch's default_collate does. What lies elsewhere is copied to shared memory by a thread that sends it; where
    # there is none left, that thread drops it, and the trainer would wait for ever.
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """The death of a worker process, which torch raises anywhere in this one, as one line.

    Raises:
        FastfuseError: a worker was killed, or found no shared memory.
    """
    try:
        yield
    except RuntimeError as error:
        first, *more = str(error).splitlines() or [""]
        said = [first] if first.startswith("DataLoader worker") else [line for line in more if _NO_MEMORY in line]
        if not said:
            raise
        raise FastfuseError(
            f"a process that decodes images was lost ({said[-1].rstrip('. ')}): memory, or shared memory (/dev/shm, of "
            "containers --shm-size), may have run out: give fewer --workers; a run goes on from its last checkpoint "
            "with --resume"
        ) from error


class _Items:
    """What is iterated over next; the DataLoader knows only this."""

    items: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class _Applied(torch.utils.data.Dataset):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, item: Any) -> Any:
        return self.function(item)


def _as_it_is(result: Any) -> Any:
    return result


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process that is forked here never hears of Ctrl-C, SIGTERM and SIGUSR1; this one hears of it at the end.

    Those may be sent to all processes of a run, of which one alone finishes the step and ends the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
