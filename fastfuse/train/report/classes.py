"""Where two ways to train differ: class by class, and in what they take for what."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastfuse.train.keepsakes import Keepsakes


class Pair(NamedTuple):
    """Test images of class `true` that are taken for `taken`: how many by ours, and by the other (mean over seeds)."""

    true: int
    taken: int
    ours: float
    other: float


def per_class(kept: Sequence[Keepsakes], network: str) -> np.ndarray:
    """Accuracy of a network in percent by class, float64 [K], mean over seeds; NaN of a class without test images."""
    each = []
    for one in kept:
        classes = len(one.class_names)
        right = np.bincount(one.labels[one.predictions[network] == one.labels], minlength=classes)
        images = np.bincount(one.labels, minlength=classes)
        each.append(np.divide(100.0 * right, images, out=np.full(classes, np.nan), where=images > 0))
    return np.mean(each, axis=0)


def mistakes(kept: Sequence[Keepsakes], network: str) -> dict[tuple[int, int], float]:
    """The confusion matrix of a network off its diagonal, without zeros: images by (true, taken), mean over seeds."""
    found: dict[tuple[int, int], float] = {}
    for one in kept:
        taken = one.predictions[network]
        wrong = taken != one.labels
        pairs, counts = np.unique(np.stack([one.labels[wrong], taken[wrong]]), axis=1, return_counts=True)
        for true, other, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            found[true, other] = found.get((true, other), 0.0) + count / len(kept)
    return found


def differing(ours: dict[tuple[int, int], float], other: dict[tuple[int, int], float], most: int) -> list[Pair]:
    """The pairs whose numbers differ most, largest difference first; none that are equal."""
    pairs = [Pair(*pair, ours.get(pair, 0.0), other.get(pair, 0.0)) for pair in sorted(ours.keys() | other.keys())]
    pairs = [pair for pair in pairs if pair.ours != pair.other]
    return sorted(pairs, key=lambda pair: -abs(pair.ours - pair.other))[:most]


def same_images(ours: Sequence[Keepsakes], other: Sequence[Keepsakes]) -> bool:
    """Whether both were tested on the same images, as far as labels and class names tell."""
    first = ours[0]
    return all(
        one.class_names == first.class_names and np.array_equal(one.labels, first.labels) for one in (*ours, *other)
    )
