"""Saving beside the training: a copy of the state, then a thread; the last checkpoints are kept."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fastfuse.train import checkpoint
from fastfuse.train.files import WriteError


class CheckpointWriter:
    """Writes the checkpoints of a run, one after another, while the run goes on.

    A write that fails leaves all earlier checkpoints as they were.

    Args:
        path: of the newest; the ones before it are kept beside it, see `checkpoint.kept`.
        keep: how many are kept, at least 1.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        self.path, self.keep = path, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Copy the state to memory that nobody else writes and start writing it; waits for the write before it.

        Raises:
            WriteError: the write before this one failed; this one has been started all the same.
        """
        try:
            self.finish()
        finally:
            self._pending = self._pool.submit(checkpoint.save, self.path, host_copy(state), keep=self.keep)

    def finish(self) -> None:
        """Wait until what was saved last is on the disk.

        Raises:
            WriteError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever ends the run, what was saved last is written first."""
        try:
            self.finish()
        except WriteError as failure:
            if error is None:
                raise
            warn_of(failure)
        finally:
            self._pool.shutdown()


def host_copy(state: dict[str, Any]) -> dict[str, Any]:
    """The same with every tensor copied to memory of the host that nobody else writes."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), state)


class Files:
    """The other files of a run. What cannot be written is tried again with the next ones: a full disk ends no run."""

    def __init__(self) -> None:
        self._due: dict[str, Callable[[], object]] = {}

    def add(self, name: str, write: Callable[[], object]) -> None:
        """Have something written by the next `flush`, in place of what is still due under that name."""
        self._due[name] = write

    def flush(self, *, last: bool = False) -> None:
        """Write what is due; of what cannot be written there is one warning.

        Args:
            last: there is no later.

        Raises:
            WriteError: the last time, something cannot be written.
        """
        failures = []
        for name, write in list(self._due.items()):
            try:
                write()
            except WriteError as error:
                failures.append(error)
            else:
                del self._due[name]
        if failures and last:
            raise failures[0]
        if failures:
            warn_of(failures[0])


def warn_of(error: WriteError) -> None:
    """Say that a file could not be written and that the run goes on without it."""
    logging.getLogger(__name__).warning("%s; what was written before is intact, and training goes on", error)
