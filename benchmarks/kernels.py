"""Suite "kernels": every operator, forward and backward, against eager and against torch.compile of its reference."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import roofline
from benchmarks.kernel_cases import KernelCase
from benchmarks.kernel_plan import DTYPES, planned
from benchmarks.report import Report, Value, environment
from benchmarks.shares import compile_together, part_of
from benchmarks.timing import Timing, measure_in_turn
from fastfuse.kernels import _dispatch
from fastfuse.testing import relative_l2
from fastfuse.train.build import pick_device
from fastfuse.train.graph import Captured, beside

MODES = ("forward", "backward")
# Against a float64 reference: bfloat16 outputs carry 2^-9 each, a wrong kernel is far above this.
AGREEMENT = 3e-2
# Copies of the inputs together exceed this, so that no call finds its inputs in the cache (an H200 has 50 MB of L2).
ROTATED_BYTES = 256 * 2**20
COLUMNS = {
    "op": "op",
    "shape": "shape",
    "dtype": "dtype",
    "mode": "mode",
    "provider": "provider",
    "median_us": "median us",
    "p20_us": "p20",
    "p80_us": "p80",
    "gb_per_s": "GB/s",
    "of_copy": "of copy",
    "reference_ratio": "x reference",
    "compile_ratio": "x compile",
    "peak_mb": "peak MB",
}


# Of the time, for compiling by several processes before the first measurement.
COMPILING = 0.4
EVERY = 10  # seconds: as often the report is given while it grows


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure all providers of every case in turn; `options` as parsed by `benchmarks/run.py`.

    Gives the report as it grows. A case that fails is left out.

    Raises:
        InputError: no such device or operator, or a part that does not exist.
        AssertionError: after all others, names the cases that failed, or do not compute what the reference does.
    """
    device = pick_device(options.device)
    # A backward is timed many times over one forward.
    functorch_config.donated_buffer = False
    end = math.inf if options.max_time is None else time.monotonic() + options.max_time
    chosen, skipped = planned(options, device)
    if options.compile:
        compile_share(part_of(chosen, options.compile, "--compile"), device)
        return
    if options.jobs > 1 and device.type == "cuda":
        compile_together([sys.executable, *sys.argv], options.jobs, COMPILING * (options.max_time or math.inf))
    copy_rate = roofline.copy_rate(device, options.repeats) / 1e9
    settings = {
        "suite": "kernels",
        "part": options.part or "1/1",
        "repeats": options.repeats,
        "quick": options.quick,
        "copy_gb_per_s": round(copy_rate, 1),
    }
    more = f"_after{skipped}" if skipped else ""
    stem = f"kernels_{settings['part'].replace('/', 'of')}{more}{'_quick' if options.quick else ''}_{device.type}"
    report = Report(stem, settings, environment(device), COLUMNS, [], {}, {}, [])
    failed: list[str] = []
    shown = time.monotonic()
    for number, (case, name) in enumerate(chosen):
        if time.monotonic() > end:
            report.warnings.append(f"the time was over before {len(chosen) - number} of {len(chosen)} cases")
            break
        _into(report, case, name, device, options, copy_rate, failed)
        if report.rows and time.monotonic() > shown + EVERY:
            shown = time.monotonic()
            yield report
    if report.rows:
        yield report
    if failed:
        raise AssertionError("; ".join(failed))


def _into(
    report: Report,
    case: KernelCase,
    name: str,
    device: torch.device,
    options: argparse.Namespace,
    copy_rate: float,
    failed: list[str],
) -> None:
    """Add a case's rows to the report, or say why there are none."""
    try:
        found, missing = _measure(case, name, DTYPES[name], device, options, copy_rate)
    except Exception as error:  # of a hundred cases one must not cost the others
        failed.append(f"{case.op} {case.shape} {name}: {type(error).__name__}: {str(error)[:300]}")
        report.warnings.append(f"left out: {failed[-1]}")
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises after a fault, from which no process recovers
        return
    report.warnings.extend(sorted(missing - set(report.warnings)))
    for row, timing in found:
        report.rows.append(row)
        key = "/".join(str(row[k]) for k in ("op", "shape", "dtype", "mode", "provider"))
        report.samples_ms[key] = timing.samples_ms


def compile_share(chosen: Sequence[tuple[KernelCase, str]], device: torch.device) -> None:
    """Run every provider of these cases once in each mode, so that compilers' caches hold what they need."""
    for case, name in chosen:
        tensors = case.make(device, DTYPES[name])
        for function in providers_of(case, DTYPES[name], device)[0].values():
            try:
                with torch.no_grad():
                    function(tensors)
                _forward_backward(function, tensors)
            except Exception as error:  # whoever measures this case meets it again, and says so
                print(f"{case.op} {case.shape} {name}: {type(error).__name__}", file=sys.stderr)
        release(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds: a dozen processes that compile have one GPU's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def providers_of(
    case: KernelCase, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[Sequence[Tensor]], object]], set[str]]:
    """What runs a case, by name, and which backends are left out, with the reason."""
    providers: dict[str, Callable] = {"reference": lambda t: case.call(t, "reference")}
    # Compiled once per case: its own recompilations would otherwise end in eager code after eight shapes.
    torch._dynamo.reset()
    providers["compile"] = torch.compile(lambda t: case.call(t, "reference"), dynamic=False)
    missing: set[str] = set()
    for backend in ("triton", "cuda"):
        reason = _dispatch.why_not(case.op, backend, torch.empty(1, device=device, dtype=dtype))
        if reason is None:
            providers[f"fastfuse {backend}"] = lambda t, b=backend: case.call(t, b)
        else:
            missing.add(f"{case.op} left out on backend {backend}: {reason}")
    return providers, missing


