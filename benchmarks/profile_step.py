"""Where the time of fastfuse's FFSD step goes on a GPU: per part of the replayed graph, beside what the part must move.

    python benchmarks/profile_step.py [--model resnet32] [--students 2] [--strategy loop] [--out profile.json]

Durations are those of a replayed graph, of the median of several replays; the parts are found with `trace_parts.py`.
Gaps are what is left of a step that nobody watches: its time without a profiler less the time in which a kernel runs.
Bytes are counted in an eager step: what the operators of a part are given and give, each tensor once per operator;
products where PyTorch knows the operator. "least" is bytes over the measured bandwidth of a copy, or products over the
measured rate of a matrix product, whichever takes longer. "estimate" is no measurement: what a fused engine must move
in bf16, computed from shapes. The step draws, augments, trains and notes its terms.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python looks in this folder only: the package lies one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import trace_parts as parts
from benchmarks.cases import Case, data_of
from benchmarks.command import one_line_on_error
from benchmarks.profiling import BATCHES, Counter, made, marked, traced
from benchmarks.report import environment
from benchmarks.roofline import Rates, Work, least_ms, measured_rates
from benchmarks.timing import measure_in_turn
from fastfuse.errors import InputError
from fastfuse.train.engine import Engine
from fastfuse.train.files import write_atomic
from fastfuse.train.modes import pick_amp
from fastfuse.train.step import AMP_DTYPES

REPLAYS = 5
# Megabytes that a fused engine moves at least: two students and a leader, bf16, batches as published.
ESTIMATES = {
    "resnet32": {
        "convolutions": 3860.0,  # and batch norm
        "fusion and trans-fusion": 48.0,
        "cross-entropy and KL": 0.6,
        "diversity": 2.0,
        "attention losses": 15.0,
        "transforms": 144.0,  # and their losses
        "optimizer": 33.0,
    },
    "resnet18": {
        "convolutions": 55_700.0,
        "fusion and trans-fusion": 600.0,
        "attention losses": 400.0,
        "transforms": 4500.0,
        "optimizer": 900.0,
    },
}


def eager_parts(engine: Engine, start: Callable[[], None], device: torch.device) -> list[tuple[str, str]]:
    """Names and parts of an eager step's kernels, in their order."""
    start()
    engine.run(0)
    with marked(engine):
        trace = traced(lambda: engine.run(1), device)
    where = parts.places(trace)
    return [(kernel.name, parts.part_of(kernel.name, where.get(kernel.launch))) for kernel in parts.kernels(trace)]


def counted(engine: Engine, start: Callable[[], None]) -> dict[str, list[int]]:
    """Bytes and floating point operations of an eager step, by part."""
    start()
    counter = Counter()
    with marked(engine, counter), counter:
        engine.run(0)
    return counter.work


