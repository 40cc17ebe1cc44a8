"""Every method in every mode and strategy: the same training, or a reason why not."""

import functools

import pytest
import torch

from fastfuse.methods import METHODS
from fastfuse.nn import STRATEGIES
from fastfuse.train.checkpoint import load
from tests.losses.batches import differing
from tests.methods import making
from tests.train.engines import agree_over_20_steps, make

MODES = ("eager", "compiled", "graphed")
NO_GPU = "needs a CUDA device: tests/train/test_cuda.py"
ONE_NETWORK = "a single student: grouped is the loop, as its eager row shows, and compiled it has the loop's row"
NO_NETWORKS_SIDE_BY_SIDE = "its networks are parts of one another: it refuses other strategies and says why"


def why_not(method: str, mode: str, strategy: str) -> str | None:
    """Why a combination is not trained on a CPU; None where it is."""
    if method in making.LOOP_ONLY and strategy != "loop":
        return NO_NETWORKS_SIDE_BY_SIDE
    if METHODS[method].maximum_students == 1 and strategy == "grouped" and mode == "compiled":
        return ONE_NETWORK
    return NO_GPU if mode == "graphed" or strategy == "branches" else None


TRAINED = [row for row in ((m, o, s) for m in METHODS for o in MODES for s in STRATEGIES) if why_not(*row) is None]


def test_every_combination_has_a_row():
    # Two modes of two strategies, of the loop alone, or of both but compiled groups of one.
    single = [name for name in making.SIDE_BY_SIDE if METHODS[name].maximum_students == 1]
    assert len(TRAINED) == 4 * len(making.SIDE_BY_SIDE) + 2 * len(making.LOOP_ONLY) - len(single)
    assert set(making.SIDE_BY_SIDE) | set(making.LOOP_ONLY) == set(METHODS)


# Compiled to machine code. Of the others the compiler traces and differentiates the whole step as well, and runs it
# operator by operator: generating the code of all takes a quarter of an hour, and it would be of the same operators.
GENERATED = {("ffsd", "loop"), ("ffsd", "grouped"), ("ffl", "loop"), ("ffcl", "loop"), ("dml", "loop")}
GENERATED |= {("feed-parallel", "loop"), ("dfa", "loop"), ("kd", "loop")}


def check(method: str, mode: str, strategy: str) -> None:
    other = make(method, strategy=strategy, compiled=mode == "compiled")
    agree_over_20_steps(make(method), other, f"{mode}, {strategy}")


GROUPED = [m for m, mode, strategy in TRAINED if (mode, strategy) == ("eager", "grouped")]


@pytest.mark.parametrize("method", [*GROUPED, *(pytest.param(m, marks=pytest.mark.long) for m in making.VARIANTS)])
def test_grouped_steps_are_the_steps_of_the_loop(method):
    check(method, "eager", "grouped")


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "mode", "strategy"),
    [*(row for row in TRAINED if row[1] == "compiled"), *((m, "compiled", "loop") for m in making.VARIANTS)],
)
def test_compiled_steps_are_eager_steps(method, mode, strategy, monkeypatch):
    if (method, strategy) not in GENERATED:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check(method, mode, strategy)


def test_a_run_goes_on_in_another_strategy(train):
    """Checkpoints hold networks that stand alone, with the momentum of each."""
    begun = train("--strategy", "grouped", "--max-time", "0.0001")
    assert begun.config["strategy"] == "grouped" and not begun.summary["completed"]
    ended = train("--strategy", "loop", "--resume")
    whole = train(out="whole")
    assert ended.summary["completed"] and whole.config["strategy"] == "auto"
    ours, theirs = load(ended.path / "checkpoint.pt"), load(whole.path / "checkpoint.pt")
    assert ours["method"].keys() == theirs["method"].keys()
    assert differing(ours["method"], theirs["method"], 1e-4) == {}
    momenta = [{name: own["momentum_buffer"] for name, own in x["optimizers"][0].items()} for x in (ours, theirs)]
    assert differing(*momenta, 1e-3) == {}
    assert (ended.path / "leader.safetensors").exists()


@pytest.mark.parametrize("strategy", ["grouped", "branches"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_there_is_refused_by_name(refused, method, strategy):
    reason = why_not(method, "eager", strategy)
    if reason is None:
        return
    message = refused("--method", method, "--strategy", strategy)
    assert strategy in message and "--strategy loop" in message
