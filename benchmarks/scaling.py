"""Suite "scaling": what more students cost, and more replicas, all of them in turn within one run."""

import argparse
import dataclasses
from collections.abc import Iterator

from benchmarks import figures, selection
from benchmarks.cases import Case, cases, stem
from benchmarks.programs import Prepared
from benchmarks.report import Report, environment
from benchmarks.selection import Program
from benchmarks.step import busy, complain, counts, described, prepared, release, timed
from fastfuse.train.build import pick_device
from fastfuse.train.modes import pick_amp

COLUMNS = {
    "model": "model",
    "provider": "provider",
    "students": "S",
    "replicas": "R",
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
    """Measure the published program and fastfuse for each number of students, and fastfuse with the fewest of them for
    each number of replicas; the report as it grows, by model.

    Raises:
        InputError, NonFiniteLossError, AssertionError: as in the suite "step".
    """
    device = pick_device(options.device)
    kinds = options.providers or ["published", "fastfuse"]
    modes = options.modes or (["eager"] if options.quick else None)
    asked = options.strategies is not None
    programs, warnings = selection.programs(kinds, modes, options.strategies, device)
    models, missing = selection.models(options.model, device)
    every = cases(options, models, pick_amp(options.amp, device), device)
    settings, name = described(options, "scaling", every), stem("scaling", every)
    report = Report(name, settings, environment(device), COLUMNS, [], {}, {}, [*missing, *warnings, *busy()])
    for model in models:
        own = [case for case in every if case.model == model]
        own += [dataclasses.replace(own[0], replicas=r) for r in options.replicas or () if r > 1]
        made = {
            (program, _size(case)): one
            for case in own
            for program, one in prepared(case, _for(case, programs), report.warnings, asked=asked).items()
        }
        _measure(own, made, report, f"{model} " if len(models) > 1 else "", options.repeats)
        yield report
    complain(report)


def _size(case: Case) -> tuple[int, int]:
    return case.replicas, case.students


def _for(case: Case, programs: list[Program]) -> list[Program]:
    """Replicas are the engine's own."""
    return [program for program in programs if case.replicas == 1 or program.kind in selection.WITH_FORMS]


def _measure(
    cases: list[Case], made: dict[tuple[Program, tuple[int, int]], Prepared], report: Report, prefix: str, repeats: int
) -> None:
    timings = timed(made, cases[0].device, repeats)
    medians = {key: timing.median for key, timing in timings.items()}
    costs = figures.costs(medians)
    for program in dict.fromkeys(program for program, _ in made):
        own = [case for case in cases if (program, _size(case)) in made]
        fewest = own[0]  # `--students` come sorted, and replicas after them
        for case in own:
            key = program, _size(case)
            same = {p: ms for (p, size), ms in medians.items() if size == _size(case)}
            report.rows.append(
                {
                    **case.described,
                    "provider": str(program),
                    "replicas": case.replicas,
                    **figures.spread(timings[key]),
                    "images_per_s": case.replicas * case.batch_size / medians[key] * 1e3,
                    "cost": costs[key],
                    **counts(program, made[key], case.device),
                    "peak_mb": made[key].peak_mb,
                    **figures.ratios(same, program),
                    "ready_s": made[key].ready_s,
                }
            )
            name = case.name.removeprefix(f"{case.model} ")
            report.samples_ms[f"{prefix}{program} {name}"] = timings[key].samples_ms
            if case is not fewest:
                report.ratios[f"{prefix}{program} {name}/S={fewest.students}"] = costs[key]
    release(made)
