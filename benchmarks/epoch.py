"""Suite "epoch": a whole epoch of the engine, data on the device, against the sum of its steps."""

import argparse
from collections.abc import Callable, Iterator

import torch

from benchmarks import epoch_data, figures, selection
from benchmarks.cases import Case, cases, joined, stem
from benchmarks.programs import Start, Step, engine_step
from benchmarks.report import Report, Value, environment
from benchmarks.selection import Form, Program
from benchmarks.step import CALLS_PER_TURN, busy, complain, described, full_memory_explained, prepared, release
from benchmarks.timing import Timing, measure_in_turn
from fastfuse.config import TrainConfig
from fastfuse.data import Dataset, training_batches
from fastfuse.train.build import pick_device
from fastfuse.train.engine import Engine
from fastfuse.train.modes import pick_amp
from fastfuse.train.terms import TermLog

COLUMNS = {
    "model": "model",
    "students": "S",
    "provider": "provider",
    "epoch_s": "epoch s",
    "p20_s": "p20",
    "p80_s": "p80",
    "images_per_s": "images/s",
    "step_ms": "step ms",
    "steps_s": "sum of steps s",
    "overhead": "epoch/steps",
}


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure an epoch and bare steps of each form in turn; the report as it grows, by model and number of students.

    Raises:
        InputError: as in the suite "step".
        NonFiniteLossError: training diverged, so that its times mean nothing.
    """
    device = pick_device(options.device)
    modes = options.modes or (["eager"] if options.quick else None)
    asked = options.strategies is not None
    forms, warnings = selection.available_forms(modes, options.strategies, device)
    models, missing = selection.models(options.model, device)
    every = cases(options, models, pick_amp(options.amp, device), device)
    numbers = {case.model: options.images or epoch_data.count(case) for case in every}
    settings: dict[str, Value] = {**described(options, "epoch", every), "images": joined(numbers.values())}
    name = stem("epoch", every)
    report = Report(name, settings, environment(device), COLUMNS, [], {}, {}, [*missing, *warnings, *busy()])
    for case in every:
        prefix = f"{case.name} " if len(every) > 1 else ""
        images, start = numbers[case.model], Start(case)
        dataset = epoch_data.synthetic(images, case)
        steps = prepared(case, [Program("fastfuse", form) for form in forms], report.warnings, asked=asked)
        with full_memory_explained(2 * len(steps)):
            made = {
                program.form: (_epoch(program.form, case, start, dataset), _several(one.step, device))
                for program, one in steps.items()
            }
            _measure(case, made, images, report, prefix, options.repeats)
        release(made)
        yield report
    complain(report)


def _epoch(form: Form, case: Case, start: Start, dataset: Dataset) -> Callable[[], None]:
    """One epoch as `fastfuse train` runs it, without evaluation: order, rates, steps, terms, and reading them."""
    step, _ = engine_step("fastfuse", form, case, start)
    batches = training_batches(dataset, batch_size=case.batch_size, memory_format=step.memory_format)
    terms = TermLog(TrainConfig().log_interval, case.device)
    engine = Engine(step, batches, terms, graphed=form.graphed)
    epoch = 0

    def run_epoch() -> None:
        nonlocal epoch
        engine.start_epoch(seed=0, epoch=epoch, step=0, factors=[1.0] * batches.steps)
        for number in range(batches.steps):
            count = engine.run(number)
            terms.count(epoch=epoch, step=number, images=count)
        terms.flush()
        epoch += 1

    return run_epoch


def _several(step: Step, device: torch.device) -> Callable[[], None]:
    """Steps as in the suite "step", on a batch that lies there: no drawing, no rates, no terms."""

    def several() -> None:
        for _ in range(CALLS_PER_TURN[device.type]):
            step()

    return several


def _measure(case: Case, made: dict, images: int, report: Report, prefix: str, repeats: int) -> None:
    calls = {
        (form, what): call for form, both in made.items() for what, call in zip(("epoch", "step"), both, strict=True)
    }
    timings = measure_in_turn(calls, repeats=repeats, calls=1, warmup=1, device=case.device)
    for form in made:
        provider = f"fastfuse {form}"
        row = figures.epoch(
            timings[form, "epoch"],
            Timing(tuple(ms / CALLS_PER_TURN[case.device.type] for ms in timings[form, "step"].samples_ms)),
            images=images,
            batch_size=case.batch_size,
        )
        report.rows.append({**case.described, "provider": provider, "images": images, **row})
        report.samples_ms[f"{prefix}{provider} epoch"] = timings[form, "epoch"].samples_ms
        report.ratios[f"{prefix}{provider} epoch/steps"] = row["overhead"]
