"""Several processes that train one run together, as torchrun starts them; one process is a group of one.

What a step makes of it is in `micro` and `step`. Without torchrun no process group is made, and every method of
`Processes` gives back what it was given.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from fastfuse.data.share import Share
from fastfuse.errors import FastfuseError, InputError
from fastfuse.train.graph import beside

if TYPE_CHECKING:
    from fastfuse.config import TrainConfig
    from fastfuse.methods import Method

# Seconds between two agreements: how long a wish to stop waits to be heard by all.
_AGREE_EVERY = 2.0
_AT_MOST = 200
# For a data set to be downloaded, or decoded into a cache.
_PATIENCE = timedelta(days=2)


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that train together. Its methods must be called by all, in the same order.

    What they exchange are numbers and tensors of the host; waiting for one another, they wait for no device.
    """

    share: Share = dataclasses.field(default_factory=Share)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.share.processes

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.share.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        return self._reduced(values, "SUM")

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of all processes; of wishes (0 or 1), whether anyone has it."""
        return self._reduced(values, "MAX")

    def agreed(self, value: Any) -> Any:
        """What the first process gives, a plain value: the clock, the disk and the user are asked once."""
        if self.count == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def wait(self) -> None:
        """Until all are here."""
        self.sum([0.0])

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """A block that the others enter when the first process has left it; all leave together, be it hours later."""
        if self.count == 1:
            yield
            return
        # In a group of its own, which ends with all others: elsewhere a process must answer within half an hour.
        patient: Any = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        if not self.leads:
            distributed.barrier(patient)
        yield
        if self.leads:
            distributed.barrier(patient)
        distributed.barrier(patient)

    def as_leader(self, tensors: Sequence[Tensor]) -> None:
        """Write the first process's values into all tensors."""
        if self.count == 1:
            return
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)

    def _reduced(self, values: Sequence[float], operation: str) -> list[float]:
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total, getattr(distributed.ReduceOp, operation))
        return total.tolist()


ALONE = Processes()


def current() -> Processes:
    """The processes that have joined."""
    if not distributed.is_available() or not distributed.is_initialized():
        return ALONE
    return Processes(Share(distributed.get_rank(), distributed.get_world_size()))


@contextmanager
def together(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started with this one, until the block ends.

    Args:
        device: as --device: decides what they talk through, NCCL or gloo.

    Raises:
        InputError: more processes than GPUs on this machine, or a device that only one of them can have.
        FastfuseError: inside, another process has gone.
    """
    if current().count > 1 or not _started_together():
        yield current()
        return
    on_gpu = pick_device(device).type == "cuda"
    # A store of its own for every attempt: with --standalone, torchrun's outlives a restart, and processes of the new
    # attempt would look for those of the old one.
    store, rank, count = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"fastfuse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Numbers of the host go through gloo in any case.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        with lost_processes_explained():
            yield current()
    finally:
        distributed.destroy_process_group()


@contextmanager
def lost_processes_explained() -> Iterator[None]:
    """The end of another process, which gloo reports wherever this one waits for it, as one line.

    Raises:
        FastfuseError: one has gone.
    """
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [""]
        if "/gloo/" not in first:
            raise
        raise FastfuseError(
            "another process of this run has ended; it says why, unless it was killed: --resume goes on from the last "
            "checkpoint, as torchrun's --max-restarts does by itself"
        ) from error


def pick_device(name: str) -> torch.device:
    """The device of this process; `build.pick_device` for one that is alone.

    Raises:
        InputError: see `together`.
    """
    from fastfuse.train import build

    device = build.pick_device(name)
    if device.type != "cuda" or not _started_together():
        return device
    if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise InputError(f"--device {name} is one GPU, and every process needs its own: give --device cuda")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is None and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: lower torchrun's "
            "--nproc-per-node, or give --device cpu"
        )
    device = torch.device("cuda", local if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def configured(config: "TrainConfig", processes: Processes) -> "TrainConfig":
    """The configuration as several processes can run it; of one process as it is.

    A worker that torchrun has started again goes on from the last checkpoint.

    Raises:
        InputError: a strategy for one process alone, a mode that cannot synchronise norms, or no --out where a restart
            would not find the run.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if config.out is None and restarts:
        raise InputError("torchrun --max-restarts needs --out: a worker that is started again must find its run")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        config = dataclasses.replace(config, resume=True)
    if processes.count == 1:
        return config
    if config.mode.endswith("compiled") and config.sync_batchnorm:
        # A compiler orders independent norms as it likes, for every process's shapes anew; their exchanges must match.
        raise InputError(
            f"--mode {config.mode} cannot take --sync-batchnorm, whose exchanges a compiler may put into another order "
            "in every process: give --mode eager or graphed, or leave --sync-batchnorm out"
        )
    if config.strategy == "branches":
        raise InputError("--strategy branches is for one process: give --strategy loop or grouped, or auto")
    return config


def changed(before: int, now: int, config: "TrainConfig") -> str:
    """What a run can no longer promise that goes on with another number of processes."""
    said = f"fastfuse: {before} process{'es' * (before > 1)} took the steps so far, {now} go{'es' * (now == 1)} on: "
    said += "sums are rounded in another order, so that what follows is not bit for bit the same"
    if not config.sync_batchnorm:
        largest = -(-config.batch_size // now)
        said += f", and batch norms now see at most {largest} images of a batch"
    return said


def arrange(method: "Method", strategy: str, processes: Processes) -> None:
    """Choose how the networks run; parallel branches, which only a CUDA graph makes parallel, are for one process."""
    if method.arrange(strategy) == "branches" and processes.count > 1:
        method.arrange("loop")


def wrapped(method: nn.Module, *, synchronised: bool, stream: torch.cuda.Stream | None = None) -> nn.Module:
    """The method under DistributedDataParallel: its forward is the method's, its gradients are means over processes.

    Args:
        method: on its device, compiled or not, with its optimizers made.
        synchronised: its batch norms take the statistics of all processes, so that all have the same buffers; else
            every forward starts from the first process's.
        stream: where steps will be captured: what adds up a parameter's gradient, which the wrapper keeps, runs on the
            stream that it was made on, and a capture must meet no other.
    """
    with beside(stream):
        found = nn.parallel.DistributedDataParallel(method)
    found.broadcast_buffers = not synchronised  # as an attribute: the argument has another name since PyTorch 2.15
    return found


class Agreement:
    """Decisions that all processes take alike although their clocks differ and signals reach them at different steps.

    They exchange their wishes at step numbers that all know: about every two seconds, and at the end of an epoch.

    Args:
        processes: who decides.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._since, self._next = 0, 1.0
        self._began = time.monotonic()

    def due(self, *, last: bool) -> bool:
        """Count a step; whether wishes are to be exchanged after it. One process alone may always ask itself.

        Args:
            last: it is the last one of an epoch.
        """
        self._since += 1
        return last or self._since >= self._next or self.processes.count == 1

    def decide(self, wishes: Sequence[bool]) -> list[bool]:
        """What anyone wishes happens; each answer in the place of its wish."""
        if self.processes.count == 1:
            return list(wishes)
        now = time.monotonic()
        steps = int(_AGREE_EVERY * self._since / max(now - self._began, 1e-9))
        *found, self._next = self.processes.most([*map(float, wishes), float(min(max(steps, 1), _AT_MOST))])
        self._since, self._began = 0, now
        return [bool(wish) for wish in found]


def _started_together() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
