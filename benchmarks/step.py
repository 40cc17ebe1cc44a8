"""Suite "step": one training step on a batch that already lies on the device; of FFSD if --methods names no other."""

import argparse
import gc
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from benchmarks import figures, roofline, selection
from benchmarks.cases import Case, batches, cases, stem
from benchmarks.counting import count_step
from benchmarks.counting_gpu import count_on_gpu
from benchmarks.programs import Prepared, Start, prepare
from benchmarks.report import MISSING, Report, Value, environment
from benchmarks.selection import Program
from benchmarks.timing import Timing, measure_in_turn
from fastfuse.errors import InputError, NonFiniteLossError
from fastfuse.train.build import pick_device
from fastfuse.train.modes import pick_amp
from fastfuse.train.step import AMP_DTYPES

WARMUP_CALLS = {"cpu": 1, "cuda": 10}
CALLS_PER_TURN = {"cpu": 1, "cuda": 20}
FAILED = "left out, for it failed: "
TOO_MUCH = (
    "the GPU's memory does not hold it; lower --batch-size, or name fewer --providers, --modes and --strategies at once"
)
COLUMNS = {
    "model": "model",
    "students": "S",
    "provider": "provider",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "images_per_s": "images/s",
    "ops": "ops",
    "waits": "host waits",
    "kernels": "kernels",
    "launches": "launches",
    "peak_mb": "peak MB",
    "published_ratio": "x published",
    "published_amp_ratio": "x published-amp",
    "compile_ratio": "x compile",
    "distillation_share": "distillation",
    "of_roofline": "of roofline",
    "ready_s": "ready s",
}


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure the programs of each model and number of students in turn; `options` as parsed by `benchmarks/run.py`.

    Gives the report as it grows, after each case, so that a run that is cut short has said what it had.

    Raises:
        InputError: an unknown name, a device, mode or strategy that is not here, or more than --quick can measure.
        NonFiniteLossError: a program diverged, so that its times mean nothing.
        AssertionError: after all others, names the programs that failed or do not compute the published losses.
    """
    if options.methods not in (None, ["ffsd"]):
        from benchmarks import methods_step  # which imports this module

        yield from methods_step.run(options)
        return
    device = pick_device(options.device)
    programs, warnings = chosen(options, device)
    models, missing = selection.models(options.model, device)
    amp = pick_amp(options.amp, device)
    chosen_cases = cases(options, models, amp, device)
    rates = measured_rates(device, amp, options.repeats)
    labels = {programs[-1]: "fastfuse"} if options.quick else {}
    settings = {**described(options, "step", chosen_cases), **rates_described(rates)}
    name = stem("step", chosen_cases)
    report = Report(name, settings, environment(device), COLUMNS, [], {}, {}, [*missing, *warnings, *busy()])
    for case in chosen_cases:
        prefix = f"{case.name} " if len(chosen_cases) > 1 else ""
        made = prepared(case, programs, report.warnings, asked=options.strategies is not None)
        _measure(case, made, labels, report, prefix, rates, options.repeats)
        yield report
    complain(report)


def complain(report: Report) -> None:
    """Once all else is measured and saved, an error for what failed.

    Raises:
        AssertionError: see there.
    """
    if failed := [warning for warning in report.warnings if FAILED in warning]:
        raise AssertionError("; ".join(failed))


def chosen(options: argparse.Namespace, device: torch.device) -> tuple[list[Program], list[str]]:
    """The programs of a run and what to say about those left out."""
    if options.quick:
        form = selection.best_form(options.modes, options.strategies, device)
        return [Program("published"), Program("fastfuse", form)], []
    return selection.programs(options.providers, options.modes, options.strategies, device)


def measured_rates(device: torch.device, amp: str, repeats: int) -> roofline.Rates | None:
    """Of a GPU, in the precision of the run; None on a CPU, which has no roofline here."""
    return roofline.measured_rates(device, AMP_DTYPES[amp] or torch.float32, repeats) if device.type == "cuda" else None


def rates_described(rates: roofline.Rates | None) -> dict[str, Value]:
    """For the settings of a report."""
    if rates is None:
        return {"copy_gb_per_s": "not measured", "matrix_tflop_per_s": "not measured"}
    return {
        "copy_gb_per_s": round(rates.copy / 1e9, 1),
        "matrix_tflop_per_s": round(rates.matrix / 1e12, 1),
    }


def described(options: argparse.Namespace, suite: str, cases: Sequence[Case]) -> dict[str, Value]:
    """What was asked for, for the settings of a report."""
    device_type = cases[0].device.type
    return {
        "suite": suite,
        **batches(cases),
        "amp": cases[0].amp,
        "repeats": options.repeats,
        "calls_per_turn": CALLS_PER_TURN[device_type],
        "quick": options.quick,
        "device_type": device_type,
    }


def busy() -> list[str]:
    """A warning if other work has the machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.25 * cores:
        return []
    return [f"the load was {load:.1f} on {cores} cores before the start: on a quiet machine the figures may be others"]


