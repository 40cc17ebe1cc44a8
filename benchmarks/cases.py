"""What is trained in a measurement: networks, how many, and the shape of their batches."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.report import Value
from fastfuse.errors import InputError
from fastfuse.models import IMAGENET


class Data(NamedTuple):
    """What a family of networks reads: sides of its images, classes, images per batch on a device of each type.

    Attributes:
        multiple: sides are multiples of it, so that the published program's transforms, which double, meet the maps.
    """

    image_size: int
    classes: int
    batch_size: dict[str, int]
    multiple: int


CIFAR_DATA = Data(32, 100, {"cuda": 128, "cpu": 128}, 4)
# As published on a GPU; on a CPU what ends in seconds.
IMAGENET_DATA = Data(224, 1000, {"cuda": 256, "cpu": 4}, 32)


@dataclass(frozen=True)
class Case:
    """S students of a model and their leader, on batches of random images; R times in one pass."""

    model: str
    students: int
    batch_size: int
    amp: str
    device: torch.device
    replicas: int = 1
    image_size: int = CIFAR_DATA.image_size
    classes: int = CIFAR_DATA.classes

    @property
    def name(self) -> str:
        """For headings."""
        return f"{self.model} S={self.students}" + (f" R={self.replicas}" if self.replicas > 1 else "")

    @property
    def described(self) -> dict[str, Value]:
        """The first columns of its rows."""
        shape = {"batch_size": self.batch_size, "image_size": self.image_size}
        return {"model": self.model, "students": self.students, **shape}


def data_of(model: str) -> Data:
    """The data that a model is published with."""
    return IMAGENET_DATA if model in IMAGENET else CIFAR_DATA


def cases(options: argparse.Namespace, models: Sequence[str], amp: str, device: torch.device) -> list[Case]:
    """A case for each model and number of students, with the model's own batches where none are asked for.

    Raises:
        InputError: images that do not suit a model.
    """
    found = []
    for model in models:
        data = data_of(model)
        size = options.image_size or data.image_size
        # Two positions a side at least: the diversity threshold needs three.
        if size % data.multiple or size < 2 * data.multiple:
            least = 2 * data.multiple
            raise InputError(
                f"--image-size {size} does not suit {model}: give a multiple of {data.multiple} from {least}"
            )
        batch = options.batch_size or data.batch_size[device.type]
        found += [Case(model, s, batch, amp, device, image_size=size, classes=data.classes) for s in options.students]
    return found


def batches(cases: Sequence[Case]) -> dict[str, Value]:
    """Sizes of batches and images for the settings of a report, with "+" between those of different models."""
    return {key: joined(case.described[key] for case in cases) for key in ("batch_size", "image_size")}


def joined(values: Iterable[Value]) -> Value:
    """One value, or different ones with "+" between them."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else "+".join(map(str, different))


def stem(suite: str, cases: Sequence[Case], part: str | None = None) -> str:
    """Of a report's files; `part` in place of the numbers of students."""
    first, sizes = cases[0], batches(cases)
    models = "+".join(dict.fromkeys(case.model for case in cases))
    part = part or "s" + "+".join(map(str, dict.fromkeys(case.students for case in cases)))
    own = all(case.image_size == data_of(case.model).image_size for case in cases)
    images = "" if own else f"_i{sizes['image_size']}"
    return f"{suite}_{models}_{part}_b{sizes['batch_size']}{images}_{first.amp}_{first.device.type}"
