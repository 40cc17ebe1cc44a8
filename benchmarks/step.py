"""Suite "step": one FFSD training step on a batch that already lies on the device."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.counting import count_step
from benchmarks.published import PublishedFFSD
from benchmarks.report import Report, Value, environment, ratios
from benchmarks.timing import Timing, measure_in_turn
from fastfuse.errors import NonFiniteLossError
from fastfuse.methods import Method, build_method
from fastfuse.train.build import pick_device
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

CLASSES = 100
IMAGE_SIZE = 32
LR = 0.1
# Past the ramp of the lambdas: all terms at full weight.
EPOCH = 10
WARMUP_CALLS = {"cpu": 1, "cuda": 10}
CALLS_PER_TURN = {"cpu": 1, "cuda": 20}
# Same weights and batch, float32 forward only: rounding is 1e-6, a missing term or another weight is far above this.
AGREEMENT = 1e-3
COLUMNS = {
    "provider": "provider",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "images_per_s": "images/s",
    "ops": "ops",
    "waits": "host waits",
}

# One step; gives the sum of all losses before its update, 0-d or a number.
Step = Callable[[], Tensor | float]


def run(options: argparse.Namespace) -> Report:
    """Measure both providers in turn; `options` as parsed by `benchmarks/run.py`.

    Raises:
        InputError: an unknown model or device, or CUDA where there is none.
        NonFiniteLossError: a provider diverged, so that its times mean nothing.
        AssertionError: from the same weights the providers do not compute the same loss; nothing is measured then.
    """
    device = pick_device(options.device)
    steps = _providers(options.model, options.students, options.batch_size, device)
    _same_loss(steps)
    warmup = 0 if options.quick else WARMUP_CALLS[device.type]
    calls = 1 if options.quick else CALLS_PER_TURN[device.type]
    timings = measure_in_turn(steps, repeats=options.repeats, calls=calls, warmup=warmup, device=device)
    settings = {
        "suite": "step",
        "model": options.model,
        "students": options.students,
        "batch_size": options.batch_size,
        "dtype": "float32",
        "repeats": options.repeats,
        "calls_per_turn": calls,
        "quick": options.quick,
    }
    stem = f"step_{options.model}_s{options.students}_b{options.batch_size}_{device.type}"
    rows = [_row(name, step, timings[name], options.batch_size, device) for name, step in steps.items()]
    medians = {name: timing.median for name, timing in timings.items()}
    samples = {name: timing.samples_ms for name, timing in timings.items()}
    doubts = _doubts(timings, options.quick)
    return Report(stem, settings, environment(device), COLUMNS, rows, ratios(medians, "published"), samples, doubts)


def _providers(model: str, students: int, batch_size: int, device: torch.device) -> dict[str, Step]:
    """Both providers, from the same weights, on the same batch of random normal images."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    baseline = PublishedFFSD(model, students=students, num_classes=CLASSES, lr=LR, device=device)
    method = build_method("ffsd", model=model, students=students, num_classes=CLASSES).to(device)
    _copy_weights(baseline, method)
    train_step = TrainStep(method, build_optimizers(method, lr=LR), amp="off")
    # The engine counts finished epochs, the published program the current one.
    progress = torch.tensor(float(EPOCH - 1), device=device)

    def published() -> float:
        return _loss(baseline.step(images, labels, epoch=EPOCH))

    def fastfuse() -> Tensor:
        return train_step(images, labels, progress).loss.detach()

    return {"published": published, "fastfuse": fastfuse}


def _copy_weights(baseline: PublishedFFSD, method: Method) -> None:
    leader = baseline.networks["leader"]
    for i in range(baseline.students):
        method.common_students[i].load_state_dict(baseline.networks[f"student{i}"].state_dict())
    state = leader.state_dict()
    method.leader.load_state_dict({key: state[key] for key in state if not key.startswith("trans_fusion.")})
    method.criterion.trans_fusion.load_state_dict(leader.trans_fusion.state_dict())
    method.criterion.fusion.load_state_dict(baseline.networks["fusion"].state_dict())
    for name, transform in method.criterion.transforms.items():
        own = "transform_leader" if name == "leader" else name.replace("student", "transform")
        transform.load_state_dict(baseline.networks[own].state_dict())


def _loss(terms: dict[str, float | list[float]]) -> float:
    summed = [value for name, value in terms.items() if name.endswith("_total") or name.startswith("transform_")]
    return sum(sum(value) if isinstance(value, list) else value for value in summed)


def _same_loss(steps: dict[str, Step]) -> None:
    losses = {name: float(step()) for name, step in steps.items()}
    wanted = losses["published"]
    for name, loss in losses.items():
        if not math.isclose(loss, wanted, rel_tol=AGREEMENT):
            raise AssertionError(f"{name} computes a loss of {loss} where the published program has {wanted}")


def _doubts(timings: dict[str, Timing], quick: bool) -> list[str]:
    doubts = ["--quick measures too little for a claim"] if quick else []
    if timings["published"].overlaps(timings["fastfuse"]):
        doubts.append("the ranges p20 to p80 overlap: noise may explain this ratio; repeat on a quiet machine")
    return doubts


def _row(name: str, step: Step, timing: Timing, batch_size: int, device: torch.device) -> dict[str, Value]:
    counts = count_step(step, device=device)
    if not math.isfinite(float(step())):
        raise NonFiniteLossError(
            f"{name} diverged on random data, so its times mean nothing; use a larger --batch-size"
        )
    return {
        "provider": name,
        "median_ms": timing.median,
        "p20_ms": timing.quantile(0.2),
        "p80_ms": timing.quantile(0.8),
        "images_per_s": batch_size / timing.median * 1e3,
        "ops": counts.ops,
        "waits": counts.waits,
    }
