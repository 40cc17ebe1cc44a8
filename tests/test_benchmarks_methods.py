"""The suite "methods", what its table says, and a step of every method."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import cases, methods, methods_step, methods_table, options, run, subset
from benchmarks.selection import Form
from fastfuse import data
from fastfuse.data import Dataset, Split
from fastfuse.errors import InputError, NonFiniteLossError
from fastfuse.methods import METHODS
from fastfuse.train.record import RunFolder

STEP = ["--suite", "step", "--device", "cpu", "--model", "resnet8", "--batch-size", "4", "--repeats", "2"]
LEARN = ["--suite", "methods", "--device", "cpu", "--model", "resnet8", "--batch-size", "10", "--epochs", "1"]
PART = ["--classes", "3", "--images", "10"]
CASE = cases.Case("resnet8", 2, 4, "off", torch.device("cpu"))


def large(classes=4, of_each=6, size=8):
    """Images whose pixels all say which class they are of, and which of it; classes not in order."""
    labels = torch.arange(classes).repeat(of_each).flip(0)
    number = torch.arange(of_each).repeat_interleave(classes)
    images = (10 * labels + number).to(torch.uint8)[:, None, None, None].expand(-1, size, size, 3).contiguous()
    split = Split(images, labels)
    names = tuple("abcd"[:classes])
    return Dataset("large", split, split, None, names, torch.zeros(3), torch.ones(3), 4, True)


def test_a_subset_is_the_first_images_of_the_first_classes_and_all_their_test_images(tmp_path):
    whole = large()
    subset.write(whole, tmp_path / "part.npz", classes=3, images=2, size=None)
    part = data.load("npz", path=tmp_path / "part.npz")
    assert part.class_names == ("a", "b", "c") and (len(part.train), len(part.test)) == (6, 18)
    assert part.train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21]
    assert sorted(part.test.images[:, 0, 0, 0].tolist()) == [10 * c + i for c in range(3) for i in range(6)]
    assert torch.equal(part.train.labels, torch.tensor([0, 0, 1, 1, 2, 2]))


def test_a_smaller_image_has_the_means_of_squares(tmp_path):
    whole = large(size=4)
    whole.train.images[0] = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    label = int(whole.train.labels[0])
    subset.write(whole, tmp_path / "part.npz", classes=None, images=1, size=2)
    found = data.load("npz", path=tmp_path / "part.npz", padding=0).train
    means = whole.train.images[0].double().view(2, 2, 2, 2, 3).mean((1, 3))
    assert torch.equal(found.images[found.labels == label][0], means.round().to(torch.uint8))
    assert found.images.shape[1:] == (2, 2, 3)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        pytest.param({"classes": 5}, "--classes must be 2 to 4 of these data, not 5", id="classes"),
        pytest.param({"images": 7}, "--images must be at most 6, which class 0 has for training, not 7", id="images"),
        pytest.param({"size": 3}, "--image-size 3 is no whole part of these images of 8x8", id="size"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(part, message, tmp_path):
    with pytest.raises(InputError, match=message):
        subset.write(large(), tmp_path / "x.npz", **{"classes": None, "images": None, "size": None, **part})
    assert list(tmp_path.iterdir()) == []


def entry(name, seed, top1, deployed="student0", **others):
    return {"name": name, "run": f"{name}-seed{seed}", "seed": seed, "top1": top1, "deployed": deployed} | {
        "seconds": 10.0 + seed,
        "before_s": 2.0,
        "commit": "abc",
        "device": "a machine",
        "versions": {"torch": "2"},
        **others,
    }


RUNS = [
    entry("independent", 0, {"student0": 50.0}),
    entry("ffsd", 0, {"leader": 51.0, "student0": 60.0, "ensemble": 55.0}, "leader"),
    {"name": "kd", "run": "kd-seed0", "seed": 0, "failed": "it diverged", "commit": "abc"},
    entry("teachers", 0, {"student0": 70.0}),
    entry("independent", 1, {"student0": 52.0}),
    entry("ffsd", 1, {"leader": 55.0, "student0": 50.0, "ensemble": 59.0}, "leader"),
    entry("ffl", 1, {"student0": 51.0, "fusion": 53.0}),
]


def test_the_table_is_means_deviations_and_gains_over_the_same_seeds():
    rows = {row["method"]: row for row in methods_table.summaries(RUNS)}
    assert list(rows) == ["independent", "ffsd", "kd", "ffl", "teachers"]
    ffsd = rows["ffsd"]
    assert (ffsd["top1"], ffsd["seeds"], ffsd["seconds"], ffsd["before_s"]) == (53.0, 2, 10.5, 2.0)
    assert ffsd["top1_sd"] == pytest.approx(math.sqrt(8))  # (51 - 53)^2 + (55 - 53)^2, over n - 1
    # 51 - 50 and 55 - 52.
    assert ffsd["gain"] == pytest.approx(2.0) and ffsd["gain_sd"] == pytest.approx(math.sqrt(2))
    # The best mean, 57 against 55, and not the best run, which is of student0.
    assert (ffsd["other"], ffsd["other_top1"]) == ("ensemble", 57.0)
    assert ffsd["other_sd"] == pytest.approx(math.sqrt(8))
    assert (rows["ffl"]["gain"], rows["ffl"]["gain_sd"], rows["ffl"]["top1_sd"]) == (-1.0, "-", "-")
    assert (rows["kd"]["seeds"], rows["kd"]["top1"], rows["kd"]["failed"]) == (0, "-", "it diverged")
    for name in ("independent", "teachers"):
        assert (rows[name]["gain"], rows[name]["other"]) == ("-", "-")


def test_the_page_says_what_was_done_and_leaves_no_method_out():
    settings = {"model": "resnet8", "teacher_model": "resnet14", "epochs": 15, "batch_size": 64, "classes": 20}
    settings |= {"train_images": 2000, "test_images": 1000, "paper_epochs": 300, "search_epochs": 2}
    page = methods_table.markdown(settings, RUNS)
    assert "| ffsd | 53.00 ± 2.83 | +2.00 ± 1.41 | 57.00 ± 2.83 ensemble | 2 | 10 | 2 |" in page
    assert "| ffl | 51.00 | -1.00 | 53.00 fusion | 1 | 11 | 2 |" in page
    assert "| kd | failed: it diverged | - | - | - | - | - |" in page
    assert "multiplied by 15/300" in page and "by commit abc on a machine; torch 2" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_runs_are_kept_and_not_trained_again(tmp_path, capsys, monkeypatch):
    trained = []
    original = methods.train

    def train(config):
        trained.append((config.out.name, config.resume))
        if config.method == "dml" and broken:
            raise NonFiniteLossError("the loss is nan")
        return original(config)

    monkeypatch.setattr(methods, "train", train)
    broken = True
    out = tmp_path / "results"
    arguments = [*LEARN, *PART, "--teacher-model", "resnet14", "--out", str(out)]
    assert run.main([*arguments, "--methods", "dml,at,kd", "--seeds", "1"]) == 0
    first = ["independent-seed0", "dml-seed0", "teacher0-seed0", "kd-seed0", "at-seed0"]
    assert trained == [(name, False) for name in first]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == first and rows[1]["failed"] == "the loss is nan"
    assert {(row["model"], row["deployed"]) for row in rows if row["name"] == "kd"} == {("resnet8", "student0")}
    assert RunFolder(out / "runs" / "teacher0-seed0").read_config().model == "resnet14"
    taught = [RunFolder(out / "runs" / f"{name}-seed0").read_config() for name in ("kd", "at")]
    assert {c.teachers for c in taught} == {(str(out / "runs" / "teacher0-seed0"),)}
    # The last epoch's accuracy is the run's own.
    summary = json.loads((out / "runs" / "kd-seed0" / "summary.json").read_text())
    assert rows[3]["top1"] == {"student0": summary["networks"]["student0"]["last_top1"]}
    assert "failed: the loss is nan" in (out / "results.md").read_text()
    trained.clear()
    broken = False
    # More seeds: what failed is tried again, what is there is not.
    assert run.main([*arguments, "--methods", "dml,at", "--seeds", "2"]) == 0
    assert [name for name, _ in trained] == [
        *("dml-seed0", "independent-seed1", "dml-seed1", "teacher0-seed1", "at-seed1")
    ]
    seeds = {
        RunFolder(out / "runs" / f"{name}-seed{i}").read_config().seed for name in ("at", "teacher0") for i in (0, 1)
    }
    assert len(seeds) == 4
    kept = json.loads((out / "methods_resnet8_digits_e1_b10_cpu.json").read_text())
    assert [(row["method"], row["seeds"]) for row in kept["rows"]] == [
        *(("independent", 2), ("kd", 1), ("at", 2), ("dml", 2), ("teachers", 2))
    ]
    assert kept["settings"]["train_images"] == 30 and kept["environment"]["commit"]
    printed = capsys.readouterr()
    assert "best other head" in printed.out and "at seed 1: " in printed.err
    # With nothing left to train the page is written all the same.
    (out / "results.md").unlink()
    assert run.main([*arguments, "--methods", "dml,at", "--seeds", "2"]) == 0
    assert "| teachers |" in (out / "results.md").read_text() and len(trained) == 5
    # Another budget does not belong into this folder.
    assert run.main([*arguments, "--epochs", "2"]) == 2
    assert "holds runs of another epochs" in capsys.readouterr().err


def test_every_method_has_the_budget_and_its_published_values_in_proportion(tmp_path, monkeypatch):
    seen = {}

    def train(config):
        seen[config.out.name] = config
        config.out.mkdir(parents=True)
        (config.out / "student0.safetensors").touch()
        heads = {METHODS[config.method].deployed: {"last_top1": 50.0}}
        return {"deployed": next(iter(heads)), "networks": heads, "seconds": 1.0, "versions": {}} | dict.fromkeys(
            ("step_ms", "mode", "device", "commit"), "x"
        )

    monkeypatch.setattr(methods, "train", train)
    arguments = ["--suite", "methods", "--device", "cpu", "--model", "resnet8", "--teacher-model", "resnet14"]
    given = options.make_parser("").parse_args([*arguments, *PART, "--epochs", "24", "--out", str(tmp_path)])
    report = methods.run(options.for_suite(given, "methods"))
    wanted = {name: methods.SEEDS.get(name, 1) for name in METHODS if name not in methods.WITHOUT_A_NETWORK}
    wanted |= {"independent": 3, "teachers": 15}
    assert {row["method"]: row["seeds"] for row in report.rows} == wanted
    assert len(seen) == sum(wanted.values())
    budget = (
        "epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "schedule",
        "milestones",
        "crop_padding",
        "flip",
        "data_path",
    )
    assert {tuple(getattr(config, key) for key in budget) for config in seen.values()} == {
        (24, 128, 0.1, 1e-4, "multistep", None, 2, False, tmp_path / "images.npz")
    }
    students = [config for name, config in seen.items() if not name.startswith("teacher")]
    assert {config.model for config in students} == {"resnet8"}
    for config in students:
        published = METHODS[config.method].defaults.get("rampup_epochs")
        assert config.rampup_epochs == (None if published is None else pytest.approx(published * 0.08))
    assert seen["ffl-seed0"].rampup_epochs == pytest.approx(6.4) and seen["dfa-seed1"].search_epochs == 3
    assert seen["feed-parallel-seed2"].teachers == tuple(str(tmp_path / f"runs/teacher{i}-seed2") for i in range(5))
    assert seen["ffcl-seed0"].teacher_model == "resnet14" and seen["independent-seed0"].students == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--methods", "ffsdd"], "unknown method 'ffsdd': did you mean ffsd", id="name"),
        pytest.param(["--methods", "dfa-search"], "unknown method 'dfa-search'", id="deploys-nothing"),
        pytest.param(["--model", "resnet8,resnet20"], "trains one network: give one --model", id="models"),
        pytest.param(["--seeds", "0"], "--seeds must be at least 1, not 0", id="seeds"),
    ],
)
def test_learning_refuses_what_cannot_be(arguments, message, tmp_path, capsys):
    assert run.main([*LEARN, "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_learning_needs_a_folder(capsys):
    assert run.main(LEARN) == 2
    assert "--suite methods needs --out" in capsys.readouterr().err


def test_a_step_of_methods_is_measured_beside_one_student_alone(tmp_path, capsys):
    assert run.main([*STEP, "--methods", "kd,ffl", "--out", str(tmp_path)]) == 0
    name = "step_resnet8_methods_b4_off_cpu"
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert [(r["method"], r["students"], r["teachers"]) for r in rows] == [
        *(("independent", 1, 0), ("ffl", 2, 0), ("kd", 1, 1))
    ]
    for row in rows:
        assert row["cost"] == pytest.approx(row["median_ms"] / rows[0]["median_ms"])
        assert row["lowest_ms"] <= row["median_ms"] <= row["highest_ms"] and row["waits"] == 0
    # A frozen teacher without a backward costs less than a student.
    assert rows[0]["ops"] < rows[2]["ops"] < 2 * rows[0]["ops"]
    assert len(list(csv.DictReader((tmp_path / f"{name}.csv").open()))) == 3
    assert "ratio kd eager/loop/independent: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [["--students", "2"], ["--providers", "published"], ["--quick"], ["--plot", "x.png"]]
)
def test_options_of_ffsd_are_not_those_of_all_methods(option, capsys):
    assert run.main([*STEP, "--methods", "kd", *option]) == 2
    assert f"{option[0]} is of the step of ffsd alone" in capsys.readouterr().err


def test_a_step_of_a_method_that_does_not_exist_is_one_line(capsys):
    assert run.main([*STEP, "--methods", "kdd"]) == 2
    assert "unknown method 'kdd'" in capsys.readouterr().err


def test_ffsd_alone_keeps_its_published_baseline(monkeypatch):
    from benchmarks import step

    monkeypatch.setattr(methods_step, "run", lambda options: iter(["methods"]))
    monkeypatch.setattr(step, "pick_device", lambda name: (_ for _ in ()).throw(InputError("the step of ffsd")))
    for names, own in ((["ffsd"], True), (None, True), (["kd"], False), (["ffsd", "kd"], False), (["all"], False)):
        given = options.make_parser("").parse_args(STEP)
        given.methods = names
        if own:
            with pytest.raises(InputError, match="the step of ffsd"):
                list(step.run(given))
        else:
            assert list(step.run(given)) == ["methods"]


def test_teachers_have_statistics_of_their_own_and_all_forms_start_alike():
    first, second = (methods_step.make("feed-parallel", CASE, "resnet14") for _ in range(2))
    states = [method.state_dict() for method in (first, second)]
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert len(first.teachers(torch.zeros(2, 3, 32, 32))) == 5
    plain = methods_step.preliminary.stand_in
    seen = []

    def stand_in(config, classes):
        config, given = plain(config, classes)
        seen.extend(given["teachers"])
        return config, given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods_step.preliminary, "stand_in", stand_in)
        methods_step.make("kd", CASE, None)
    norms = [m for m in seen[0].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(norm.running_mean.abs().sum() > 0 for norm in norms)


def test_no_speed_of_a_form_that_computes_something_else(monkeypatch):
    original = methods_step._step

    def step(method, form, case):
        made, came_to = original(method, form, case)
        return (lambda: made() * (1.0 if form.strategy == "loop" else 1.02)), came_to

    monkeypatch.setattr(methods_step, "_step", step)
    forms = [Form("eager", "loop"), Form("eager", "auto")]
    with pytest.raises(AssertionError, match=r"eager/auto computes a loss .* where its own eager loop has"):
        methods_step.prepared(CASE, ["independent"], forms, None, [])


def test_what_a_method_cannot_do_is_left_out_and_said():
    warnings = []
    made = methods_step.prepared(
        CASE, ["independent", "paraphraser"], [Form("eager", "loop"), Form("eager", "grouped")], None, warnings
    )
    assert [(name, one.form.strategy) for (name, _), one in made.items()] == [
        *(("independent", "loop"), ("independent", "grouped"), ("paraphraser", "loop"))
    ]
    assert len(warnings) == 1 and warnings[0].startswith("resnet8 paraphraser eager/grouped left out: ")


@pytest.mark.long
def test_every_method_is_measured_and_learns(tmp_path, capsys):
    given = [*STEP, "--model", "resnet14", "--methods", "all", "--out", str(tmp_path / "step")]
    assert run.main(given) == 0
    rows = json.loads((tmp_path / "step" / "step_resnet14_methods_b4_off_cpu.json").read_text())["rows"]
    assert {row["method"] for row in rows} == set(METHODS) and {row["waits"] for row in rows} == {0}
    out = tmp_path / "learn"
    assert run.main([*LEARN, *PART, "--teacher-model", "resnet14", "--seeds", "1", "--out", str(out)]) == 0
    found = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["name"] for row in found} == set(METHODS) - set(methods.WITHOUT_A_NETWORK) | {"teachers"}
    assert not [row for row in found if "failed" in row]
    assert next(row for row in found if row["name"] == "dfa")["before_s"] > 0
    weights = np.array([row["top1"][row["deployed"]] for row in found])
    assert ((weights >= 0) & (weights <= 100)).all()
    capsys.readouterr()
