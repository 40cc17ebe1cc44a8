import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fastfuse import cli
from tests.train.recorded import Recorded, stand_in


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 30 test images of 8x8 in three classes that a network can tell apart."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    arrays = {}
    for split, count in (("train", 60), ("test", 30)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 8, 8, 3))
        images[np.arange(count), :, :, labels] += 100
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_npz: Path) -> list[str]:
    """Options of a run of two epochs of three steps that takes about a second."""
    options = "--model resnet8 --data npz --crop-padding 1 --epochs 2 --batch-size 24 --lr 0.02 --device cpu --quiet"
    return ["train", *options.split(), "--data-path", str(tiny_npz)]


@pytest.fixture(scope="session")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two students and a leader; it is only read."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main([*tiny, "--method", "ffsd", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def program(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The leader of that run as a program of torch.export."""
    file = tmp_path_factory.mktemp("program") / "leader.pt2"
    assert cli.main(["export", str(finished), "--format", "torch-export", "--device", "cpu", "--out", str(file)]) == 0
    return file


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """CUDA graphs on a CPU, see `stand_in`."""
    return stand_in(monkeypatch)


class Run:
    """A finished run read back from its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = json.loads((path / "config.json").read_text())
        self.metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        summary = path / "summary.json"
        self.summary = json.loads(summary.read_text()) if summary.exists() else None

    def timeless_metrics(self) -> list[dict]:
        return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in self.metrics]

    def weights(self, name: str) -> dict:
        return load_file(self.path / f"{name}.safetensors")


@pytest.fixture
def train(tiny: list[str], tmp_path: Path):
    """Run `fastfuse train` on the tiny data in this process; options follow, the last of each wins."""

    def run(*options: object, out: str = "run") -> Run:
        path = tmp_path / out
        status = cli.main([*tiny, *map(str, options), "--out", str(path)])
        assert status == 0, f"exit status {status}"
        return Run(path)

    return run


@pytest.fixture
def refused(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    """Run a command that must fail: a status that is not 0, one line on standard error, and no run folder."""

    def run(*options: object, out: str = "run", folder_remains: bool = False, command: list[str] | None = None) -> str:
        path = tmp_path / out
        capsys.readouterr()
        arguments = [*tiny, *map(str, options), "--out", str(path)] if command is None else command
        status = cli.main(arguments)
        captured = capsys.readouterr()
        assert status not in (0, None)
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, f"one line expected, got {lines}"
        assert lines[0].startswith("fastfuse: ")
        if not folder_remains and command is None:
            assert not path.exists()
        return lines[0]

    return run
