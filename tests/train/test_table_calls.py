"""The CIFAR-100 table in several calls: stopped, packed, unpacked in an empty folder, and as if never stopped."""

import dataclasses
import gzip
import json
import signal
import sys

import pytest

from benchmarks.train import cifar100_table, pack, runs
from benchmarks.train.rows import ROWS, Row
from tests.train.test_signals import signalled

TINY = {"model": "resnet8", "crop_padding": 1, "batch_size": 30, "lr": 0.02, "epochs": 2, "milestones": (1,)}
ROWS_OF_TESTS = (
    Row("tiny-ffsd", "cifar100-resnet20", baseline="tiny-alone", overrides=tuple(TINY.items())),
    Row("tiny-alone", "cifar100-resnet20", method="independent", students=1, overrides=tuple(TINY.items())),
    Row(
        "tiny-feed",
        "cifar100-feed-resnet56",
        overrides=tuple(
            {**TINY, "epochs": 1, "teacher_model": "resnet8", "teacher_count": 2, "teacher_epochs": 1}.items()
        ),
    ),
)


@pytest.fixture(autouse=True)
def tiny_rows(monkeypatch):
    """Three rows more, on a machine without the command line's parser."""
    for row in ROWS_OF_TESTS:
        monkeypatch.setitem(ROWS, row.name, dataclasses.replace(row, images="60+30 images"))
    monkeypatch.setitem(sys.modules, "tyro", None)


@pytest.fixture
def call(tiny_npz):
    """One call of the driver, which must succeed."""

    def run(rows, out, *options, train=True):
        data = ["--data", str(tiny_npz), "--device", "cpu"] if train else []
        return cifar100_table.main(["--rows", rows, "--out", str(out), "--seeds", "0,1", *data, *map(str, options)])

    return run


def table(out):
    """table.json without what depends on the clock."""
    found = json.loads((out / "table.json").read_text())
    for entry in found["rows"]:
        for name in ("seconds", "wall_seconds", "images_per_second"):
            assert entry.pop(name)["mean"] > 0
    return found


def test_a_row_stopped_after_every_step_and_carried_to_empty_folders_is_the_row_never_stopped(call, tmp_path, capsys):
    assert call("tiny-ffsd,tiny-alone", tmp_path / "whole", "--summarise") == 0
    carried, calls = [], 0
    while True:
        calls += 1
        out, file = tmp_path / f"machine{calls}", tmp_path / f"pack{calls}" / "state"
        unpack = ["--unpack", *carried] if carried else []
        # Every call takes a step or ends an epoch, however short it is; each has another folder.
        assert call("tiny-ffsd", out, *unpack, "--max-time", 1e-4, "--weights", "--pack", file) == 0
        carried = sorted(file.parent.iterdir())
        if [runs.read_summary(folder)["completed"] for folder in pack.run_folders(out)] == [True, True]:
            break
        assert calls < 10, "two seeds of two epochs of two steps"
    assert calls == 10
    out = tmp_path / "home"
    assert call("tiny-ffsd,tiny-alone", out, "--unpack", *carried, "--summarise") == 0
    assert table(out) == table(tmp_path / "whole")
    for seed in (0, 1):
        ours, theirs = (folder / f"runs/tiny-ffsd/seed{seed}" for folder in (out, tmp_path / "whole"))
        assert (ours / "leader.safetensors").read_bytes() == (theirs / "leader.safetensors").read_bytes()
        assert len((ours / runs.CALLS).read_text().splitlines()) == 5
        assert (theirs / "checkpoint.pt").exists() and not (ours / "checkpoint.pt").exists()
    entry = table(out)["rows"][0]
    assert entry["row"] == "tiny-ffsd" and entry["seeds"] == [0, 1] and entry["heads"]["leader"]["last"]["n"] == 2
    assert entry["gain"]["n"] == 2 and table(out)["partial"] == []
    # What is finished is not trained again.
    before = (out / "runs/tiny-ffsd/seed0" / runs.CALLS).read_bytes()
    capsys.readouterr()
    assert call("tiny-ffsd", out) == 0
    assert (out / "runs/tiny-ffsd/seed0" / runs.CALLS).read_bytes() == before


