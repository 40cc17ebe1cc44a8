"""The run folder: config.json, metrics.jsonl and .csv, summary.json and the deployed network's weights."""

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError
from fastfuse.train import checkpoint
from fastfuse.train.files import make_folder, write_atomic


class RunFolder:
    """Where a run writes.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's path, whether it exists or not."""
        return self.path / checkpoint.NAME

    def claim(self, *, resume: bool) -> bool:
        """Make the folder ready for this run; True if it was created.

        Raises:
            InputError: it holds another run or other files, or cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose a folder for --out")
        # What a run killed before its first complete file leaves behind is no content.
        content = [p.name for p in self.path.iterdir() if p.suffix != ".tmp"] if self.path.is_dir() else []
        if content and not resume:
            raise InputError(
                f"{self.path} holds another run or other files; choose another --out, or go on with --resume"
            )
        if content and "config.json" not in content:
            raise InputError(f"{self.path} holds no run to resume (config.json is missing); choose another --out")
        return make_folder(self.path)

    def write_config(self, config: TrainConfig) -> None:
        """Keep the configuration."""
        self._write_json("config.json", configuration.to_plain(config))

    def read_config(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        path = self.path / "config.json"
        try:
            values = json.loads(path.read_text())
            return TrainConfig(**configuration.from_plain(values))
        except FileNotFoundError as error:
            raise InputError(f"{self.path} is not a run folder: config.json is missing") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a run's configuration: {error}") from error

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all epochs anew, as after a resume: metrics.jsonl, and the same as a table, metrics.csv."""
        text = "".join(json.dumps(line) + "\n" for line in history)
        write_atomic(self.path / "metrics.jsonl", lambda file: file.write(text.encode()))
        table = csv_table(history)
        write_atomic(self.path / "metrics.csv", lambda file: file.write(table.encode()))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keep the results."""
        self._write_json("summary.json", summary)

    def write_result(self, name: str, result: Any) -> None:
        """Keep what a method found besides weights as NAME.json."""
        self._write_json(f"{name}.json", result)

    def write_weights(self, name: str, state: dict[str, Tensor]) -> None:
        """Write one network's weights as NAME.safetensors, those of a replica, SEED/NAME, in its folder."""
        from safetensors.torch import save

        with contextlib.suppress(OSError):  # which writing then says in one line
            (self.path / name).parent.mkdir(exist_ok=True)
        data = save({key: value.detach().cpu().contiguous() for key, value in state.items()})
        write_atomic(self.path / f"{name}.safetensors", lambda file: file.write(data))

    def _write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's line by their path, as accuracy/leader/top1; the whole loss is plainly `loss`."""
    found: dict[str, float] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for name, part in value.items():
                collect(part, f"{path}/{name}" if path else name)
        elif isinstance(value, list):
            collect({str(i): part for i, part in enumerate(value)}, path)
        elif isinstance(value, int | float):
            found["loss" if path == "losses/loss" else path] = value

    collect(line, "")
    return found


def csv_table(history: Sequence[Mapping[str, Any]]) -> str:
    """A heading and a row per epoch; floats with all their digits, and nothing where an epoch has no such number."""
    rows = [scalars(line) for line in history]
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["epoch"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
