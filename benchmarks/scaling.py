"""Suite "scaling": what more students cost, all numbers of students in turn within one run."""

import argparse
from collections.abc import Iterator

from benchmarks import figures, selection
from benchmarks.programs import Case, Prepared
from benchmarks.report import Report, environment
from benchmarks.selection import Program
from benchmarks.step import busy, counts, described, prepared, release, timed
from fastfuse.train.build import pick_device
from fastfuse.train.modes import pick_amp

COLUMNS = {
    "model": "model",
    "provider": "provider",
    "students": "S",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "images_per_s": "images/s",
    "cost": "cost",
    "ops": "ops",
    "kernels": "kernels",
    "peak_mb": "peak MB",
    "published_ratio": "x published",
    "ready_s": "ready s",
}


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure the published program and fastfuse for each number of students; the report as it grows, by model.

    Raises:
        InputError, NonFiniteLossError, AssertionError: as in the suite "step".
    """
    device = pick_device(options.device)
    kinds = options.providers or ["published", "fastfuse"]
    modes = options.modes or (["eager"] if options.quick else None)
    asked = options.strategies is not None
    programs, warnings = selection.programs(kinds, modes, options.strategies, device)
    models, missing = selection.models(options.model)
    amp = pick_amp(options.amp, device)
    stem = (
        f"scaling_{'+'.join(models)}_s{'+'.join(map(str, options.students))}_b{options.batch_size}_{amp}_{device.type}"
    )
    settings = described(options, "scaling", amp, device)
    report = Report(stem, settings, environment(device), COLUMNS, [], {}, {}, [*missing, *warnings, *busy()])
    for model in models:
        cases = [Case(model, s, options.batch_size, amp, device) for s in options.students]
        made = {
            (program, case.students): one
            for case in cases
            for program, one in prepared(case, programs, report.warnings, asked=asked).items()
        }
        _measure(cases, made, report, f"{model} " if len(models) > 1 else "", options.repeats)
        yield report


def _measure(
    cases: list[Case], made: dict[tuple[Program, int], Prepared], report: Report, prefix: str, repeats: int
) -> None:
    timings = timed(made, cases[0].device, repeats)
    medians = {key: timing.median for key, timing in timings.items()}
    costs = figures.costs(medians)
    for program in dict.fromkeys(program for program, _ in made):
        own = [case for case in cases if (program, case.students) in made]
        fewest = own[0].students  # `--students` come sorted
        for case in own:
            key = program, case.students
            same = {p: ms for (p, students), ms in medians.items() if students == case.students}
            report.rows.append(
                {
                    "model": case.model,
                    "provider": str(program),
                    "students": case.students,
                    **figures.spread(timings[key]),
                    "images_per_s": case.batch_size / medians[key] * 1e3,
                    "cost": costs[key],
                    **counts(program, made[key], case.device),
                    "peak_mb": made[key].peak_mb,
                    **figures.ratios(same, program),
                    "ready_s": made[key].ready_s,
                }
            )
            report.samples_ms[f"{prefix}{program} S={case.students}"] = timings[key].samples_ms
            if case.students != fewest:
                report.ratios[f"{prefix}{program} S={case.students}/S={fewest}"] = costs[key]
    release(made)
