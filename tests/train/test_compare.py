"""`fastfuse compare`: from run folders made by hand, whose numbers are known, and from runs of the trainer."""

import json
import statistics

import pytest

from fastfuse import cli
from fastfuse.config import TrainConfig, to_plain
from fastfuse.errors import InputError
from fastfuse.train.build import resolved
from fastfuse.train.compare import compare
from fastfuse.train.results import read_run


@pytest.fixture
def folder(tmp_path):
    """A run folder with the options, results and epochs that are given."""

    def make(name, results=None, *, lines=(), **options):
        path = tmp_path / name
        path.mkdir()
        config = resolved(TrainConfig(**{"method": "dml", "epochs": 4, "out": path, **options}))
        (path / "config.json").write_text(json.dumps(to_plain(config)))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if results is not None:
            (path / "summary.json").write_text(json.dumps(results))
        return path

    return make


def summary(networks, **others):
    """The results of a finished run; (best, last) by network."""
    return {
        "deployed": "student0",
        "networks": {
            name: {"best_top1": best, "last_top1": last, "best_epoch": 3} for name, (best, last) in networks.items()
        },
        "best_chosen_on": "test",
        "epochs": 4,
        "images_per_second": 100.0,
        "step_ms": 5.0,
        "seconds": 60.0,
        "commit": "abc",
        "versions": {"python": "3.12.1", "torch": "2.15.0"},
        "device": "a CPU",
        "mode": "eager",
        **others,
    }


def line(epoch, accuracy, validation=None, **others):
    """One epoch's line; top-1 by network."""
    parts = {"accuracy": accuracy} | ({} if validation is None else {"validation": validation})
    found = {part: {name: {"top1": x, "top5": 100.0} for name, x in values.items()} for part, values in parts.items()}
    return {"epoch": epoch, **found, "images_per_second": 100.0, "seconds": 10.0 * epoch, **others}


def test_only_what_differs_is_named(folder):
    first = folder("a", summary({"student0": (71.0, 70.0)}), lr=0.1, quiet=True)
    second = folder("b", summary({"student0": (73.5, 73.0)}), lr=0.05, device="cpu", log=("wandb",), out="elsewhere")
    found = compare([first, second])
    assert found["configuration"] == {"lr": [0.1, 0.05]}
    assert found["versions"] == {}
    expected = [{"mean": x, "sd": None, "n": 1} for x in (71.0, 73.5)]
    assert found["accuracy"]["student0"]["best"] == found["accuracy"]["deployed"]["best"] == expected
    assert [x["mean"] for x in found["accuracy"]["student0"]["last"]] == [70.0, 73.0]
    assert [column["runs"] for column in found["columns"]] == [[str(first)], [str(second)]]


def test_defaults_are_those_of_the_method(folder, tmp_path):
    given = folder("a", summary({"student0": (71.0, 70.0)}), temperature=2.0, students=2, model="resnet32")
    default = folder("b", summary({"student0": (71.0, 70.0)}))
    plain = to_plain(TrainConfig(method="dml", epochs=4))  # as another version may have left it: nothing filled in
    (default / "config.json").write_text(json.dumps({k: v for k, v in plain.items() if k not in ("ema", "log")}))
    assert compare([given, default])["configuration"] == {}


def test_seeds_are_one_column_with_mean_and_deviation(folder):
    best = [70.0, 72.0, 77.0]
    runs = [
        folder(
            f"s{seed}", summary({"student0": (x, x - 1)}, images_per_second=100.0 * seed, commit=f"c{seed}"), seed=seed
        )
        for seed, x in enumerate(best)
    ]
    other = folder("other", summary({"student0": (60.0, 60.0)}), lr=0.5, seed=0)
    found = compare([runs[0], other, *runs[1:]])
    assert [column["seeds"] for column in found["columns"]] == [[0, 1, 2], [0]]
    ours, theirs = found["accuracy"]["student0"]["best"]
    assert ours == {"mean": 73.0, "sd": pytest.approx((13.0) ** 0.5), "n": 3}  # (9 + 1 + 16) / 2
    assert theirs == {"mean": 60.0, "sd": None, "n": 1}
    assert found["accuracy"]["student0"]["last"][0]["mean"] == 72.0
    assert found["speed"]["images_per_second"] == [100.0, 100.0]
    assert found["versions"] == {"commit": [["c0", "c1", "c2"], ["abc"]]}
    assert found["configuration"] == {"lr": [0.1, 0.5]}


