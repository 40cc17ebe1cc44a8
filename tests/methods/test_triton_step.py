"""Whole steps of the methods on the Triton kernels, in the interpreter, against the recordings' float64 run."""

import pytest
import torch

from fastfuse.methods import METHODS
from fastfuse.testing import assert_within_budget
from tests.kernels.watched_memory import watched_memory
from tests.methods import making
from tests.nn.stacking import untidy
from tests.replay import replay_stepwise, step_in_float32


@pytest.mark.long
@pytest.mark.parametrize(("name", "steps"), [("ffsd_resnet20_s2", 1), ("ffl_resnet20", 2)])
def test_every_term_and_gradient_is_within_the_error_budget(golden, name, steps):
    used = replay_stepwise(golden / f"{name}.npz", golden / f"{name}.json", "triton", steps)
    assert len(used) > 100
    over = {what: found for what, found in used.items() if found[0] > 1}
    assert not over


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("ffsd", "ffl")])
def test_every_method_runs_on_the_kernels(name):
    """One forward and backward on Triton alone, beside the eager reference, against float64."""
    torch.manual_seed(0)
    exact = untidy(making.make(name, num_classes=5)).train()
    images, labels = torch.randn(6, 3, 12, 12, dtype=torch.float64), torch.arange(6) % 5
    progress = torch.tensor(30.0, dtype=torch.float64)
    with watched_memory() as watch:
        ours = step_in_float32(exact, (images, labels), progress, "triton")
    assert watch.launches or name == "paraphraser", "no kernel ran"
    eager = step_in_float32(exact, (images, labels), progress, "reference")
    output = exact(images, labels, progress)
    output.loss.backward()
    truth = (output.terms, {key: p.grad for key, p in exact.named_parameters()})
    for part, a, e, t in zip(("terms", "gradients"), ours, eager, truth, strict=True):
        rows = [torch.cat([found[key].flatten() for key in t]) for found in (a, t, e)]
        assert_within_budget(*rows, what=f"{name}: {part}")
