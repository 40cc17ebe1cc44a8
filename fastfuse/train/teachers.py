"""Trained teachers from what --teachers names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastfuse import models
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError
from fastfuse.methods import METHODS
from fastfuse.train.record import RunFolder
from fastfuse.train.weights import model_options, read_weights


def load_teacher(entry: str, config: TrainConfig, num_classes: int) -> nn.Module:
    """One trained network.

    Args:
        entry: a run folder, whose deployed network it is, as the last epoch left it; a weight file of the
            configuration's teacher model; or torchvision:NAME or timm:NAME with the weights of that library.
        config: resolved.
        num_classes: K of the data.

    Raises:
        InputError: it cannot be found or read, or has another number of classes.
    """
    path = Path(entry)
    if entry.startswith(("torchvision:", "timm:")) and not path.exists():
        from fastfuse.models.foreign import pretrained

        return pretrained(entry, num_classes)
    if path.is_dir():
        return _of_run(path, num_classes)
    if path.is_file():
        options = model_options(config)
        return _loaded(path, str(config.teacher_model), num_classes, _taps(config, str(config.teacher_model)), options)
    raise InputError(
        f"teacher {entry} cannot be found: name a run folder, a weight file, torchvision:NAME or timm:NAME; where "
        "--teachers is left out, a method's teachers are trained first"
    )


def check_teacher_model(config: TrainConfig) -> None:
    """Refuse teachers that are all other networks than the --teacher-model that was given beside them.

    Args:
        config: as it was asked for, not resolved; weight files do not say what they are, and take the name.
    """
    method = METHODS.get(config.method)
    if method is None or method.extra_network == "teacher" or any(Path(entry).is_file() for entry in config.teachers):
        return
    for entry in config.teachers:
        own = told_model(entry) or config.teacher_model
        if own != config.teacher_model:
            raise InputError(
                f"teacher {entry} is {own}, and --teacher-model says {config.teacher_model}: name another teacher, or "
                "leave --teacher-model out, which is for weight files and teachers that are trained first"
            )


def told_model(entry: str) -> str | None:
    """The network that a teacher says it is; None of a weight file, which says nothing."""
    if Path(entry).is_dir():
        return deployed_model(RunFolder(Path(entry)).read_config())
    return entry if ":" in entry and not Path(entry).exists() else None


def _of_run(path: Path, num_classes: int) -> nn.Module:
    trained = RunFolder(path).read_config()
    if trained.replicas > 1:
        raise InputError(
            f"teacher {path} holds {trained.replicas} replicas: name one of them, as {path}/seed{trained.seed}"
        )
    deployed = METHODS[trained.method].deployed
    if deployed not in ("student0", "leader"):
        raise InputError(f"teacher {path} is a run of {trained.method}, which trains no classifier: name another run")
    weights = path / f"{deployed}.safetensors"
    if not weights.exists():
        raise InputError(
            f"teacher {path} has no {weights.name}: the run has not ended; go on with: fastfuse train --resume --out "
            f"{path}"
        )
    model = deployed_model(trained)
    return _loaded(weights, model, num_classes, _taps(trained, model), model_options(trained))


def deployed_model(config: TrainConfig) -> str:
    """The name of the network that a run deploys."""
    if METHODS[config.method].deployed == "leader" and config.leader:
        return config.leader
    return (config.student_models or [str(config.model)])[0]


def _taps(config: TrainConfig, model: str) -> tuple[str, ...]:
    return config.taps if model == config.model else ()


def _loaded(path: Path, model: str, num_classes: int, taps: tuple[str, ...], options: Mapping[str, Any]) -> nn.Module:
    network = models.build(model, num_classes, taps=taps, **(options if model.startswith("wrn") else {}))
    try:
        network.load_state_dict(read_weights(path), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"teacher {path} does not fit {model} with the {num_classes} classes of the data ({reason}); name its "
            "network with --teacher-model, or give a teacher of these data"
        ) from error
    return network
