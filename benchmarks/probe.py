"""What a GPU does with several small networks at once: four questions that no datasheet answers.

    python benchmarks/probe.py [--out probe.json] [--max-time 75]

(a) convolutions of S networks one after another, as parallel branches of one graph, or as one grouped convolution, for
    the shapes of CIFAR's ResNets, forward, input gradient and weight gradient apart;
(b) kernels of an eager step, and the host's time for it;
(c) the cost of an eager launch, and of a node of a graph, alone and in parallel branches;
(d) whether activations stay in the L2 cache between kernels.

All but eager launches is captured in a CUDA graph and timed with the device's own events, on random data. The answers
are printed, and written after each question.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache as once
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks in this folder only: the package lies one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.command import one_line_on_error
from benchmarks.counting_gpu import count_on_gpu
from benchmarks.programs import Start, build
from benchmarks.report import environment
from benchmarks.roofline import measured_rates
from benchmarks.selection import Form, Program
from fastfuse.errors import InputError
from fastfuse.train.files import write_atomic
from fastfuse.train.graph import Captured

DTYPE = torch.bfloat16
BATCH = 128
# Channels in and out, height of the input, stride: of the stages of a ResNet on 32x32.
LAYERS = ((16, 16, 32, 1), (32, 32, 16, 1), (64, 64, 8, 1), (16, 32, 32, 2), (32, 64, 16, 2))
NETWORKS = (3, 9, 5)
PASSES = {"forward": None, "input gradient": [True, False, False], "weight gradient": [False, True, False]}
CHAIN = 1000
REPEATS = 7


def microseconds(call: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Median time of a captured call, by the device's events; on a CPU, where nothing is captured, by the clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - began)
    replay, samples = Captured(call, lambda: [], stream=streams()[0]), []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            replay()
        end.record()
        torch.cuda.synchronize(device)
        samples.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(samples[1:])


@once
def streams() -> list[torch.cuda.Stream]:
    """One to capture on, and one for each branch; made together, so that none of PyTorch's is given twice."""
    return [torch.cuda.Stream() for _ in range(1 + max(NETWORKS))]


def in_branches(jobs: Sequence[Callable[[], object]], device: torch.device) -> list[object]:
    """The jobs on a stream each, forked from the current one at one point and joined to it."""
    if device.type != "cuda":
        return [job() for job in jobs]
    main, results = torch.cuda.current_stream(device), []
    fork = main.record_event()
    branches = streams()[1 : len(jobs) + 1]
    for stream, job in zip(branches, jobs, strict=True):
        stream.wait_event(fork)
        with torch.cuda.stream(stream):
            results.append(job())
    for stream in branches:
        main.wait_event(stream.record_event())
    return results


