"""Modes of several processes: steps that a stand-in for CUDA graphs replays, and compiled ones, are eager steps."""

import functools
from contextlib import contextmanager

import pytest
import torch

from fastfuse.errors import FastfuseError
from fastfuse.train import modes
from fastfuse.train.checkpoint import load
from fastfuse.train.distributed import current
from fastfuse.train.engine import Engine
from fastfuse.train.graph import WARM_UP_CALLS_TOGETHER
from fastfuse.train.step import TrainStep
from tests.train.conftest import Run
from tests.train.engines import make, run_epoch, state_of
from tests.train.ranks import together
from tests.train.recorded import WAITS, Seen
from tests.train.test_distributed import agree, trained
from tests.train.test_distributed_runs import in_processes, losses_agree, same_bits, torchrun

FORMS = {
    "own statistics": {},
    "synchronised": {"sync_batchnorm": True},
    "two forwards": {"accumulate": 2},
    "loss scaling and averaged weights": {"amp": "fp16", "ema": 0.9, "skip_bad": True},
}
SHORT = [("ffl", "own statistics"), ("independent", "loss scaling and averaged weights")]
# A graph of each kind: stacked transforms, halves of a batch with a second optimizer, frozen teachers, connectors.
LONG = [("ffl", "two forwards")]
LONG += [(name, "synchronised") for name in ("ffsd", "dfa-search", "ft", "feed-sequential")]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]


def two_epochs(name, **options):
    """The state after two epochs, and the engine."""
    engine = make(name, processes=current(), **options)
    for epoch in range(2):
        run_epoch(engine, epoch)
    return state_of(engine), engine


@pytest.mark.parametrize(("name", "form"), CASES)
def test_replayed_steps_of_two_processes_are_their_eager_steps(name, form, recorded_graphs):
    def own():
        calls, take = [], TrainStep.__call__

        def step(self, *arguments):
            calls.append(1)
            return take(self, *arguments)

        TrainStep.__call__ = step  # in a forked process: nobody else sees it
        replayed, engine = two_epochs(name, graphed=True, **FORMS[form])
        assert [graph.replays for graph in recorded_graphs] == [4, 2]  # batches of four, and the last one of three
        assert len(calls) == 2 * (WARM_UP_CALLS_TOGETHER + 1) + 6
        engine.close()
        assert engine._graphs == {}
        return replayed, two_epochs(name, **FORMS[form])[0]

    for replayed, eager in together(2, own):
        assert same_bits(replayed, eager)


@pytest.mark.long
def test_processes_that_stand_in_replay_too(recorded_graphs):
    # Steps of two images and, the last one, of one: one process, then two of them only stand in.
    def own():
        return [two_epochs("ffl", graphed=graphed, batch=2, sync_batchnorm=True)[0] for graphed in (True, False)]

    for replayed, eager in together(3, own):
        assert same_bits(replayed, eager)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_read_on_the_host_and_nothing_moves(form):
    """Buckets are arranged anew in the second step alone, as all agree by a broadcast; the others stay as they are."""

    def own():
        engine = make("ffl", processes=current(), **FORMS[form])
        waited, addresses, names = [], [], []
        for epoch in range(2):
            engine.start_epoch(seed=0, epoch=epoch, step=0, factors=[1.0] * 3)
            for step in range(3):
                with Seen() as seen:
                    engine.run(step)
                waited.append(seen.names & WAITS)
                names.append(seen.names)
                addresses.append([x.data_ptr() for x in engine.tensors()])
        assert {"_fused_sgd_", "allreduce_"} <= seen.names
        return waited, addresses, ["broadcast_" in found for found in names]

    for waited, addresses, agreed in together(2, own):
        assert waited == [set()] * 6
        assert all(found == addresses[0] for found in addresses)
        if form == "synchronised":  # else buffers are broadcast in every step
            assert agreed == [False, True, False, False, False, False]


def one_fails(monkeypatch, graphs, *, at):
    """The capture of a number fails in the second process, as a real one does: at its end."""
    capture = torch.cuda.graph

    @contextmanager
    def graph(*given, **form):
        with capture(*given, **form):
            yield
        if current().share.rank == 1 and len(graphs) == at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", graph)


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.long), 2], ids=["first", "second"])
def test_where_one_cannot_capture_all_go_on_without(at, recorded_graphs, monkeypatch, caplog):
    def own():
        one_fails(monkeypatch, recorded_graphs, at=at)
        engine = make("independent", processes=current(), graphed=True)
        engine.fall_back = True
        for epoch in range(2):
            run_epoch(engine, epoch)
        assert not engine.graphed and engine._graphs == {}
        return state_of(engine), two_epochs("independent")[0], caplog.messages

    found = together(2, own)
    for fallen_back, eager, _ in found:
        assert same_bits(fallen_back, eager)
    said = [messages for *_, messages in found]
    assert [len(messages) for messages in said] == [1, 1]
    assert "(in another process)" in said[0][0] and "(operation not permitted" in said[1][0]


@pytest.mark.parametrize("at", [1, pytest.param(2, marks=pytest.mark.long)], ids=["first", "second"])
def test_where_one_cannot_capture_all_end(at, recorded_graphs, monkeypatch):
    def own():
        one_fails(monkeypatch, recorded_graphs, at=at)
        try:
            run_epoch(make("independent", processes=current(), graphed=True))
        except (RuntimeError, FastfuseError) as error:
            return type(error).__name__, str(error)

    (kind, said), (its_kind, its_message) = together(2, own)
    assert kind == "FastfuseError" and "--mode eager" in said
    assert its_kind == "RuntimeError" and "not permitted" in its_message


