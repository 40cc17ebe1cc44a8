"""The whole step on the device: what it may touch, where its state lies, and that every mode trains the same."""

import copy
import functools
import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.autograd.function import BackwardCFunction

from fastfuse import data
from fastfuse.methods import METHODS, build_method
from fastfuse.train.evaluate import Evaluator
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.methods import making
from tests.train.engines import BATCH, COUNT, make, run_epoch
from tests.train.recorded import WAITS, Recorded, Seen

FORMS = {
    "float32": {},
    "bfloat16, clipped and guarded": {"amp": "bf16", "clip_norm": 1.0, "skip_bad": True},
    "loss scaling and averaged weights": {"amp": "fp16", "ema": 0.9, "skip_bad": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", making.EVERY)
def test_no_step_reads_a_value_on_the_host(name: str, form: str) -> None:
    engine = make(name, **FORMS[form])
    engine.start_epoch(seed=0, epoch=3, step=0, factors=[1.0] * 3)
    for step in range(3):
        with Seen() as seen:
            engine.run(step)
        assert seen.names & WAITS == set(), f"step {step}"
        assert "_fused_sgd_" in seen.names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", making.EVERY)
def test_nothing_that_lives_on_moves(name: str, form: str) -> None:
    engine = make(name, **FORMS[form])
    addresses = [[x.data_ptr() for x in engine.tensors()]]
    run_epoch(engine, after_step=lambda: addresses.append([x.data_ptr() for x in engine.tensors()]))
    run_epoch(engine, 1, after_step=lambda: addresses.append([x.data_ptr() for x in engine.tensors()]))
    assert len(addresses) == 7 and all(found == addresses[0] for found in addresses)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_all_that_a_step_changes(name: str, form: str) -> None:
    """What `tensors` leaves out would not be put back after a capture's warm-up: the same state gives the same step."""
    engine = make(name, **FORMS[form])
    engine.start_epoch(seed=0, epoch=3, step=0, factors=[1.0] * 3)
    engine.run(0)
    before = [x.detach().clone() for x in engine.tensors()]
    engine.run(1)
    after = [x.detach().clone() for x in engine.tensors()]
    with torch.no_grad():
        for x, saved in zip(engine.tensors(), before, strict=True):
            x.copy_(saved)
    engine.run(1)
    assert all(torch.equal(x, wanted) for x, wanted in zip(engine.tensors(), after, strict=True))
    assert not all(torch.equal(x, wanted) for x, wanted in zip(engine.tensors(), before, strict=True))


@pytest.mark.parametrize("name", ["ffsd", "ffl", "ffcl"])
def test_no_part_of_a_step_s_graph_outlives_it(name: str) -> None:
    """What adds up a gradient belongs to the stream that it was made on: a capture must make its own."""
    engine = make(name, amp="bf16", strategy="loop" if name == "ffl" else "grouped")
    engine.start_epoch(seed=0, epoch=3, step=0, factors=[1.0] * 3)
    gc.collect()
    gc.disable()  # a cycle would only go sometime
    try:
        before = {id(x) for x in gc.get_objects()}  # with what an earlier test has left
        engine.run(0)
        left = [x for x in gc.get_objects() if issubclass(type(x), BackwardCFunction) and id(x) not in before]
        assert left == []
    finally:
        gc.enable()


@pytest.mark.parametrize("name", METHODS)
def test_state_made_beforehand_changes_no_update(name: str) -> None:
    """The first step of optimizers that make their state themselves is the recorded program's."""
    torch.manual_seed(0)
    method = making.make(name, num_classes=5)
    early, late = (copy.deepcopy(method).to(memory_format=torch.channels_last) for _ in range(2))
    prepared, fresh = build_optimizers(early), build_optimizers(late)
    prepared.create_state()
    assert all(not x.any() for x in prepared.tensors()[1:])
    for _ in range(3):
        for parameters, optimizers in ((early.parameters(), prepared), (late.parameters(), fresh)):
            generator = torch.Generator().manual_seed(1)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).to(memory_format=torch.preserve_format)
            optimizers.step()
    for ours, theirs in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_rates_follow_the_table_and_keep_their_memory() -> None:
    engine = make("ffsd")
    seen = []
    address = engine.step.optimizers.rates.data_ptr()
    run_epoch(engine, after_step=lambda: seen.append(engine.step.optimizers.rates.clone()))
    initial = engine.step.optimizers.initial
    assert torch.equal(torch.stack(seen), initial * torch.tensor([1.0, 0.5, 0.25])[:, None])
    groups = [g for optimizer in engine.step.optimizers.optimizers for g in optimizer.param_groups]
    assert groups[0]["lr"].data_ptr() == address
    assert [float(g["lr"]) for g in groups] == engine.step.optimizers.rates.tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_warming_up_and_replaying_a_graph_is_training(name: str, form: str, recorded_graphs: list[Recorded]) -> None:
    """Everything of the graphed mode but CUDA itself: warm-up leaves no trace, a last smaller batch has its graph."""
    graphed, eager = make(name, graphed=True, **FORMS[form]), make(name, **FORMS[form])
    for epoch in range(2):
        run_epoch(graphed, epoch)
        run_epoch(eager, epoch)
    assert [graph.replays for graph in recorded_graphs] == [4, 2]  # batches of four, and the last one of three
    for ours, theirs in zip(graphed.tensors(), eager.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    for engine in (graphed, eager):
        engine.terms.flush()
    shown = COUNT - COUNT % graphed.batches.parts
    assert graphed.terms.sums == eager.terms.sums and graphed.terms.images == 2 * shown


@pytest.mark.parametrize("fall_back", [True, False], ids=["auto", "asked for"])
def test_a_capture_that_fails_ends_the_run_only_if_it_was_asked_for(fall_back, recorded_graphs, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphed, eager = make("dml", graphed=True), make("dml")
    graphed.fall_back = fall_back
    monkeypatch.setattr(torch.cuda, "graph", fail)
    if not fall_back:
        with pytest.raises(RuntimeError, match="not permitted"):
            run_epoch(graphed)
        return
    run_epoch(graphed)
    run_epoch(eager)
    assert not graphed.graphed and caplog.messages == [
        "training goes on without CUDA graphs: a capture failed (operation not permitted when stream is capturing)"
    ]
    for ours, theirs in zip(graphed.tensors(), eager.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_capture_cut_short_says_why_and_the_run_goes_on(recorded_graphs, monkeypatch, caplog):
    """The optimizer refuses half-way through an update with loss scaling, and the capture can then not be ended."""
    graphed, eager = (make("ffsd", graphed=g, amp="fp16", clip_norm=1.0) for g in (True, False))
    graphed.fall_back = True
    graphed.step.optimizers.optimizers[1].param_groups[0]["capturable"] = False

    ending = torch.cuda.graph

    @contextmanager
    def unending(*arguments: object, **options: object):
        try:
            with ending(*arguments, **options):
                yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", unending)
    run_epoch(graphed)
    run_epoch(eager)
    assert "capturable is False" in caplog.text and "previous error" not in caplog.text
    for ours, theirs in zip(graphed.tensors(), eager.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_evaluation_replayed_counts_the_same(recorded_graphs: list[Recorded]) -> None:
    found = []
    for graphed in (False, True):
        engine = make("ffsd")
        split = engine.batches.dataset
        batches = data.EvaluationBatches(split.test, mean=split.mean, std=split.std, batch_size=BATCH)
        evaluator = Evaluator(engine.step.method, batches, nullcontext, graphed=graphed)
        run_epoch(engine)
        found.append([evaluator(), evaluator()])
        assert engine.step.method.training
    assert found[0] == found[1] and found[0][0] == found[0][1]
    assert [graph.replays for graph in recorded_graphs] == [4, 2]


def test_graphs_go_with_who_replays_them(recorded_graphs: list[Recorded]) -> None:
    """Not when the garbage collector comes: until then they hold a GPU's memory."""
    engine = make("independent", graphed=True)
    run_epoch(engine)
    source = engine.batches.dataset
    batches = data.EvaluationBatches(source.test, mean=source.mean, std=source.std, batch_size=BATCH)
    evaluator = Evaluator(engine.step.method, batches, nullcontext, graphed=True)
    evaluator()
    held = [weakref.ref(graphs) for own in (engine, evaluator) for graphs in own._graphs.values()]
    gc.disable()
    try:
        del engine, evaluator
        assert len(held) == 4 and not any(graph() for graph in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["independent", "ffl"])
def test_a_method_compiles_as_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced forward and backward without a break, without the minutes that a compiler takes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    traced, eager = make(name, compiled=True), make(name)
    run_epoch(traced)
    run_epoch(eager)
    pairs = zip(traced.tensors(), eager.tensors(), strict=True)
    worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert worst < 1e-5


@pytest.mark.long
def test_many_runs_compile_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own limit is eight for the code that all of them share, and networks of other classes count."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    losses = []
    for classes in range(2, 12):
        method = build_method("independent", model="resnet8", students=1, num_classes=classes).train()
        step = TrainStep(method, build_optimizers(method), compiled=True)
        losses.append(step(torch.randn(4, 3, 8, 8), torch.arange(4) % 2, torch.tensor(0.0)).loss)
    assert torch.stack(losses).isfinite().all()
