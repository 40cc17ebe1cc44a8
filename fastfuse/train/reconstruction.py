"""How well a paraphraser rebuilds the last map of each of several trained networks (FEED's analysis)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastfuse import info
from fastfuse.config import TrainConfig, adapted
from fastfuse.data import Dataset, Split, evaluation_batches
from fastfuse.errors import FastfuseError, InputError
from fastfuse.models._blocks import last_channels
from fastfuse.nn.factor import Paraphraser
from fastfuse.nn.teachers import Teachers
from fastfuse.train import build
from fastfuse.train.files import write_atomic
from fastfuse.train.record import RunFolder
from fastfuse.train.run import train
from fastfuse.train.teachers import load_teacher
from fastfuse.train.weights import read_weights

EVALUATION_BATCH = 500
TABLE, PICTURE = "reconstruction.json", "reconstruction.png"


class Reconstruction(NamedTuple):
    """One network's row.

    Attributes:
        network: as it was named.
        channels: C of its last map.
        factor_channels: m of the factor that the map is rebuilt from.
        train, test: mean of |P(F) - F| over all elements of all images, not augmented, after the last epoch.
        scale: mean of |F| over the test images, which the errors are to be seen against.
    """

    network: str
    channels: int
    factor_channels: int
    train: float
    test: float
    scale: float


def configured(networks: Sequence[str], given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of the paraphrasers' training: what was given, on the data of the first network's run.

    Args:
        networks: see `reconstruct`.
        given: fields of a configuration; None: the first run's, or the configuration's own.
    """
    config = TrainConfig(method="paraphraser", nesterov=False)
    path = Path(networks[0])
    if path.is_dir():
        first = RunFolder(path).read_config()
        data = ("data", "data_root", "data_path", "crop_padding", "flip", "image_size")
        config = dataclasses.replace(config, **{name: getattr(first, name) for name in data})
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if config.out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        config = dataclasses.replace(config, out=Path("runs") / f"{stamp}_reconstruct")
    return config


def reconstruct(networks: Sequence[str], config: TrainConfig) -> list[Reconstruction]:
    """Train a paraphraser on each network's last map, with the same epochs, seed and data, and measure it.

    Each is a run of its own in `config.out`, as 0-NAME, which is taken up where it stopped with `config.resume`.

    Args:
        networks: at least one, named as in --teachers.
        config: of the paraphrasers' training; its method is not looked at.

    Returns:
        A row for each network, in their order.

    Raises:
        InputError: no network, or one that cannot be used, before anything is trained.
        FastfuseError: --max-time ended a run.
    """
    if not networks or config.out is None:
        raise InputError("a reconstruction needs at least one trained network and a folder: fastfuse reconstruct RUN")
    singles = [build.resolved(_single(config, i, entry)) for i, entry in enumerate(networks)]
    dataset = build.load_data(singles[0])
    teachers = [load_teacher(single.teachers[0], single, dataset.num_classes) for single in singles]
    rows = []
    for entry, single, teacher in zip(networks, singles, teachers, strict=True):
        summary = train(single)
        if not summary["completed"]:
            raise FastfuseError(f"--max-time ended the paraphraser of {entry}: go on with --resume")
        state = read_weights(Path(summary["run"]) / "paraphraser.safetensors")
        factor_channels = state["encoder.conv3.weight"].shape[0]
        channels = last_channels(teacher)
        paraphraser = Paraphraser(channels, factor_channels)
        paraphraser.load_state_dict(state)
        device = build.pick_device(config.device)
        on_train, on_test = errors(teacher, paraphraser, dataset, device=device)
        rows.append(Reconstruction(entry, channels, factor_channels, on_train[0], *on_test))
    return rows


@torch.no_grad()
def errors(
    network: nn.Module, paraphraser: nn.Module, dataset: Dataset, *, device: torch.device | str = "cpu"
) -> list[tuple[float, float]]:
    """Mean |P(F) - F| and mean |F| of the network's last map F, on the training and on the test images, in float32."""
    dataset = dataset.to(torch.device(device))
    teachers = Teachers([network]).to(device)
    teachers.arrange("loop")
    paraphraser = paraphraser.to(device).eval()
    return [_errors(teachers, paraphraser, dataset, split) for split in (dataset.train, dataset.test)]


def save(rows: Sequence[Reconstruction], config: TrainConfig) -> list[Path]:
    """Write reconstruction.json and reconstruction.png into `config.out`.

    Raises:
        InputError: matplotlib is not installed; the table is written nevertheless.
    """
    assert config.out is not None  # see `configured`
    table, picture = config.out / TABLE, config.out / PICTURE
    found = {
        "rows": [row._asdict() for row in rows],
        "settings": {name: getattr(config, name) for name in ("data", "epochs", "batch_size", "lr", "seed")},
        "versions": {**info.versions(), "commit": info.commit()},
    }
    write_atomic(table, lambda file: file.write((json.dumps(found, indent=2) + "\n").encode()))
    draw(rows, picture)
    return [table, picture]


def draw(rows: Sequence[Reconstruction], path: Path) -> None:
    """Bars of the errors on training and test images, by network; the suffix of `path` is the format.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"{path.name} needs matplotlib, which is not installed: pip install 'fastfuse[plot]'; the numbers are in "
            f"{TABLE}"
        ) from error
    figure = Figure(figsize=(8, 1.5 + 0.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for shift, kind in ((-0.2, "train"), (0.2, "test")):
        places = [i + shift for i in range(len(rows))]
        bars = axes.barh(places, [getattr(row, kind) for row in rows], 0.4, label=kind)
        axes.bar_label(bars, fmt="%.4f", padding=3)
    axes.set_yticks(range(len(rows)), [row.network for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("mean absolute error of the rebuilt last map")
    figure.legend(loc="outside upper right", ncols=2)
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix(".")))


def _single(config: TrainConfig, index: int, entry: str) -> TrainConfig:
    """The run of one network's paraphraser."""
    assert config.out is not None  # see `reconstruct`
    out = config.out / f"{index}-{Path(entry).name.replace(':', '-')}"
    own: dict[str, Any] = {"teachers": (entry,), "teacher_model": config.teacher_model}
    own |= {"students": None, "init": (), "baseline": False, "replicas": 1, "ema": 0.0}
    own |= {"factor_ratio": config.factor_ratio, "out": out, "resume": config.resume and out.exists()}
    return dataclasses.replace(adapted(config, method="paraphraser"), **own)


def _errors(teachers: Teachers, paraphraser: nn.Module, dataset: Dataset, split: Split) -> tuple[float, float]:
    batches = evaluation_batches(split, mean=dataset.mean, std=dataset.std, batch_size=EVALUATION_BATCH)
    batches.start()
    wrong, size, count = 0.0, 0.0, 0
    for step, images in enumerate(batches.counts):
        batches.fetch(step)
        ((_, features),) = teachers(batches.draw(images)[0])
        feature = features[-1]
        wrong += (paraphraser(feature) - feature).abs().sum(dtype=torch.float64).item()
        size += feature.abs().sum(dtype=torch.float64).item()
        count += feature.numel()
    return wrong / count, size / count