def test_loss_scaling_skips_alike():
    """An infinity of one process is one of the mean: nobody takes that step, and all halve their scales."""

    def own():
        engine = make("independent", processes=current(), amp="fp16", skip_bad=True, sync_batchnorm=True)
        step, scales, bad = engine.step, [], []
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 8.0})
        backward = step._backward
        engine.start_epoch(seed=0, epoch=0, step=0, factors=[1.0] * 3)
        weights = []
        for number in range(3):
            worse = float("inf") if number == 1 and current().share.rank == 1 else 1.0
            step._backward = lambda *given, worse=worse: backward(*given[:-1], given[-1] * worse)
            engine.run(number)
            scales.append(step.scaler.get_scale())
            bad.append(float(step.optimizers.bad))
            weights.append({name: p.detach().clone() for name, p in step.method.named_parameters()})
        return scales, [x > 0 for x in bad], weights

    first, second = together(2, own)
    for scales, bad, weights in (first, second):
        assert bad == [False, True, False] and scales == [8.0, 4.0, 4.0]
        assert same_bits(weights[0], weights[1])
        assert not any(torch.equal(weights[1][name], x) for name, x in weights[2].items() if x.dim() > 1)
    assert all(same_bits(*pair) for pair in zip(first[2], second[2], strict=True))


@pytest.mark.long
def test_a_run_in_graphs_is_interrupted_and_resumed_to_the_same_bits(recorded_graphs, tiny, tmp_path, monkeypatch):
    """All of a run but CUDA itself: warm-up, evaluations between replays, a checkpoint, and graphs that go in time."""
    options = ("--method", "ffl", "--sync-batchnorm", "--lr", "0.01", "--batch-size", 25)
    in_processes(2, tiny, tmp_path / "eager", *options)
    monkeypatch.setattr(modes, "pick_mode", lambda *given, **form: "graphed")
    closed = tmp_path / "closed"
    closed.mkdir()
    close = Engine.close

    def closing(self):
        assert self._graphs
        close(self)
        (closed / f"{self.step.share.rank} of run {len(list(tmp_path.glob('graphed/summary.json')))}").touch()

    monkeypatch.setattr(Engine, "close", closing)
    begun = in_processes(2, tiny, tmp_path / "graphed", *options, "--max-time", 0.0001)
    assert begun[0]["completed"] is False and len(list(closed.iterdir())) >= 2
    ended = in_processes(2, tiny, tmp_path / "graphed", *options, "--resume")
    assert ended[0]["completed"] and ended[0]["mode"] == "graphed"
    states = [load(tmp_path / run / "checkpoint.pt")["method"] for run in ("graphed", "eager")]
    assert same_bits(*states)


@pytest.fixture
def traced(monkeypatch):
    """Traced forward and backward without a break, without the minutes that a compiler takes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


COMPILED = {
    "one forward": {},
    "two forwards": {"accumulate": 2},
    "processes that stand in": {"batch": 2},
    "loss scaling": {"amp": "fp16", "skip_bad": True},
}


@pytest.mark.parametrize(
    "form", ["one forward", *(pytest.param(x, marks=pytest.mark.long) for x in list(COMPILED)[1:])]
)
def test_compiled_steps_of_several_processes_are_their_eager_steps(form, traced):
    # Batches of four and three: the second process has a smaller last one, and compiles while the first one waits.
    def own():
        form_of_both = {"students": 1, **COMPILED[form]}
        compiled, engine = two_epochs("independent", compiled=True, **form_of_both)
        assert isinstance(engine.step._forward.module, torch._dynamo.OptimizedModule)
        return compiled, two_epochs("independent", **form_of_both)[0]

    count = 3 if form == "processes that stand in" else 2
    for compiled, eager in together(count, own):
        agree(compiled, eager, 1e-2 if form == "loss scaling" else 1e-5)


@pytest.mark.long
def test_compiled_processes_take_the_steps_of_one(traced):
    truth = trained("ffl", frozen=True, steps=4)
    for ours in together(2, lambda: trained("ffl", frozen=True, steps=4, compiled=True)):
        agree(ours, truth)


@pytest.mark.long
def test_compiled_gradients_of_several_buckets_are_the_eager_ones(traced, monkeypatch):
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20_000)

    def own():
        found = []
        for compiled in (True, False):
            engine = make("ffsd", processes=current(), compiled=compiled)
            engine.start_epoch(seed=0, epoch=0, step=0, factors=[1.0] * 3)
            engine.run(0)
            found.append({name: p.grad for name, p in engine.step.method.named_parameters() if p.grad is not None})
        return found

    for compiled, eager in together(2, own):
        agree(compiled, eager, 1e-3)


@pytest.mark.long
def test_torchrun_compiles(tiny, tmp_path):
    options = ("--method", "independent", "--students", 1, "--epochs", 1)
    in_processes(2, tiny, tmp_path / "eager", *options)
    done = torchrun(*tiny, *options, "--mode", "compiled", "--out", tmp_path / "compiled")
    assert done.returncode == 0, done.stderr
    losses_agree(Run(tmp_path / "compiled"), Run(tmp_path / "eager"), 1e-4)
    assert Run(tmp_path / "compiled").summary["mode"] == "compiled"
