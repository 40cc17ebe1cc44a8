"""How a step's images are divided: over processes, and over forwards one after another (`--accumulate`)."""

from typing import NamedTuple

from torch import Tensor

from fastfuse.data.share import Share


class Micro(NamedTuple):
    """One forward and backward of a step.

    Attributes:
        rows: of the images that this process has drawn; of each part, see `TrainingBatches`.
        share: of those images that count for this process, the part that these are: sums to 1 over a step.
        weight: of the loss, so that gradients, averaged over processes and added up over a step, are those of the mean
            over the whole batch; 0 of a process that only stands in.
    """

    rows: slice
    share: float
    weight: float


def plan(count: int, share: Share, *, accumulate: int = 1, parts: int = 1) -> list[Micro]:
    """The forwards of a step, as many for every process.

    Args:
        count: images in the whole batch.
        share: this process's.
        accumulate: into how many forwards a process divides its images; fewer, where it has fewer images.
        parts: of the training images, of which each forward has equally many images.
    """
    each = count // parts
    own, processes = share.own(each), share.processes
    forwards = min(accumulate, -(-each // processes))  # as many as the first process, which has most images
    found = []
    for i in range(forwards):
        within = Share(i, forwards)
        rows, size = within.rows(own), within.own(own)
        if not size:
            drawn = share.drawn(each)
            rows = slice(0, min(drawn.stop - drawn.start, 2))
        found.append(Micro(rows, size / max(own, 1), size * processes / each))
    return found


def taken(images: Tensor, labels: Tensor, micro: Micro, *, parts: int = 1) -> tuple[Tensor, Tensor]:
    """The images [B, ...] and labels [..., B] of one forward."""
    if images.shape[0] == parts * (micro.rows.stop - micro.rows.start):
        return images, labels
    if parts == 1:
        return images[micro.rows], labels[..., micro.rows]
    own = labels.unflatten(-1, (parts, -1))[..., micro.rows].flatten(-2)
    return images.unflatten(0, (parts, -1))[:, micro.rows].flatten(0, 1), own
