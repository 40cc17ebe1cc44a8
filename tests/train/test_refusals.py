"""What a user did wrong is one line, and no run; what the program did wrong keeps its traceback."""

import json
import os

import numpy as np
import pytest
import torch

from fastfuse import cli
from fastfuse.train.checkpoint import load


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method ffds", ["ffds", "ffsd", "dml"]),
        ("--model resnt20", ["resnt20", "resnet20"]),
        ("--model resnet21", ["resnet21", "6n + 2"]),
        ("--model wrn17_2", ["wrn17_2", "6n + 4"]),
        ("--data digit", ["digit", "digits"]),
        ("--recipe cifar100-resnet23", ["cifar100-resnet20"]),
        ("--students 1", ["--students", "at least 2"]),
        ("--students 0", ["--students", "at least 1"]),
        ("--method dml --students 1", ["dml", "at least 2"]),
        ("--batch-size 0", ["--batch-size", "at least 1", "0"]),
        ("--batch-size 2.5", ["--batch-size", "2.5"]),
        ("--epochs 0", ["--epochs"]),
        ("--lr nan", ["--lr", "finite", "nan"]),
        ("--lr fast", ["--lr", "fast"]),
        ("--lr inf", ["--lr", "inf"]),
        ("--lr 0", ["--lr", "positive"]),
        ("--lr -0.1", ["--lr", "positive"]),
        ("--momentum -1", ["--momentum"]),
        ("--momentum 0", ["--momentum", "--no-nesterov"]),
        ("--weight-decay -1", ["--weight-decay"]),
        ("--temperature 0", ["--temperature", "positive"]),
        ("--lambda-fusion -1", ["--lambda-fusion"]),
        ("--ema 1", ["--ema"]),
        ("--val-fraction 1", ["--val-fraction"]),
        ("--val-fraction 0.99", ["--val-fraction", "class"]),
        ("--schedule step", ["--schedule", "multistep"]),
        ("--milestones 5 3", ["--milestones"]),
        ("--amp fp8", ["--amp", "bf16"]),
        ("--mode graph", ["--mode", "graphed"]),
        ("--strategy group", ["--strategy", "grouped"]),
        ("--diversity-mode code", ["--diversity-mode", "published"]),
        ("--device tpu", ["--device"]),
        ("--max-time 0", ["--max-time"]),
        ("--crop-padding 8", ["--crop-padding", "8x8"]),
        ("--method dml --lambda-fusion 1", ["dml", "--lambda-fusion", "--temperature"]),
        ("--method independent --temperature 3", ["independent", "--temperature"]),
        ("--kl-target-epsilon 1e-7", ["ffsd", "--kl-target-epsilon"]),
        ("--wrn-conv-bias False", ["resnet8", "conv_bias"]),
        ("--model wrn10_1 --wrn-stride-on conv3", ["stride_on", "conv3"]),
        ("--method ffl --branch-stage 3", ["--branch-stage", "1 to 2"]),
        ("--method ffl --sharing both", ["--sharing", "both", "separate"]),
        ("--method ffl --sharing separate --branch-stage 1", ["--branch-stage", "--sharing separate"]),
        ("--method ffl --model tests.models.test_foreign:small", ["no stages", "--sharing separate"]),
        ("--method one --branch-stage 3", ["--branch-stage", "1 to 2"]),
        ("--init nowhere.pt", ["nowhere.pt", "exist"]),
        ("--init leeder=x.pt", ["leeder", "leader"]),
        ("--learning-rate 0.1", ["--learning-rate"]),
        ("--data digits", ["--data-path", "digits"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_option_is_one_clear_line(refused, options, said):
    message = refused(*options.split())
    assert all(word in message for word in said), message


@pytest.mark.parametrize("size", [4, 2, 1])
def test_images_too_small_for_the_method(refused, tmp_path, size):
    path = tmp_path / "small.npz"
    images = np.zeros((40, size, size, 3), np.uint8)
    labels = np.arange(40) % 3
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    message = refused("--data-path", path, "--crop-padding", 0)
    assert f"{size}x{size}" in message and "larger images" in message


def test_a_last_batch_of_one_image_with_maps_of_one_pixel(refused, tmp_path):
    path = tmp_path / "small.npz"
    images, labels = np.zeros((25, 4, 4, 3), np.uint8), np.arange(25) % 3
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    message = refused("--data-path", path, "--crop-padding", 0, "--method", "independent")
    assert "4x4" in message and "more than 1 value" in message


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda a: a.pop("test_labels"), "test_labels"),
        (lambda a: a.update(train_images=a["train_images"].astype(np.float32)), "uint8"),
        (lambda a: a.update(train_labels=a["train_labels"][:-1]), "train_labels"),
        (lambda a: a.update(test_labels=a["test_labels"] + 7), "test_labels"),
        (lambda a: a.update(train_images=a["train_images"][:, :, :, :2]), "train_images"),
    ],
    ids=["missing key", "wrong dtype", "wrong length", "label out of range", "wrong shape"],
)
def test_damaged_data_reach_the_user_as_one_line(refused, tiny_npz, tmp_path, damage, said):
    with np.load(tiny_npz) as file:
        arrays = dict(file)
    damage(arrays)
    path = tmp_path / "damaged.npz"
    np.savez(path, **arrays)
    message = refused("--data-path", path)
    assert said in message and "damaged.npz" in message


