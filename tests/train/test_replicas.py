"""Replicas: several seeds in one pass, each of them the run that it would have been alone."""

import csv
import json
import statistics

import pytest
import torch

from fastfuse import cli
from fastfuse.config import TrainConfig
from fastfuse.methods import METHODS
from fastfuse.train.build import make_method, resolved, with_replicas
from fastfuse.train.checkpoint import load
from fastfuse.train.engine import Engine
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from fastfuse.train.terms import TermLog
from tests.losses.batches import differing
from tests.methods import making
from tests.train.engines import BATCH, data, dataset, run_epoch, state_of

FIRST, REPLICAS = 5, 3


def exact_engine(name: str, seed: int, replicas: int, strategy: str) -> Engine:
    """In float64, from the weights and draws of a seed, or of several."""
    method, own = making.VARIANTS.get(name, (name, {}))
    config = resolved(TrainConfig(method=method, model="resnet8", seed=seed, replicas=replicas, **own))
    torch.manual_seed(0)
    given = making.ingredients(name, num_classes=5, students=config.students)
    method = with_replicas(make_method(config, 5, given), config, 5, given).double().train()
    method.arrange(strategy)
    step = TrainStep(method, build_optimizers(method, lr=0.02))
    form = {"dtype": torch.float64, "memory_format": step.memory_format}
    batches = data.TrainingBatches(dataset(), batch_size=BATCH, replicas=replicas, parts=method.image_parts, **form)
    engine = Engine(step, batches, TermLog(50))
    engine.progress = engine.progress.double()
    return engine


WAYS = [(m, s) for m in METHODS for s in ("loop", "grouped") if s == "loop" or m in making.SIDE_BY_SIDE]
WAYS += [pytest.param(m, "grouped", marks=pytest.mark.long) for m in making.VARIANTS]


@pytest.mark.parametrize(("name", "strategy"), WAYS)
def test_every_replica_is_the_run_of_its_seed(name, strategy):
    together = exact_engine(name, FIRST, REPLICAS, strategy)
    run_epoch(together, seed=FIRST)  # three steps, the last of a smaller batch
    together.terms.flush()
    found = together.step.method.state_dict()
    states = together.step.optimizers.state_dict()
    for replica in range(REPLICAS):
        alone = exact_engine(name, FIRST + replica, 1, "loop")
        run_epoch(alone, seed=FIRST + replica)
        alone.terms.flush()
        method = together.step.method
        own = method.own(replica, found)
        assert differing(own, alone.step.method.state_dict(), 1e-10) == {}
        for ours, theirs in zip(states, alone.step.optimizers.state_dict(), strict=True):
            ours = method.own(replica, ours)
            assert ours.keys() == theirs.keys()
            for key, state in theirs.items():
                assert differing(ours[key], state, 1e-10) == {}, key
        for term, value in alone.terms.sums.items():
            assert together.terms.sums[f"seed{FIRST + replica}/{term}"] == pytest.approx(value, rel=1e-10), term


