"""The programs that are measured, all from the same weights and batch, each held to the same losses first."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.published import PublishedFFSD
from benchmarks.report import Value
from benchmarks.selection import Form, Program
from fastfuse.kernels import _dispatch
from fastfuse.methods import Method, build_method
from fastfuse.methods.replicas import Replicas
from fastfuse.train.graph import Captured
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

# Time does not depend on it; with the published 0.1 many steps on one batch of noise diverge.
LR = 0.01
# Past the ramp of the lambdas: all terms at full weight.
EPOCH = 10
# Two losses with one update between them, relative. Float32 rounds to 1e-5 there and bfloat16 to 1e-3 (resnet20, batch
# 16); a missing term, another weight or a missing update is above 5e-2.
AGREEMENT = {"off": 1e-3, "bf16": 1e-2, "fp16": 1e-2}

# One step; gives the sum of all losses before its update, 0-d or a number.
Step = Callable[[], Tensor | float]


class Start:
    """Where all programs of a case start, and the losses that must come of it.

    Attributes:
        images, labels: a batch of random normal images on the device, in both memory formats, [B, 3, H, W] and [B].
        states: initial weights on the CPU, by the names of `PublishedFFSD.networks`.
        losses: of two steps of the published program, all terms.
        cross_entropies: the part of the first that plain training of the same networks has.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.images = torch.randn(case.batch_size, 3, case.image_size, case.image_size).to(case.device)
        self.channels_last = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(case.classes, (case.batch_size,)).to(case.device)
        baseline = PublishedFFSD(case.model, students=case.students, num_classes=case.classes, lr=LR)
        self.states = {
            name: {key: value.clone() for key, value in network.state_dict().items()}
            for name, network in baseline.networks.items()
        }
        baseline = self.published(case, amp=False)
        terms = [baseline.step(self.images, self.labels, epoch=EPOCH) for _ in range(2)]
        self.losses = [_total(step) for step in terms]
        self.cross_entropies = sum(terms[0]["student_ce"]) + terms[0]["leader_ce"]

    def published(self, case: Case, *, amp: bool) -> PublishedFFSD:
        """The baseline before its first step."""
        settings = {"students": case.students, "num_classes": case.classes, "lr": LR, "device": case.device}
        baseline = PublishedFFSD(case.model, **settings, amp=amp)
        for name, state in self.states.items():
            baseline.networks[name].load_state_dict(state)
        return baseline

    def load(self, method: Method) -> None:
        """Give the same weights to FFSD, or to independent networks: the students and, as the last one, the leader."""
        students = len(method.peers) - 1
        for i in range(students):
            method.peers[i].load_state_dict(self.states[f"student{i}"])
        leader = self.states["leader"]
        method.peers[-1].load_state_dict({key: leader[key] for key in leader if not key.startswith("trans_fusion.")})
        if method.name != "ffsd":
            return
        trans_fusion = {key.removeprefix("trans_fusion."): leader[key] for key in leader if key.startswith("trans_")}
        method.criterion.trans_fusion.load_state_dict(trans_fusion)
        method.criterion.fusion.load_state_dict(self.states["fusion"])
        for name, transform in method.criterion.transforms.items():
            own = "transform_leader" if name == "leader" else name.replace("student", "transform")
            transform.load_state_dict(self.states[own])


@dataclass(frozen=True)
class Prepared:
    """A program that computes the right losses and is ready to be timed.

    Attributes:
        step: see `Step`.
        form: mode and strategy as they came out, or None.
        ready_s: seconds from nothing to two steps done: building, compiling, capturing.
        peak_mb: memory of its own, see `benchmarks.memory`; "-" on a CPU.
    """

    step: Step
    form: Form | None
    ready_s: float
    peak_mb: Value


