"""What only a GPU can show of the trainer."""

import copy
from contextlib import closing, contextmanager, nullcontext

import pytest
import torch
from torch import distributed

from fastfuse import data
from fastfuse.config import TrainConfig
from fastfuse.methods import METHODS
from fastfuse.nn import STRATEGIES
from fastfuse.train import checkpoint
from fastfuse.train.distributed import Processes
from fastfuse.train.evaluate import Evaluator
from fastfuse.train.modes import float32_products
from fastfuse.train.optim import build_optimizers
from fastfuse.train.run import train
from fastfuse.train.step import TrainStep
from tests.data import jpegs
from tests.methods import making
from tests.train.engines import BATCH, agree_over_20_steps, make, run_epoch, state_of

pytestmark = pytest.mark.gpu

ROWS = [(n, s) for n in METHODS for s in STRATEGIES if s == "loop" or n in making.SIDE_BY_SIDE]
ROWS += [(n, s) for n in making.VARIANTS for s in STRATEGIES]


@pytest.fixture(autouse=True)
def exact_products():
    # Not with monkeypatch, which deletes what an object finds by __getattr__ alone when it undoes.
    with float32_products(tf32=False):
        yield


@contextmanager
def waiting_refused():
    """A block in which PyTorch raises wherever the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graphed"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name", making.EVERY)
def test_a_step_waits_for_nothing(name, amp, graphed):
    engine = make(name, amp=amp, ema=0.9, graphed=graphed, device="cuda")
    run_epoch(engine)  # compiles kernels, captures graphs
    engine.start_epoch(seed=0, epoch=1, step=0, factors=[1.0] * 3)
    with waiting_refused():
        for step in range(3):
            engine.run(step)
    assert all(torch.isfinite(x).all() for x in state_of(engine).values() if amp != "fp16")


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graphed"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_guards_wait_for_nothing_and_skip_in_a_graph_too(amp, graphed):
    engine = make("ffsd", amp=amp, graphed=graphed, device="cuda", clip_norm=1.0, skip_bad=True)
    run_epoch(engine)
    engine.start_epoch(seed=0, epoch=1, step=0, factors=[1.0] * 3)
    weight = next(engine.step.method.parameters())
    with waiting_refused():
        engine.run(0)
    with torch.no_grad():
        kept = weight.clone()
        weight[0, 0, 0, 0] = float("nan")
    before = {name: x for name, x in state_of(engine).items() if name.startswith(("peers", "0/peers"))}
    engine.run(1)
    assert engine.step.optimizers.bad > 0
    after = state_of(engine)
    trained = [name for name in before if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert [name for name in trained if not torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7))] == []
    assert torch.equal(weight[1:], kept[1:])


@pytest.mark.parametrize(("name", "strategy"), ROWS)
def test_graphed_steps_are_eager_steps(name, strategy):
    other = make(name, strategy=strategy, graphed=True, device="cuda")
    agree_over_20_steps(make(name, device="cuda"), other, f"graphed, {strategy}")


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
def test_compiled_steps_in_a_graph_are_eager_steps(strategy):
    other = make("ffsd", strategy=strategy, graphed=True, compiled=True, device="cuda")
    agree_over_20_steps(make("ffsd", device="cuda"), other, f"graphed-compiled, {strategy}")


class OneOfSeveral(Processes):
    """A group of one process that is treated as several: everything of several GPUs but the second one."""

    @property
    def count(self):
        return 2


@pytest.fixture
def group(tmp_path, monkeypatch):
    """One process that talks to itself through NCCL on its GPU and through gloo on the host, as torchrun's do."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks up the host's name
    torch.cuda.set_device(0)
    place = {"init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
    distributed.init_process_group("cpu:gloo,cuda:nccl", **place)
    yield OneOfSeveral()
    distributed.destroy_process_group()


@pytest.mark.parametrize("form", ["own statistics", "synchronised", "compiled"])
def test_graphed_steps_with_collectives_are_eager_steps(form, group):
    """Buckets, all-reduces, broadcasts of buffers and gathered statistics in a graph; it goes before the group."""
    # Synchronised norms are other code: it is their graph that is looked at here.
    norms = {"sync_batchnorm": True, "processes": group} if form == "synchronised" else {}
    eager = make("ffsd", device="cuda", **norms)
    form_of_other = {"processes": group, "compiled": form == "compiled", **norms}
    with closing(make("ffsd", graphed=True, device="cuda", **form_of_other)) as other:
        assert isinstance(other.step._forward, torch.nn.parallel.DistributedDataParallel)
        agree_over_20_steps(eager, other, f"graphed with collectives, {form}")
        assert other.graphed and len(other._graphs) == 2


@pytest.mark.parametrize("form", [{}, {"accumulate": 2}, {"amp": "fp16", "ema": 0.9, "skip_bad": True}])
def test_graphed_steps_with_collectives_wait_for_nothing(form, group):
    with closing(make("ffl", graphed=True, device="cuda", processes=group, **form)) as engine:
        run_epoch(engine)  # captures graphs
        engine.start_epoch(seed=0, epoch=1, step=0, factors=[1.0] * 3)
        group.as_leader(list(engine.step.method.buffers()))  # as between two epochs: a collective outside of all graphs
        with waiting_refused():
            for step in range(3):
                engine.run(step)
        assert engine.graphed and len(engine._graphs) == 2
        assert all(torch.isfinite(x).all() for x in state_of(engine).values() if "amp" not in form)


@pytest.fixture
def same_sums():
    """Gradients of convolutions that two runs sum alike."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("form", [{}, {"amp": "bf16"}, {"amp": "fp16", "ema": 0.9}], ids=["off", "bf16", "fp16 ema"])
def test_warming_up_leaves_no_trace(form, same_sums):
    """A capture's warm-up steps are undone: one replayed step is the first step."""
    graphed, eager = (make("ffsd", graphed=g, device="cuda", **form) for g in (True, False))
    for engine in (graphed, eager):
        engine.start_epoch(seed=0, epoch=0, step=0, factors=[1.0] * 3)
        engine.run(0)
    assert int(graphed.batches.step) == int(eager.batches.step) == 1
    ours, theirs = state_of(graphed), state_of(eager)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name].float(), value.float(), rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_an_evaluation_replayed_counts_the_same():
    engine = make("ffsd", device="cuda")
    run_epoch(engine)
    source = engine.batches.dataset
    found = []
    for graphed in (False, True):
        batches = data.EvaluationBatches(source.test, mean=source.mean, std=source.std, batch_size=BATCH)
        evaluator = Evaluator(engine.step.method, batches, nullcontext, graphed=graphed)
        found += [evaluator(), evaluator()]
    assert all(accuracy == found[0] for accuracy in found)


