"""What is trained before a run: teachers, paraphrasers, searches and stages; found again, resumed, interrupted."""

import dataclasses
import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastfuse import cli, models
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError
from fastfuse.models import foreign
from fastfuse.train import build, preliminary
from fastfuse.train.checkpoint import load
from fastfuse.train.step import TrainStep
from fastfuse.train.teachers import load_teacher

# What lies below the run folder of each method that brings its own, and the epochs of what is trained before.
BEFORE = {
    "kd": ("--method kd --teacher-epochs 1", {"teachers": 1}),
    "at": ("--method at", {"teachers": 2}),
    "ft": ("--method ft --paraphraser-epochs 1", {"teachers": 2, "paraphrasers/0": 1}),
    "feed-parallel": (
        "--method feed-parallel --teacher-count 2 --factor-targets paraphrased --paraphraser-epochs 1",
        {"teachers": 2, "paraphrasers/0": 1, "paraphrasers/1": 1},
    ),
    "feed-sequential": (
        "--method feed-sequential --feed-stages 3",
        {"teachers": 2, "stages/stage1": 2, "stages/stage2": 2},
    ),
    "dfa": ("--method dfa --search-epochs 1", {"teachers": 2, "search": 1}),
}  # fmt: skip


def folders(path: Path) -> dict[str, int]:
    """Every finished run below a run folder that is not one replica of others, with its epochs."""
    found = {}
    for summary in path.rglob("summary.json"):
        values = json.loads(summary.read_text())
        assert values["completed"]
        if summary.parent != path and not summary.parent.name.startswith("seed"):
            found[str(summary.parent.relative_to(path))] = values["epochs"]
    return found


@pytest.mark.parametrize("method", BEFORE)
def test_what_a_method_needs_is_trained_first_and_kept(train, method):
    options, wanted = BEFORE[method]
    run = train(*options.split(), "--teacher-model", "resnet14")
    assert run.summary["completed"] and run.summary["epochs"] == 2
    assert folders(run.path) == wanted
    teachers = json.loads((run.path / "teachers" / "config.json").read_text())
    assert (teachers["method"], teachers["model"], teachers["students"]) == ("independent", "resnet14", 1)
    assert teachers["seed"] != run.config["seed"], "a teacher must not start from the student's weights"
    plain = models.build("resnet8", 3)
    plain.load_state_dict(run.weights("student0"), strict=True)
    assert not any("teacher" in key for key in load(run.path / "checkpoint.pt")["method"])
    status = cli.main(["eval", str(run.path), "--json"])
    assert status == 0


COPIED = ("--method", "ffcl", "--regularization", "self")


