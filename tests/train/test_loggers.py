"""Loggers: the files that every run has, and TensorBoard and Weights & Biases, whose packages are stood in for here."""

import csv
import json
import signal
import sys
import types

import pytest
import torch

from fastfuse import cli
from fastfuse.cli import parse_train
from fastfuse.config import TrainConfig, check
from fastfuse.errors import InputError
from fastfuse.train import loggers
from fastfuse.train.build import resolved
from fastfuse.train.record import RunFolder, csv_table, scalars
from fastfuse.train.step import TrainStep

ALONE = ("--method", "independent", "--students", 1)
LINE = {
    "epoch": 2,
    "learning_rate": 0.1,
    "losses": {"loss": 1 / 3, "leader_ce": 0.25},
    "accuracy": {"leader": {"top1": 50.0, "top5": 90.0}},
    "aggregation": {"groups": [{"candidates": ["a", "b"], "weights": [0.75, 0.25]}], "teacher": "t"},
    "seconds": 2.5,
}


class Board:
    """In place of torch.utils.tensorboard: keeps what every SummaryWriter was told."""

    def __init__(self):
        self.writers = []
        self.fails = None

    def SummaryWriter(self, *, log_dir, purge_step):
        writer = types.SimpleNamespace(log_dir=log_dir, purge_step=purge_step, told=[], walls=[], ended=[])

        def add_scalar(tag, value, step, *, walltime):
            assert isinstance(value, int | float), "a tensor would make somebody wait for the device"
            if self.fails is not None and step >= self.fails:
                raise OSError(28, "No space left on device")
            writer.told.append((tag, value, step))
            writer.walls.append((step, walltime))

        writer.add_scalar = add_scalar
        writer.flush = lambda: writer.ended.append("flush")
        writer.close = lambda: writer.ended.append("close")
        self.writers.append(writer)
        return writer


class Wandb:
    """In place of wandb: keeps what every run was told. It takes no epoch again, as Weights & Biases does not."""

    def __init__(self):
        self.runs = []
        self.fails_at = None
        self.no_login = False

    def init(self, **options):
        if self.no_login:
            raise RuntimeError("api_key not configured (no-tty)\nmore lines")
        run = types.SimpleNamespace(options=options, logged=[], exit_code=None)

        def log(values, *, step):
            assert all(isinstance(value, int | float) for value in values.values())
            if step == self.fails_at:
                raise ConnectionError("network away")
            run.logged.append((step, values))

        def finish(*, exit_code):
            run.exit_code = exit_code

        run.log, run.finish = log, finish
        self.runs.append(run)
        return run


@pytest.fixture
def board(monkeypatch):
    stand_in = Board()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    return stand_in


@pytest.fixture
def wandb(monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return stand_in


def table_of(run):
    with (run.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_has_a_number_at_each_path_and_no_words():
    assert scalars(LINE) == {
        "epoch": 2,
        "learning_rate": 0.1,
        "loss": 1 / 3,
        "losses/leader_ce": 0.25,
        "accuracy/leader/top1": 50.0,
        "accuracy/leader/top5": 90.0,
        "aggregation/groups/0/weights/0": 0.75,
        "aggregation/groups/0/weights/1": 0.25,
        "seconds": 2.5,
    }


def test_the_table_keeps_all_digits_and_leaves_gaps():
    text = csv_table([{"epoch": 1, "losses": {"loss": 0.1}}, LINE])
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0])[:3] == ["epoch", "loss", "learning_rate"]
    assert (rows[0]["learning_rate"], float(rows[1]["loss"])) == ("", 1 / 3)
    assert csv_table([]) == "epoch\n"


