"""What kernels count in 32 bits, and what a launch's grid holds: what exceeds it is refused before any launch."""

from torch import Tensor

from fastfuse.errors import InputError

# Below 2^31 there must be room for the last tile and the last share of the positions, which reach beyond the map.
MOST = 2**31 - 2**24
# Programs along a grid's second and third axis.
ACROSS = 2**16 - 1


def check_span(x: Tensor, name: str = "a map") -> None:
    """Refuse a map of which one sample reaches further than 32 bits count: offsets of samples alone have 64.

    Raises:
        InputError: says how far it reaches.
    """
    last = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    # Elements of an expanded sample may share their memory.
    reach = max(last + 1, x.shape[1:].numel())
    if reach > MOST:
        raise InputError(
            f"a sample of {name} {list(x.shape)} spans {reach:,} elements, the kernels take at most {MOST:,}; "
            "use backend='reference', or smaller or contiguous maps"
        )


def check_count(name: str, x: Tensor, what: str, count: int) -> None:
    """Refuse a tensor of which kernels would have to count more of something than 32 bits can.

    Args:
        name: the argument.
        what: is counted, in the plural.

    Raises:
        InputError: says how many there are.
    """
    if count > MOST:
        raise InputError(
            f"{name} {list(x.shape)} makes {count:,} {what}, the kernels count at most {MOST:,}; "
            "use backend='reference', or fewer samples at a time"
        )


def check_positions(name: str, x: Tensor) -> None:
    """Refuse a map [B, C, H, W] whose B H W positions kernels cannot number through.

    Raises:
        InputError: says how many there are.
    """
    check_count(name, x, "positions", x.shape[0] * x.shape[2] * x.shape[3])


def grid(name: str, x: Tensor, *programs: int) -> tuple[int, ...]:
    """The grid of a launch over an argument, up to three numbers of programs.

    Raises:
        InputError: a GPU takes no grid as large as this.
    """
    check_count(name, x, "programs", programs[0])
    if max(programs[1:], default=0) > ACROSS:
        raise InputError(
            f"{name} {list(x.shape)} makes a grid of {' x '.join(f'{n:,}' for n in programs)} programs, a GPU takes at "
            f"most {ACROSS:,} along the second and third axis; use backend='reference', or smaller maps"
        )
    return programs