@pytest.mark.parametrize("content", [None, b"", b"not an npz"], ids=["missing", "empty", "text"])
def test_unreadable_data(refused, tmp_path, content):
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    assert "data.npz" in refused("--data-path", path)


def test_absent_cifar_says_how_to_get_it(refused, tmp_path):
    command = f"train --data cifar100 --data-root {tmp_path}/no --model resnet8 --out {tmp_path}/run --device cpu"
    message = refused(command=command.split())
    assert "--download" in message and f"{tmp_path}/no" in message


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: torch.save({"a": torch.ones(1)}, path), "does not fit network"),
        (lambda path: torch.save([1, 2], path), "state dict"),
        (lambda path: path.write_bytes(b"junk"), "cannot be read as weights"),
    ],
    ids=["other network", "no state dict", "junk"],
)
def test_unusable_initial_weights(refused, tmp_path, write, said):
    path = tmp_path / "weights.pt"
    write(path)
    message = refused("--init", path)
    assert said in message and "weights.pt" in message


def test_a_pickle_that_runs_code_is_not_run(refused, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"weight": Harmful()}, tmp_path / "weights.pt")
    assert "cannot be read as weights" in refused("--init", tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_holds_another_run(train, refused):
    run = train("--epochs", 1)
    before = (run.path / "checkpoint.pt").read_bytes()
    assert "--resume" in refused("--epochs", 1, folder_remains=True)
    assert (run.path / "checkpoint.pt").read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(refused, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert "other files" in refused(folder_remains=True)
    assert "config.json" in refused("--resume", folder_remains=True)
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_a_file_as_run_folder(refused, tmp_path):
    (tmp_path / "run").write_text("")
    assert "is a file" in refused(folder_remains=True)
    assert "cannot use" in refused(out="run/below")


def test_resume_needs_a_folder(refused):
    assert "--out" in refused(command=["train", "--resume"])


def test_resuming_what_is_not_there_starts_no_run_of_defaults(refused, train, tmp_path):
    absent = tmp_path / "absent"
    assert f"{absent} holds no run to resume" in refused(command=["train", "--resume", "--out", str(absent)])
    assert not absent.exists()
    # A job that is started again and again gives its options beside --resume.
    assert train("--method", "independent", "--students", 1, "--resume", out="absent").summary["completed"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model resnet14", "model = resnet8, not resnet14"),
        ("--lr 0.5", "lr = 0.02, not 0.5"),
        ("--epochs 9", "epochs = 1, not 9"),
        ("--seed 4", "seed = 0, not 4"),
        ("--method dml", "method = ffsd, not dml"),
    ],
)
def test_a_checkpoint_of_another_run(train, refused, options, said):
    train("--epochs", 1)
    message = refused("--epochs", 1, "--resume", *options.split(), folder_remains=True)
    assert said in message


def test_a_checkpoint_of_other_data(train, refused, tiny_npz, tmp_path):
    train("--epochs", 1)
    with np.load(tiny_npz) as file:
        arrays = dict(file)
    arrays["train_images"] = arrays["train_images"] ^ 1
    np.savez(tmp_path / "other.npz", **arrays)
    options = ("--epochs", 1, "--resume", "--data-path", tmp_path / "other.npz")
    assert "other data" in refused(*options, folder_remains=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"PK\x03\x04" + data[4:100],
        lambda data: b"a text",
    ],
    ids=["truncated", "empty", "archive header only", "text"],
)
def test_a_damaged_checkpoint(train, refused, damage):
    run = train("--epochs", 1)
    path = run.path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert "checkpoint.pt cannot be read" in refused("--epochs", 1, "--resume", folder_remains=True)
    assert "checkpoint.pt" in refused(command=["eval", str(run.path), "--device", "cpu"])