@pytest.mark.parametrize("name", making.EVERY)
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(name):
    torch.manual_seed(0)
    on_cpu = making.make(name, num_classes=10)
    on_gpu = copy.deepcopy(on_cpu)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    cpu_step = TrainStep(on_cpu, build_optimizers(on_cpu))
    gpu_step = TrainStep(on_gpu.cuda(), build_optimizers(on_gpu))
    ours = gpu_step(images.cuda(), labels.cuda(), torch.tensor(3.0, device="cuda"))
    theirs = cpu_step(images, labels, torch.tensor(3.0))
    assert ours.terms.keys() == theirs.terms.keys()
    for term, value in theirs.terms.items():
        torch.testing.assert_close(
            ours.terms[term].cpu(), value, rtol=1e-3, atol=1e-6, msg=lambda m, t=term: f"{t}: {m}"
        )


RUNS = {
    "ffsd": {"method": "ffsd"},
    "ffl, eager, bf16": {"method": "ffl", "amp": "bf16", "mode": "eager"},
    "dml, fp16, averaged weights": {"method": "dml", "amp": "fp16", "ema": 0.9},
    "ffsd in branches": {"method": "ffsd", "strategy": "branches"},
    "two replicas in one network": {"method": "ffsd", "strategy": "grouped", "replicas": 2},
    "ffsd, clipped, bad steps left out": {"method": "ffsd", "clip_norm": 1.0, "max_bad_steps": 2},
}


@pytest.mark.parametrize("form", RUNS)
def test_a_run_on_the_gpu_ends_and_resumes(tiny_npz, tmp_path, form):
    """Without the command line, whose parser a GPU machine may lack."""
    options = {
        "data": "npz",
        "data_path": tiny_npz,
        "crop_padding": 1,
        "model": "resnet8",
        "batch_size": 24,
        "lr": 0.02,
    }
    options |= {"epochs": 3, "device": "cuda", "quiet": True, "out": tmp_path / "run", **RUNS[form]}
    begun = train(TrainConfig(**options, max_time=0.0001))
    assert begun["completed"] is False
    ended = train(TrainConfig(**options, resume=True))
    assert ended["completed"] and ended["epochs"] == 3
    assert ended["mode"] == ("eager" if "eager" in form else "graphed")


def test_deterministic_runs_are_the_same_to_the_bit(tiny_npz, tmp_path):
    options = {"method": "ffsd", "data": "npz", "data_path": tiny_npz, "crop_padding": 1, "model": "resnet8"}
    options |= {"batch_size": 24, "epochs": 2, "device": "cuda", "quiet": True, "deterministic": True}
    for name in ("first", "second"):
        train(TrainConfig(**options, out=tmp_path / name))
    first, second = (checkpoint.load(tmp_path / name / "checkpoint.pt")["method"] for name in ("first", "second"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_streamed_images_are_those_of_a_cpu_and_train_in_a_graph(tmp_path):
    """Page-locked memory, a stream of its own, and a capture beside the thread that page-locks."""
    counts = {f"{split}/{name}": 20 if split == "train" else 4 for split in ("train", "val") for name in "ab"}
    folder = jpegs.write(tmp_path / "images", counts)
    drawn = []
    for device in ("cpu", "cuda"):
        dataset = data.load("imagenet", root=folder, image_size=16, workers=1).to(device)
        batches = data.training_batches(dataset, batch_size=8)
        batches.start(seed=0, epoch=1)
        for step in range(batches.steps):
            batches.fetch(step)
            drawn.append([x.cpu() for x in batches.draw(batches.count(step))])
        dataset.close()
    half = len(drawn) // 2
    for (on_cpu, labels), (on_gpu, theirs) in zip(drawn[:half], drawn[half:], strict=True):
        assert torch.equal(labels, theirs)
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-6)
    options = {"method": "dml", "model": "resnet8", "data": "imagenet", "data_root": folder, "image_size": 16}
    options |= {"epochs": 2, "batch_size": 8, "workers": 1, "device": "cuda", "quiet": True, "out": tmp_path / "run"}
    ended = train(TrainConfig(**options))
    assert ended["completed"] and ended["mode"] == "graphed"
