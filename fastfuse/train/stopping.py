"""When a run stops or saves between two steps: signals, --max-time, and the time of a checkpoint."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from fastfuse.errors import INTERRUPTED, PREEMPTED
from fastfuse.train.distributed import Agreement, Processes

if TYPE_CHECKING:
    from fastfuse.config import TrainConfig

# What asks a run to stop after its step; the later ones are sent before a machine is taken away.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Decision(NamedTuple):
    """What all processes do between two steps.

    Attributes:
        stop: end the run here, with a checkpoint.
        save: write a checkpoint and go on.
    """

    stop: bool
    save: bool


class Stopping:
    """Decides when a run stops or saves, from now on; processes that train together hear the same.

    Args:
        config: `max_time` and `checkpoint_minutes` of it.
        processes: those that train together; all ask at the same places.

    Attributes:
        status: exit status that a signal asks for, which all processes have agreed on; None: no signal has come.
    """

    def __init__(self, config: "TrainConfig", processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.status: int | None = None
        self._heard: set[int] = set()  # signals, by this process
        self._agreement = Agreement(processes)
        self._saved = self._began = time.monotonic()

    def due(self, *, last: bool) -> bool:
        """Count a step; see `Agreement.due`."""
        return self._agreement.due(last=last)

    def decide(self) -> Decision:
        """What to do now."""
        limit, now = self.config.max_time, time.monotonic()
        late = limit is not None and now - self._began >= 60 * limit
        save = now - self._saved > 60 * self.config.checkpoint_minutes
        wishes = [bool(self._heard), bool(self._heard - {signal.SIGINT}), late, save]
        stopped, preempted, late, save = self._agreement.decide(wishes)
        self.status = PREEMPTED if preempted else INTERRUPTED if stopped else None
        return Decision(stopped or late, save)

    def saved(self) -> None:
        """A checkpoint has been written: the next one is due --checkpoint-minutes from now."""
        self._saved = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals ask to stop after the step; the second Ctrl-C stops at once, the others may come again and again.

        torchrun passes on what it is sent, SIGTERM too, and ends a worker that does not stop in half a minute.
        """
        alone = self.processes.count == 1

        def ask(signum: int, frame: Any) -> None:
            self._heard.add(signum)
            if alone:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            previous = {number: signal.signal(number, ask) for number in _SIGNALS}
        except ValueError:  # not the main thread: the caller deals with signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
