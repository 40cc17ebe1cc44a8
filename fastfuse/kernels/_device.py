"""Device helpers that the Triton kernels of several ops share; imported by `triton_kernels.py` files only."""

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
    """Entry `index` of a tuple of pointers of one type."""
    address = table[0].to(tl.int64)
    for i in tl.static_range(1, len(table)):
        address = tl.where(index == i, table[i].to(tl.int64), address)
    return address.to(table[0].dtype)
