"""Which launch constants are faster: trial after trial, each proved right before it is timed. `tune.py` is the door."""

from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import KernelCase
from benchmarks.kernels import captured_on, copies_of, one_pass
from benchmarks.launch_space import Search
from benchmarks.timing import Timing, measure_in_turn
from fastfuse.kernels import _triton
from fastfuse.testing import assert_within_budget
from fastfuse.train.graph import beside

WORTH = 0.97  # of the time before: less is noise
REPEATS = 7
CALLS = 3

# By case: how long the launch takes with the constants so far, and with others.
Compared = dict[str, tuple[Timing, Timing]]


def descend(
    values: Mapping[str, Sequence[int]], compare: Callable[[dict[str, int], dict[str, int]], Compared | str]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The constants that win, without those that stay as written, and what was tried; the last one against the code's.

    Args:
        values: what to try, by constant.
        compare: times constants that were taken so far against others, or says why the others cannot be taken.
    """
    taken: dict[str, int] = {}
    tried = []
    for name, candidates in values.items():
        for value in candidates:
            trial = taken | {name: value}
            tried.append(_note(trial, compare(taken, trial)))
            if tried[-1]["taken"]:
                taken = trial
    if taken:  # each step was a comparison with the one before: the sum of them must stand as well
        tried.append(_note(taken, compare({}, taken)))
        taken = taken if tried[-1]["taken"] else {}
    return taken, tried


def _note(constants: dict[str, int], found: Compared | str) -> dict[str, Any]:
    """A trial, with microseconds before and after by case, or why it was refused."""
    if isinstance(found, str):
        return {"constants": constants, "refused": found, "taken": False}
    microseconds = {case: [timing.median * 1e3 for timing in pair] for case, pair in found.items()}
    return {"constants": constants, "microseconds": microseconds, "taken": wins(found)}


def wins(found: Compared) -> bool:
    """Whether the second of each pair of timings is worth the change."""
    ratios = {case: new.median / old.median for case, (old, new) in found.items()}
    deciding = {case: ratio for case, ratio in ratios.items() if case.startswith("imagenet")} or ratios
    clear = all(not old.overlaps(new) for case, (old, new) in found.items() if case in deciding)
    return geometric_mean(deciding.values()) < WORTH and clear and max(ratios.values()) < 1 / WORTH


class Bench:
    """One case of a search: its inputs, the truth about its results, and the budget of its errors."""

    def __init__(self, case: KernelCase, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.device = case, device
        self.copies = copies_of(case, dtype, device)
        inputs = self.copies[0]
        exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        with torch.no_grad():
            outputs = several(case.call(own(inputs), "reference"))
        self.cotangents = [torch.randn_like(x) for x in outputs]
        self.truth = self.results(exact, "reference")
        self.eager = self.results(inputs, "reference")

    def results(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        """Outputs and gradients; of running statistics, which a forward changes, each call has its own."""
        with beside(captured_on(self.device)):
            return self._results(own(inputs), backend)

    def _results(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        outputs = several(self.case.call(inputs, backend))
        wanted = [(y, g.to(y.dtype)) for y, g in zip(outputs, self.cotangents, strict=True) if y.requires_grad]
        sources = [x for x in inputs if x.requires_grad]
        if not wanted or not sources:
            return outputs
        found = torch.autograd.grad([y for y, _ in wanted], sources, [g for _, g in wanted], allow_unused=True)
        return [*(y.detach() for y in outputs), *(g for g in found if g is not None)]

    def check(self) -> None:
        """Hold the Triton kernels, as they are launched now, to the error budget.

        Raises:
            AssertionError: they compute something else, or leave memory unwritten.
        """
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives with NaN
        try:
            found = self.results(self.copies[0], "triton")
        finally:
            torch.use_deterministic_algorithms(False)
        for i, (ours, truth, eager) in enumerate(zip(found, self.truth, self.eager, strict=True)):
            assert_within_budget(ours, truth, eager, what=f"{self.case.shape}, result {i}")

    def ready(self, search: Search, constants: dict[str, int]) -> Callable[[], object]:
        """One pass of a launch with these constants."""
        with _triton.trying(search.launch, **constants):
            once = one_pass(lambda tensors: self.case.call(tensors, "triton"), self.copies, search.mode, self.device)

        def call() -> None:
            with _triton.trying(search.launch, **constants):  # a captured graph has them already
                once()

        return call


def own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of what a forward may change."""
    return [x if x.requires_grad or not x.is_floating_point() else x.clone() for x in tensors]


def several(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The results that there are."""
    return [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]


def tune(
    search: Search, kind: str, device: torch.device, *, batch: int | None = None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The constants that win for one launch, and the trials; see `descend`."""
    dtype, _, layout = kind.partition(" ")
    benches = [Bench(case, getattr(torch, dtype), device) for case in search.cases(layout, batch=batch)]

    def compare(taken: dict[str, int], trial: dict[str, int]) -> Compared | str:
        try:
            return {bench.case.shape: _compared(bench, search, taken, trial) for bench in benches}
        except AssertionError as error:
            return f"wrong: {error}"
        except Exception as error:  # a compiler may refuse a tile for many reasons: that ends a trial, not the search
            if device.type == "cuda":
                torch.cuda.synchronize()  # after a fault nothing runs any more: raises
            return f"{type(error).__name__}: {str(error)[:200]}"

    return descend(search.values, compare)


def _compared(bench: Bench, search: Search, taken: dict[str, int], trial: dict[str, int]) -> tuple[Timing, Timing]:
    with _triton.trying(search.launch, **trial):
        bench.check()
    calls = {"before": bench.ready(search, taken), "after": bench.ready(search, trial)}
    timings = measure_in_turn(calls, repeats=REPEATS, calls=CALLS, warmup=2, device=bench.device)
    return timings["before"], timings["after"]