def test_a_file_that_is_no_checkpoint(train, refused):
    run = train("--epochs", 1)
    torch.save({"weights": torch.ones(2)}, run.path / "checkpoint.pt")
    assert "not a fastfuse checkpoint" in refused("--epochs", 1, "--resume", folder_remains=True)
    state = {"format": "fastfuse-checkpoint", "version": 99}
    torch.save(state, run.path / "checkpoint.pt")
    assert "version 99" in refused("--epochs", 1, "--resume", folder_remains=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"colour": 3}'], ids=["cut", "no object", "unknown field"])
def test_a_damaged_configuration(train, refused, text):
    run = train("--epochs", 1)
    (run.path / "config.json").write_text(text)
    assert "config.json" in refused("--resume", folder_remains=True)
    assert "config.json" in refused(command=["eval", str(run.path)])


def test_eval_of_what_is_no_run(refused, tmp_path):
    assert "config.json" in refused(command=["eval", str(tmp_path)])
    assert "needs one run folder" in refused(command=["eval"])
    assert "did you mean train" in refused(command=["trian"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(train, refused, monkeypatch):
    from fastfuse.train.step import TrainStep

    run_step, steps = TrainStep.__call__, []

    def step(self, *arguments):
        steps.append(1)
        output = run_step(self, *arguments)
        if len(steps) == 5:  # epoch 2, step 2
            output.terms["leader_kl"].fill_(float("nan"))
            output.terms["leader_ce"].fill_(float("inf"))
            return output._replace(loss=output.loss * float("nan"))
        return output

    monkeypatch.setattr(TrainStep, "__call__", step)
    message = refused("--epochs", 3, folder_remains=True)
    assert "epoch 2, step 2" in message and "leader_ce, leader_kl" in message and "student" not in message
    monkeypatch.undo()
    resumed = train("--epochs", 3, "--resume")
    whole = train("--epochs", 3, out="whole")
    assert resumed.timeless_metrics() == whole.timeless_metrics()


def test_a_rate_that_explodes_is_named_too(refused, tmp_path):
    message = refused("--lr", "1e18", "--epochs", 3, folder_remains=True)
    assert "not finite" in message or "not a number" in message
    state = tmp_path / "run" / "checkpoint.pt"
    assert not state.exists() or all(
        x.isfinite().all() for x in load(state)["method"].values() if x.is_floating_point()
    )


def test_weights_that_explode_in_the_last_step_do_not_replace_a_good_checkpoint(refused, tmp_path, monkeypatch):
    from fastfuse.train.step import TrainStep

    run_step, steps = TrainStep.__call__, []

    def step(self, *arguments):
        steps.append(1)
        output = run_step(self, *arguments)
        if len(steps) == 6:
            with torch.no_grad():
                next(self.method.parameters()).fill_(float("inf"))
        return output

    monkeypatch.setattr(TrainStep, "__call__", step)
    assert "weights or statistics became" in refused(folder_remains=True)
    assert load(tmp_path / "run" / "checkpoint.pt")["position"]["epoch"] == 1


def test_errors_of_the_program_itself_keep_their_traceback(tiny, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a fault of this package")

    monkeypatch.setattr("fastfuse.train.run.train", broken)
    with pytest.raises(RuntimeError, match="a fault of this package"):
        cli.main([*tiny, "--out", str(tmp_path / "run")])


def test_the_configuration_of_a_run_is_complete(train):
    run = train("--epochs", 1)
    config = json.loads((run.path / "config.json").read_text())
    assert config["temperature"] == 2.0 and config["milestones"] == [1, 1] and config["lambda_fusion"] == 10.0