def test_what_is_shorter_or_otherwise_is_partial_and_says_why(call, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = ["--set", "lr=0.05", "--epochs", 1, "--summarise"]
    assert call("tiny-alone", out, *options) == 0
    found = json.loads((out / "table.json").read_text())
    assert (
        found["rows"] == []
        and [run["lacks"] for run in found["partial"]] == [["1 of 2 epochs", "lr 0.05 instead of 0.02"]] * 2
    )
    assert "## Complete: all epochs of the recipe, seeds 0 1\n\nNone." in capsys.readouterr().out
    monkeypatch.setitem(ROWS, "tiny-alone", ROWS_OF_TESTS[1])  # which wants all of CIFAR-100
    assert call("tiny-alone", out, "--summarise", train=False) == 0
    lacks = json.loads((out / "table.json").read_text())["partial"][0]["lacks"]
    assert lacks[2].startswith("trained on 60+30 images, crc ") and lacks[2].endswith(" instead of 50000+10000 images")
    capsys.readouterr()
    # The folder of one budget takes no other.
    assert call("tiny-alone", out) == 2
    assert capsys.readouterr().err == (
        f"error: {out}/runs/tiny-alone/seed0 holds a run with epochs = 1, not 2: give the options that it was begun "
        "with, or choose another --out\n"
    )


def test_replicas_are_seeds_of_a_row_and_go_on_elsewhere(call, tmp_path):
    out, again, file = tmp_path / "out", tmp_path / "again", tmp_path / "pack" / "state"
    assert call("tiny-alone", tmp_path / "whole", "--replicas", "--summarise") == 0
    assert call("tiny-alone", out, "--replicas", "--max-time", 1e-4, "--pack", file) == 0
    run = out / "runs/tiny-alone/seeds0-1"
    assert (run / "seed0/checkpoint.pt").exists()  # a copy, which is made anew when the run ends
    assert all(path.parent == run for path in pack.contents(run, weights=True))
    assert call("tiny-alone", again, "--replicas", "--unpack", *file.parent.iterdir(), "--summarise") == 0
    assert table(again) == table(tmp_path / "whole")
    entry = table(again)["rows"][0]
    assert entry["replicas"] == [2] and entry["seeds"] == [0, 1] and entry["heads"]["student0"]["last"]["n"] == 2


def test_teachers_travel_as_long_as_their_student_learns(call, tmp_path):
    """The teachers, trained in the first call, are neither trained again nor missing in an empty folder."""
    out, again, file = tmp_path / "out", tmp_path / "again", tmp_path / "pack" / "state"
    options = ["--seeds", "0"]
    for _ in range(3):  # a step of the teachers, their second one, and their evaluation with a step of the student
        assert call("tiny-feed", out, *options, "--max-time", 1e-4, "--pack", file) == 0
    teachers = "runs/tiny-feed/seed0/teachers"
    assert runs.read_summary(out / teachers)["completed"]
    assert call("tiny-feed", again, *options, "--unpack", *file.parent.iterdir(), "--max-time", 1e-4) == 0
    weights = f"{teachers}/seed1000/student0.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()
    assert not list((again / teachers).rglob("*.pt")) and not list((again / teachers).rglob("*_best*"))
    assert (again / "runs/tiny-feed/seed0/checkpoint.pt").exists()
    assert call("tiny-feed", again, *options, "--pack", file) == 0
    home = tmp_path / "home"
    assert call("tiny-feed", home, "--unpack", *file.parent.iterdir(), train=False) == 0
    assert runs.read_summary(home / "runs/tiny-feed/seed0")["completed"]
    assert not list(home.rglob("*.safetensors")) and not list(home.rglob("*.pt"))


def test_a_machine_that_is_wanted_back_is_given_its_pack_first(call, tmp_path, monkeypatch):
    file = tmp_path / "pack" / "state"
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, at=3)
        assert call("tiny-alone", tmp_path / "out", "--pack", file) == 75
    assert call("tiny-alone", tmp_path / "again", "--unpack", *file.parent.iterdir(), train=False) == 0
    assert pack.progress(tmp_path / "again/runs/tiny-alone/seed0") == (1, False, 1)
    assert not (tmp_path / "again/runs/tiny-alone/seed1").exists()


@pytest.fixture
def packed(call, tmp_path):
    """A folder with a finished run and its pack in several pieces."""
    out, file = tmp_path / "packed", tmp_path / "pack" / "state"
    assert call("tiny-alone", out, "--seeds", "0", "--pack", file, "--weights", "--piece-mib", 0.1) == 0
    return out, sorted(file.parent.iterdir())


def test_pieces_are_small_and_whole_together(packed, call, tmp_path):
    out, pieces = packed
    assert len(pieces) > 2 and all(piece.stat().st_size <= 0.1 * 2**20 for piece in pieces)
    assert call("tiny-alone", tmp_path / "again", "--unpack", *reversed(pieces), train=False) == 0
    kept = {".json", ".jsonl", ".npz", ".safetensors"}
    names = sorted(path.relative_to(out) for path in out.rglob("*") if path.suffix in kept)
    assert sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*")) == names
    assert all((tmp_path / "again" / name).read_bytes() == (out / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param("flip", "{1} is damaged, its bytes do not fit their checksum: copy it again", id="a bit"),
        pytest.param("cut", "{1} is damaged, its bytes do not fit their checksum: copy it again", id="truncated"),
        pytest.param("empty", "{1} is no piece of a pack: name the files that --pack wrote", id="empty"),
        pytest.param("other", "{1} is no piece of a pack: name the files that --pack wrote", id="another file"),
        pytest.param("gone", "{1} cannot be read (No such file or directory): check --unpack", id="gone"),
        pytest.param(
            "leave out", "piece 1 of {n} pieces of a pack is missing: name all of them in --unpack", id="one less"
        ),
    ],
)
def test_a_damaged_pack_is_refused_in_one_line_and_nothing_is_unpacked(packed, call, tmp_path, capsys, harm, message):
    _, pieces = packed
    victim = pieces[1]
    content = bytearray(victim.read_bytes())
    content[-100] ^= 1
    harms = {"flip": bytes(content), "cut": victim.read_bytes()[:-100], "empty": b"", "other": b"PK\x03\x04\n{}"}
    if harm in harms:
        victim.write_bytes(harms[harm])
    elif harm == "gone":
        victim.unlink()
    given = [piece for piece in pieces if piece != victim or harm != "leave out"]
    capsys.readouterr()
    assert call("tiny-alone", tmp_path / "again", "--unpack", *given, train=False) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    assert message.format(*pieces[:2], n=len(pieces)) in said
    assert not (tmp_path / "again").exists()


