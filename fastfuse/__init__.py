"""Exact and fast feature-fusion knowledge distillation. Names load when first used; importing does nothing else."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfuse import functional, models
    from fastfuse.errors import FastfuseError
    from fastfuse.losses import (
        AttentionLoss,
        FusionLoss,
        FusionLossOutput,
        NormalizedLpLoss,
        ParameterGroups,
        PeerDistillationLoss,
    )
    from fastfuse.models.extract import extract

    __version__: str

_HOMES = {
    "AttentionLoss": "losses",
    "FusionLoss": "losses",
    "FusionLossOutput": "losses",
    "NormalizedLpLoss": "losses",
    "ParameterGroups": "losses",
    "PeerDistillationLoss": "losses",
    "FastfuseError": "errors",
    "extract": "models.extract",
}
_MODULES = ("functional", "models")

__all__ = [
    "AttentionLoss",
    "FastfuseError",
    "FusionLoss",
    "FusionLossOutput",
    "NormalizedLpLoss",
    "ParameterGroups",
    "PeerDistillationLoss",
    "extract",
    "functional",
    "models",
]


if not TYPE_CHECKING:  # a type checker would take it for a promise of every name

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"fastfuse.{_HOMES[name]}"), name)
        if name in _MODULES:
            return importlib.import_module(f"fastfuse.{name}")
        if name == "__version__":
            from importlib import metadata

            return metadata.version("fastfuse")
        raise AttributeError(f"module 'fastfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
