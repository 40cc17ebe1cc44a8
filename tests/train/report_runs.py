"""Run folders made by hand, whose numbers are known, and the browser that shows a report of them."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fastfuse.config import TrainConfig, to_plain
from fastfuse.train import keepsakes
from fastfuse.train.build import resolved
from fastfuse.train.keepsakes import Keepsakes
from fastfuse.train.record import csv_table

CLASSES = ("cat", "dog & <b>cow</b>", "hen", "$\\frac")


def kept(epoch: int, networks: list[str], *, seed: int = 0, images: int = 40, mapped: int | None = None) -> Keepsakes:
    """Answers drawn at random, about two thirds of them right; the first networks have attention maps."""
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % len(CLASSES)
    answers = {}
    for name in networks:
        wrong = generator.integers(0, len(CLASSES), images)
        answers[name] = np.where(generator.random(images) < 0.6, labels, wrong)
    return Keepsakes(
        epoch=epoch,
        class_names=CLASSES,
        labels=labels,
        predictions=answers,
        images=generator.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
        shown=np.arange(4),
        maps={name: generator.random((4, 8, 8), np.float32) for name in networks[:mapped] if name != "ensemble"},
    )


def make_run(
    path: Path,
    networks: list[str],
    *,
    epochs: int = 3,
    ended: int | None = None,
    terms: int = 3,
    keep: Keepsakes | None = None,
    **options: object,
) -> Path:
    """A run folder as the trainer leaves it; `ended` epochs of it, of which without a number all."""
    config = resolved(TrainConfig(**{"method": "ffsd", "model": "resnet20", "epochs": epochs, "out": path, **options}))
    ended = epochs if ended is None else ended
    seed, deployed = config.seed, "student0" if config.method == "independent" else "leader"
    names = [f"{name}_{kind}" for name in networks for kind in ("ce", "dml", "kl", "fusion")[:terms]]
    lines = []
    for epoch in range(1, ended + 1):
        accuracy = {name: {"top1": 90 - 50 / (epoch + i + seed / 7), "top5": 99.0} for i, name in enumerate(networks)}
        losses = {name: 2 * math.exp(-epoch / 50) / (i + 1 + seed / 5) for i, name in enumerate(names)}
        lines.append(
            {
                "epoch": epoch,
                "learning_rate": 0.1 * 0.9**epoch,
                "losses": {"loss": sum(losses.values()), **losses},
                "accuracy": accuracy,
                "images_per_second": 1000.0 + epoch,
                "seconds": 2.0 * epoch,
            }
        )
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(to_plain(config)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "metrics.csv").write_text(csv_table(lines))
    if ended == epochs:
        last = lines[-1]["accuracy"]
        results = {
            name: {"best_top1": x["top1"], "last_top1": x["top1"], "best_epoch": ended} for name, x in last.items()
        }
        summary = {"method": config.method, "deployed": deployed, "networks": results, "best_chosen_on": "test"}
        summary |= {"epochs": ended, "images_per_second": 1000.0, "step_ms": 5.0, "seconds": 60.0, "commit": "abc"}
        summary |= {"versions": {"torch": "2.15.0"}, "device": "a CPU", "mode": "eager", "seed": seed}
        (path / "summary.json").write_text(json.dumps(summary))
    if keep is not None:
        keepsakes.write(path, keep)
    return path


def browse(page: Path, scratch: Path, *more: str) -> str:
    """What a real browser makes of a page: its document after everything has been laid out."""
    chromium = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if chromium is None:
        pytest.skip("no chromium on the PATH, which shows the page")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync"
    command = [chromium, *quiet.split(), f"--user-data-dir={scratch}", *more, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
