"""Memory of what the operators return."""

from collections.abc import Sequence

from torch import Tensor


def sizes(maps: Sequence[Tensor]) -> tuple[int, int]:
    """The largest batch and the most positions among maps: sides of the tables that hold something of each."""
    return max(x.shape[0] for x in maps), max(x.shape[-1] * x.shape[-2] for x in maps)
