"""What a run keeps for its report: answers and maps are those of its networks, and keeping them disturbs nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastfuse import cli
from fastfuse.methods.ffsd import FFSD
from fastfuse.models import build
from fastfuse.train import checkpoint, keepsakes
from fastfuse.train.keepsakes import Keepsakes, _with_maps


def percent_right(kept: Keepsakes, name: str) -> float:
    return 100 * float(np.mean(kept.predictions[name] == kept.labels))


def assert_answers_fit(folder, line) -> Keepsakes:
    kept = keepsakes.read(folder)
    assert isinstance(kept, Keepsakes)
    # Also to the digit: the counts are of the same answers. An oracle has none of its own.
    assert kept.predictions.keys() == line["accuracy"].keys() - {"oracle"}
    for name in kept.predictions:
        assert percent_right(kept, name) == pytest.approx(line["accuracy"][name]["top1"], abs=1e-9), name
    return kept


@pytest.mark.parametrize(
    ("options", "maps"),
    [
        ("--method ffsd --students 3 --ema 0.5", {"student0", "student1", "student2", "fusion", "leader"}),
        ("--method ffl --sharing separate --strategy grouped", {"student0", "student1", "fusion"}),
        ("--method one --students 2", {"student0", "student1"}),
        ("--method at", {"student0"}),
        pytest.param("--method paraphraser", {"teacher"}, marks=pytest.mark.long),
        pytest.param("--method dfa-search", set(), marks=pytest.mark.long),
    ],
    ids=["averaged ffsd", "stacked ffl", "one: the gated head has no map", "a teacher is not asked", "teacher", "none"],
)
def test_answers_are_those_that_were_counted_and_maps_have_their_owners(train, tiny_npz, options, maps):
    run = train(*options.split())
    kept = assert_answers_fit(run.path, run.metrics[-1])
    assert kept.maps.keys() == maps and kept.epoch == 2
    assert all(x.shape[0] == 6 and np.isfinite(x).all() and (x >= 0).all() for x in kept.maps.values())
    data = np.load(tiny_npz)
    assert np.array_equal(kept.labels, data["test_labels"]) and kept.class_names == ("0", "1", "2")
    assert np.array_equal(kept.images, data["test_images"][kept.shown])  # to the last bit, though normalised between
    assert kept.labels[kept.shown[:3]].tolist() == [0, 1, 2] and len(set(kept.shown.tolist())) == 6


def test_every_replica_has_its_own(train):
    run = train("--method", "ffsd", "--replicas", 2)
    assert not (run.path / "keepsakes.npz").exists()
    answers = []
    for seed in (0, 1):
        folder = run.path / f"seed{seed}"
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        kept = assert_answers_fit(folder, line)
        assert kept.maps.keys() == {"student0", "student1", "fusion", "leader"}
        answers.append(kept.maps["leader"])
    assert not np.array_equal(*answers)


def test_maps_are_the_channel_means_of_squares():
    torch.manual_seed(0)
    method = FFSD([lambda: build("resnet8", 3)] * 2, 3).double().eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    logits, maps = _with_maps(method, images)
    outputs = method.peers(images)
    for name, output in zip(("student0", "student1", "leader"), outputs, strict=True):
        torch.testing.assert_close(maps[name], output.features[-1].square().mean(1), rtol=1e-12, atol=0)
        assert torch.equal(logits[name], output.logits)
    fused = method.criterion.fusion([output.features[-1] for output in outputs[:2]]).fused
    torch.testing.assert_close(maps["fusion"], fused.square().mean(1), rtol=1e-12, atol=0)
    assert not method.criterion.fusion._forward_hooks


def test_keeping_draws_no_number_and_changes_no_state(train, monkeypatch):
    with_it = train("--method", "ffsd", out="with")
    seen = {}

    def nothing(trainer, method):
        seen["modes"] = [module.training for module in method.modules()]
        before = [torch.get_rng_state(), *(x.clone() for x in method.state_dict().values())]
        real(trainer, method)
        seen["same"] = [
            torch.equal(a, b)
            for a, b in zip(before, [torch.get_rng_state(), *method.state_dict().values()], strict=True)
        ]
        seen["after"] = [module.training for module in method.modules()]

    real = keepsakes.keep
    monkeypatch.setattr(keepsakes, "keep", nothing)
    again = train("--method", "ffsd", out="again")
    assert all(seen["same"]) and seen["modes"] == seen["after"]
    first, second = (checkpoint.load(run.path / "checkpoint.pt") for run in (with_it, again))
    assert all(torch.equal(x, second["method"][name]) for name, x in first["method"].items())


def test_a_run_that_stops_inside_an_epoch_keeps_nothing_and_one_that_goes_on_replaces_it(train, tiny, tmp_path):
    stopped = train("--method", "dml", "--max-time", 1e-9)
    assert not (stopped.path / "keepsakes.npz").exists()
    assert cli.main(["train", "--resume", "--quiet", "--out", str(stopped.path)]) == 0
    assert keepsakes.read(stopped.path).epoch == 2
    (stopped.path / "keepsakes.npz").unlink()  # as of a run from before
    assert cli.main(["train", "--resume", "--quiet", "--out", str(stopped.path)]) == 0
    assert keepsakes.read(stopped.path).epoch == 2


def test_a_device_without_the_memory_ends_no_run(train, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(keepsakes, "observed", full)
    run = train("--method", "independent")
    assert "no keepsakes.npz: the device's memory does not suffice" in capsys.readouterr().err
    assert run.summary["completed"] and not (run.path / "keepsakes.npz").exists()


def test_large_images_are_kept_smaller():
    white = torch.ones(2, 3, 300, 200)
    found = keepsakes._thumbnails(white, torch.full((3,), 0.5), torch.full((3,), 0.5))
    assert found.shape == (2, 96, 64, 3) and (found == 255).all()


def test_what_is_written_is_what_is_read(tmp_path):
    kept = Keepsakes(
        epoch=7,
        class_names=("ä", "b"),
        labels=np.array([0, 1, 1]),
        predictions={"leader": np.array([0, 1, 0])},
        images=np.zeros((1, 4, 4, 3), np.uint8),
        shown=np.array([2]),
        maps={"leader": np.ones((1, 2, 2), np.float32)},
    )
    keepsakes.write(tmp_path, kept)
    found = keepsakes.read(tmp_path)
    for field in dataclasses.fields(Keepsakes):
        np.testing.assert_equal(getattr(found, field.name), getattr(kept, field.name))
