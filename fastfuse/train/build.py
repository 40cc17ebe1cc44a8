"""From a configuration to data and method, with everything refused that could only fail later."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastfuse import config as configuration
from fastfuse import data
from fastfuse.config import TrainConfig
from fastfuse.data import Dataset
from fastfuse.errors import InputError, unknown_name
from fastfuse.methods import METHODS, Method, build_method
from fastfuse.methods.replicas import Replicas
from fastfuse.models.extract import Wrapper
from fastfuse.train import preliminary
from fastfuse.train.optim import SETTINGS
from fastfuse.train.schedule import milestones
from fastfuse.train.weights import model_options, read_weights

# Without a word from the user.
MODEL = "resnet32"


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with every default that depends on another option written out.

    Raises:
        InputError: a value that no run can use, an unknown method, or a hyper-parameter that the method does not have.
    """
    configuration.check(config)
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    method = METHODS[config.method]
    defaults = method.defaults
    filled: dict[str, Any] = {"milestones": milestones(config)}
    filled["log"] = () if "off" in config.log else tuple(dict.fromkeys(config.log))
    named = config.student_models
    if not method.has_students and (named or config.students not in (None, 1)):
        raise InputError(f"{config.method} trains no students: leave --students out")
    if named is None:
        filled["model"] = config.model or MODEL
    elif len(named) == 1:
        config = dataclasses.replace(config, model=named[0], students=1)
    if config.students is None:
        filled["students"] = method.default_students
    for name in configuration.METHOD_FIELDS:
        given = getattr(config, name)
        if given is not None and name not in defaults:
            known = ", ".join("--" + d.replace("_", "-") for d in defaults) or "no option of its own"
            raise InputError(f"{config.method} has no --{name.replace('_', '-')}; it has {known}")
        filled[name] = defaults.get(name) if given is None else given
    if config.leader is not None and method.extra_network != "leader":
        raise InputError(f"{config.method} has no leader: leave --leader {config.leader} out, or choose --method ffsd")
    return preliminary.resolved(dataclasses.replace(config, **filled), method)


def load_data(config: TrainConfig) -> Dataset:
    """The data set of a configuration, on the CPU."""
    return data.load(
        config.data,
        root=config.data_root,
        path=config.data_path,
        download=config.download,
        val_fraction=config.val_fraction,
        seed=config.seed if config.val_seed is None else config.val_seed,
        padding=config.crop_padding,
        flip=config.flip,
        image_size=config.image_size,
        stream=config.stream,
        cache=config.data_cache,
        workers=config.workers,
    )


def make_method(
    config: TrainConfig,
    num_classes: int,
    given: Mapping[str, Any] | None = None,
    *,
    image_size: tuple[int, int] | None = None,
) -> Method:
    """The method of a resolved configuration with weights drawn from its seed.

    Args:
        config: resolved.
        num_classes: K.
        given: what was trained before it, see `fastfuse.train.preliminary`.
        image_size: (height, width), of which several networks' maps are brought to one size; None: they have one.
    """
    torch.manual_seed(config.seed)
    method = METHODS[config.method]
    students: Any = config.student_models or config.students  # a number where they have no names
    sized = {"image_size": image_size} if method.takes_image_size else {}
    # Unset is an option that is younger than the run.
    own = {name: value for name in method.defaults if (value := getattr(config, name)) is not None}
    return build_method(
        config.method,
        model=config.model,
        students=students,
        num_classes=num_classes,
        leader=config.leader,
        teacher_model=config.teacher_model if method.extra_network == "teacher" else None,
        taps=config.taps,
        model_options=_own_options(config),
        **(given or {}),
        **sized,
        **own,
    )


def _own_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the method's own networks: all there are, unless they are those of a frozen teacher alone."""
    own = [config.leader, *(config.student_models or [str(config.model)])]
    frozen = METHODS[config.method].teacher_count > 0 and str(config.teacher_model).startswith("wrn")
    return {} if frozen and not any(str(name).startswith("wrn") for name in own) else model_options(config)


def with_replicas(
    method: Method,
    config: TrainConfig,
    num_classes: int,
    given: Mapping[str, Any] | None = None,
    *,
    image_size: tuple[int, int] | None = None,
) -> Method:
    """The method itself, or as many of it as the configuration asks for, each drawn from a seed of its own.

    Args:
        method: of the configuration's own seed, with its initial weights.
        config: resolved; its --init goes for every replica.
        num_classes, image_size: see `make_method`.
        given: see `make_method`; every replica has the same.
    """
    if config.replicas == 1:
        return method
    methods = [method]
    for seed in range(config.seed + 1, config.seed + config.replicas):
        single = dataclasses.replace(config, seed=seed)
        methods.append(make_method(single, num_classes, given, image_size=image_size))
        initial_weights(methods[-1], config.init)
    return Replicas(methods, [f"seed{config.seed + r}" for r in range(config.replicas)])


def try_out(method: Method, dataset: Dataset, batch_size: int, *, divided: int = 1) -> None:
    """One forward of a copy on blank images, so that maps too small for the method are found before a run exists.

    Raises:
        InputError: names what does not fit.
    """
    height, width = dataset.image_size
    # A last batch of one image and maps of one pixel leave batch norm nothing to average.
    shown = len(dataset.train) // method.image_parts * method.image_parts
    each = (shown % batch_size or batch_size) // method.image_parts
    smallest = method.image_parts * min(max(each // divided, 1), 2)
    trial = copy.deepcopy(method).train()
    with torch.no_grad():
        try:
            labels = torch.zeros(smallest, dtype=torch.int64)
            trial(torch.zeros(smallest, 3, height, width), labels, torch.tensor(0.0))
        except Exception as error:
            # Networks of others refuse a size with any exception; from our own code another one is a fault.
            if not isinstance(error, ValueError) and not any(isinstance(x, Wrapper) for x in trial.modules()):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"images of {height}x{width} do not suit this method and model: {reason}") from error


def initial_weights(method: Method, entries: tuple[str, ...]) -> None:
    """Load what --init names: FILE into every student and leader, NETWORK=FILE into one.

    Raises:
        InputError: an unknown network, or a file that cannot be read or does not fit.
    """
    networks = method.networks()
    for entry in entries:
        name, separator, file = entry.partition("=")
        if separator and name in networks:
            chosen = [name]
        elif separator and not Path(entry).exists():
            raise unknown_name("network in --init", name, networks)
        else:
            file, chosen = entry, [n for n in networks if not n.startswith("fusion")]
        state = read_weights(Path(file))
        for name in chosen:
            try:
                networks[name].load_state_dict(state, strict=True)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"--init: {file} does not fit network {name}: {reason}") from error


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """The optimizer settings among a configuration's fields."""
    return {name: getattr(config, name) for name in SETTINGS}


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the GPU where there is one.

    A GPU with a number becomes the current one: streams and graphs are made there, and a capture on another GPU than
    that of the tensors would note nothing.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device auto"
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device