def copies_of(case: KernelCase, dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """A case's tensors, on a GPU so many times that no call finds its own in the cache."""
    copies = [case.make(device, dtype)]
    if device.type == "cuda":
        needed = ROTATED_BYTES / max(sum(x.nbytes for x in copies[0]), 1)
        copies += [case.make(device, dtype) for _ in range(min(math.ceil(needed), 64) - 1)]
    return copies


def _measure(
    case: KernelCase, name: str, dtype: torch.dtype, device: torch.device, options: argparse.Namespace, copy_rate: float
) -> tuple[list[tuple[dict[str, Value], Timing]], set[str]]:
    providers, missing = providers_of(case, dtype, device)
    copies = copies_of(case, dtype, device)
    tensors = copies[0]
    agree(case, providers, tensors)
    found = []
    for mode in MODES:
        if mode == "backward" and not any(x.requires_grad for x in tensors):
            continue
        calls = {p: one_pass(function, copies, mode, device) for p, function in providers.items()}
        # Of the pass itself: a replay allocates nothing.
        peaks = {p: _peak(call.function if isinstance(call, Captured) else call, device) for p, call in calls.items()}
        timings = measure_in_turn(calls, repeats=options.repeats, calls=1, warmup=1, device=device)
        medians = {p: timing.median / len(copies) for p, timing in timings.items()}
        moved = _bytes(case, tensors, mode)
        for provider, timing in timings.items():
            rate = moved / medians[provider] / 1e6
            row: dict[str, Value] = {
                "op": case.op,
                "shape": case.shape,
                "kind": case.kind,
                "dtype": name,
                "mode": mode,
                "provider": provider,
                "median_us": medians[provider] * 1e3,
                "p20_us": timing.quantile(0.2) / len(copies) * 1e3,
                "p80_us": timing.quantile(0.8) / len(copies) * 1e3,
                "gb_per_s": rate,
                "of_copy": rate / copy_rate,
                "reference_ratio": medians["reference"] / medians[provider],
                "compile_ratio": medians["compile"] / medians[provider],
                "peak_mb": peaks[provider],
                "bytes": moved,
            }
            found.append((row, timing))
    return found, missing


def _forward_backward(function: Callable, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    outputs = function(list(tensors))
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
    wanted, sources = [x for x in outputs if x.requires_grad], [x for x in tensors if x.requires_grad]
    if not wanted or not sources:
        return outputs, []
    gradients = torch.autograd.grad(wanted, sources, [torch.ones_like(x) for x in wanted], allow_unused=True)
    return outputs, [g for g in gradients if g is not None]


def agree(case: KernelCase, providers: dict[str, Callable], tensors: list[Tensor]) -> None:
    """No speed of a wrong answer: outputs and gradients of all providers against the reference's in eager."""
    stream = captured_on(tensors[0].device)
    with beside(stream):
        wanted, gradients = _forward_backward(providers["reference"], tensors)
    for name, function in providers.items():
        with beside(stream):
            ours, own = _forward_backward(function, tensors)
        for a, b in zip([*ours, *own], [*wanted, *gradients], strict=True):
            if (error := relative_l2(a, b)) > AGREEMENT:
                raise AssertionError(f"{case.op} {case.shape}: {name} differs from the reference by {error:.1e}")


@cache
def captured_on(device: torch.device) -> torch.cuda.Stream | None:
    """The stream for all work whose backward may be captured: it runs where its forward ran, and cannot be captured on
    the default one. None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def one_pass(function: Callable, copies: list[list[Tensor]], mode: str, device: torch.device) -> Callable[[], object]:
    """One pass over all copies of the inputs; a captured graph on a GPU, so that launch gaps do not count."""
    stream = captured_on(device)
    if mode == "forward":

        def once() -> None:
            with torch.no_grad():
                for tensors in copies:
                    function(tensors)

    else:
        with beside(stream):
            prepared = [_prepared(function, tensors) for tensors in copies]

        def once() -> None:
            for wanted, sources, cotangents in prepared:
                torch.autograd.grad(wanted, sources, cotangents, retain_graph=True, allow_unused=True)

    return once if stream is None else Captured(once, list, stream=stream)


def _prepared(function: Callable, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    # A forward updates running statistics in place, which the backward of another provider has saved.
    tensors = [x if x.requires_grad else x.clone() for x in tensors]
    outputs = function(tensors)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    wanted = [x for x in outputs if x is not None and x.requires_grad]
    return wanted, [x for x in tensors if x.requires_grad], [torch.randn_like(x) for x in wanted]


def _bytes(case: KernelCase, tensors: list[Tensor], mode: str) -> int:
    """The least that must move: every input read once, every output written once; backward adds the gradients."""
    with torch.no_grad():
        outputs = case.call(tensors, "reference")
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
    moved = sum(x.nbytes for x in tensors) + sum(x.nbytes for x in outputs)
    return moved + (sum(x.nbytes for x in tensors if x.requires_grad) if mode == "backward" else 0)


def _peak(call: Callable[[], object], device: torch.device) -> Value:
    if device.type != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20