def launches(device: torch.device, chain: int = CHAIN) -> dict[str, float]:
    """Microseconds of a launch of a kernel that does next to nothing, in chains of so many."""
    x = torch.randn(1024, device=device)
    wide = [torch.randn(1024, device=device) for _ in range(4)]

    def chained(x: Tensor, count: int) -> None:
        for _ in range(count):
            x.mul_(1.0)

    def wall() -> float:
        began = time.perf_counter()
        chained(x, chain)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e6 * (time.perf_counter() - began)

    jobs = [lambda x=x: chained(x, chain // 4) for x in wide]
    wall()
    return {
        "eager_us": statistics.median(wall() for _ in range(REPEATS)) / chain,
        "graph_node_us": microseconds(lambda: chained(x, chain), device, 3) / chain,
        "graph_node_of_4_branches_us": microseconds(lambda: in_branches(jobs, device), device, 3) / chain,
    }


def cache(device: torch.device, channels: int = 16, batch: int = BATCH) -> dict[str, float]:
    """Microseconds of a pass over a map of the first stage, again and again, and after 256 MB of other traffic."""
    x = torch.randn(batch, channels, 32, 32, device=device).to(DTYPE)
    y, other = torch.empty_like(x), torch.randn(2**26 if device.type == "cuda" else 64, device=device)
    flush = microseconds(lambda: other.mul_(1.0), device, 5)
    cold = microseconds(lambda: (other.mul_(1.0), torch.mul(x, 2.0, out=y)), device, 5) - flush
    hot = microseconds(lambda: [torch.mul(x, 2.0, out=y) for _ in range(10)], device) / 10
    return {"hot_us": hot, "cold_us": cold, "mb": 2 * x.nbytes / 1e6}


def eager(device: torch.device, model: str = "resnet32", batch: int = BATCH) -> dict[str, Any]:
    """Kernels and waits of an eager step of FFSD with two students, its time, and the host's time to enqueue it."""
    case = Case(model, 2, batch, "bf16" if device.type == "cuda" else "off", device)
    start = Start(case)
    programs = (Program("published"), Program("fastfuse", Form("eager", "loop")))
    steps = {program.kind: build(program, case, start)[0] for program in programs}
    for step in steps.values():
        for _ in range(3):
            step()
    found: dict[str, Any] = {kind: _host_and_device_ms(step, device) for kind, step in steps.items()}
    if device.type == "cuda":  # after all times: a profiler that was used once slows launches down
        for kind, step in steps.items():
            found[kind] = asdict(count_on_gpu(step, device)) | found[kind]
    return found


def _host_and_device_ms(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    host, whole = [], []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - began))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole.append(1e3 * (time.perf_counter() - began))
    return {"host_ms": statistics.median(host), "step_ms": statistics.median(whole)}


def convolutions(
    device: torch.device, batch: int = BATCH, networks: Sequence[int] = NETWORKS, layers: Sequence = LAYERS
) -> Iterator[dict[str, Any]]:
    """A row for each number of networks, layer and pass."""
    for count, layer in product(networks, layers):
        calls = _Calls(layer, count, batch, device)
        for name, mask in PASSES.items():
            row: dict[str, Any] = {"pass": name, "layer": "x".join(map(str, layer)), "networks": count}
            try:
                row |= calls.microseconds(mask)
            except RuntimeError as error:  # what the library cannot do in some form is an answer
                row["error"] = str(error)[:200]
            yield row


class _Calls:
    """One layer of several networks, channels-last: apart, and side by side in the channels."""

    def __init__(self, layer: tuple[int, int, int, int], count: int, batch: int, device: torch.device) -> None:
        inner, outer, height, self.stride = layer
        self.count, self.device = count, device

        def made(*shape: int) -> Tensor:
            x = torch.randn(shape, device=device).to(DTYPE)
            return x.contiguous(memory_format=torch.channels_last)

        small = height // self.stride
        self.apart = [
            (made(batch, inner, height, height), made(outer, inner, 3, 3), made(batch, outer, small, small))
            for _ in range(count)
        ]
        xs, weights, grads = zip(*self.apart, strict=True)
        self.beside = tuple(
            torch.cat(x, d).contiguous(memory_format=torch.channels_last)
            for x, d in ((xs, 1), (weights, 0), (grads, 1))
        )

    def microseconds(self, mask: list[bool] | None) -> dict[str, float]:
        """Of the three forms of a pass."""
        jobs = [lambda i=i: self.one(i, mask) for i in range(self.count)]
        return {
            "loop_us": microseconds(lambda: [job() for job in jobs], self.device),
            "branches_us": microseconds(lambda: in_branches(jobs, self.device), self.device),
            "grouped_us": microseconds(lambda: self.together(mask), self.device),
        }

    def one(self, i: int, mask: list[bool] | None) -> object:
        return self._call(*self.apart[i], 1, mask)

    def together(self, mask: list[bool] | None) -> object:
        return self._call(*self.beside, self.count, mask)

    def _call(self, x: Tensor, weight: Tensor, grad: Tensor, groups: int, mask: list[bool] | None) -> object:
        if mask is None:
            return F.conv2d(x, weight, stride=self.stride, padding=1, groups=groups)
        strides = [self.stride] * 2
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, strides, [1, 1], [1, 1], False, [0, 0], groups, mask
        )


def run(device: torch.device, max_time: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All questions, the cheap ones first; what an error stops is said in its place."""
    end = time.monotonic() + max_time
    torch.backends.cudnn.benchmark = True
    found: dict[str, Any] = {"environment": environment(device)}
    for name, question in {
        "rates": lambda: measured_rates(device, DTYPE, 5)._asdict(),
        "launches": lambda: launches(device),
        "cache": lambda: cache(device),
        "eager": lambda: eager(device),
    }.items():
        try:
            found[name] = question()
        except RuntimeError as error:
            found[name] = {"error": str(error)[:300]}
        print(f"{name}: {_short(found[name])}", flush=True)
        save(found)
    rows = found["convolutions"] = []
    for row in convolutions(device):
        rows.append(row)
        print(_short(row), flush=True)
        save(found)
        if time.monotonic() > end:
            print(f"the time was over after {len(rows)} rows of convolutions", flush=True)
            break
    return found


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(own) for key, own in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--max-time", type=float, default=600, help="seconds after which no other row begins (600)")
    options = parser.parse_args(arguments)

    def save(found: dict[str, Any]) -> None:
        if options.out is not None:
            write_atomic(options.out, lambda file: file.write(json.dumps(found, indent=1).encode()))

    if not torch.cuda.is_available():
        raise InputError("the probe needs an NVIDIA GPU: torch.cuda.is_available() is False; nothing was written")
    found = run(torch.device("cuda", torch.cuda.current_device()), options.max_time, save)
    return 1 if any("error" in own for own in found.values() if isinstance(own, dict)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
