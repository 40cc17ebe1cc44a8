"""Checkpoints: everything that the rest of a run depends on, in files never half-written nor damaged unseen."""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.errors import CheckpointError
from fastfuse.train.files import write_atomic

FORMAT = "fastfuse-checkpoint"
VERSION = 2
NAME = "checkpoint.pt"

# What ends a file: these bytes and the SHA-256 of all before them. To torch.load they are a comment.
_MARK = b"fastfuse-sha256:"
_TRAILER = len(_MARK) + hashlib.sha256().digest_size
_PIECE = 1 << 22


class DamagedCheckpointError(CheckpointError):
    """The file is not what was written; an earlier checkpoint may take its place."""


def save(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """Write a checkpoint atomically, with its checksum.

    Args:
        path: of the newest.
        state: tensors and plain values.
        keep: how many checkpoints there are at most afterwards, this one included; see `kept`.

    Raises:
        WriteError: the disk is full or the folder not writable; the checkpoints before it are intact.
    """

    def write(file: BinaryIO) -> None:
        hashing: Any = _Hashing(file)  # as much of a file as is needed
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, hashing)
        except RuntimeError as error:  # torch's own, about positions in its archive
            raise hashing.failure or error from error
        file.write(_MARK + hashing.digest())

    write_atomic(path, write, before_replacing=lambda: _step_back(path, keep))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read one checkpoint; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: not a checkpoint, or of another version; if truncated or damaged, a DamagedCheckpointError.
    """
    try:
        sound = _checksum_fits(path)  # None: it has none
        state = torch.load(path, map_location=device, weights_only=True) if sound is not False else None
    except Exception as error:  # what the reader raises depends on where the damage is
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise _damaged(path, f"it is truncated, damaged or another kind of file ({reason})") from error
    if sound is False:
        raise _damaged(path, "its bytes do not fit its checksum")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a fastfuse checkpoint; give a run folder that `fastfuse train` wrote")
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {state['version']}, this fastfuse reads version {VERSION}"
        )
    if sound is None:
        raise _damaged(path, "its checksum is missing from its end")
    return state


def kept(path: Path) -> list[Path]:
    """The checkpoints of a run that are there, newest first: checkpoint.pt, checkpoint-1.pt, checkpoint-2.pt, ...

    Args:
        path: of the newest, whether it exists or not.
    """
    numbers = [file.stem.removeprefix(f"{path.stem}-") for file in path.parent.glob(f"{path.stem}-*{path.suffix}")]
    older = [_older(path, number) for number in sorted(map(int, filter(str.isdecimal, numbers)))]
    return [file for file in (path, *older) if file.exists()]


def load_newest(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the newest checkpoint of a run that is not damaged, with a warning for each one that is.

    Args:
        path: of the newest.
        device: where its tensors go.

    Raises:
        CheckpointError: as `load`, of the newest, if none can be read.
    """
    failures: list[DamagedCheckpointError] = []
    for file in kept(path) or [path]:
        try:
            state = load(file, device)
        except DamagedCheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            logging.getLogger(__name__).warning("%s; %s, the one before it, is used", failure, file.name)
        return state
    raise failures[0]


def load_matching(path: Path, config: TrainConfig, data: str) -> dict[str, Any]:
    """The checkpoint of a run, if it belongs to this configuration and data.

    Args:
        path: of the checkpoint.
        config: resolved.
        data: the data set's fingerprint.

    Raises:
        CheckpointError: it cannot be read, or the run was told something else; names the option.
    """
    state = load_newest(path)
    from fastfuse.train import build  # which imports what imports this

    # Resolved again: of an option that is younger than the run it had the default. What may change is what it is now.
    runtime = {name: getattr(config, name) for name in configuration.RUNTIME_FIELDS}
    stored = dataclasses.asdict(build.resolved(TrainConfig(**configuration.from_plain(state["config"]) | runtime)))
    for name, value in dataclasses.asdict(config).items():
        if name not in configuration.RUNTIME_FIELDS and stored[name] != value:
            raise CheckpointError(
                f"{path} belongs to a run with {name} = {stored[name]}, not {value}; "
                "resume without that option, or choose another --out"
            )
    if state["data"] != data:
        raise CheckpointError(
            f"{path} was trained on other data ({state['data']}) than given now ({data}); "
            "give the same data, or choose another --out"
        )
    return state


def generator_states() -> dict[str, Any]:
    """States of the global random generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_generators(states: dict[str, Any]) -> None:
    """Put the global random generators back; GPU states only where there are as many GPUs."""
    torch.set_rng_state(states["cpu"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _step_back(path: Path, keep: int) -> None:
    """Number the checkpoints that stay one higher; there is a newest one at every moment."""
    for number in range(keep - 1, 1, -1):
        if _older(path, number - 1).exists():
            _older(path, number - 1).replace(_older(path, number))
    if keep > 1 and path.exists():
        second = path.with_name(f"{path.name}.link.tmp")
        second.unlink(missing_ok=True)
        try:
            second.hardlink_to(path)
        except OSError:  # a file system without links: for a moment only the older name is there
            path.replace(_older(path, 1))
        else:
            second.replace(_older(path, 1))
    for file in kept(path)[1:]:
        if int(file.stem.removeprefix(f"{path.stem}-")) >= keep:
            file.unlink()


class _Hashing:
    """A file that takes the checksum of what is written to it, and remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def _checksum_fits(path: Path) -> bool | None:
    """Whether a file is what was written; None where it has no checksum."""
    left = path.stat().st_size - _TRAILER
    found = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            found.update(piece)
            left -= len(piece)
        mark, digest = file.read(len(_MARK)), file.read()
    return digest == found.digest() if mark == _MARK else None


def _damaged(path: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} cannot be read as a checkpoint, {reason}; restore it from a copy, or delete it and start anew with "
        "--resume"
    )