def test_replicas_are_seeds(folder):
    networks = {f"seed{s}/{n}": (x, x) for s, x in ((3, 50.0), (4, 54.0)) for n in ("student0", "ensemble")}
    together = folder("together", summary(networks), seed=3, replicas=2)
    alone = folder("alone", summary({"student0": (58.0, 58.0), "ensemble": (1.0, 1.0)}), seed=9)
    found = compare([together, alone])
    assert [column["seeds"] for column in found["columns"]] == [[3, 4, 9]]
    assert found["accuracy"]["student0"]["last"] == [{"mean": 54.0, "sd": pytest.approx(4.0), "n": 3}]
    assert found["accuracy"].keys() == {"deployed", "student0", "ensemble"}


@pytest.mark.parametrize(
    "options",
    [{"seed": 0}, {"seed": 1, "lr": 0.5}, {"seed": 1, "init": ("w.pt",)}, {"seed": 1, "val_fraction": 0.1}],
    ids=["the same seed again", "another option", "other initial weights", "held-out images"],
)
def test_other_runs_stay_apart(folder, options):
    runs = [folder("a", summary({"student0": (1.0, 1.0)})), folder("b", summary({"student0": (2.0, 2.0)}), **options)]
    assert len(compare(runs)["columns"]) == 2


def test_runs_that_hold_out_images_by_their_seed_are_alike(folder):
    runs = [folder(f"s{s}", summary({"student0": (1.0, 1.0)}), seed=s, val_fraction=0.1) for s in (0, 1)]
    assert len(compare(runs)["columns"]) == 1


def test_versions_devices_and_modes_that_differ(folder):
    first = folder("a", summary({"student0": (1.0, 1.0)}))
    versions = {"python": "3.12.1", "torch": "2.14.0", "triton": "3.6"}
    second = folder("b", summary({"student0": (1.0, 1.0)}, versions=versions, device="H200", mode="graphed"), lr=1.0)
    found = compare([first, second])
    assert found["versions"] == {"torch": [["2.15.0"], ["2.14.0"]], "triton": [[], ["3.6"]]}
    assert found["speed"]["device"] == [["a CPU"], ["H200"]] and found["speed"]["mode"] == [["eager"], ["graphed"]]


def test_the_deployed_networks_are_compared_across_methods(folder):
    leader = {"student0": (60.0, 60.0), "leader": (75.0, 74.0)}
    first = folder("a", summary(leader, deployed="leader"), method="ffsd")
    second = folder("b", summary({"student0": (70.0, 69.0)}), method="independent", students=1)
    found = compare([first, second])
    assert [x["mean"] for x in found["accuracy"]["deployed"]["last"]] == [74.0, 69.0]
    assert found["accuracy"]["leader"]["best"][1] is None
    assert found["configuration"]["method"] == ["ffsd", "independent"]
    assert found["configuration"]["lambda_fusion"] == [10.0, None]


def test_a_run_that_goes_on_counts_as_far_as_it_is(folder):
    done = folder("done", summary({"student0": (1.0, 1.0)}), seed=5)
    lines = [
        line(1, {"student0": 40.0, "oracle": 90.0}, {"student0": 50.0}, images_per_second=50.0),
        line(2, {"student0": 60.0, "oracle": 90.0}, {"student0": 55.0}, images_per_second=200.0),
        line(3, {"student0": 70.0, "oracle": 90.0}, {"student0": 55.0}, images_per_second=200.0),
    ]
    running = folder("running", lines=lines, val_fraction=0.0, seed=6)
    found = compare([done, running])
    assert [column["state"] for column in found["columns"]] == ["finished", "not finished: epoch 3 of 4"]
    assert found["accuracy"].keys() == {"deployed", "student0"}
    # The first of the best on validation images.
    assert found["accuracy"]["student0"]["best"][1]["mean"] == 60.0
    assert found["accuracy"]["deployed"]["last"][1]["mean"] == 70.0
    assert found["columns"][1]["best_chosen_on"] == "validation"
    # n images in n / 50, n / 200 and n / 200 seconds.
    assert found["speed"]["images_per_second"][1] == pytest.approx(3 / (1 / 50 + 1 / 200 + 1 / 200))
    assert (found["speed"]["seconds"][1], found["speed"]["step_ms"][1], found["speed"]["mode"][1]) == (30.0, None, [])


def test_a_summary_of_before_it_was_resumed_is_not_believed(folder):
    old = summary({"student0": (40.0, 40.0)}, epochs=1)
    lines = [line(1, {"student0": 40.0}), line(2, {"student0": 60.0})]
    run = read_run(folder("run", old, lines=lines))
    assert run.accuracy == {"student0": {"best": {0: 60.0}, "last": {0: 60.0}}}
    assert run.state == "not finished: epoch 2 of 4" and run.results["mode"] == "eager"