def test_every_network_is_held_by_its_own_copy(train, capsys):
    """Each is trained first, alone, of its own architecture; the same named by run or by file train the same again."""
    run = train(*COPIED, "--teacher-model", "wrn10_1", "--teacher-epochs", 1)
    assert folders(run.path) == {"copies/student0": 1, "copies/teacher": 1}
    found = [json.loads((run.path / "copies" / name / "config.json").read_text()) for name in ("student0", "teacher")]
    assert [(own["method"], own["model"]) for own in found] == [("independent", "resnet8"), ("independent", "wrn10_1")]
    assert len({run.config["seed"], *(own["seed"] for own in found)}) == 3
    assert not any("copies" in key or "teachers" in key for key in load(run.path / "checkpoint.pt")["method"])
    assert cli.main(["eval", str(run.path), "--json"]) == 0
    capsys.readouterr()
    files = [run.path / "copies/student0", run.path / "copies/teacher/student0.safetensors"]
    again = train(*COPIED, "--teacher-model", "wrn10_1", "--teachers", *files, out="again")
    assert folders(again.path) == {}
    ours, theirs = (load(own.path / "checkpoint.pt")["method"] for own in (run, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    other = train(*COPIED, "--teacher-model", "wrn10_1", "--teachers", files[0], train_other(train), out="other")
    assert not torch.equal(load(other.path / "checkpoint.pt")["method"]["peers.1.fc.weight"], ours["peers.1.fc.weight"])


def train_other(train) -> Path:
    return train("--method", "independent", "--students", 1, "--model", "wrn10_1", "--seed", 7, out="elsewhere").path


def test_several_teachers_differ_and_are_replicas_of_one_run(train):
    run = train("--method", "feed-parallel", "--teacher-count", 2)
    first, second = (load_file(run.path / "teachers" / f"seed{s}" / "student0.safetensors") for s in (1000, 1001))
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


def test_every_stage_learns_from_the_one_before(train):
    run = train("--method", "feed-sequential", "--feed-stages", 3, "--teacher-model", "resnet14")
    stages = [json.loads((run.path / f"stages/stage{i}/config.json").read_text()) for i in (1, 2)]
    assert [own["teachers"] for own in stages] == [[str(run.path / "teachers")], [str(run.path / "stages/stage1")]]
    assert run.config["teacher_model"] == "resnet14"
    assert [own["teacher_model"] for own in stages] == ["resnet14", "resnet8"]
    config = TrainConfig(**{**run.config, "out": run.path, "teachers": ()})
    given = preliminary.prepared(config, 3, None)
    last = load_file(run.path / "stages/stage2/student0.safetensors")
    assert torch.equal(given["teachers"][0].conv1.weight, last["conv1.weight"])


def test_named_teachers_are_used_as_they_are(train, tmp_path):
    """A run folder, a weight file of the same network: the same distillation, bit for bit; nothing else is trained."""
    teacher = train("--method", "dml", out="teacher")
    before = teacher.weights("student0")
    by_run = train("--method", "kd", "--teachers", teacher.path, out="by_run")
    by_file = train("--method", "kd", "--teachers", teacher.path / "student0.safetensors", out="by_file")
    assert folders(by_run.path) == folders(by_file.path) == {}
    assert (by_run.config["teacher_model"], by_file.config["teacher_model"]) == (None, "resnet8")
    ours, theirs = by_run.weights("student0"), by_file.weights("student0")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(x, before[key]) for key, x in teacher.weights("student0").items())


def test_a_search_of_another_run_takes_the_place_of_one(train):
    teacher = train("--method", "independent", "--students", 1, out="teacher")
    first = train("--method", "dfa", "--teachers", teacher.path, out="first")
    found = first.path / "search" / "aggregation.json"
    again = train("--method", "dfa", "--teachers", teacher.path, "--aggregation-file", found, out="again")
    assert folders(again.path) == {}
    assert all(torch.equal(x, first.weights("student0")[key]) for key, x in again.weights("student0").items())
    assert json.loads((found.parent / "config.json").read_text())["teacher_model"] == "resnet8"
    alone = train("--method", "dfa-search", "--teachers", teacher.path, out="alone")
    groups = json.loads((alone.path / "aggregation.json").read_text())["groups"]
    assert all(sum(group["weights"]) == pytest.approx(1) for group in groups)
    assert [line["aggregation"]["groups"] for line in alone.metrics][-1] == groups
    assert (alone.path / "aggregation.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    ("own", "at"),
    [
        pytest.param(("--method", "ft"), 2, id="in the teacher"),
        pytest.param(("--method", "ft"), 8, id="in the paraphraser"),
        pytest.param(("--method", "ft"), 14, id="in the run"),
        pytest.param(COPIED, 8, id="in the second copy", marks=pytest.mark.long),
    ],
)
def test_interrupted_anywhere_it_goes_on_to_the_same_end(tiny, tmp_path, capsys, monkeypatch, own, at):
    options = [*tiny, *own]
    assert cli.main([*options, "--out", str(tmp_path / "whole")]) == 0
    steps, run_step = [], TrainStep.__call__

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == at:
            signal.raise_signal(signal.SIGINT)
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    out = tmp_path / "stopped"
    capsys.readouterr()
    assert cli.main([*options, "--out", str(out)]) == 130
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.rstrip().endswith(f"fastfuse train --resume --out {out}")
    assert cli.main(["train", "--resume", "--quiet", "--out", str(out)]) == 0
    whole, again = (load_file(tmp_path / name / "student0.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(x, whole[key]) for key, x in again.items())


def test_the_time_limit_holds_for_everything_together(tiny, train, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*tiny, "--method", "kd", "--max-time", "0.0001", "--out", str(out)]) == 0
    assert not (out / "checkpoint.pt").exists() and (out / "teachers" / "checkpoint.pt").exists()
    assert f"go on with: fastfuse train --resume --out {out}" in capsys.readouterr().out
    assert train("--method", "kd", "--resume").summary["completed"]


def test_bad_input_is_found_before_the_teachers_are_trained(refused):
    assert "branches needs CUDA" in refused("--method", "kd", "--strategy", "branches")
    assert "stages" in refused("--method", "at", "--teacher-model", "resnet18")
    assert "kd-weight" in refused("--method", "kd", "--kd-weight", 1.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method kd --teachers nowhere", "teacher nowhere cannot be found: name a run folder"),
        ("--method kd --teachers a b --teacher-count 3", "--teachers names 2, --teacher-count asks for 3"),
        ("--method dml --teachers a", "dml has no use for --teachers: leave it out"),
        ("--method ffcl --teachers a", "ffcl with --regularization virtual has no use for --teachers"),
        (
            "--method ffcl --regularization self --teachers a",
            "copy of each of its 2 networks, not 1: name one",
        ),
        ("--method ffcl --regularization self --teacher-count 3", "copy of each of its 2 networks, not 3"),
        ("--method ffcl --regularization own", "known: off, published, self, virtual"),
        ("--method kd --search-epochs 2", "kd has no use for --search-epochs"),
        ("--method feed-parallel --paraphraser-epochs 2", "--factor-targets raw has no use for --paraphraser-epochs"),
        (
            "--method dfa --aggregation last --aggregation-file x",
            "last has no use for --aggregation-file",
        ),
        ("--method dfa --aggregation-file nowhere", "nowhere cannot be read as aggregation weights"),
        ("--method kd --teacher-epochs 0", "--teacher-epochs must be at least 1, not 0"),
        ("--method kd --teachers torchvision:resnet18", "know 1000 classes, and the data have 3"),
        ("--method kd --teachers torchvision:resnet19", "unknown network of torchvision 'resnet19'"),
        (
            "--method kd --teachers torchvision:resnet18 --teacher-model wrn10_1",
            "teacher torchvision:resnet18 is torchvision:resnet18, and --teacher-model says wrn10_1: name",
        ),
        ("--method kd --leader resnet8", "kd has no leader"),
        ("--method paraphraser --students 3", "paraphraser trains no students: leave --students out"),
    ],
)
def test_what_cannot_be_used_is_said(refused, options, said):
    assert said in refused(*options.split())


def test_runs_that_cannot_teach(train, refused, tmp_path):
    def teach(path: Path, *options: str) -> str:
        return refused("--method", "kd", "--teachers", path, *options, out="student")

    assert "config.json is missing" in teach(tmp_path)
    begun = train("--method", "independent", "--students", 1, "--max-time", "0.0001", out="begun")
    (begun.path / "student0.safetensors").unlink(missing_ok=True)
    assert f"the run has not ended; go on with: fastfuse train --resume --out {begun.path}" in teach(begun.path)
    several = train("--method", "independent", "--students", 1, "--replicas", 2, out="several")
    assert f"holds 2 replicas: name one of them, as {several.path}/seed0" in teach(several.path)
    alone = several.path / "seed0"
    assert f"{alone} is resnet8, and --teacher-model says resnet14" in teach(alone, "--teacher-model", "resnet14")
    search = train("--method", "dfa-search", "--teachers", alone, out="search").path
    assert f"{search} is a run of dfa-search, which trains no classifier" in teach(search)
    copies = [*COPIED, "--teacher-model", "wrn10_1", "--teachers", alone, alone]
    assert "teacher 1 is of another architecture than teacher, whose" in refused(*copies, out="student")
    network = models.build("resnet8", 7)
    save_file(network.state_dict(), tmp_path / "seven.safetensors")
    message = teach(tmp_path / "seven.safetensors")
    assert "does not fit resnet8 with the 3 classes of the data" in message and "--teacher-model" in message


def test_a_resumed_run_has_the_teachers_that_it_had(train, refused, tmp_path):
    one, two = (train("--method", "independent", "--students", 1, "--seed", s, out=f"t{s}") for s in (1, 2))
    taught = tmp_path / "teacher"
    shutil.copytree(one.path, taught)
    begun = train("--method", "kd", "--teachers", taught, out="kd")
    shutil.rmtree(taught)
    resume = ["train", "--resume", "--quiet", "--out", str(begun.path)]
    assert "cannot be found" in refused(command=resume)
    shutil.copytree(two.path, taught)
    message = refused(command=resume)
    assert "1 teachers, crc" in message and "name the same --teachers" in message
    shutil.rmtree(taught)
    shutil.copytree(one.path, taught)
    assert cli.main(resume) == 0


def test_a_leaders_run_teaches_with_the_leader(tiny, tmp_path):
    run = tmp_path / "run"
    networks = ["--method", "ffsd", "--students", "resnet8,resnet14", "--leader", "wrn10_1", "--out", str(run)]
    assert cli.main([option for option in tiny if option not in ("--model", "resnet8")] + networks) == 0
    config = build.resolved(TrainConfig(method="kd", model="resnet8", teachers=(str(run),)))
    teacher = load_teacher(str(run), config, 3)
    assert type(teacher).__name__ == "WideResNet"
    assert torch.equal(teacher.conv1.weight, load_file(run / "leader.safetensors")["conv1.weight"])


def test_weights_of_a_library_are_its_own(monkeypatch):
    """The download is that library's; what is asked of it, and what becomes of its answer, is ours."""
    import torchvision

    asked = {}

    def builder(weights, num_classes):
        asked.update(weights=weights, num_classes=num_classes)
        return torchvision.models.resnet18(num_classes=num_classes)

    monkeypatch.setitem(foreign._MAKERS, "torchvision", lambda own: builder)
    network = foreign.pretrained("torchvision:resnet18", 1000)
    assert asked == {"weights": torchvision.models.ResNet18_Weights.DEFAULT, "num_classes": 1000}
    assert network.feature_channels[-1] == 512
    monkeypatch.setitem(foreign._MAKERS, "torchvision", lambda own: lambda **given: 1 / 0)
    with pytest.raises(InputError, match=r"cannot be had .division by zero.; give a weight file"):
        foreign.pretrained("torchvision:resnet18", 1000)


def test_resolving_again_changes_nothing():
    copied = {"method": "ffcl", "regularization": "self", "students": 2}
    assert build.resolved(TrainConfig(**copied)).teacher_count == 3
    for options in (
        copied,
        {"method": "ft"},
        {"method": "dfa", "search_epochs": 3},
        {"method": "kd", "teachers": ("a", "b")},
    ):
        once = build.resolved(TrainConfig(**options))
        assert build.resolved(once) == once
        assert dataclasses.asdict(once)["teacher_epochs"] == once.epochs
