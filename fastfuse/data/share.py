"""Which rows of every batch a process takes when several train together."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Share:
    """One process's part of all batches: draws are made for the whole batch, and a process takes its rows of them.

    So what is drawn does not depend on the number of processes.
    """

    rank: int = 0
    processes: int = 1

    def rows(self, count: int) -> slice:
        """The rows of a batch of `count`: contiguous parts whose sizes differ by one at most, larger ones first."""
        size, more = divmod(count, self.processes)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def own(self, count: int) -> int:
        """How many rows that are."""
        rows = self.rows(count)
        return rows.stop - rows.start

    def drawn(self, count: int) -> slice:
        """The rows that the process loads: its own, or, where it has none, the first two of the batch.

        Those count for nothing: with them the process stands in, since every one must take part in every step.
        """
        return self.rows(count) if self.own(count) else slice(0, min(count, 2))