def median_replay(engine: Engine, start: Callable[[], None], device: torch.device) -> list[parts.Kernel]:
    """The kernels of the replay with the median length, of several."""
    start()
    engine.run(0)
    torch.cuda.synchronize(device)
    runs = [parts.kernels(traced(lambda n=n: engine.run(n), device)) for n in range(1, REPLAYS + 1)]
    return sorted(runs, key=parts.span_us)[REPLAYS // 2]


def step_ms(engine: Engine, start: Callable[[], None], steps: int, device: torch.device) -> float:
    """Milliseconds of a step that nobody watches: what the steps of an epoch but the first take, over their number."""

    def rest() -> None:
        for number in range(1, steps):
            engine.run(number)

    samples = []
    for _ in range(REPLAYS):
        start()
        engine.run(0)
        timing = measure_in_turn({"rest": rest}, repeats=1, calls=1, warmup=0, device=device)["rest"]
        samples.append(timing.median / (steps - 1))
    return statistics.median(samples)


def rows(
    eager: Sequence[tuple[str, str]],
    replay: Sequence[parts.Kernel],
    work: dict[str, list[int]],
    alone_ms: float,
    rates: Rates,
    estimates: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The table: a row for each part in the order of its time, then gaps and the whole step."""
    of = parts.assigned(eager, [kernel.name for kernel in replay])
    found = []
    for part in {*of, *work}:
        own = [kernel for kernel, name in zip(replay, of, strict=True) if name == part]
        moved, flops = work.get(part, [0, 0])
        found.append(
            {
                "part": part,
                "ms": sum(kernel.duration for kernel in own) / 1e3,
                "kernels": len(own),
                "counted_mb": moved / 1e6,
                "counted_gflop": flops / 1e9,
                "least_ms": least_ms(Work(moved, flops), rates),
                "estimate_mb": estimates.get(part, 0.0),
            }
        )
    found.sort(key=lambda row: -row["ms"])
    busy = parts.busy_us(replay) / 1e3
    sums = {key: sum(row[key] for row in found) for key in ("counted_mb", "counted_gflop", "least_ms", "estimate_mb")}
    gaps = {"part": "gaps, no kernel running", "ms": alone_ms - busy, "kernels": 0, **dict.fromkeys(sums, 0.0)}
    whole = {"part": "a step without profiler", "ms": alone_ms, "kernels": len(replay), **sums}
    return [*found, gaps, whole]


def shown(table: Sequence[dict[str, Any]]) -> str:
    """The table as text."""
    whole = table[-1]["ms"]
    heads = (
        ("ms", 8),
        ("share", 6),
        ("kernels", 7),
        ("counted MB", 10),
        ("GFLOP", 8),
        ("least ms", 8),
        ("estimate MB", 11),
    )
    lines = [" ".join([f"{'part':28}", *(f"{head:>{width}}" for head, width in heads)])]
    for row in table:
        cells = f"{row['kernels']:7d} {row['counted_mb']:10.1f} {row['counted_gflop']:8.1f} {row['least_ms']:8.3f}"
        cells += f" {row['estimate_mb'] or '-':>11}"
        lines.append(f"{row['part']:28} {row['ms']:8.3f} {100 * row['ms'] / whole:5.1f}% {cells}")
    return "\n".join(lines)


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--strategy", default="auto", help="loop, branches, grouped or auto")
    parser.add_argument("--batch-size", type=int, help="128, of ImageNet's networks 256")
    parser.add_argument("--out", type=Path, help="JSON file: table, environment, and the kernels of each part")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("a profile needs an NVIDIA GPU: torch.cuda.is_available() is False; nothing was written")
    device = torch.device("cuda", torch.cuda.current_device())
    data = data_of(options.model)
    batch, amp = options.batch_size or data.batch_size["cuda"], pick_amp("auto", device)
    shape = {"image_size": data.image_size, "classes": data.classes}
    case = Case(options.model, options.students, batch, amp, device, **shape)
    found = measured(case, options.strategy)
    print(f"{case.name}, batch {batch}, {amp}, strategy {options.strategy}")
    print(shown(found["rows"]))
    if options.out is not None:
        write_atomic(options.out, lambda file: file.write(json.dumps(found, indent=1).encode()))
    return 0


def measured(case: Case, strategy: str) -> dict[str, Any]:
    """Everything about one step."""
    rates = measured_rates(case.device, AMP_DTYPES[case.amp] or torch.float32, 5)
    engine, start = made(case, strategy, graphed=True)
    # Before the first profile: a profiler that was used once slows launches down.
    alone_ms = step_ms(engine, start, BATCHES, case.device)
    replay = median_replay(engine, start, case.device)
    engine, start = made(case, strategy, graphed=False)
    work, eager = counted(engine, start), eager_parts(engine, start, case.device)
    known = case.students == 2 and case.batch_size == data_of(case.model).batch_size["cuda"]
    estimates = ESTIMATES.get(case.model, {}) if known else {}
    table = rows(eager, replay, work, alone_ms, rates, estimates)
    of = parts.assigned(eager, [kernel.name for kernel in replay])
    listed = [[part, kernel.name[:120], kernel.duration] for part, kernel in zip(of, replay, strict=True)]
    same = [name for name, _ in eager] == [kernel.name for kernel in replay]
    return {
        "environment": environment(case.device),
        "case": case.described | {"strategy": strategy},
        "rates": rates._asdict(),
        "same_kernels_as_eager": same,
        "rows": table,
        "kernels": listed,
    }


if __name__ == "__main__":
    raise SystemExit(main())
