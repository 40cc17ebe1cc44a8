"""The rows of the CIFAR-100 table, and the figures of its page from runs that are written here by hand."""

import dataclasses
import statistics
import sys

import pytest

from benchmarks.train import cifar100_table, found, page, table
from benchmarks.train.rows import ROWS
from fastfuse.config import from_recipe, recipes
from fastfuse.methods import METHODS
from fastfuse.train.build import resolved

BUDGET = ("data", "epochs", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "schedule", "milestones")


def test_every_row_is_a_recipe_or_its_baseline_under_the_same_budget():
    assert {row.recipe for row in ROWS.values()} == {name for name in recipes() if name.startswith("cifar100-")}
    for row in ROWS.values():
        config = resolved(row.config())
        if row.method is None:
            assert row.config() == from_recipe(row.recipe)
        if row.baseline is None:
            assert (config.method, config.students) == ("independent", 1)
            continue
        alone = resolved(ROWS[row.baseline].config())
        assert alone.method == "independent" and alone.model == config.model
        assert [getattr(alone, name) for name in BUDGET] == [getattr(config, name) for name in BUDGET]


def test_published_values_are_of_heads_that_a_run_has_and_say_where_they_stand(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cifar100_table.main(["--rows", "list"]) == 0
    printed = capsys.readouterr().out
    for name, row in ROWS.items():
        assert f"{name}: " in printed
        heads = {METHODS[row.config().method].deployed, "fusion"}
        assert all(value.head in heads and value.source and 60 < value.top1 < 85 for value in row.published)
    assert "ffsd-resnet32: ffsd resnet32, recipe cifar100-resnet32, 300 epochs, beside independent-resnet32" in printed
    assert "    published: 74.85 leader (best epoch on the test images; FFSD's README, mean of three runs)" in printed
    best = [value for row in ROWS.values() for value in row.published if "best" in value.chosen]
    assert [value.top1 for value in best] == [72.70, 74.85, 75.80, 75.81, 79.14, 77.39, 81.60]


def run(row, seed, top1, *, lacks=(), commit="abc", amp="bf16"):
    """A seed whose deployed network had these percentages after its epochs."""
    deployed = METHODS[ROWS[row].config().method].deployed
    history = [
        {
            "epoch": i + 1,
            "learning_rate": 0.1,
            "losses": {"loss": 2.0 + seed + i, "kl": 1.0},
            "accuracy": {"oracle": {"top1": 99.0}, deployed: {"top1": x}, "other": {"top1": x - 1}},
        }
        for i, x in enumerate(top1)
    ]
    made = {"commit": [commit], "device": ["a GPU"], "versions": ["torch 2"], "data": ["images"]}
    speed = {"seconds": 10.0 + seed, "wall": 12.0 + seed, "images_per_second": 100.0, "peak_mb": 300.0 + seed}
    return found.Found(
        ROWS[row], seed, f"{row}/seed{seed}", history, deployed, amp, list(lacks), made, replicas=1, **speed
    )


@pytest.fixture
def summary(monkeypatch):
    def summarised(runs, seeds=(0, 1, 2)):
        monkeypatch.setattr(table, "collect", lambda out: (runs, ["a note"]))
        return table.summarised(None, seeds)

    return summarised


OURS = [[50.0, 71.0, 70.0], [50.0, 72.0, 74.0], [50.0, 73.0, 75.0]]
ALONE = [[40.0, 60.0, 69.0], [40.0, 60.0, 70.0], [40.0, 60.0, 68.0]]


def complete(**own):
    return [
        *(run("ffsd-resnet32", seed, x, **own) for seed, x in enumerate(OURS)),
        *(run("independent-resnet32", seed, x) for seed, x in enumerate(ALONE)),
    ]


def test_a_complete_row_has_the_last_epoch_first_and_gains_of_the_same_seeds(summary):
    entries = summary(complete())
    row, alone = entries["rows"]
    leader = row["heads"]["leader"]
    assert list(row["heads"]) == ["leader", "other"]
    assert leader["last"] == {"mean": 73.0, "sd": pytest.approx(statistics.stdev([70, 74, 75])), "n": 3}
    assert leader["best"]["mean"] == pytest.approx((71 + 74 + 75) / 3) and leader["best_epochs"] == [2, 3, 3]
    assert row["gain"] == {"mean": pytest.approx(4.0), "sd": pytest.approx(statistics.stdev([1, 4, 7])), "n": 3}
    assert alone["gain"] == "it is a baseline" and entries["partial"] == []
    assert (row["peak_mb"], row["seconds"]["mean"], row["wall_seconds"]["mean"]) == (302.0, 11.0, 13.0)
    text = page.markdown(entries)
    assert "| ffsd-resnet32 | leader 73.00 ± 2.65 | 73.33 ± 2.08 (epochs 2 3 3) | +4.00 ± 3.00 over indep" in text
    assert "| 74.85 leader (best epoch on the test images; FFSD's README, mean of three runs) | 3 (0 1 2) |" in text
    assert "- commit abc on a GPU; torch 2; images: ffsd-resnet32, independent-resnet32." in text and "- a note" in text


@pytest.mark.parametrize(
    ("runs", "lacks"),
    [
        pytest.param(complete()[:2], [["seeds 2 of the row"]] * 2, id="a seed less"),
        pytest.param(
            [*complete()[:2], run("ffsd-resnet32", 2, OURS[2], lacks=["3 of 300 epochs"])],
            [["seeds 2 of the row"], ["seeds 2 of the row"], ["3 of 300 epochs"]],
            id="a seed shorter",
        ),
        pytest.param(
            [*complete()[:2], run("ffsd-resnet32", 2, OURS[2], amp="off")],
            [["another precision, same row"]] * 3,
            id="another precision",
        ),
    ],
)
def test_a_row_that_is_not_whole_is_partial_with_its_reason(summary, runs, lacks):
    entries = summary(runs)
    assert entries["rows"] == [] and [entry["lacks"] for entry in entries["partial"]] == lacks


def test_a_seed_beyond_those_asked_for_is_partial_beside_its_row(summary):
    entries = summary([*complete(), run("ffsd-resnet32", 3, [50.0], lacks=["1 of 300 epochs"])])
    assert [row["row"] for row in entries["rows"]] == ["ffsd-resnet32", "independent-resnet32"]
    assert [(entry["folder"], entry["last"]["leader"]) for entry in entries["partial"]] == [
        ("ffsd-resnet32/seed3", 50.0)
    ]


def test_there_is_no_gain_over_a_baseline_of_another_commit_or_one_that_is_not_whole(summary):
    assert summary(complete(commit="def"))["rows"][0]["gain"] == "independent-resnet32 has another commit"
    assert summary(complete()[:4])["rows"][0]["gain"] == "independent-resnet32 is not complete"


def test_the_way_of_a_row_stands_beside_its_baseline_after_the_same_epochs(summary, monkeypatch):
    monkeypatch.setattr(table, "EPOCHS", (2, 10))
    runs = complete()
    runs[0] = dataclasses.replace(runs[0], history=runs[0].history[:1])
    course = summary(runs)["course"][0]
    assert [point["epoch"] for point in course["points"]] == [2, 3]
    first = course["points"][0]
    assert first["top1"]["leader"] == {"mean": 72.5, "sd": pytest.approx(0.5**0.5), "n": 2}
    assert first["baseline"] == {"mean": 60.0, "sd": 0.0, "n": 3} and first["losses"] == {"loss": 4.5, "kl": 1.0}
    text = page.markdown(summary(runs))
    assert "| independent-resnet32, top-1 % | 60.00 ± 0.00 | 69.00 ± 1.00 |" in text and "| kl | 1 | 1 |" in text