def test_a_run_of_another_version_is_read(folder):
    path = folder("old", summary({"student0": (1.0, 1.0)}))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "method": "dml2", "sparkle": 3}))
    found = compare([path, folder("new", summary({"student0": (1.0, 1.0)}))])
    assert found["configuration"] == {"method": ["dml2", "dml"], "sparkle": [3, None]}


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_lines_give_what_the_summary_says(train, replicas):
    run = train("--val-fraction", 0.3, "--epochs", 5, "--replicas", replicas, "--method", "dml")
    whole = read_run(run.path)
    (run.path / "summary.json").unlink()
    lines = read_run(run.path)
    assert lines.accuracy == whole.accuracy and lines.state == whole.state == "finished"
    for key in ("deployed", "best_chosen_on", "epochs"):
        assert lines.results[key] == whole.results[key]
    assert lines.results["images_per_second"] == pytest.approx(whole.results["images_per_second"], rel=0.05)


def test_the_replicas_of_a_run_are_its_own_column_again(train):
    run = train("--replicas", 2, "--method", "independent", "--students", 1)
    by_folder = compare([run.path / "seed0", run.path / "seed1"])
    assert len(by_folder["columns"]) == 1
    assert by_folder["accuracy"]["student0"]["best"] == [run.summary["statistics"]["student0"]["best_top1"]]
    whole = read_run(run.path)
    assert whole.accuracy["student0"] == {
        kind: {seed: read_run(run.path / f"seed{seed}").accuracy["student0"][kind][seed] for seed in (0, 1)}
        for kind in ("best", "last")
    }


def test_the_table_says_what_json_says(train, capsys):
    first, second = train("--method", "dml"), train("--method", "dml", "--lr", 0.01, "--seed", 1, out="other")
    third = train("--method", "dml", "--lr", 0.01, "--seed", 2, out="third")
    capsys.readouterr()
    command = ["compare", *(str(run.path) for run in (first, second, third))]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = [run.summary["networks"]["student0"]["last_top1"] for run in (second, third)]
    expected = {"mean": pytest.approx(statistics.fmean(last)), "sd": pytest.approx(statistics.stdev(last)), "n": 2}
    assert found["accuracy"]["student0"]["last"][1] == expected
    assert found["configuration"] == {"lr": [0.02, 0.01]}
    assert cli.main(command) == 0
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in table(capsys.readouterr().out)}
    assert rows["lr"] == ["0.02", "0.01"] and rows["seeds"] == ["0", "1 2"]
    mean, deviation = statistics.fmean(last), statistics.stdev(last)
    assert rows["student0, last"][1] == f"{mean:.2f} ± {deviation:.2f} (2)"
    assert rows["mode"] == ["eager", "eager"] and rows["state"] == ["finished", "finished"]


def table(text):
    return [row.split("│") for row in text.splitlines() if row.startswith("│")]


def test_no_run_one_run_and_no_results_are_refused(folder, tmp_path, refused):
    good = folder("good", summary({"student0": (1.0, 1.0)}))
    assert "at least two runs, not 1" in refused(command=["compare", str(good)])
    assert "at least two runs, not 0" in refused(command=["compare"])
    assert "not a run folder" in refused(command=["compare", str(good), str(tmp_path / "nowhere")])
    assert "not a run folder" in refused(command=["compare", str(good), str(good / "config.json")])
    begun = folder("begun")
    assert "no epoch has ended" in refused(command=["compare", str(good), str(begun)])
    (begun / "metrics.jsonl").unlink()  # what comes first is still being trained
    assert "no epoch has ended" in refused(command=["compare", str(good), str(begun)])
    empty = folder("empty", summary({}, epochs=0))  # --max-time was over before
    assert "no epoch has ended" in refused(command=["compare", str(good), str(empty)])


@pytest.mark.parametrize("file", ["config.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ['{"epo', "[1, 2]", "\x00\x01", '{"networks": {"a": 3}, "epochs": 4}\n', "7"])
def test_damaged_files_are_named(folder, file, text):
    results = summary({"student0": (1.0, 1.0)}) if file == "summary.json" else None
    path = folder("run", results, lines=[line(1, {"student0": 1.0})])
    (path / file).write_text(text)
    with pytest.raises(InputError, match=f"{file} is damaged") as raised:
        read_run(path)
    assert "\n" not in str(raised.value)
