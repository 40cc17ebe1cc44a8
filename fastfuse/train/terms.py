"""Loss terms of every step, kept on the device and read once per logging interval."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastfuse.errors import NonFiniteLossError
from fastfuse.methods.base import MethodOutput


class TermLog:
    """A device buffer of one row of terms per step, and their image-weighted sums on the host.

    Args:
        interval: steps between two reads; each read waits for the device once.
        device: where the steps run.
    """

    def __init__(self, interval: int, device: torch.device | str = "cpu") -> None:
        self.interval = interval
        self.names: list[str] = []
        self.sums: dict[str, float] = {}
        self.images = 0
        self._buffer: Tensor | None = None
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._positions: list[tuple[int, int, int]] = []

    def note(self, output: MethodOutput) -> None:
        """Keep one step's values on the device: its work there, which a captured step repeats by itself."""
        values = torch.stack([output.loss.detach(), *output.terms.values()])
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

        Raises:
            NonFiniteLossError: a value is infinite or not a number; names the first such step and its terms.
        """
        if not self._positions:
            return
        rows = self._buffer[: len(self._positions)].cpu().tolist()
        positions, self._positions = self._positions, []
        self._row.zero_()
        for (epoch, step, images), row in zip(positions, rows, strict=True):
            if bad := [name for name, value in zip(self.names, row, strict=True) if not math.isfinite(value)]:
                named = [name for name in bad if name != "loss"] or bad
                raise NonFiniteLossError(
                    f"the loss is not finite at epoch {epoch + 1}, step {step + 1}: {', '.join(named)}; "
                    "lower --lr, add --warmup-epochs, or try --amp off"
                )
            for name, value in zip(self.names, row, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value * images
            self.images += images

    def means(self) -> dict[str, float]:
        """Mean per image of every term since the last reset, flushed values only."""
        return {name: value / self.images for name, value in self.sums.items()} if self.images else {}

    def reset(self) -> None:
        """Start a new epoch."""
        self.sums, self.images = {}, 0

    def state_dict(self) -> dict[str, object]:
        """The partial sums; flush first."""
        return {"sums": dict(self.sums), "images": self.images}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore partial sums."""
        self.sums, self.images = dict(state["sums"]), int(state["images"])
