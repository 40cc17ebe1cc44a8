"""Loss terms of every step, kept on the device and read once per logging interval."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastfuse.errors import NonFiniteLossError
from fastfuse.methods.base import MethodOutput
from fastfuse.train.distributed import ALONE, Processes


class TermLog:
    """A device buffer of one row of terms per step, and their image-weighted sums on the host.

    Args:
        interval: steps between two reads; each read waits for the device once.
        device: where the steps run.
        max_bad: so many bad steps in a row are borne: with a loss or gradient that is not finite.

    Attributes:
        bad: such steps since the last reset.
    """

    def __init__(self, interval: int, device: torch.device | str = "cpu", *, max_bad: int = 0) -> None:
        self.interval, self.max_bad = interval, max_bad
        self.bad = self._in_a_row = 0
        self.names: list[str] = []
        self.sums: dict[str, float] = {}
        self.images = 0
        self._buffer: Tensor | None = None
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._good = torch.zeros((), device=device)
        self._positions: list[tuple[int, int, int]] = []

    def note(self, output: MethodOutput, bad: Tensor | None = None) -> None:
        """Keep one step's values on the device: its work there, which a captured step repeats by itself.

        Args:
            output: of the step.
            bad: 0-d, above 0 if its gradient was not finite; None: nobody looked.
        """
        values = torch.stack([output.loss.detach(), *output.terms.values(), self._good if bad is None else bad])
        if self._buffer is None:
            self.names = ["loss", *output.terms]
            self._buffer = values.new_empty(self.interval, len(values))
        self._buffer.index_copy_(0, self._row, values[None])
        self._row += 1

    def count(self, *, epoch: int, step: int, images: int) -> None:
        """Say which step was noted; reads once per interval."""
        self._positions.append((epoch, step, images))
        if len(self._positions) == self.interval:
            self.flush()

    def tensors(self) -> list[Tensor]:
        """What noting a step changes, but for its row."""
        return [self._row]

    def flush(self) -> None:
        """Read what was noted since the last read and add it up.

        Values that are not finite are left out.

        Raises:
            NonFiniteLossError: too many bad steps in a row; names the last and its terms.
        """
        if not self._positions:
            return
        assert self._buffer is not None  # steps are noted before they are counted
        rows = self._buffer[: len(self._positions)].cpu().tolist()
        positions, self._positions = self._positions, []
        self._row.zero_()
        for (epoch, step, images), row in zip(positions, rows, strict=True):
            *row, flag = row
            bad = [name for name, value in zip(self.names, row, strict=True) if not math.isfinite(value)]
            self._judge(bad, gradient=flag > 0, where=f"epoch {epoch + 1}, step {step + 1}")
            if bad:
                continue
            for name, value in zip(self.names, row, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value * images
            self.images += images

    def _judge(self, bad: list[str], *, gradient: bool, where: str) -> None:
        """Count a step with terms that are not finite, or with such a gradient; the last straw is an error."""
        if not bad and not gradient:
            self._in_a_row = 0
            return
        self.bad += 1
        self._in_a_row += 1
        if self._in_a_row <= self.max_bad:
            return
        what = f"the loss is not finite at {where}: {', '.join([name for name in bad if name != 'loss'] or bad)}"
        what = what if bad else f"gradients are not finite at {where}, though the loss is"
        row = f" ({self._in_a_row} steps in a row)" if self._in_a_row > 1 else ""
        raise NonFiniteLossError(f"{what}{row}; lower --lr, add --warmup-epochs, or try --amp off")

    def means(self) -> dict[str, float]:
        """Mean per image of every term since the last reset, flushed values only."""
        return {name: value / self.images for name, value in self.sums.items()} if self.images else {}

    def reset(self) -> None:
        """Start a new epoch."""
        self.sums, self.images, self.bad = {}, 0, 0

    def collect(self, processes: Processes) -> None:
        """Add up the sums of all processes, in all of them; flush first."""
        self.sums, self.images = self._joined(processes)

    def state_dict(self, processes: Processes = ALONE) -> dict[str, Any]:
        """The partial sums, of all processes; flush first."""
        sums, images = self._joined(processes)
        return {"sums": sums, "images": images, "bad": self.bad, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any], processes: Processes = ALONE) -> None:
        """Restore partial sums; the first process goes on with them, the others from zero."""
        whole = dict(state["sums"])
        self.sums = whole if processes.leads else dict.fromkeys(whole, 0.0)
        self.images = int(state["images"]) if processes.leads else 0
        self.bad, self._in_a_row = int(state["bad"]), int(state["in_a_row"])

    def _joined(self, processes: Processes) -> tuple[dict[str, float], int]:
        if processes.count == 1:
            return dict(self.sums), self.images
        # One whose steps were all bad has no sums yet.
        names = list(dict.fromkeys([*self.sums, *self.names]))
        images, *values = processes.sum([self.images, *(self.sums.get(name, 0.0) for name in names)])
        return dict(zip(names, values, strict=True)), int(images)
