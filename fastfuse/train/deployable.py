"""The networks that a run trained, each as the plain network that can be taken away."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.config import TrainConfig
from fastfuse.data import Dataset
from fastfuse.errors import CheckpointError, InputError, unknown_name
from fastfuse.methods import METHODS, Method
from fastfuse.models.extract import Wrapper
from fastfuse.train import build, checkpoint, preliminary
from fastfuse.train.record import RunFolder
from fastfuse.train.weights import model_options, read_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Deployable:
    """One trained network with what must be known of it.

    Attributes:
        name: in its run, such as leader.
        model: a name of `fastfuse.models`.
        network: the plain network with the trained weights, on the CPU, in evaluation mode.
        reference: normalised images [B, 3, H, W] to the logits [B, K] of the network as it was trained: the method's
            own, restored from the checkpoint; of best weights, and where teachers would be needed, `network`'s.
        source: the file of its weights.
        epoch: epochs done; of the best weights, that of the best.
        completed: whether the run has ended.
        record: `networks` (accuracies by name), `best_chosen_on`, `commit`, `versions`, as in summary.json.
        config: of the run.
        dataset: its data, on the CPU.
    """

    name: str
    model: str
    network: nn.Module
    reference: Callable[[Tensor], Tensor]
    source: Path
    epoch: int | None
    completed: bool
    record: Mapping[str, Any]
    config: TrainConfig
    dataset: Dataset


def load_deployable(
    path: Path,
    *,
    network: str | None = None,
    best: bool = False,
    data_root: Path | None = None,
    data_path: Path | None = None,
) -> Deployable:
    """A network of a run: from its weight file where the run has ended, else from the checkpoint.

    Args:
        path: the run folder.
        network: its name; None: the one that the method deploys.
        best: the weights of the best epoch, which are kept of the deployed network alone.
        data_root, data_path: where the data are now, if they have moved.

    Raises:
        InputError, CheckpointError: no run, no such network, no weights, or files that are damaged or do not fit.
    """
    run = RunFolder(path)
    config = run.read_config()
    if config.replicas > 1:
        raise InputError(f"{path} holds {config.replicas} replicas; name one of them, such as {path}/seed{config.seed}")
    name, model = _chosen(config, network)
    state = checkpoint.load_newest(run.checkpoint) if checkpoint.kept(run.checkpoint) else None
    record = _record(run.path / "summary.json", state, config)
    file = _weight_file(path, config, name, best=best, usable=state is None or record["completed"])
    if file is None and state is None:
        raise InputError(
            f"{path} has no weights of {name} yet; go on training with: fastfuse train --resume --out {path}"
        )
    moved: dict[str, Any] = {"data_root": data_root or config.data_root, "data_path": data_path or config.data_path}
    located = dataclasses.replace(config, out=path, data_cache=None, **moved)
    dataset = build.load_data(located)
    if state is not None and state["data"] != dataset.fingerprint():
        raise InputError(
            f"{path} was trained on other data ({state['data']}) than are found now ({dataset.fingerprint()}): class "
            "names and normalisation would be wrong; give its own with --data-root or --data-path"
        )
    # Of a finished run the method is built besides, to hold the file against it, unless that needs its teachers.
    method = None
    if state is not None and (file is None or not (best or config.teacher_count)):
        method = _restored(located, dataset, state, run.checkpoint)
    if file is None:
        assert method is not None  # without a file there is a checkpoint
        own = _state_of(method, name)
    else:
        own = read_weights(file)
    plain = _loaded(plain_network(config, model, dataset.num_classes), own, f"{file or run.checkpoint}", model)
    accuracy = record["networks"].get(name, {})
    return Deployable(
        name=name,
        model=model,
        network=plain,
        reference=_reference(plain, method, name),
        source=file or run.checkpoint,
        epoch=accuracy.get("best_epoch") if best else record["epochs"],
        completed=record["completed"],
        record=record,
        config=config,
        dataset=dataset,
    )


def _loaded(network: nn.Module, state: Mapping[str, Tensor], source: str, model: str) -> nn.Module:
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} does not fit {model}, which the run's config.json names: {reason}") from error
    return network


def _reference(plain: nn.Module, method: Method | None, name: str) -> Callable[[Tensor], Tensor]:
    if method is None:
        return lambda images: logits_of(plain, images)
    return lambda images: method.predict(images)[name]


def plain_network(config: TrainConfig, model: str, num_classes: int) -> nn.Module:
    """The network that `model` names with new weights and nothing around it, in evaluation mode."""
    network = models.build(model, num_classes, **(model_options(config) if model.startswith("wrn") else {}))
    return (network.network if isinstance(network, Wrapper) else network).eval()


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """What any plain network makes of images: [B, 3, H, W] to [B, K]."""
    output = network(images)
    return output if isinstance(output, Tensor) else output.logits


def networks_of(config: TrainConfig) -> dict[str, str]:
    """The names of the networks of a resolved configuration that can be taken away, with their models."""
    method = METHODS[config.method]
    if method.deployed not in ("student0", "leader"):
        return {}
    students = config.student_models or [str(config.model)] * int(config.students or 1)
    found = {f"student{i}": model for i, model in enumerate(students)}
    extra = {"leader": config.leader, "teacher": config.teacher_model}
    if method.extra_network is not None:
        found[method.extra_network] = extra[method.extra_network] or students[0]
    return found


def _chosen(config: TrainConfig, network: str | None) -> tuple[str, str]:
    known = networks_of(config)
    if not known:
        raise InputError(
            f"a run of {config.method} trains no network that classifies images: there is nothing to export"
        )
    name = network or METHODS[config.method].deployed
    if name in ("ensemble", "oracle") or name.startswith("fusion"):
        raise InputError(
            f"{name} is made of several networks and is never deployed; networks of this run: {', '.join(known)}"
        )
    if name not in known:
        raise unknown_name("network of this run", name, known)
    return name, known[name]


def _weight_file(path: Path, config: TrainConfig, name: str, *, best: bool, usable: bool) -> Path | None:
    """The file to take the weights from; None: the checkpoint has them."""
    deployed = METHODS[config.method].deployed
    file = path / f"{name}{'_best' if best else ''}.safetensors"
    if best and name != deployed:
        raise InputError(
            f"the best weights are kept of {deployed} alone: leave --best out for those of {name}'s last epoch"
        )
    if best and not file.exists():
        raise InputError(f"{path} has no {file.name}: no epoch has ended yet; leave --best out")
    # While a resumed run goes on, the file of the last epoch is an earlier one's.
    return file if best or (name == deployed and usable and file.exists()) else None


def _record(summary: Path, state: Mapping[str, Any] | None, config: TrainConfig) -> dict[str, Any]:
    """What is known of the run, from its checkpoint or, where that has been removed, from its results."""
    if state is None:
        try:
            record = json.loads(summary.read_text())
            return {
                key: record[key] for key in ("networks", "best_chosen_on", "epochs", "completed", "commit", "versions")
            }
        except FileNotFoundError:
            return {
                "networks": {},
                "best_chosen_on": None,
                "epochs": None,
                "completed": False,
                "commit": "unknown",
                "versions": {},
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{summary} cannot be read as a run's results ({error!r}): restore or remove it"
            ) from error
    position, versions = state["position"], dict(state["versions"])
    last = position["history"][-1] if position["history"] else {"accuracy": {}}
    return {
        "networks": {
            name: {
                "last_top1": accuracy["top1"],
                "best_top1": position["best"][name]["top1"],
                "best_epoch": position["best"][name]["epoch"],
            }
            for name, accuracy in last["accuracy"].items()
        },
        "best_chosen_on": "validation" if "validation" in last else "test",
        "epochs": position["epoch"],
        "completed": position["epoch"] == config.epochs,
        "commit": versions.pop("commit"),
        "versions": versions,
    }


def _restored(config: TrainConfig, dataset: Dataset, state: Mapping[str, Any], file: Path) -> Method:
    """The method of a checkpoint in evaluation mode, with the averaged weights where there are any."""
    given = preliminary.prepared(config, dataset.num_classes, None)
    with torch.random.fork_rng([]):
        method = build.make_method(config, dataset.num_classes, given, image_size=dataset.image_size)
    try:
        method.load_state_dict(state["method"] if state["ema"] is None else state["ema"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file} does not fit the run's config.json: {reason}") from error
    return method.eval()


def _state_of(method: Method, name: str) -> dict[str, Tensor]:
    networks = method.networks()
    if name in networks:
        return networks[name].state_dict()
    branched: Any = networks["network"]  # of what shares its trunk
    return branched.state_of(method.students().index(name))
