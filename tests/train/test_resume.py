import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfuse import cli
from fastfuse.train.checkpoint import load, save
from fastfuse.train.step import TrainStep

KILLABLE = str(Path(__file__).with_name("killable.py"))
# Bit-equality is promised for equal thread counts, so every process has one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_process(moment: str, count: int, options: list[str]) -> int:
    """Exit status of a training process that is killed at a moment of `killable`."""
    command = [sys.executable, KILLABLE, "process", f"{moment}:{count}", *options]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode


def assert_equal(ours: object, theirs: object, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    else:
        assert ours == theirs, where


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights and states bit for bit, and the metrics apart from their time fields."""
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (ours, theirs)
    ]
    for line in (*lines[0], *lines[1]):
        assert line.pop("seconds") > 0 and line.pop("images_per_second") > 0
    assert lines[0] == lines[1]
    files = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert len(files) == 2 and files == sorted(path.name for path in ours.glob("*.safetensors"))
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    first, second = load(ours / "checkpoint.pt"), load(theirs / "checkpoint.pt")
    for part in ("method", "ema", "optimizers", "scaler", "generators"):
        assert_equal(first[part], second[part], part)
    assert not list(ours.glob("*.tmp"))


@pytest.mark.long
def test_random_kills_leave_no_trace(tiny, tmp_path):
    """With a checkpoint at the ends of epochs only; one after every step, and other faults: test_kill_matrix.py."""
    own = "--method ffl --amp fp16 --val-fraction 0.2 --warmup-epochs 2 --epochs 6 --batch-size 12"
    options = [*tiny, *own.split()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_process("never", 0, [*options, "--out", str(whole)]) == 0

    draw = random.Random(2024)
    moments = ["step", "write", "rename", "metrics", "any"]
    counts = {"step": (1, 3), "any": (500, 4000)}  # any: milliseconds, start-up included
    draw.shuffle(moments)
    resume = [*options, "--resume", "--out", str(killed)]
    deaths = 0
    for moment in moments:
        status = run_process(moment, draw.randint(*counts.get(moment, (1, 1))), resume)
        deaths += status == -signal.SIGKILL
    assert deaths == len(moments), "the run ended before all kills: make it longer"
    assert run_process("never", 0, resume) == 0
    assert_same_run(killed, whole)


def test_killed_before_its_first_checkpoint_it_starts_anew(tiny, tmp_path):
    options = [*tiny, "--method", "ffsd"]
    assert run_process("never", 0, [*options, "--out", str(tmp_path / "whole")]) == 0
    out = ["--out", str(tmp_path / "killed")]
    assert run_process("step", 2, [*options, *out]) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()
    assert run_process("never", 0, ["train", "--resume", *out]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 3, 4, 6], ids=["first step", "last of epoch 1", "first of epoch 2", "very last"])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tiny, tmp_path, capsys, monkeypatch, at):
    options = [*tiny, "--method", "dml"]
    before = signal.getsignal(signal.SIGINT)
    assert cli.main([*options, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "stopped"
    steps = []
    run_step = TrainStep.__call__

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == at:
            signal.raise_signal(signal.SIGINT)
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    capsys.readouterr()
    assert cli.main([*options, "--out", str(out)]) == 130
    assert len(steps) == at
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"fastfuse train --resume --out {out}" in message
    position = load(out / "checkpoint.pt")["position"]
    assert (position["epoch"], position["step"]) == ((at - 1) // 3, (at - 1) % 3 + 1)
    assert not (out / "summary.json").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert cli.main(["train", "--resume", "--quiet", "--out", str(out)]) == 0
    assert_same_run(out, tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(train):
    run = train("--method", "independent", "--students", 1)
    before = {path.name: path.read_bytes() for path in run.path.glob("*.safetensors")}
    metrics = run.metrics
    again = train("--method", "independent", "--students", 1, "--resume")
    assert {path.name: path.read_bytes() for path in again.path.glob("*.safetensors")} == before
    assert again.metrics == metrics
    assert again.summary["networks"] == run.summary["networks"]


def test_a_run_of_before_an_option_goes_on_with_its_default(train, refused):
    own = ("--method", "ffcl", "--students", 1, "--epochs", 1)
    run = train(*own)
    path, settings = run.path / "checkpoint.pt", run.path / "config.json"
    state, config = load(path), json.loads(settings.read_text())
    assert state["config"].pop("fused_stages") == config.pop("fused_stages") == 1
    save(path, {name: value for name, value in state.items() if name not in ("format", "version")})
    settings.write_text(json.dumps(config))
    assert "a run with fused_stages = 1, not 2" in refused(*own, "--fused-stages", 2, "--resume", folder_remains=True)
    assert train(*own, "--resume").summary["networks"] == run.summary["networks"]


def test_a_lost_metrics_file_comes_back_from_the_checkpoint(train):
    run = train("--method", "independent", "--students", 1)
    table = (run.path / "metrics.csv").read_bytes()
    (run.path / "metrics.jsonl").write_text('{"epoch": 1}\n{"ep')
    (run.path / "metrics.csv").write_text("epoch,los")
    again = train("--method", "independent", "--students", 1, "--resume")
    assert again.metrics == run.metrics
    assert (run.path / "metrics.csv").read_bytes() == table


def test_a_checkpoint_carries_everything(train):
    state = load(train("--ema", "0.5", "--amp", "fp16").path / "checkpoint.pt")
    expected = {
        "method",
        "optimizers",
        "scaler",
        "ema",
        "terms",
        "position",
        "generators",
        "config",
        "data",
        "versions",
    }
    assert expected <= state.keys()
    assert {"epoch", "step", "history", "best", "seconds"} <= state["position"].keys()
    assert {"fastfuse", "torch", "python", "commit"} <= state["versions"].keys()
    momenta = [s for s in state["optimizers"][0].values() if "momentum_buffer" in s]
    assert len(momenta) == len(state["optimizers"][0]) > 0
