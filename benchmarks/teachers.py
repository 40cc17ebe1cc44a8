"""Suite "teachers": one forward of N frozen teachers of one network, as feed-parallel has them in every step."""

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import figures, selection
from benchmarks.cases import Case, cases, stem
from benchmarks.counting import count_step
from benchmarks.report import MISSING, Report, environment, ratios
from benchmarks.selection import Form
from benchmarks.step import CALLS_PER_TURN, WARMUP_CALLS, busy, described, measured_rates, rates_described, release
from benchmarks.timing import measure_in_turn
from fastfuse import models
from fastfuse.nn.teachers import Teachers
from fastfuse.train.build import pick_device
from fastfuse.train.graph import Captured
from fastfuse.train.modes import pick_amp
from fastfuse.train.step import AMP_DTYPES

# What folding and stacking may change, relative to the largest element.
TOLERANCE = {"off": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
STRATEGIES = ("loop", "grouped")
BASELINE = "unfolded"
COLUMNS = {
    "model": "model",
    "teachers": "N",
    "provider": "provider",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "lowest_ms": "lowest",
    "highest_ms": "highest",
    "images_per_s": "images/s",
    "ops": "ops",
    "baseline_ratio": "x unfolded",
}


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure the teachers of each model as given, one after another and folded, and folded and stacked, in turn.

    Gives the report as it grows, by model and number of teachers, which `--students` says.

    Raises:
        InputError: an unknown name, or a device or mode that is not here.
        AssertionError: a provider does not give what the plain networks give; it is not measured then.
    """
    device = pick_device(options.device)
    modes = options.modes or (["eager", "graphed"] if device.type == "cuda" and not options.quick else ["eager"])
    asked = [name for name in options.strategies or STRATEGIES if name in STRATEGIES]
    forms, warnings = selection.available_forms(modes, asked or STRATEGIES, device)
    chosen, missing = selection.models(options.model, device)
    amp = pick_amp(options.amp, device)
    every = cases(options, chosen, amp, device)
    settings = {
        **described(options, "teachers", every),
        **rates_described(measured_rates(device, amp, options.repeats)),
    }
    name = stem("teachers", every)
    report = Report(name, settings, environment(device), COLUMNS, [], {}, {}, [*missing, *warnings, *busy()])
    for case in every:
        made = prepared(case, [Form(mode, "plain") for mode in dict.fromkeys(form.mode for form in forms)] + forms)
        _measure(case, made, report, f"{case.model} N={case.students} " if len(every) > 1 else "", options.repeats)
        release(made)
        yield report


def prepared(case: Case, forms: Sequence[Form]) -> dict[Form, Callable[[], list[Tensor]]]:
    """A forward for each form, on the same weights and images; strategy "plain" is the networks as they were given.

    Raises:
        AssertionError: one gives something else than they do.
    """
    torch.manual_seed(0)
    networks = [trained(models.build(case.model, case.classes)) for _ in range(case.students)]
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=case.device)
    images = images.contiguous(memory_format=torch.channels_last)
    made = {form: _forward(form, networks, images, case.amp) for form in forms}
    wanted = [x.float().clone() for x in made[forms[0]]()]
    for form, forward in made.items():
        for found, want in zip(forward(), wanted, strict=True):
            error = ((found.float() - want).abs().max() / want.abs().max()).item()
            if not error <= TOLERANCE[case.amp]:
                raise AssertionError(
                    f"{_label(form)} is off by {error:.1e} of the largest element of a teacher's output"
                )
    return made


def trained(network: nn.Module) -> nn.Module:
    """With statistics of batch norms that are not the initial ones, which would fold to nothing."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return network


def _forward(form: Form, networks: Sequence[nn.Module], images: Tensor, amp: str) -> Callable[[], list[Tensor]]:
    teachers = Teachers(networks).to(images.device)
    if form.strategy != "plain":
        teachers.arrange(form.strategy)
    teachers.to(memory_format=torch.channels_last)
    call = torch.compile(teachers, fullgraph=True, dynamic=False) if form.compiled else teachers
    dtype = AMP_DTYPES[amp]

    def forward() -> list[Tensor]:
        # Logits and last maps, which the losses of the methods read.
        with torch.autocast(images.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return [x for logits, features in call(images) for x in (logits, features[-1])]

    return Captured(forward, list) if form.graphed else forward


def _label(form: Form) -> str:
    return f"{BASELINE} {form.mode}" if form.strategy == "plain" else f"fastfuse {form}"


def _measure(
    case: Case, made: dict[Form, Callable[[], list[Tensor]]], report: Report, prefix: str, repeats: int
) -> None:
    kind = case.device.type
    settings = {"calls": CALLS_PER_TURN[kind], "warmup": WARMUP_CALLS[kind], "device": case.device}
    timings = measure_in_turn({_label(form): forward for form, forward in made.items()}, repeats=repeats, **settings)
    medians = {label: timing.median for label, timing in timings.items()}
    for form, forward in made.items():
        label, baseline = _label(form), _label(Form(form.mode, "plain"))
        timing = timings[label]
        report.rows.append(
            {
                "model": case.model,
                "teachers": case.students,
                "batch_size": case.batch_size,
                "image_size": case.image_size,
                "provider": label,
                "mode": form.mode,
                "strategy": form.strategy,
                **figures.spread(timing),
                "lowest_ms": min(timing.samples_ms),
                "highest_ms": max(timing.samples_ms),
                "images_per_s": case.batch_size / timing.median * 1e3,
                "ops": count_step(forward, device=case.device).ops if form.mode == "eager" else MISSING,
                "baseline_ratio": medians[baseline] / timing.median,
            }
        )
        report.samples_ms[prefix + label] = timing.samples_ms
    for mode in dict.fromkeys(form.mode for form in made):
        own = {_label(form): medians[_label(form)] for form in made if form.mode == mode}
        found = ratios(own, _label(Form(mode, "plain")))
        report.ratios.update({prefix + pair: ratio for pair, ratio in found.items()})
