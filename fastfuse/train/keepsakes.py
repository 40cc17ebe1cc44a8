"""What a run keeps of its trained networks for its report: every answer to a test image, and a few attention maps."""

import dataclasses
import io
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.methods.base import Method
from fastfuse.methods.replicas import Replicas
from fastfuse.nn.fusion import FusionHead, FusionOutput
from fastfuse.train.files import write_atomic

if TYPE_CHECKING:
    from fastfuse.train.loop import Trainer

NAME = "keepsakes.npz"
FORMAT = 1
IMAGES = 6
# Larger images are kept smaller: a report shows them as thumbnails.
LARGEST = 96
_MAPS = "maps/"


@dataclasses.dataclass(frozen=True, eq=False)
class Keepsakes:
    """What is kept of one run, in the state in which it ended or stopped.

    Attributes:
        epoch: epochs done.
        class_names: K.
        labels: int [N] of the test images.
        predictions: the most probable class of every test image, int [N], by network; also of the ensemble.
        images: a few test images of different classes, uint8 [M, H, W, 3].
        shown: their places among the test images, int [M].
        maps: their attention maps, the channel means of squares of the last map, float32 [M, h, w]; by network, of
            those that have one; that of the fused map under the fused head's name.
    """

    epoch: int
    class_names: tuple[str, ...]
    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    images: np.ndarray
    shown: np.ndarray
    maps: dict[str, np.ndarray]


def keep(trainer: "Trainer", method: Method) -> None:
    """Look at all test images once and write what is kept into the run folder, or into that of each replica.

    Nothing is written of a run that stopped inside an epoch: its weights are not those of any line of its metrics. A
    device without the memory for it says so, and the run stays as good as it is.

    Args:
        trainer: its files are written; of replicas, the folders of each are there.
        method: the trained networks, or their moving average.
    """
    position = trainer.position
    if position.step or not position.history:
        return
    try:
        found = observed(trainer, method)
    except torch.OutOfMemoryError:
        print(f"fastfuse: no {NAME}: the device's memory does not suffice; all else is written", file=sys.stderr)
        return
    each = [(f"{name}/", trainer.run.path / name) for name in method.names] if isinstance(method, Replicas) else []
    for prefix, folder in each or [("", trainer.run.path)]:
        own: dict[str, Any] = {part: _own(getattr(found, part), prefix) for part in ("predictions", "maps")}
        write(folder, dataclasses.replace(found, **own))


@torch.no_grad()
def observed(trainer: "Trainer", method: Method) -> Keepsakes:
    """One evaluation pass; the method's mode is restored, and no random number is drawn."""
    batches = trainer.evaluator(trainer.dataset.test, method).batches
    was_training = method.training
    method.eval()
    batches.start()
    labels, predictions = [], []
    for i, count in enumerate(batches.counts):
        batches.fetch(i)
        images, own_labels = batches.draw(count)
        with trainer.step.autocast():
            if i == 0:
                logits, found = _with_maps(method, images)
                shown = _shown(own_labels)
                pictures = images[shown].float()
                maps = {name: x[shown].float().cpu().numpy() for name, x in found.items()}
            else:
                logits = method.predict(images)
        predictions.append({name: _best(rows) for name, rows in _and_ensembles(method, logits)})
        labels.append(own_labels)
    method.train(was_training)
    kind = np.uint16 if trainer.dataset.num_classes <= 1 << 16 else np.int32
    return Keepsakes(
        epoch=trainer.position.epoch,
        class_names=tuple(trainer.dataset.class_names),
        labels=torch.cat(labels).cpu().numpy().astype(kind),
        predictions={
            name: torch.cat([part[name] for part in predictions]).cpu().numpy().astype(kind) for name in predictions[0]
        },
        images=_thumbnails(pictures, trainer.dataset.mean, trainer.dataset.std),
        shown=shown.cpu().numpy(),
        maps=maps,
    )


def write(folder: Path, kept: Keepsakes) -> None:
    """Write RUN/keepsakes.npz.

    Raises:
        WriteError: it cannot be written.
    """
    names = list(kept.predictions)
    arrays: dict[str, Any] = {
        "format": np.array(FORMAT),
        "epoch": np.array(kept.epoch),
        "class_names": np.array(kept.class_names),
        "labels": kept.labels,
        "networks": np.array(names),
        "predictions": np.stack([kept.predictions[name] for name in names]),
        "images": kept.images,
        "shown": kept.shown,
        **{_MAPS + name: maps for name, maps in kept.maps.items()},
    }
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_atomic(folder / NAME, lambda file: file.write(data.getvalue()))