def prepared(case: Case, programs: Sequence[Program], warnings: list[str], *, asked: bool) -> dict[Program, Prepared]:
    """All programs of a case, ready to be timed; one line on the standard error for each.

    Networks that cannot be stacked are an error if the strategies were `asked` for, otherwise a warning; so is a
    program that finds the GPU's memory full, unless it is the last one left. One that fails, or computes other losses,
    is left out, and `complain` is to say so at the end.

    Raises:
        InputError: see above.
        AssertionError: all have failed.
    """
    start = Start(case)
    made = {}
    for program in programs:
        full = False
        try:
            one = made[program] = prepare(program, case, start)
        except InputError as error:
            if asked or program.form is None or program.form.strategy != "grouped":
                raise
            warnings.append(f"{case.name} {program} left out: {error}")
            continue
        except torch.OutOfMemoryError:
            warnings.append(f"{case.name} {program} left out: {TOO_MUCH}")
            full = True
        except Exception as error:  # of a dozen programs one must not cost the others
            warnings.append(f"{case.name} {program} {FAILED}{type(error).__name__}: {str(error)[:300]}")
            full = True
        if full:  # outside the handler, which keeps what the program had made
            gc.collect()
            torch.cuda.empty_cache()
            continue
        name = Program(program.kind, one.form)
        print(f"{case.name}: {name} is ready after {one.ready_s:.0f} s", file=sys.stderr, flush=True)
    if not made:
        if any(FAILED in warning for warning in warnings):
            raise AssertionError("; ".join(warnings))
        raise InputError(f"{case.name}: {TOO_MUCH}")
    return made


def timed(steps: Mapping[object, Prepared], device: torch.device, repeats: int) -> dict[object, Timing]:
    """Of all in turn.

    Raises:
        InputError: what graphs keep leaves too little memory for the others.
    """
    calls = {key: one.step for key, one in steps.items()}
    settings = {"calls": CALLS_PER_TURN[device.type], "warmup": WARMUP_CALLS[device.type], "device": device}
    with full_memory_explained(len(steps)):
        return measure_in_turn(calls, repeats=repeats, **settings)


@contextmanager
def full_memory_explained(programs: int) -> Iterator[None]:
    """A block in which so many programs share the GPU's memory; where it is full an InputError says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"{programs} programs at once: {TOO_MUCH}") from error


def counts(program: Program, one: Prepared, device: torch.device) -> dict[str, Value]:
    """Operations, waits, kernels and launches of a step, where they can be seen, and that it still computes a loss."""
    found: dict[str, Value] = dict.fromkeys(("ops", "waits", "kernels", "launches"), MISSING)
    compiled = program.kind == "compile" or (one.form is not None and one.form.compiled)
    graphed = one.form is not None and one.form.graphed
    if not compiled and not graphed:
        seen = count_step(one.step, device=device)
        found |= {"ops": seen.ops, "waits": seen.waits}
    if device.type == "cuda":
        on_gpu = count_on_gpu(one.step, device)
        found["waits"] = on_gpu.waits
        if on_gpu.kernels:
            found |= {"kernels": on_gpu.kernels, "launches": on_gpu.launches}
    if not math.isfinite(float(one.step())):
        raise NonFiniteLossError(
            f"{program} diverged on random data, so its times mean nothing; use a larger --batch-size"
        )
    return found


def _measure(
    case: Case,
    made: dict[Program, Prepared],
    labels: Mapping[Program, str],
    report: Report,
    prefix: str,
    rates: roofline.Rates | None,
    repeats: int,
) -> None:
    timings = timed(made, case.device, repeats)
    medians = {program: timing.median for program, timing in timings.items()}
    for program, one in made.items():
        label = labels.get(program, str(program))
        derived = figures.ratios(medians, program)
        report.rows.append(
            {
                **case.described,
                "provider": label,
                "kind": program.kind,
                "mode": one.form.mode if one.form else MISSING,
                "strategy": one.form.strategy if one.form else MISSING,
                **figures.spread(timings[program]),
                "images_per_s": case.batch_size / medians[program] * 1e3,
                **counts(program, one, case.device),
                "peak_mb": one.peak_mb,
                **derived,
                "of_roofline": _of_roofline(case, medians[program], rates),
                "ready_s": one.ready_s,
            }
        )
        report.samples_ms[prefix + label] = timings[program].samples_ms
        if derived["published_ratio"] != MISSING:
            report.ratios[f"{prefix}published/{label}"] = derived["published_ratio"]
    report.warnings.extend(prefix + doubt for doubt in figures.doubts(timings))
    release(made)


def release(made: dict) -> None:
    """Give back what programs hold, so that the next case starts in an empty memory."""
    made.clear()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _of_roofline(case: Case, median_ms: float, rates: roofline.Rates | None) -> Value:
    if rates is None:
        return MISSING
    element_bytes = (AMP_DTYPES[case.amp] or torch.float32).itemsize
    shape = {"batch_size": case.batch_size, "image_size": case.image_size, "element_bytes": element_bytes}
    work = roofline.least_work(case.model, networks=case.students + 1, **shape)
    return roofline.least_ms(work, rates) / median_ms
