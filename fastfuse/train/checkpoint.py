"""Checkpoints: everything that the rest of a run depends on, in one file that is never half-written."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.errors import CheckpointError
from fastfuse.train.files import write_atomic

FORMAT = "fastfuse-checkpoint"
VERSION = 1
NAME = "checkpoint.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        WriteError: the disk is full or the folder not writable; the checkpoint before it is intact.
    """
    write_atomic(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **state}, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are unpickled.

    Raises:
        CheckpointError: truncated, damaged, not a checkpoint, or of another version.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what the reader raises depends on where the damage is
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint, it is truncated, damaged or another kind of file ({reason}); "
            "restore it from a copy, or delete it and start anew with --resume"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a fastfuse checkpoint; give a run folder that `fastfuse train` wrote")
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {state['version']}, this fastfuse reads version {VERSION}"
        )
    return state


def load_matching(path: Path, config: TrainConfig, data: str) -> dict[str, Any]:
    """The checkpoint of a run, if it belongs to this configuration and data.

    Args:
        path: of the checkpoint.
        config: resolved.
        data: the data set's fingerprint.

    Raises:
        CheckpointError: it cannot be read, or the run was told something else; names the option.
    """
    state = load(path)
    stored = configuration.from_plain(state["config"])
    for name, value in dataclasses.asdict(config).items():
        if name not in configuration.RUNTIME_FIELDS and stored.get(name) != value:
            raise CheckpointError(
                f"{path} belongs to a run with {name} = {stored.get(name)}, not {value}; "
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
