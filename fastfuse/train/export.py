"""`fastfuse export`: one trained network as a file, proven equal before it is written, and its model card."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse import info
from fastfuse.config.commands import ExportOptions
from fastfuse.errors import FastfuseError, InputError, unknown_name
from fastfuse.nn.folding import folded
from fastfuse.train import build, formats
from fastfuse.train.cost import Cost, cost, latency
from fastfuse.train.deployable import Deployable, load_deployable, logits_of, plain_network
from fastfuse.train.files import make_folder, write_atomic
from fastfuse.train.model_card import card

# Two sizes of batch, of which neither is the one that a program is traced with.
_BATCHES = (1, 3)


class ExportError(FastfuseError):
    """What was made is not the network that was trained."""


def export(path: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a network of a run to a file of its own and a model card beside it.

    Args:
        path: the run folder.
        options: of the command.

    Returns:
        `file`, `card`, `network`, `epoch`, `completed`, `source`, `error` (largest difference of a logit), and `costs`
        of what was exported and of the plain network, see `fastfuse.train.cost`.

    Raises:
        InputError, CheckpointError: bad input, see `load_deployable`; a format that does not exist or whose package is
            missing; a place that cannot be written to.
        ExportError: the file would give other logits, or cost more; nothing was written.
    """
    _check(options)
    device = build.pick_device(options.device)
    found = load_deployable(
        path, network=options.network, best=options.best, data_root=options.data_root, data_path=options.data_path
    )
    file = options.out or path / "export" / f"{_stem(found, options)}{formats.SUFFIXES[options.format]}"
    network = _folded(found) if options.fold_batchnorm else found.network
    size = found.dataset.image_size

    def blank() -> nn.Module:
        return plain_network(found.config, found.model, found.dataset.num_classes)

    facts = describe(found)
    data = formats.encode(network, options.format, size, facts)
    exported = formats.decode(data, options.format, blank)
    error = check_equal(found, exported)
    counted = exported if isinstance(exported, nn.Module) else formats.Logits(network)
    costs = cost(counted, size), cost(blank(), size)
    _check_cost(*costs, folded=options.fold_batchnorm)
    times = latency({"exported": formats.Logits(network), "plain": formats.Logits(blank())}, size, device)
    make_folder(file.parent)
    text = card(found, facts, file.name, costs=costs, times=times, error=error, folded=options.fold_batchnorm)
    write_atomic(file, lambda opened: opened.write(data))
    write_atomic(file.with_suffix(".md"), lambda opened: opened.write(text.encode()))
    return {
        "file": str(file), "card": str(file.with_suffix(".md")), "network": found.name, "epoch": found.epoch,
        "completed": found.completed, "source": str(found.source), "error": error,
        "costs": [counted._asdict() for counted in costs],
    }  # fmt: skip


def describe(found: Deployable) -> dict[str, Any]:
    """What must be known to use a network, as JSON can hold it."""
    dataset = found.dataset
    return {
        "format": 1,
        "network": found.name,
        "model": found.model,
        "method": found.config.method,
        "data": dataset.name,
        "image_size": list(dataset.image_size),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "classes": list(dataset.class_names),
        "epoch": found.epoch,
        "accuracy": dict(found.record["networks"].get(found.name, {})),
        "chosen_on": found.record["best_chosen_on"],
        "trained": {"commit": found.record["commit"], "versions": found.record["versions"]},
        "exported": {"commit": info.commit(), "versions": info.versions()},
    }


@torch.no_grad()
def check_equal(found: Deployable, exported: Callable[[Tensor], Tensor]) -> float:
    """The largest difference between the logits of what was made and of what was trained, on random images.

    Allowed is what rounding can do: ten times what it does to the plain network itself, which float64 tells, and ten
    units in the last place of the largest logit.

    Raises:
        ExportError: it differs by more.
    """
    exact = copy.deepcopy(found.network).double()
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in _BATCHES:
        images = torch.randn(batch, 3, *found.dataset.image_size, generator=generator)
        truth = logits_of(exact, images.double())
        rounding = (logits_of(found.network, images) - truth).abs().max().item()
        allowed = 10 * (rounding + torch.finfo(torch.float32).eps * truth.abs().max().item())
        wanted = found.reference(images)
        try:
            got = exported(images)
        except Exception as error:  # a program with a fixed batch, or a runtime that lacks an operator
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(
                f"the exported {found.name} does not run on a batch of {batch} ({reason}); nothing was written, try "
                "another --format"
            ) from error
        off = (got - wanted).abs().max().item() if got.shape == wanted.shape else float("inf")
        if not off <= allowed:  # also where it is not a number
            raise ExportError(
                f"the exported {found.name} does not give the logits of the trained one: they differ by {off:.3g} "
                f"for a batch of {batch}, and rounding allows {allowed:.3g}; nothing was written, try another --format"
            )
        largest = max(largest, off)
    return largest


def _check(options: ExportOptions) -> None:
    if options.format not in formats.SUFFIXES:
        raise unknown_name("format", options.format, formats.SUFFIXES)
    formats.check_format(options.format)
    if options.fold_batchnorm and options.format not in formats.PROGRAMS:
        raise InputError(
            f"--fold-batchnorm changes the layers, and --format {options.format} holds the plain network's weights: "
            f"use --format {' or '.join(formats.PROGRAMS)}"
        )
    suffix = formats.SUFFIXES[options.format]
    if options.out is not None and (options.out.suffix != suffix or options.out.is_dir()):
        raise InputError(f"--out {options.out} must be a file named *{suffix} for --format {options.format}")


def _stem(found: Deployable, options: ExportOptions) -> str:
    return found.name + ("_best" if options.best else "") + ("_folded" if options.fold_batchnorm else "")


def _folded(found: Deployable) -> nn.Module:
    def norms(network: nn.Module) -> int:
        return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())

    network = folded(found.network)
    if norms(network) == norms(found.network):
        raise InputError(f"no batch norm of {found.model} can be folded: leave --fold-batchnorm out")
    return network


def _check_cost(own: Cost, plain: Cost, *, folded: bool) -> None:
    """Distillation costs nothing at inference; folding makes a network cheaper."""
    wrong = own.parameters > plain.parameters or own.multiply_adds != plain.multiply_adds
    if wrong or (own != plain and not folded):
        raise ExportError(
            f"the exported network costs {tuple(own)} parameters and multiply-adds, the plain {tuple(plain)}"
        )
