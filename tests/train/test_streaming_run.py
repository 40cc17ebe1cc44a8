"""Runs on streamed images: resumed to the bit, workers that die, the cache, and the published recipe end to end."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from fastfuse import cli
from fastfuse.train.checkpoint import load
from fastfuse.train.step import TrainStep
from tests.data import jpegs
from tests.train.conftest import Run
from tests.train.started import LIMIT, assert_nobody_is_left, started
from tests.train.test_distributed_runs import losses_agree, torchrun
from tests.train.test_resume import assert_same_run

COUNTS = {"train/ant": 9, "train/bee": 8, "train/cow": 6, "val/ant": 3, "val/bee": 2, "val/cow": 2}
SMALL = "--method dml --model resnet8 --image-size 16 --epochs 2 --batch-size 8 --lr 0.02 --device cpu --quiet"
RECIPE = "--recipe imagenet-resnet18 --batch-size 8 --image-size 64 --epochs 1 --device cpu --quiet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jpegs.write(tmp_path_factory.mktemp("images"), COUNTS)


@pytest.fixture
def train(folder, tmp_path):
    def run(*options, out, small=SMALL, root=folder):
        given = [*f"{small} --data imagenet".split(), "--data-root", str(root), "--out", str(tmp_path / out)]
        return cli.main(["train", *given, *map(str, options)])

    return run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run without workers or interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    options = f"{SMALL} --data imagenet --data-root {folder} --workers 0 --out {out}"
    assert cli.main(["train", *options.split()]) == 0
    return out


def stop_at(monkeypatch, number, act):
    """Do something in the `number`-th training step."""
    steps, run_step = [], TrainStep.__call__

    def step(self, *arguments):
        steps.append(1)
        if len(steps) == number:
            act()
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)


@pytest.mark.parametrize("at", [2, 3], ids=["inside an epoch", "at its end"])
def test_an_interrupted_run_goes_on_to_the_same_bits(train, whole, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        stop_at(patch, at, lambda: signal.raise_signal(signal.SIGINT))
        assert train("--workers", 2, out="stopped") == 130
    assert load(tmp_path / "stopped/checkpoint.pt")["position"]["step"] == at
    assert multiprocessing.active_children() == [], "the workers end with the run"
    # --workers is no part of what is computed.
    assert cli.main(["train", "--resume", "--workers", "1", "--out", str(tmp_path / "stopped")]) == 0
    assert_same_run(tmp_path / "stopped", whole)


def test_a_killed_worker_is_one_line_and_the_checkpoint_stays(train, whole, tmp_path, monkeypatch, capsys):
    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(LIMIT)  # torch raises wherever this process is when it hears of it

    with monkeypatch.context() as patch:
        stop_at(patch, 3, kill)
        capsys.readouterr()
        assert train("--workers", 1, "--checkpoint-minutes", 0, out="killed") == 1
    message = capsys.readouterr().err
    assert message.startswith("fastfuse: a process that decodes images was lost") and message.count("\n") == 1
    assert load(tmp_path / "killed/checkpoint.pt")["position"]["step"] == 2
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "killed")]) == 0
    assert_same_run(tmp_path / "killed", whole)


def test_eval_and_validation_see_streamed_images(train, tmp_path, capsys):
    assert train("--val-fraction", 0.3, "--epochs", 1, "--workers", 1, out="run") == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["validation"].keys() == line["accuracy"].keys()
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["accuracy"]
    assert found["student0"] == line["accuracy"]["student0"]
    assert multiprocessing.active_children() == []


def test_the_cache_decides_training_and_not_evaluation(train, whole, tmp_path, capsys):
    assert train("--workers", 0, "--data-cache", tmp_path / "cache", out="cached") == 0
    weights = [(run / "student0.safetensors").read_bytes() for run in (whole, tmp_path / "cached")]
    assert weights[0] != weights[1]
    line = json.loads((tmp_path / "cached/metrics.jsonl").read_text().splitlines()[-1])
    (tmp_path / "cache").rename(tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "cached"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["student0"] == line["accuracy"]["student0"]
    assert not (tmp_path / "cache").exists(), "an evaluation makes no cache"
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "cached"), "--data-cache", "None"]) == 2
    assert "data_cache" in capsys.readouterr().err


def test_an_image_folder_is_streamed_on_request(train, tmp_path, folder):
    other = ["--data", "imagefolder", "--epochs", 1, "--workers", 0]
    assert train(*other, "--stream", "True", out="streamed") == 0
    assert train(*other, out="resident") == 0
    data = [load(tmp_path / run / "checkpoint.pt")["data"] for run in ("streamed", "resident")]
    assert "image files" in data[0] and "image files" not in data[1]


@pytest.mark.long
def test_the_published_recipe_is_interrupted_and_resumed_to_the_same_bits(train, tmp_path, monkeypatch):
    images = jpegs.write(
        tmp_path / "large", {f"{s}/{c}": 8 if s == "train" else 3 for s in ("train", "val") for c in "ab"}, (375, 500)
    )
    assert train("--workers", 0, out="whole", small=RECIPE, root=images) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert train("--workers", 1, out="stopped", small=RECIPE, root=images) == 130
    assert cli.main(["train", "--resume", "--quiet", "--out", str(tmp_path / "stopped")]) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.long
def test_two_processes_decode_their_halves_and_train_as_one(train, tmp_path, folder):
    """23 images in batches of 8: the last batch is divided 4 and 3; 7 test images 4 and 3."""
    assert train("--workers", 0, "--epochs", 1, out="one") == 0
    options = f"{SMALL} --epochs 1 --data imagenet --workers 1 --sync-batchnorm".split()
    done = torchrun("train", *options, "--data-root", folder, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    losses_agree(two, one, 1e-4)
    assert two.metrics[0]["accuracy"] == one.metrics[0]["accuracy"]


@pytest.mark.long
def test_teachers_are_trained_on_streamed_images_first(train, tmp_path):
    options = "--method feed-parallel --teacher-count 2 --teacher-epochs 1 --epochs 1 --workers 1"
    assert train(*options.split(), out="run") == 0
    assert sorted(p.name for p in (tmp_path / "run/teachers").glob("seed*")) == ["seed1000", "seed1001"]
    options = "--method dfa --search-epochs 1 --teacher-epochs 1 --epochs 1 --workers 1"
    assert train(*options.split(), out="dfa") == 0
    assert (tmp_path / "dfa/search/aggregation.json").exists()


@pytest.mark.long
def test_ctrl_c_reaches_all_processes_and_the_checkpoint_is_written(folder, tmp_path):
    out = tmp_path / "run"
    process = started(f"{SMALL} --data imagenet --data-root {folder} --workers 2 --epochs 5000".split(), out)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, errors
    assert "the checkpoint is written" in errors and "Traceback" not in errors
    assert load(out / "checkpoint.pt")["position"]["steps_done"] > 0
    assert_nobody_is_left(process)


@pytest.mark.long
def test_workers_end_when_the_run_is_killed(folder, tmp_path):
    options = f"{SMALL} --data imagenet --data-root {folder} --workers 2 --epochs 5000"
    process = started(options.split(), tmp_path / "run")
    process.kill()
    process.wait()
    assert_nobody_is_left(process)
