"""Suite "step" with --methods: one training step of every method beside the student trained alone."""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import figures, memory, selection
from benchmarks.cases import Case, cases, stem
from benchmarks.programs import AGREEMENT, EPOCH, LR, Prepared, Step, check, ready
from benchmarks.report import Report, environment
from benchmarks.selection import Form, Program
from benchmarks.step import TOO_MUCH, busy, counts, described, release, timed
from benchmarks.teachers import trained
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError, unknown_name
from fastfuse.methods import METHODS, Method
from fastfuse.train import build, preliminary
from fastfuse.train.graph import Captured
from fastfuse.train.modes import pick_amp, pick_mode
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

BASELINE = "independent"
COLUMNS = {
    "model": "model",
    "method": "method",
    "students": "S",
    "teachers": "N",
    "form": "form",
    "median_ms": "median ms",
    "lowest_ms": "lowest",
    "highest_ms": "highest",
    "ops": "ops",
    "waits": "host waits",
    "kernels": "kernels",
    "launches": "launches",
    "peak_mb": "peak MB",
    "cost": "x independent",
    "ready_s": "ready s",
}


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure one step of each method in turn, with one student alone beside them; the report as it grows, by model.

    Raises:
        InputError: an unknown name, or a device, mode or strategy that is not here.
        NonFiniteLossError: a method diverged, so that its times mean nothing.
        AssertionError: a form of a method does not compute what its networks compute one after another.
    """
    device = build.pick_device(options.device)
    modes = options.modes or [pick_mode("auto", device)]
    forms, warnings = selection.available_forms(modes, options.strategies or ["loop"], device)
    if options.strategies is None:
        forms = [Form(form.mode, "auto") for form in forms]
    models, missing = selection.models(options.model, device)
    every = cases(options, models, pick_amp(options.amp, device), device)
    settings = described(options, "step", every) | {"teacher_model": options.teacher_model or "as model"}
    name = stem("step", every, "methods")
    report = Report(name, settings, environment(device), COLUMNS, [], {}, {}, [*missing, *warnings, *busy()])
    for case in every:
        made = prepared(case, names(options), forms, options.teacher_model, report.warnings)
        _measure(case, made, report, f"{case.model} " if len(every) > 1 else "", options.repeats)
        yield report


def names(options: argparse.Namespace) -> list[str]:
    """The methods to measure, the baseline first.

    Raises:
        InputError: one that does not exist.
    """
    for name in options.methods:
        if name not in (*METHODS, "all"):
            raise unknown_name("method", name, METHODS)
    kept = [name for name in METHODS if name in options.methods or "all" in options.methods]
    return [BASELINE, *(name for name in kept if name != BASELINE)]


def make(name: str, case: Case, teacher_model: str | None) -> Method:
    """A method with its default number of students, one of the baseline, and untrained teachers; always the same."""
    cls = METHODS[name]
    own = {"teacher_model": teacher_model} if cls.teacher_count or cls.extra_network == "teacher" else {}
    students = 1 if name == BASELINE else None
    config = build.resolved(TrainConfig(method=name, model=case.model, students=students, **own))
    torch.manual_seed(config.seed)
    config, given = preliminary.stand_in(config, case.classes)
    for teacher in given.get("teachers", ()):
        trained(teacher)
    size = (case.image_size, case.image_size)
    return build.make_method(config, case.classes, given, image_size=size).to(case.device).train()


def prepared(
    case: Case, methods: list[str], forms: list[Form], teacher_model: str | None, warnings: list[str]
) -> dict[tuple[str, Form], Prepared]:
    """Every method in every form, held to the losses that its networks give eagerly and one after another.

    What a method cannot do, and what finds the memory full, is left out with a warning.

    Raises:
        InputError: the baseline cannot be measured.
    """
    made: dict[tuple[str, Form], Prepared] = {}
    for name in methods:
        wanted: list[float] = []
        for form in forms:
            try:
                wanted = wanted or _ready(name, Form("eager", "loop"), case, teacher_model)[2]
                held = memory.held(case.device)
                step, came_to, losses, seconds = _ready(name, form, case, teacher_model)
                check(f"{name} {form}", losses, wanted, AGREEMENT[case.amp], "its own eager loop")
                made[name, form] = Prepared(step, came_to, seconds, memory.peak_mb(step, held, case.device))
            except (InputError, torch.OutOfMemoryError) as error:
                if name == BASELINE:
                    raise
                reason = TOO_MUCH if isinstance(error, torch.OutOfMemoryError) else str(error)
                warnings.append(f"{case.model} {name} {form} left out: {reason}")
                continue
            print(f"{case.model} {name} {came_to} is ready after {seconds:.0f} s", file=sys.stderr, flush=True)
    return made


def _ready(
    name: str, form: Form, case: Case, teacher_model: str | None
) -> tuple[Step, Form | None, list[float], float]:
    return ready(lambda: _step(make(name, case, teacher_model), form, case))


def _step(method: Method, form: Form, case: Case) -> tuple[Step, Form]:
    """Of a method on a batch that lies on the device, and the form that "auto" came to."""
    strategy = method.arrange(form.strategy)
    train_step = TrainStep(method, build_optimizers(method, lr=LR), amp=case.amp, compiled=form.compiled)
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, 3, case.image_size, case.image_size)
    images = torch.randn(shape, generator=generator).to(case.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(case.classes, (case.batch_size,), generator=generator).to(case.device)
    progress = torch.tensor(float(EPOCH - 1), device=case.device)

    def step() -> Tensor:
        return train_step(images, labels, progress).loss.detach()

    return Captured(step, train_step.tensors) if form.graphed else step, Form(form.mode, strategy)


def _measure(case: Case, made: dict[tuple[str, Form], Prepared], report: Report, prefix: str, repeats: int) -> None:
    timings = timed(made, case.device, repeats)
    for (name, form), one in made.items():
        timing, alone = timings[name, form], timings[BASELINE, form]
        cost = timing.median / alone.median
        label = f"{name} {one.form}"
        report.rows.append(
            {
                "model": case.model,
                "method": name,
                "students": 1 if name == BASELINE else METHODS[name].default_students,
                "teachers": METHODS[name].teacher_count,
                "batch_size": case.batch_size,
                "image_size": case.image_size,
                "form": str(one.form),
                **figures.spread(timing),
                "lowest_ms": min(timing.samples_ms),
                "highest_ms": max(timing.samples_ms),
                **counts(Program(name, form), one, case.device),
                "peak_mb": one.peak_mb,
                "cost": cost,
                "ready_s": one.ready_s,
            }
        )
        report.samples_ms[prefix + label] = timing.samples_ms
        if name != BASELINE:
            report.ratios[f"{prefix}{label}/{BASELINE}"] = cost
    release(made)
