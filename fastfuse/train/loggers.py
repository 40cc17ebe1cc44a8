"""Who is told about a run: its own files always, TensorBoard and Weights & Biases where --log asks for them.

A logger is told of all epochs so far, when a run begins or goes on and after every epoch, in numbers that the loop has
read anyway. The files are the run's record: what cannot be written there yet is written later. The others may fail at
any time: then they say so once, and the run goes on without them; a later `--resume` gives them what they missed.
"""

import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError
from fastfuse.train.files import write_atomic
from fastfuse.train.record import RunFolder, scalars

History = list[dict[str, Any]]


class Logger(Protocol):
    """What is told about a run."""

    def write(self, history: History) -> None:
        """Take all epochs so far, the lines of metrics.jsonl; some may be known already."""

    def close(self, *, failed: bool) -> None:
        """The run ends here: stopped by an error or by Ctrl-C, or not."""


class Records:
    """metrics.jsonl and metrics.csv, written anew each time: no kill leaves half a line.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def write(self, history: History) -> None:
        """Replace both files."""
        self.run.write_metrics(history)

    def close(self, *, failed: bool) -> None:
        """Nothing is left to do."""


class TensorBoard:
    """Event files in RUN/tensorboard. A run that goes on writes its whole history again and hides what was there.

    Needs `torch.utils.tensorboard.SummaryWriter(log_dir=, purge_step=)` with `add_scalar(tag, value, step, walltime=)`,
    `flush()` and `close()`: that is the package tensorboard.

    Args:
        run: the run folder.
        config: of the run.
    """

    def __init__(self, run: RunFolder, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(run.path / "tensorboard"), purge_step=1)
        self.epochs = 0

    def write(self, history: History) -> None:
        """Write the epochs that this process has not written yet, each at the time at which it ended."""
        now = time.time()
        for line in history[self.epochs :]:
            ended = now - (history[-1]["seconds"] - line["seconds"])
            for name, value in scalars(line).items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, line["epoch"], walltime=ended)
        self.writer.flush()
        self.epochs = len(history)

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; RUN/wandb.json holds its id and the epochs it has, for a run that goes on.

    Needs `wandb.init(project=, name=, id=, resume="allow", dir=, config=, allow_val_change=)`, and of what it returns
    `log(values, step=)` and `finish(exit_code=)`. The project is WANDB_PROJECT, else fastfuse.

    Args:
        run: the run folder.
        config: of the run.
    """

    def __init__(self, run: RunFolder, config: TrainConfig) -> None:
        import wandb

        self.file = run.path / "wandb.json"
        known = json.loads(self.file.read_text()) if self.file.exists() else {"id": secrets.token_hex(4), "epochs": 0}
        self.id, self.epochs = known["id"], known["epochs"]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastfuse"),
            name=str(run.path),
            id=self.id,
            resume="allow",
            dir=str(run.path),
            config=configuration.to_plain(config),
            allow_val_change=True,  # --max-time and the like may differ from what was said before
        )

    def write(self, history: History) -> None:
        """Send the epochs that it does not have: of an epoch that is there, a second one would be ignored."""
        for line in history:
            if line["epoch"] > self.epochs:
                self.run.log(scalars(line), step=line["epoch"])
                self.epochs = line["epoch"]
        known = {"id": self.id, "epochs": self.epochs}
        write_atomic(self.file, lambda file: file.write((json.dumps(known) + "\n").encode()))

    def close(self, *, failed: bool) -> None:
        """Send what is waiting, and how the run ended."""
        self.run.finish(exit_code=int(failed))


# By the names in --log: what is opened, and the module that must be there.
OPTIONAL: dict[str, tuple[Callable[[RunFolder, TrainConfig], Logger], str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def check(names: tuple[str, ...]) -> None:
    """Import what the loggers need.

    Raises:
        InputError: it is not installed; says how to install it.
    """
    for name in names:
        try:
            importlib.import_module(OPTIONAL[name][1])
        except ImportError as error:
            raise InputError(
                f"--log {name} needs {name}, which cannot be imported ({error}): pip install 'fastfuse[{name}]', or "
                "leave it out with --log off"
            ) from error


class Guarded:
    """A logger that may fail: opened when first written to, and left alone after a warning when anything goes wrong.

    Args:
        name: as in --log.
        open_logger: opens it.
    """

    def __init__(self, name: str, open_logger: Callable[[], Logger]) -> None:
        self.name, self._open = name, open_logger
        self._logger: Logger | None = None
        self._failed = False

    def write(self, history: History) -> None:
        """Open it if need be, and tell it."""
        self._try(lambda: self._opened().write(history))

    def close(self, *, failed: bool) -> None:
        """Close it if it was opened."""
        logger = self._logger
        if logger is not None:
            self._try(lambda: logger.close(failed=failed))

    def _opened(self) -> Logger:
        if self._logger is None:
            self._logger = self._open()
        return self._logger

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # what a package of others raises, nobody knows: hours of training are worth more
            self._failed = True
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            print(
                f"fastfuse: --log {self.name} failed and is left out from here on ({reason}); the run goes on, and "
                "metrics.jsonl and metrics.csv have everything",
                file=sys.stderr,
            )


class Loggers:
    """All loggers of a run, to be left as a context when it ends.

    Args:
        run: the run folder.
        config: resolved.
    """

    def __init__(self, run: RunFolder, config: TrainConfig) -> None:
        self.all: list[Logger] = [Records(run)]
        for name in config.log:
            self.all.append(Guarded(name, partial(OPTIONAL[name][0], run, config)))

    @classmethod
    def none(cls) -> "Loggers":
        """Nobody is told: of several processes one speaks for all."""
        found = cls.__new__(cls)
        found.all = []
        return found

    def write(self, history: History) -> None:
        """Tell them all."""
        for logger in self.all:
            logger.write(history)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self.all:
            logger.close(failed=kind is not None)