@pytest.mark.parametrize("options", [(), ("--val-fraction", 0.2, "--method", "ffl"), ("--replicas", 2, *ALONE)])
def test_the_table_says_what_the_lines_say(train, options):
    run = train(*options)
    rows = table_of(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row, line in zip(rows, run.metrics, strict=True):
        for name, accuracy in line["accuracy"].items():
            assert {kind: float(row[f"accuracy/{name}/{kind}"]) for kind in accuracy} == accuracy
        for name, value in line["losses"].items():
            assert float(row["loss" if name == "loss" else f"losses/{name}"]) == value
        assert {n: float(row[n]) for n in ("learning_rate", "seconds", "images_per_second")}.items() <= line.items()
        assert ("validation" in line) == any(name.startswith("validation/") for name in row)


def test_neither_is_asked_for_without_a_word(train, board, wandb):
    run = train(*ALONE)
    assert board.writers == wandb.runs == []
    assert run.config["log"] == []
    assert {"tensorboard", "wandb.json"}.isdisjoint(path.name for path in run.path.iterdir())


def test_both_get_the_numbers_of_every_epoch(train, board, wandb):
    run = train("--log", "tensorboard", "--log", "wandb", "--log", "wandb")
    expected = [scalars(line) for line in run.metrics]
    (writer,), (other,) = board.writers, wandb.runs
    assert writer.log_dir == str(run.path / "tensorboard") and writer.ended == ["flush"] * 3 + ["close"]
    told = {(tag, step): value for tag, value, step in writer.told}
    assert told == {(tag, i + 1): x for i, row in enumerate(expected) for tag, x in row.items() if tag != "epoch"}
    assert len(writer.told) == len(told)
    assert other.logged == [(1, expected[0]), (2, expected[1])]
    assert other.exit_code == 0
    options = other.options
    assert (options["project"], options["name"], options["resume"]) == ("fastfuse", str(run.path), "allow")
    assert (options["config"]["batch_size"], options["config"]["method"]) == (24, "ffsd")
    json.dumps(options["config"])
    assert json.loads((run.path / "wandb.json").read_text()) == {"id": options["id"], "epochs": 2}


def test_the_records_and_weights_are_those_of_a_run_without(train, board, wandb):
    with_them, without = train(*ALONE, "--log", "wandb", out="a"), train(*ALONE, out="b")
    assert with_them.timeless_metrics() == without.timeless_metrics()
    ours, theirs = (run.weights("student0") for run in (with_them, without))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_resumed_run_goes_on_where_it_was(train, tiny, tmp_path, board, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    steps, run_step = [], TrainStep.__call__

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 8:  # the second step of the third epoch
            signal.raise_signal(signal.SIGINT)
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    asked = [*map(str, ALONE), "--epochs", "4", "--log", "tensorboard", "--log", "wandb"]
    assert cli.main([*tiny, *asked, "--out", str(tmp_path / "run")]) == 130
    assert [step for step, _ in wandb.runs[0].logged] == [1, 2] and wandb.runs[0].exit_code == 1
    run = train("--epochs", 4, "--resume")  # the other options are the run's own: they need not be given again
    assert [step for step, _ in wandb.runs[1].logged] == [3, 4] and wandb.runs[1].exit_code == 0
    assert wandb.runs[0].options["id"] == wandb.runs[1].options["id"]
    assert [other.options["project"] for other in wandb.runs] == ["mine", "mine"]
    # TensorBoard hides all from step 1 on, and gets all of it again.
    writer = board.writers[-1]
    assert writer.purge_step == 1
    losses = [(value, step) for tag, value, step in writer.told if tag == "loss"]
    assert losses == [(line["losses"]["loss"], line["epoch"]) for line in run.metrics] and len(losses) == 4


def test_times_in_tensorboard_are_as_far_apart_as_the_epochs(tmp_path, board):
    history = [{"epoch": 1, "x": 1.0, "seconds": 10.0}, {"epoch": 2, "x": 2.0, "seconds": 25.0}]
    loggers.TensorBoard(RunFolder(tmp_path), TrainConfig()).write(history)
    walls = dict(board.writers[0].walls)
    assert walls[2] - walls[1] == pytest.approx(15.0)


def test_wandb_is_not_sent_an_epoch_that_it_has(tmp_path, wandb):
    history = [{"epoch": epoch, "x": 0.5} for epoch in (1, 2, 3)]
    loggers.WeightsAndBiases(RunFolder(tmp_path), TrainConfig()).write(history)
    # Killed before the checkpoint of epoch 3: that one is trained again.
    resumed = loggers.WeightsAndBiases(RunFolder(tmp_path), TrainConfig())
    resumed.write(history[:2])
    resumed.write(history)
    resumed.write([*history, {"epoch": 4, "x": 0.5}])
    assert [[step for step, _ in run.logged] for run in wandb.runs] == [[1, 2, 3], [4]]


def test_off_ends_what_a_run_had(train, wandb, monkeypatch):
    run = train(*ALONE, "--log", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed any more
    assert cli.main(["train", "--resume", "--quiet", "--out", str(run.path)]) == 2
    assert cli.main(["train", "--resume", "--quiet", "--log", "off", "--out", str(run.path)]) == 0
    assert json.loads((run.path / "config.json").read_text())["log"] == []


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_before_anything_is_done(refused, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = refused("--log", name)
    assert f"--log {name} needs {name}" in message and f"pip install 'fastfuse[{name}]'" in message


def test_an_unknown_logger_names_the_known_ones(refused):
    message = refused("--log", "tensorbord")
    assert "--log" in message and "did you mean tensorboard" in message
    with pytest.raises(InputError):
        check(TrainConfig(log=("wandb", "nothing")))


def test_the_names_are_those_of_the_option(tmp_path):
    for name in loggers.OPTIONAL:
        assert resolved(parse_train(["--log", name])).log == (name,)
    assert resolved(parse_train(["--log", "wandb", "--log", "off"])).log == ()


def test_a_logger_that_fails_warns_once_and_the_run_goes_on(train, board, wandb, capsys):
    board.fails, wandb.fails_at = 2, 3
    run = train(*ALONE, "--epochs", 4, "--log", "tensorboard", "--log", "wandb")
    assert run.summary["completed"] and len(run.metrics) == len(table_of(run)) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("fastfuse: --log ") for line in lines)
    assert "tensorboard failed" in lines[0] and "No space left" in lines[0]
    assert "wandb failed" in lines[1] and "network away" in lines[1]
    # What it missed it gets when the run is taken up again.
    assert json.loads((run.path / "wandb.json").read_text())["epochs"] == 2
    board.fails = wandb.fails_at = None
    train(*ALONE, "--epochs", 4, "--resume")
    assert [[step for step, _ in other.logged] for other in wandb.runs] == [[1, 2], [3, 4]]


def test_one_that_cannot_be_opened_stops_nothing_and_leaves_no_id(train, wandb, capsys):
    wandb.no_login = True
    run = train(*ALONE, "--log", "wandb")
    assert run.summary["completed"] and not (run.path / "wandb.json").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "api_key not configured" in line and "more lines" not in line


def test_a_run_that_fails_is_told_as_failed(tiny, tmp_path, wandb, capsys):
    status = cli.main([*tiny, "--lr", "1e30", "--log", "wandb", "--out", str(tmp_path / "run")])
    assert status == 1 and "not finite" in capsys.readouterr().err.replace("not a number", "not finite")
    assert [run.exit_code for run in wandb.runs] == [1]


def test_the_files_are_no_option_a_full_disk_ends_the_run(train, monkeypatch, tmp_path, tiny, capsys):
    from fastfuse.train import record
    from fastfuse.train.files import WriteError, write_atomic

    def full(path, write):
        if path.name == "metrics.csv":
            raise WriteError(f"cannot write {path}: No space left on device")
        write_atomic(path, write)

    monkeypatch.setattr(record, "write_atomic", full)
    assert cli.main([*tiny, "--out", str(tmp_path / "run")]) == 1
    assert "metrics.csv" in capsys.readouterr().err


def test_eval_needs_no_logger(train, wandb, monkeypatch, capsys):
    run = train(*ALONE, "--log", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["eval", str(run.path), "--device", "cpu", "--json"]) == 0
    assert len(wandb.runs) == 1
