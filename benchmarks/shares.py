"""Work that several processes share: parts of a list, and compilation by many before one of them measures."""

import os
import subprocess
import time
from collections.abc import Sequence
from typing import TypeVar

from fastfuse.errors import InputError

T = TypeVar("T")


def part_of(items: Sequence[T], part: str | None, option: str = "--part") -> list[T]:
    """The i-th of n parts of a list, "i/n": every n-th entry; None: all.

    Raises:
        InputError: a part that does not exist.
    """
    if part is None:
        return list(items)
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise InputError(f"{option} must be i/n with 1 <= i <= n, not {part!r}")
    return list(items[int(index) - 1 :: int(count)])


def compile_together(command: Sequence[str], jobs: int, seconds: float) -> None:
    """Run a command with `--compile i/jobs` for each i, all at once: their kernels then lie in the compilers' caches.

    What is not ready after so many seconds is left to whoever needs it.
    """
    # Each compiles in its own thread: torch.compile would start a process for every core in each of them.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, "--compile", f"{i + 1}/{jobs}"], env=environment) for i in range(jobs)]
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