def read(folder: Path) -> Keepsakes | str:
    """What a run kept, or why there is nothing to read: it is no run's fault that it has none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / NAME
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if int(found["format"]) != FORMAT:
            return f"its {NAME} is of format {int(found['format'])}, and this version reads {FORMAT}"
        kept = Keepsakes(
            epoch=int(found["epoch"]),
            class_names=tuple(found["class_names"].tolist()),
            labels=found["labels"].astype(np.int64),
            predictions=dict(
                zip(found["networks"].tolist(), found["predictions"].astype(np.int64), strict=True),
            ),
            images=found["images"],
            shown=found["shown"],
            maps={name.removeprefix(_MAPS): x for name, x in found.items() if name.startswith(_MAPS)},
        )
        _check(kept)
        return kept
    except FileNotFoundError:
        return f"it has no {NAME}, which a run writes when it ends"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"{path} is damaged ({reason}): delete it and have it written anew with fastfuse train --resume --out "
            f"{folder}"
        ) from error


def _check(kept: Keepsakes) -> None:
    classes, shown = len(kept.class_names), len(kept.shown)
    for values in (kept.labels, *kept.predictions.values()):
        if values.shape != kept.labels.shape or values.ndim != 1 or not 0 <= values.min() <= values.max() < classes:
            raise ValueError("classes of the test images that do not fit one another")
    if kept.images.shape != (shown, *kept.images.shape[1:3], 3) or any(
        maps.shape != (shown, *maps.shape[1:3]) or not np.isfinite(maps).all() for maps in kept.maps.values()
    ):
        raise ValueError("images and maps that do not fit one another")


def _with_maps(method: Method, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The logits of every head, and the attention map [B, h, w] behind those that have one."""
    fused: list[FusionOutput] = []
    heads = [module for module in method.modules() if isinstance(module, FusionHead)]
    handles = [head.register_forward_hook(lambda module, given, output: fused.append(output)) for head in heads]
    try:
        answers = method.answers(images)
        logits = method.heads(answers)
    finally:
        for handle in handles:
            handle.remove()
    # Which answer is whose is the method's business: a head's logits are the very tensor that its network gave.
    maps = {id(answer.logits): answer.features[-1] for answer in _single(answers)}
    attention = {name: functional.attention_map(maps[id(x)]) for name, x in logits.items() if id(x) in maps}
    attention |= {name: own.attention for name, x in logits.items() for own in fused if own.logits is x}
    return logits, {name: attention[name] for name in logits if name in attention}


def _single(answers: Any) -> Iterator[Any]:
    """Every network's answer that has maps, of all replicas."""
    if hasattr(answers, "logits"):
        if hasattr(answers, "features"):
            yield answers
    elif isinstance(answers, list | tuple):
        for answer in answers:
            yield from _single(answer)


def _and_ensembles(method: Method, logits: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every head, and the mean-logit ensembles that `Evaluator` counts."""
    rows = {name: x.float() for name, x in logits.items()}
    yield from rows.items()
    for prefix, names in method.ensembles().items():
        if len(names) > 1:
            yield f"{prefix}ensemble", torch.stack([rows[name] for name in names]).mean(0)


def _best(logits: Tensor) -> Tensor:
    # As `Evaluator` takes it: of equal logits, argmax may take another.
    return logits.topk(min(5, logits.shape[1]), 1).indices[:, 0]


def _shown(labels: Tensor) -> Tensor:
    """The first images of so many classes, or the first images where there are fewer classes."""
    known = labels.tolist()
    firsts = [i for i, label in enumerate(known) if label not in known[:i]]
    others = [i for i in range(len(known)) if i not in set(firsts)]
    return torch.tensor((firsts + others)[:IMAGES], device=labels.device)


def _thumbnails(images: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """Normalised images [M, 3, H, W] as uint8 [M, H, W, 3], no larger than a report shows them."""
    images = images * std[:, None, None] + mean[:, None, None]
    if (largest := max(images.shape[2:])) > LARGEST:
        size = [max(1, round(side * LARGEST / largest)) for side in images.shape[2:]]
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _own(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