def test_replicas_differ_and_share_their_updates():
    engine = exact_engine("ffsd", FIRST, REPLICAS, "grouped")
    single = exact_engine("ffsd", FIRST, 1, "grouped")
    groups = [[len(o.param_groups) for o in e.step.optimizers.optimizers] for e in (engine, single)]
    assert all(together <= alone for together, alone in zip(*groups, strict=True))
    images, labels = engine.batches.draw(4)
    assert images.shape == (4, 3 * REPLICAS, 8, 8) and labels.shape == (REPLICAS, 4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    own = [engine.step.method.own(r, state_of(engine)) for r in range(2)]
    assert not torch.equal(own[0]["peers.0.conv1.weight"], own[1]["peers.0.conv1.weight"])


def test_a_run_of_replicas_leaves_a_run_folder_of_each(train, tiny, tmp_path, capsys):
    run = train("--replicas", 2, "--seed", 4, "--strategy", "grouped", "--val-fraction", 0.2, "--ema", 0.5)
    table = capsys.readouterr().out
    assert " ± " in table and "leader" in table
    held_out = "--val-fraction 0.2 --val-seed 4 --ema 0.5 --seed"
    for seed in (4, 5):
        assert cli.main([*tiny, *held_out.split(), str(seed), "--out", f"{tmp_path}/s{seed}"]) == 0
        alone, own = tmp_path / f"s{seed}", run.path / f"seed{seed}"
        config = json.loads((own / "config.json").read_text())
        assert (config["seed"], config["replicas"], config["out"]) == (seed, 1, str(own))
        ours, theirs = (load(path / "checkpoint.pt") for path in (own, alone))
        for part in ("method", "ema"):
            assert differing(ours[part], theirs[part], 1e-4) == {}
        lines = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (own, alone)]
        for mine, other in zip(*lines, strict=True):
            assert mine.keys() == other.keys()
            assert mine["losses"] == pytest.approx(other["losses"], rel=1e-3)
            assert mine["accuracy"].keys() == other["accuracy"].keys()
        results = [json.loads((path / "summary.json").read_text()) for path in (own, alone)]
        assert results[0].keys() == results[1].keys() and results[0]["seed"] == results[1]["seed"] == seed
        assert results[0]["networks"].keys() == results[1]["networks"].keys()
        assert results[0]["networks"]["leader"]["last_top1"] == lines[0][-1]["accuracy"]["leader"]["top1"]
        for name in ("leader", "leader_best"):
            assert (own / f"{name}.safetensors").exists()
        with (own / "metrics.csv").open() as file:
            table = list(csv.DictReader(file))
        assert [float(row["accuracy/leader/top1"]) for row in table] == [
            line["accuracy"]["leader"]["top1"] for line in lines[0]
        ]
        capsys.readouterr()
        assert cli.main(["eval", str(own), "--device", "cpu", "--json"]) == 0
        accuracy = json.loads(capsys.readouterr().out)["accuracy"]
        assert accuracy["leader"] == lines[0][-1]["accuracy"]["leader"]


def test_mean_and_deviation_are_those_of_the_runs(train):
    summary = train("--replicas", 3, "--method", "independent", "--students", 1).summary
    values = [summary["networks"][f"seed{seed}/student0"]["last_top1"] for seed in range(3)]
    found = summary["statistics"]["student0"]["last_top1"]
    assert found == {
        "mean": pytest.approx(statistics.fmean(values)),
        "sd": pytest.approx(statistics.stdev(values)),
        "n": 3,
    }
    assert summary["replicas"] == 3 and summary["deployed"] == "student0"


def test_replicas_go_on_where_they_stopped(train):
    options = ["--replicas", 2, "--method", "dml", "--strategy", "grouped"]
    begun = train(*options, "--max-time", "0.0001")
    assert not begun.summary["completed"]
    ended, whole = train(*options, "--resume"), train(*options, out="whole")
    for seed in (0, 1):
        name = f"seed{seed}/student0"
        ours, theirs = (run.weights(name) for run in (ended, whole))
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_replica_can_be_trained_on_alone(train, tiny, tmp_path):
    run = train("--replicas", 2, "--method", "independent", "--students", 1, "--max-time", "0.0001")
    out = run.path / "seed1"
    assert cli.main(["train", "--resume", "--quiet", "--out", str(out)]) == 0
    alone = train("--seed", 1, "--method", "independent", "--students", 1, out="alone")
    assert differing(load(out / "checkpoint.pt")["method"], load(alone.path / "checkpoint.pt")["method"], 1e-4) == {}


def test_what_replicas_cannot_do_is_said(train, refused):
    assert "--replicas must be at least 1" in refused("--replicas", 0)
    run = train("--replicas", 2, "--method", "independent", "--students", 1, "--epochs", 1)
    message = refused(command=["eval", str(run.path)])
    assert "2 replicas" in message and "seed0" in message