def test_of_two_states_of_a_run_the_newer_one_stays(call, tmp_path, capsys):
    out, old, new = tmp_path / "out", tmp_path / "old" / "state", tmp_path / "new" / "state"
    for file in (old, new):
        assert call("tiny-alone", out, "--seeds", "0", "--max-time", 1e-4, "--pack", file) == 0
    assert call("tiny-alone", out, "--summarise", train=False) == 0
    assert "- tiny-alone/seed0: no epoch has ended" in capsys.readouterr().out
    older, newer = (sorted(file.parent.iterdir()) for file in (old, new))
    assert call("tiny-alone", tmp_path / "a", "--unpack", *newer, train=False) == 0
    capsys.readouterr()
    assert call("tiny-alone", tmp_path / "a", "--unpack", *older, train=False) == 0
    assert "tiny-alone/seed0: the state that is there is as new, and stays" in capsys.readouterr().err
    assert call("tiny-alone", tmp_path / "b", "--unpack", *older, *newer, train=False) == 0
    for name in "ab":
        assert pack.progress(tmp_path / name / "runs/tiny-alone/seed0") == (0, False, 2)


def test_what_does_not_fit_is_left_out_and_said(packed, call, tmp_path, capsys):
    out, _ = packed
    file = tmp_path / "less" / "state"
    assert call("tiny-alone", out, "--pack", file, "--weights", "--pack-mib", 0.1, train=False) == 0
    assert "left out, for it does not fit into 0.1 MiB: tiny-alone/seed0 (" in capsys.readouterr().err
    assert call("tiny-alone", tmp_path / "again", "--unpack", *file.parent.iterdir(), train=False) == 0
    assert not (tmp_path / "again").exists()


def test_a_record_has_every_epoch_and_replaces_none(packed, call, tmp_path, capsys, monkeypatch):
    out, _ = packed
    monkeypatch.setattr(cifar100_table, "RECORDS", tmp_path / "records")
    assert call("tiny-alone", out, "--seeds", "0", "--record", "rehearsal", train=False) == 0
    (folder,) = (tmp_path / "records").iterdir()
    assert folder.name.endswith("_rehearsal") and "tiny-alone" in (folder / "table.md").read_text()
    run, kept = out / "runs/tiny-alone/seed0", folder / "runs/tiny-alone/seed0"
    assert gzip.decompress((kept / "metrics.jsonl.gz").read_bytes()) == (run / "metrics.jsonl").read_bytes()
    assert sorted(path.name for path in kept.iterdir()) == [
        "calls.jsonl",
        "config.json",
        "metrics.jsonl.gz",
        "summary.json",
    ]
    capsys.readouterr()
    assert call("tiny-alone", out, "--seeds", "0", "--record", "rehearsal", train=False) == 2
    assert capsys.readouterr().err.endswith("is there already: choose another slug for --record\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--rows", "ffsd-resnet23", "--data", "x.npz"], "unknown row 'ffsd-resnet23': did you mean", id="row"
        ),
        pytest.param(["--rows", "tiny-alone"], "nothing to do: give --rows and --data to train", id="nothing"),
        pytest.param(["--data", "x.npz"], "--data needs --rows", id="no rows"),
        pytest.param(["--rows", "tiny-alone", "--data", "x.npz", "--set", "lr"], "must be FIELD=VALUE", id="set"),
        pytest.param(
            ["--rows", "tiny-alone", "--data", "x.npz", "--set", "lrr=1"], "configuration field 'lrr'", id="field"
        ),
        pytest.param(
            ["--rows", "tiny-alone", "--data", "x.npz", "--replicas", "--seeds", "0,2"], "follow one another", id="gap"
        ),
        pytest.param(["--rows", "tiny-alone", "--data", "x.npz", "--mode", "fast"], "--mode", id="mode"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options, message, tmp_path, capsys):
    assert cifar100_table.main([*options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and not (tmp_path / "out").exists()