def prepare(program: Program, case: Case, start: Start) -> Prepared:
    """Build a program, run its first steps and hold their losses against the published program's.

    Raises:
        AssertionError: it computes something else; nothing is measured then.
        InputError: a strategy that these networks cannot take.
    """
    held = memory.held(case.device)
    step, form, losses, seconds = ready(lambda: build(program, case, start))
    low = program.kind == "published-amp"
    tolerance = AGREEMENT["bf16" if low else "off" if program.kind == "published" else case.amp]
    wanted = [start.cross_entropies] if program.kind == "networks-only" else start.losses
    # All replicas start alike here, and their losses are added.
    check(str(program), [loss / case.replicas for loss in losses], wanted, tolerance)
    return Prepared(step, form, seconds, memory.peak_mb(step, held, case.device))


def ready(make: Callable[[], tuple[Step, Form | None]]) -> tuple[Step, Form | None, list[float], float]:
    """What `make` gives, the losses of its first two steps, and the seconds that all this took."""
    began = time.perf_counter()
    step, form = make()
    losses = [float(step()) for _ in range(2)]
    return step, form, losses, time.perf_counter() - began


def check(
    name: str, losses: list[float], wanted: list[float], tolerance: float, source: str = "the published program"
) -> None:
    """Losses of the first steps against those of `source`; as many as there are wanted ones."""
    for number, (loss, right) in enumerate(zip(losses, wanted, strict=False), 1):
        if not math.isclose(loss, right, rel_tol=tolerance):
            raise AssertionError(f"{name} computes a loss of {loss} in step {number} where {source} has {right}")


def build(program: Program, case: Case, start: Start) -> tuple[Step, Form | None]:
    """A program before its first step, and the form that "auto" came to."""
    if program.kind.startswith("published"):
        amp = program.kind == "published-amp"
        baseline = start.published(case, amp=amp)
        images = start.channels_last if amp else start.images
        return lambda: _total(baseline.step(images, start.labels, epoch=EPOCH)), None
    form = program.form or Form("compiled", "loop")
    train_step, strategy = engine_step(program.kind, form, case, start)
    # The engine counts finished epochs, the published program the current one.
    progress = torch.tensor(float(EPOCH - 1), device=case.device)
    images, labels = start.channels_last, start.labels
    if case.replicas > 1:
        images = images.repeat(1, case.replicas, 1, 1).contiguous(memory_format=torch.channels_last)
        labels = labels.repeat(case.replicas, 1)

    def step() -> Tensor:
        return train_step(images, labels, progress).loss.detach()

    if program.kind == "compile":
        return _on_references(step), None
    made = Form(form.mode, strategy)
    return (Captured(step, train_step.tensors) if form.graphed else step), made


def engine_step(kind: str, form: Form, case: Case, start: Start) -> tuple[TrainStep, str]:
    """The engine's step of FFSD, or of the same networks without distillation, and its strategy."""
    name, networks = ("independent", case.students + 1) if kind == "networks-only" else ("ffsd", case.students)
    methods = [
        build_method(name, model=case.model, students=networks, num_classes=case.classes) for _ in range(case.replicas)
    ]
    for method in methods:
        start.load(method)
    replicas = [f"replica{r}" for r in range(case.replicas)]
    method = (methods[0] if case.replicas == 1 else Replicas(methods, replicas)).to(case.device).train()
    strategy = method.arrange(form.strategy)
    return TrainStep(method, build_optimizers(method, lr=LR), amp=case.amp, compiled=form.compiled), strategy


def _on_references(step: Step) -> Step:
    def call() -> Tensor | float:
        with _references():
            return step()

    return call


@contextmanager
def _references() -> Iterator[None]:
    """What FASTFUSE_BACKEND=reference does to a process, for a while."""
    before, _dispatch._process_default = _dispatch._process_default, "reference"
    try:
        yield
    finally:
        _dispatch._process_default = before


def _total(terms: Mapping[str, float | list[float]]) -> float:
    summed = [value for name, value in terms.items() if name.endswith("_total") or name.startswith("transform_")]
    return sum(sum(value) if isinstance(value, list) else value for value in summed)
