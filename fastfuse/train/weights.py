"""Weight files, and what of a configuration makes a network."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError


def model_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the networks among a configuration's fields."""
    return {
        name.removeprefix("wrn_"): value
        for name in configuration.WRN_FIELDS
        if (value := getattr(config, name)) is not None
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by key from a .safetensors file or a torch file of a plain state dict; nothing else is unpickled.

    Raises:
        InputError: the file is missing or is neither.
    """
    if not path.is_file():
        raise InputError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exceptions for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as weights (.safetensors, or a torch state dict): {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no plain state dict (names to tensors); save network.state_dict()")
    return state
