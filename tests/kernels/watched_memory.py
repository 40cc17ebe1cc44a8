"""What a GPU's memory checker sees, and what it does not, in Triton's interpreter.

Programs of a launch run at the same time on a GPU, and so do the threads of a program between two barriers. The
interpreter runs one program after another, element by element in no time, and hides what goes wrong then. Here every
access of every program is noted, and refused

- outside of the tensors that the launch was given;
- to an element that another program of the launch writes, or reads if this one is a store;
- of a program that reads, or writes with another value, what it has itself written since its last barrier;
- of one store that writes two values to one element;
- of a load that leaves elements out and does not say what they are: a GPU leaves there what it finds.

A program may write what it has read: of the threads that have loaded an element one stores it, after its own load. So
running statistics are moved, and maps replaced in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

NOBODY, SEVERAL = -1, -2


class Block:
    """The elements of one tensor's extent, and which program has touched each of them last in this launch.

    Args:
        start, end: addresses.
        size: bytes of an element.
    """

    def __init__(self, start: int, end: int, size: int) -> None:
        self.start, self.end, self.size = start, end, size
        count = -(-(end - start) // size)
        self.reader, self.writer = np.full(count, NOBODY), np.full(count, NOBODY)
        self.since = np.full(count, NOBODY)  # which barriers the writer had passed


class Watch:
    """The accesses of one launch at a time."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.program = self.barriers = self.accesses = self.launches = 0
        self.index: tuple[int, ...] = ()

    def launch(self, tensors: list[torch.Tensor]) -> None:
        """Begin a launch that is given these tensors."""
        extents: dict[tuple[int, int], int] = {}
        for x in tensors:
            if x.numel():
                last = sum((count - 1) * stride for count, stride in zip(x.shape, x.stride(), strict=True))
                extents[x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()] = x.element_size()
        merged: list[Block] = []
        for (start, end), size in sorted(extents.items()):
            if merged and start < merged[-1].end:  # views of one memory are one block
                merged[-1] = Block(merged[-1].start, max(end, merged[-1].end), min(size, merged[-1].size))
            else:
                merged.append(Block(start, end, size))
        self.blocks, self.launches = merged, self.launches + 1

    def begin(self, index: tuple[int, ...]) -> None:
        """Begin a program."""
        self.program, self.barriers, self.index = self.program + 1, 0, index

    def load(self, addresses: np.ndarray, size: int, undefined: np.ndarray) -> None:
        """Note what a program reads, and whether it leaves elements undefined."""
        self._refuse(undefined, "reads what a mask leaves out")
        for block, places in self._places(addresses, size, "reads"):
            writers = block.writer[places]
            self._refuse((writers != NOBODY) & (writers != self.program), "reads what another program writes")
            unsettled = (writers == self.program) & (block.since[places] == self.barriers)
            self._refuse(unsettled, "reads what it has written itself, without a barrier")
            readers = block.reader[places]
            block.reader[places] = np.where((readers == NOBODY) | (readers == self.program), self.program, SEVERAL)

    def store(self, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        """Note what a program writes."""
        order = np.argsort(addresses, kind="stable")
        ordered, written = addresses[order], values[order].view(f"u{values.dtype.itemsize}")
        self._refuse((ordered[1:] == ordered[:-1]) & (written[1:] != written[:-1]), "writes two values to one element")
        for block, places in self._places(addresses, size, "writes"):
            readers, writers = block.reader[places], block.writer[places]
            others = (readers != NOBODY) & (readers != self.program)
            self._refuse(others, "writes what another program reads")
            self._refuse((writers != NOBODY) & (writers != self.program), "writes what another program writes")
            unsettled = (writers == self.program) & (block.since[places] == self.barriers)
            self._refuse(unsettled, "writes again what it has written, without a barrier")
            block.writer[places], block.since[places] = self.program, self.barriers

    def _places(self, addresses: np.ndarray, size: int, does: str) -> Iterator[tuple[Block, np.ndarray]]:
        self.accesses += addresses.size
        starts = np.array([block.start for block in self.blocks], dtype=np.int64)
        which = np.searchsorted(starts, addresses, side="right") - 1
        self._refuse(which < 0, f"{does} outside of what it was given")
        for i in np.unique(which):
            block, own = self.blocks[i], addresses[which == i]
            self._refuse(own + size > block.end, f"{does} outside of what it was given")
            yield block, (own - block.start) // block.size

    def _refuse(self, bad: np.ndarray, what: str) -> None:
        assert not bad.any(), f"program {self.index} {what}, {int(bad.sum())} times in one access"


def tensors_of(arguments: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested arguments."""
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, dict):
        yield from tensors_of(list(arguments.values()))
    elif isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from tensors_of(argument)


@contextmanager
def watched_memory() -> Iterator[Watch]:
    """A block in which every launch of the interpreter is watched."""
    from triton.runtime import interpreter

    watch, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, place = executor.__call__, builder.set_grid_idx
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        watch.launch(list(tensors_of([arguments, options])))
        return run(self, *arguments, **options)

    def begin(self: Any, *index: int) -> None:
        watch.begin(index)
        place(self, *index)

    def addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        return pointers.data[chosen].astype(np.int64), chosen

    def width(pointers: Any) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def watched_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        places, chosen = addresses(pointers, mask)
        watch.load(places, width(pointers), np.array(other is None and not chosen.all()))
        return load(self, pointers, mask, other, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        places, chosen = addresses(pointers, mask)
        watch.store(places, np.broadcast_to(value.data, chosen.shape)[chosen], width(pointers))
        return store(self, pointers, value, mask, *rest)

    def watched_barrier(self: Any) -> Any:
        watch.barriers += 1
        return barrier(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", launch)
        patch.setattr(builder, "set_grid_idx", begin)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_barrier", watched_barrier)
        yield watch
