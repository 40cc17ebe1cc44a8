"""What "auto" comes to on a device, what a device cannot do, and that running out of memory loses nothing."""

import functools

import pytest
import torch

from fastfuse.config import TrainConfig
from fastfuse.errors import FastfuseError, InputError
from fastfuse.methods import Method
from fastfuse.train import build, modes
from fastfuse.train import run as run_module
from fastfuse.train.checkpoint import load
from fastfuse.train.step import TrainStep

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", GPU, "graphed"),
        ("auto", CPU, "eager"),
        ("eager", GPU, "eager"),
        ("compiled", GPU, "compiled"),
        ("graphed", GPU, "graphed"),
        ("graphed-compiled", GPU, "graphed-compiled"),
    ],
)
def test_the_mode_of_a_device(name, device, expected):
    assert modes.pick_mode(name, device) == expected


def test_several_processes_replay_graphs_where_that_is_asked_for():
    assert modes.pick_mode("auto", GPU, processes=2) == "eager"
    assert modes.pick_mode("graphed", GPU, processes=2) == "graphed"
    with pytest.raises(InputError, match="--mode graphed needs a CUDA device"):
        modes.pick_mode("graphed", CPU, processes=2)


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    """A capture on the current GPU notes nothing of what runs on another one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert build.pick_device("cuda:1") == torch.device("cuda", 1) and chosen == [torch.device("cuda", 1)]
    assert build.pick_device("cpu").type == "cpu" and len(chosen) == 1


def test_half_precision_is_for_gpus_unless_asked_for():
    assert (modes.pick_amp("auto", GPU), modes.pick_amp("auto", CPU)) == ("bf16", "off")
    assert (modes.pick_amp("off", GPU), modes.pick_amp("fp16", CPU)) == ("off", "fp16")


def test_a_graph_needs_a_gpu_and_a_compiler_must_be_there(refused, monkeypatch):
    message = refused("--mode", "graphed")
    assert "--mode graphed" in message and "cpu" in message and "compiled" in message
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refused("--mode", "compiled")
    assert "no-such-compiler" in message and "CXX" in message
    with pytest.raises(InputError, match="no-such-compiler"):
        modes.pick_mode("compiled", CPU)
    assert modes.pick_mode("compiled", GPU) == "compiled"  # a GPU's code is made by Triton


def test_tf32_is_set_for_a_run_and_put_back(train, monkeypatch):
    seen = []
    run_step = TrainStep.__call__

    def step(self, *arguments):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    train("--epochs", 1)
    assert set(seen) == {(True, True)}
    seen.clear()
    train("--epochs", 1, "--no-tf32", out="exact")
    assert set(seen) == {(False, False)}
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_a_run_says_its_mode_and_may_go_on_in_another(train, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = "--method independent --students 1"
    run = train(*options.split(), "--mode", "compiled", "--max-time", "0.0001")
    assert run.summary["mode"] == "compiled" and not run.summary["completed"]
    again = train(*options.split(), "--mode", "eager", "--resume")
    assert again.summary["mode"] == "eager" and again.summary["completed"]
    whole = train(*options.split(), out="whole")
    assert whole.summary["mode"] == "eager"
    ours, theirs = again.weights("student0"), whole.weights("student0")
    assert max((ours[key] - theirs[key]).abs().max() for key in theirs if ours[key].is_floating_point()) < 1e-4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore about it."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["on a GPU", "on a CPU"],
)
def test_out_of_memory_says_what_to_lower_and_keeps_the_checkpoint(train, refused, tmp_path, monkeypatch, error):
    run_step, steps = TrainStep.__call__, []

    def step(self, *arguments):
        steps.append(1)
        if len(steps) == 5:
            raise error
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)
    message = refused("--epochs", 3, folder_remains=True)
    assert all(word in message for word in ("--batch-size 24", "--students 2", "--amp bf16", "intact"))
    assert load(tmp_path / "run" / "checkpoint.pt")["position"]["epoch"] == 1
    monkeypatch.undo()
    assert train("--epochs", 3, "--resume").summary["completed"]


def test_out_of_memory_before_the_first_step_is_one_line_too(refused, monkeypatch):
    def to(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Method, "to", to)
    message = refused()
    assert all(word in message for word in ("--batch-size 24", "--students 2", "lower either"))


def test_out_of_memory_in_half_precision_does_not_ask_for_it():
    config = TrainConfig(method="dml", amp="bf16", batch_size=8, students=2)
    said = pytest.raises(FastfuseError, match=r"--batch-size 8 and --students 2: lower either; the last checkpoint")
    with said, run_module._out_of_memory_explained(config, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
