"""Device helpers that the Triton kernels of several ops share; imported by `triton_kernels.py` files only."""

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def pick(table, index):
    """Entry `index`, known only on the device, of a tuple of scalars that travels as kernel parameters."""
    found = table[0]
    for i in tl.static_range(1, len(table)):
        found = tl.where(index == i, table[i], found)
    return found


@triton.jit
def pick_pointer(table, index):
    """Entry `index` of a tuple of pointers, as a pointer of the first one's type.

    Selected as pointers, not as addresses: the compiler keeps track of their alignment and loads 16 bytes at once.
    """
    found = table[0]
    for i in tl.static_range(1, len(table)):
        found = tl.where(index == i, table[i].to(table[0].dtype), found)
    return found


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """Sum of `count` numbers in memory, in an order that depends on nothing but `count`."""
    total = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(values + place, mask=place < count, other=0).to(DTYPE)
    return tl.sum(total)


def table(values: Sequence[float]) -> tuple:
    """A table for `pick`, one entry if all are equal: the compiler then knows a stride of 1 as such."""
    return (values[0],) if all(value == values[0] for value in values) else tuple(values)
