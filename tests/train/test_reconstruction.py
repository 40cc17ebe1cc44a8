"""The analysis of reconstruction errors: rows of trained paraphrasers, the table, the picture, what is refused."""

import builtins
import copy
import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from fastfuse import cli, models
from fastfuse.config import TrainConfig
from fastfuse.errors import InputError
from fastfuse.nn.factor import Paraphraser
from fastfuse.train import build
from fastfuse.train.reconstruction import Reconstruction, draw, errors, reconstruct, save


@pytest.fixture
def config(tiny_npz, tmp_path) -> TrainConfig:
    return TrainConfig(
        method="paraphraser", model="resnet8", teacher_model="resnet8", data="npz", data_path=tiny_npz, crop_padding=1,
        epochs=2, batch_size=24, lr=0.05, device="cpu", quiet=True, out=tmp_path / "analysis",
    )  # fmt: skip


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = []
    for name in ("first", "second"):
        paths.append(str(tmp_path / f"{name}.pt"))
        torch.save(models.build("resnet8", 3).state_dict(), paths[-1])
    return paths


def test_errors_are_means_over_all_elements_of_all_images(config):
    dataset = build.load_data(build.resolved(dataclasses.replace(config, method="independent", teacher_model=None)))
    network, paraphraser = models.build("resnet8", 3), Paraphraser(64, 32)
    plain = copy.deepcopy(network).double().eval()
    found = errors(network, paraphraser, dataset)
    for split, (error, scale) in zip((dataset.train, dataset.test), found, strict=True):
        images = (split.images.double() / 255 - dataset.mean.double()) / dataset.std.double()
        feature = plain(images.permute(0, 3, 1, 2)).features[-1]
        wanted = F.l1_loss(paraphraser.double()(feature), feature).item()
        assert error == pytest.approx(wanted, rel=1e-5) and scale == pytest.approx(
            feature.abs().mean().item(), rel=1e-5
        )
        paraphraser.float()


def test_each_network_has_a_row_and_a_run_of_its_own(config, files):
    rows = reconstruct([*files, files[0]], config)
    assert [row.network for row in rows] == [*files, files[0]]
    assert all((row.channels, row.factor_channels) == (64, 32) for row in rows)
    assert all(min(row.train, row.test, row.scale) > 0 for row in rows)
    assert rows[0] == rows[2], "the same network, epochs and seed"
    assert rows[0].test != rows[1].test
    folders = sorted(path.name for path in config.out.iterdir())
    assert folders == ["0-first.pt", "1-second.pt", "2-first.pt"]
    ended = json.loads((config.out / "0-first.pt" / "metrics.jsonl").read_text().splitlines()[-1])
    assert ended["epoch"] == 2 and ended["losses"]["reconstruction"] == ended["losses"]["loss"]
    assert reconstruct([*files, files[0]], dataclasses.replace(config, resume=True)) == rows


def test_the_table_and_the_picture_are_saved(config, tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib, which draws the picture")
    rows = [Reconstruction("runs/one", 64, 32, 0.1, 0.2, 0.5), Reconstruction("runs/two", 64, 16, 0.3, 0.4, 0.5)]
    table, picture = save(rows, dataclasses.replace(config, out=tmp_path))
    assert (table.name, picture.name) == ("reconstruction.json", "reconstruction.png")
    saved = json.loads(table.read_text())
    assert saved["rows"][1] == rows[1]._asdict()
    assert saved["settings"]["epochs"] == 2 and "torch" in saved["versions"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_more_epochs_rebuild_better(config, files):
    short, long = (
        reconstruct(files[:1], dataclasses.replace(config, epochs=epochs, lr=0.1, out=config.out / str(epochs)))[0]
        for epochs in (1, 12)
    )
    assert long.train < 0.95 * short.train and long.test < 0.95 * short.test


def test_without_matplotlib_the_table_is_written(config, tmp_path, monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    config = dataclasses.replace(config, out=tmp_path)
    with pytest.raises(InputError, match=r"needs matplotlib, .*pip install 'fastfuse\[plot\]'"):
        save([Reconstruction("a", 4, 2, 0.1, 0.2, 0.5)], config)
    assert json.loads((tmp_path / "reconstruction.json").read_text())["rows"][0]["test"] == 0.2


def test_the_format_of_the_picture_is_its_suffix(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib, which draws the picture")
    draw([Reconstruction("a", 4, 2, 0.1, 0.2, 0.5)], tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_refusals_come_before_any_training(config, files):
    with pytest.raises(InputError, match="at least one trained network"):
        reconstruct([], config)
    with pytest.raises(InputError, match=r"nowhere\.pt cannot be found"):
        reconstruct([*files, "nowhere.pt"], config)
    assert not config.out.exists()


def test_the_command_prints_a_row_for_each_network(train, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="no matplotlib, which draws the picture")
    runs = [str(train("--method", "independent", "--seed", seed, out=f"run{seed}").path) for seed in (0, 1)]
    capsys.readouterr()
    options = ["--epochs", "1", "--batch-size", "24", "--device", "cpu", "--quiet", "--out", str(tmp_path / "found")]
    assert cli.main(["reconstruct", *runs, *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in rows] == runs and all(row["test"] > 0 for row in rows)
    assert json.loads((tmp_path / "found" / "reconstruction.json").read_text())["rows"] == rows
    assert cli.main(["reconstruct", *runs, *options, "--resume"]) == 0
    assert f"{rows[1]['test']:.4f}" in capsys.readouterr().out
    assert cli.main(["reconstruct", "--quiet"]) == 2
    assert "needs trained networks" in capsys.readouterr().err
