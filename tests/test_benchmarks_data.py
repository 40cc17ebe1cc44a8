"""The suite "data": its files, its columns, and what it calls a core's speed."""

import json

import numpy as np
import pytest

from benchmarks import data, run

pytest.importorskip("torchvision", reason="no torchvision")


def test_files_have_the_spectrum_of_photographs(tmp_path):
    pixels = data.natural(64, 96, np.random.default_rng(0))
    assert pixels.shape == (64, 96, 3) and pixels.dtype == np.uint8 and 20 < pixels.std() < 70
    # Amplitudes fall with 1/f: twice the frequency, half of it.
    power = abs(np.fft.fft2(data.natural(256, 256, np.random.default_rng(1))[..., 0].astype(float)))
    low, high = (power[f : 2 * f, 0].mean() + power[0, f : 2 * f].mean() for f in (8, 32))
    assert 2.5 < low / high < 6
    size = data.write(tmp_path, 1)
    assert 80_000 < size < 160_000 and len(list(tmp_path.rglob("*.jpg"))) == 2


def test_all_providers_are_measured_with_and_without_workers(tmp_path, capsys):
    arguments = (
        "--suite data --device cpu --quick --repeats 1 --images 6 --image-size 64 --model resnet18 --batch-size 2"
    )
    assert run.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "data_i64_cpu.json").read_text())["rows"]
    providers = ["pillow", "fastfuse decode", "fastfuse", "fastfuse cache"]
    workers = rows[4]["processes"]
    assert workers >= 1
    wanted = [*((name, 0) for name in providers), *((name, workers) for name in providers), ("step", 0)]
    assert [(row["provider"], row["processes"]) for row in rows] == wanted
    step = rows[-1]
    for row in rows[:-1]:
        baseline = rows[0] if row["processes"] == 0 else rows[4]
        assert row["images_per_s"] == pytest.approx(6e3 / row["median_ms"])
        assert row["baseline_ratio"] == pytest.approx(baseline["median_ms"] / row["median_ms"])
        assert row["fed"] == pytest.approx(row["images_per_s"] / step["images_per_s"])
        assert (row["per_core"] == "-") == (row["processes"] > 0)
    assert "ratio pillow/fastfuse cache, no workers: " in capsys.readouterr().out
