"""A training step by several processes: its time, and the bytes that a process puts into collectives.

    torchrun --standalone --nproc-per-node 2 benchmarks/processes.py --method ffsd --model resnet20 --batch-size 64

Started without torchrun it measures one process. The first process prints and saves.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# Run as a script, Python looks in this folder only: the package and its neighbour fastfuse lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import report
from benchmarks.command import one_line_on_error
from fastfuse.kernels import _across
from fastfuse.methods import Method, build_method
from fastfuse.train.distributed import Processes, pick_device, together
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

COLUMNS = {
    "processes": "processes",
    "batch_size": "batch",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "images_per_s": "images/s",
    "gradients": "gradient bytes",
    "statistics": "statistics bytes",
    "buffers": "buffer bytes",
    "gathers": "all-gathers",
    "messages": "collectives",
}
WARM_UP = 5


class Traffic:
    """Bytes and calls of the collectives that the steps within `counting` make, as one process gives them.

    Attributes:
        gradients: into all-reduces, in `DistributedDataParallel`'s buckets.
        statistics: into all-gathers, of synchronised batch norms.
        buffers: broadcast by the first process.
        gathers: all-gathers alone.
        messages: collectives of each kind together.
    """

    def __init__(self, step: TrainStep) -> None:
        self.gradients = self.statistics = self.buffers = self.gathers = self.messages = 0
        self._on = False
        if isinstance(step._forward, torch.nn.parallel.DistributedDataParallel):
            step._forward.register_comm_hook(None, self._reduced)

    def counting(self, run: Callable[[], Any]) -> "Traffic":
        """Run something and count."""
        gathered, broadcast = _across.gathered, distributed._broadcast_coalesced

        def gather(row: Tensor) -> Tensor:
            self.gathers += 1
            self._add("statistics", row)
            return gathered(row)

        def send(group: Any, tensors: Sequence[Tensor], *others: Any) -> None:
            self._add("buffers", *tensors)
            broadcast(group, tensors, *others)

        self._on = True
        with (
            mock.patch.object(_across, "gathered", gather),
            mock.patch.object(distributed, "_broadcast_coalesced", send),
        ):
            run()
        self._on = False
        return self

    def _reduced(self, state: None, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        if self._on:
            self._add("gradients", bucket.buffer())
        return allreduce_hook(None, bucket)

    def _add(self, kind: str, *tensors: Tensor) -> None:
        setattr(self, kind, getattr(self, kind) + sum(x.numel() * x.element_size() for x in tensors))
        self.messages += 1


def expected(method: Method, *, synchronised: bool) -> dict[str, int]:
    """What a step must exchange, from the shapes alone, in bytes.

    Gradients: every trained parameter once. Statistics: C counts, means and variances of each norm forward, 2 C sums
    backward, in float32 at least. Buffers: without synchronised norms all of them.
    """
    norms = [norm for norm in method.modules() if isinstance(norm, _BatchNorm) and norm.training]
    size = max(4, next(method.parameters()).element_size())
    return {
        "gradients": sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad),
        "statistics": sum(size * 5 * norm.num_features for norm in norms) if synchronised else 0,
        "buffers": 0 if synchronised else sum(b.numel() * b.element_size() for b in method.buffers()),
    }


def made(
    options: argparse.Namespace, processes: Processes, device: torch.device
) -> tuple[TrainStep, Callable[[], Any]]:
    """The step of a method with random weights, and what runs it on this process's random images."""
    torch.manual_seed(0)
    method = build_method(options.method, model=options.model, students=options.students, num_classes=options.classes)
    method = method.to(device).train()
    given = {"processes": processes, "sync_batchnorm": options.sync_batchnorm, "amp": options.amp}
    step = TrainStep(method, build_optimizers(method), **given)
    own = range(options.batch_size)[processes.share.drawn(options.batch_size)]
    images = torch.randn(len(own), 3, options.image_size, options.image_size, device=device)
    labels = torch.randint(0, options.classes, (len(own),), device=device)
    progress = torch.zeros((), device=device)
    return step, lambda: step(images, labels, progress, options.batch_size)


def measure(options: argparse.Namespace, processes: Processes, device: torch.device) -> report.Report:
    """Time of steps, each ended by all processes together, and what one of them exchanges."""
    step, run = made(options, processes, device)
    traffic = Traffic(step)
    for _ in range(WARM_UP):
        run()
    counted = traffic.counting(run)
    samples = []
    for _ in range(options.steps):
        processes.wait()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(processes.most([1e3 * (time.perf_counter() - began)])[0])  # the slowest one's
    middle = statistics.median(samples)
    fifths = statistics.quantiles(samples, n=5)
    row: dict[str, report.Value] = {
        "processes": processes.count,
        "batch_size": options.batch_size,
        "median_ms": middle,
        "p20_ms": fifths[0],
        "p80_ms": fifths[3],
        "images_per_s": 1e3 * options.batch_size / middle,
        **{kind: getattr(counted, kind) for kind in ("gradients", "statistics", "buffers", "gathers", "messages")},
    }
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    name = f"processes_{options.method}_{options.model}_b{options.batch_size}_p{processes.count}"
    samples_ms = {f"{processes.count} processes": tuple(samples)}
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    busy = [f"{processes.count} processes on {cores} cores at load {load:.1f}"] if load > processes.count + 0.5 else []
    return report.Report(name, settings, report.environment(device), COLUMNS, [row], {}, samples_ms, busy)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="ffsd", help="ffsd, ffl, dml, one, ffcl or independent")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"))
    parser.add_argument("--sync-batchnorm", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the JSON and CSV files")
    return parser


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print, save."""
    options = parser().parse_args(arguments)
    with together(options.device) as processes:
        found = measure(options, processes, pick_device(options.device))
        if processes.leads:
            report.show(found)
            if options.out is not None:
                report.prepare(options.out)
                print("\n".join(f"wrote {path}" for path in report.save(found, options.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
