"""Several processes of one group, forked from the test: they share what is imported, and start in milliseconds."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def together(count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 600) -> list[Any]:
    """What a function returns in each of `count` processes, in the order of their ranks.

    Raises:
        AssertionError: a process failed, or has not ended after so many seconds: all are then killed.
    """
    import torch._dynamo  # as DistributedDataParallel does: once here, in place of seconds in every process

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        given = (count, Path(folder), function, arguments)
        processes = [context.Process(target=_run, args=(rank, *given), daemon=True) for rank in range(count)]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        while any(p.is_alive() for p in processes) and time.monotonic() < end and not list(Path(folder).glob("*.txt")):
            time.sleep(0.01)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        for process in processes:
            process.kill()
            process.join()
        assert not failures, "\n".join(failures)
        assert not hung, f"processes {hung} of {count} have not ended after {seconds} s"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(1)
        # Gloo looks up the host's name otherwise, which takes seconds where there is no network.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count)
        found = function(*arguments)
        distributed.barrier()
        torch.save(found, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"process {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # without what the test's process has to do at its end
