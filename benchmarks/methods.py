"""Suite "methods": what each method makes of one network, beside that network trained alone under the same budget."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import subset
from benchmarks.methods_table import BASELINE, COLUMNS, markdown, summaries
from benchmarks.report import Report, Value, environment
from fastfuse import data
from fastfuse.config import TrainConfig
from fastfuse.errors import FastfuseError, InputError, InterruptedRun, unknown_name
from fastfuse.methods import METHODS
from fastfuse.train.build import pick_device
from fastfuse.train.files import write_atomic
from fastfuse.train.modes import pick_amp
from fastfuse.train.run import train

# Those of the papers that this package is about; the others once.
SEEDS = dict.fromkeys(("ffsd", "ffl", "feed-parallel", "dfa", "ffcl"), 3)
# They train what other methods need, and deploy no network.
WITHOUT_A_NETWORK = ("paraphraser", "dfa-search")
# The ramps are published for runs of so many epochs, and the recipes search for an eighth of a run.
PAPER_EPOCHS = 300
SEARCH_SHARE = 1 / 8
EPOCHS, BATCH_SIZE = 30, 128
# Far from the seeds of students; so many teachers of one seed.
_TEACHER_SEED, _MOST_TEACHERS = 5000, 100


def run(options: argparse.Namespace) -> Report:
    """Train every method with its seeds, seed by seed, so that a run that is cut short has said something of each.

    Everything is kept in `--out`: `rows.jsonl` and the table `results.md`, written anew after each run, and the run
    folders. What is in there is not trained again.

    Raises:
        InputError: an unknown name, an option that does not fit, or a folder of another measurement.
        FastfuseError: the baseline or a teacher failed; that a method fails is a result.
    """
    chosen = names(options)
    study = Study(options)
    asked = {name: 1 if options.quick else options.seeds or SEEDS.get(name, 1) for name in chosen}
    asked[BASELINE] = max(asked.values())
    for seed in range(max(asked.values())):
        for name in chosen:
            if seed < asked[name]:
                study.learn(name, seed)
    study.write()
    rows = summaries(study.runs)
    return Report(study.name, study.settings, study.environment, COLUMNS, rows, {}, {}, [])


def names(options: argparse.Namespace) -> list[str]:
    """The methods to train, the baseline first.

    Raises:
        InputError: one that does not exist, or that deploys no network.
    """
    asked = options.methods or ["all"]
    usable = [name for name in METHODS if name not in WITHOUT_A_NETWORK]
    for name in asked:
        if name not in (*usable, "all"):
            raise unknown_name("method", name, usable)
    kept = [name for name in usable if name in asked or "all" in asked]
    return [BASELINE, *(name for name in kept if name != BASELINE)]


class Study:
    """The runs of one budget, in one folder.

    Attributes:
        runs: one entry for each that has ended, as in `rows.jsonl`.
        settings, environment: as in a report.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        if options.out is None:
            raise InputError("--suite methods needs --out: the folder of its runs")
        if len(options.model) > 1 or "all" in options.model:
            raise InputError("--suite methods trains one network: give one --model")
        self.out: Path = options.out
        device = pick_device(options.device)
        model = options.model[0]
        epochs = options.epochs or (1 if options.quick else EPOCHS)
        self.base = TrainConfig(
            model=model,
            epochs=epochs,
            batch_size=options.batch_size or BATCH_SIZE,
            device=options.device,
            amp=pick_amp(options.amp, device),
            quiet=True,
            **self._data(options),
        )
        self.teacher_model = options.teacher_model or model
        self.search_epochs = max(1, round(epochs * SEARCH_SHARE))
        self.settings = self._settings(options, device.type)
        self.environment = environment(device)
        self.name = f"methods_{model}_{options.data}_e{epochs}_b{self.base.batch_size}_{device.type}"
        self.runs = self._read()

    def learn(self, method: str, seed: int) -> None:
        """One run of a method, unless it is there."""
        own: dict[str, Any] = {"method": method, "seed": seed}
        cls = METHODS[method]
        if "rampup_epochs" in cls.defaults:
            own["rampup_epochs"] = cls.defaults["rampup_epochs"] * self.base.epochs / PAPER_EPOCHS
        if self._done(method, seed):
            return
        if cls.teacher_count:
            own["teachers"] = tuple(self.teacher(i, seed) for i in range(cls.teacher_count))
        if cls.teacher_count or cls.extra_network == "teacher":
            own["teacher_model"] = self.teacher_model
        if method == "dfa":
            own["search_epochs"] = self.search_epochs
        if method == BASELINE:
            own["students"] = 1
        self._train(method, seed, dataclasses.replace(self.base, **own))

    def teacher(self, index: int, seed: int) -> str:
        """The run folder of a teacher, trained by now."""
        name = f"teacher{index}"
        own = {"method": "independent", "students": 1, "model": self.teacher_model}
        own["seed"] = _TEACHER_SEED + _MOST_TEACHERS * seed + index
        folder = self._folder(name, seed)
        # The row of a teacher says nothing to those who need its weights.
        if not (self._done(name, seed) and (folder / "student0.safetensors").exists()):
            self._train(name, seed, dataclasses.replace(self.base, **own))
        return str(folder)

    def _train(self, name: str, seed: int, config: TrainConfig) -> None:
        folder = self._folder(name, seed)
        entry: dict[str, Any] = {"name": "teachers" if name.startswith("teacher") else name, "run": folder.name}
        entry |= {"seed": seed, "model": config.model}
        try:
            summary = train(dataclasses.replace(config, out=folder, resume=folder.exists()))
            entry |= {"deployed": summary["deployed"], "seconds": summary["seconds"], "before_s": _before(folder)}
            entry["top1"] = {head: accuracy["last_top1"] for head, accuracy in summary["networks"].items()}
            entry |= {key: summary[key] for key in ("step_ms", "mode", "device", "versions", "commit")}
            said = f"{entry['top1'][entry['deployed']]:.2f} % after {entry['seconds']:.0f} s"
        except FastfuseError as error:
            if isinstance(error, InterruptedRun) or name == BASELINE or name.startswith("teacher"):
                raise
            entry |= {"failed": str(error), "commit": self.environment["commit"]}
            said = f"failed: {error}"
        self.runs = [run for run in self.runs if run["run"] != folder.name] + [entry]
        self.write()
        print(f"{name} seed {seed}: {said}", file=sys.stderr, flush=True)

    def _done(self, name: str, seed: int) -> bool:
        """A run that failed is tried again."""
        return any(run["run"] == self._folder(name, seed).name and "top1" in run for run in self.runs)

    def _folder(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-seed{seed}"

    def _data(self, options: argparse.Namespace) -> dict[str, Any]:
        """The options of the data: as they are, or a part of them, which is written into the folder first."""
        given = {"data": options.data, "data_path": options.data_path, "data_root": options.data_root}
        part = {"classes": options.classes, "images": options.images, "size": options.image_size}
        self.dataset = data.load(options.data, root=options.data_root, path=options.data_path)
        if not any(part.values()):
            return given
        height, padding, flip = self.dataset.image_size[0], self.dataset.padding, self.dataset.flip
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "images.npz"
        if not file.exists():
            subset.write(self.dataset, file, **part)
        padding = round(padding * (options.image_size or height) / height)
        self.dataset = data.load("npz", path=file, padding=padding)
        return {"data": "npz", "data_path": file, "crop_padding": padding, "flip": flip}

    def _settings(self, options: argparse.Namespace, device_type: str) -> dict[str, Value]:
        """What must be the same whenever these runs are taken up."""
        source = options.data_path.name if options.data_path is not None else options.data
        size = "x".join(map(str, self.dataset.image_size))
        kept = ("lr", "momentum", "nesterov", "weight_decay", "schedule", "batch_size", "amp", "epochs")
        return {
            "suite": "methods",
            "model": str(self.base.model),
            "teacher_model": self.teacher_model,
            "data": source,
            "classes": self.dataset.num_classes,
            "train_images": len(self.dataset.train),
            "test_images": len(self.dataset.test),
            "image_size": size,
            "fingerprint": self.dataset.fingerprint(),
            **{key: getattr(self.base, key) for key in kept},
            "paper_epochs": PAPER_EPOCHS,
            "search_epochs": self.search_epochs,
            "device_type": device_type,
        }

    def _read(self) -> list[dict[str, Any]]:
        """The runs that are there, if they are of the same budget."""
        file = self.out / "settings.json"
        if file.exists() and (kept := json.loads(file.read_text())) != self.settings:
            different = [key for key in self.settings if kept.get(key) != self.settings[key]]
            raise InputError(
                f"{self.out} holds runs of another {', '.join(different) or 'version'}: choose another --out"
            )
        _write(file, json.dumps(self.settings, indent=1) + "\n")
        rows = self.out / "rows.jsonl"
        return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    def write(self) -> None:
        """The rows, and the table of all that has ended."""
        _write(self.out / "rows.jsonl", "".join(json.dumps(run) + "\n" for run in self.runs))
        _write(self.out / "results.md", markdown(self.settings, self.runs))


def _before(folder: Path) -> float:
    """Seconds of the runs below a run."""
    files = [file for file in folder.rglob("summary.json") if file.parent != folder]
    return sum(json.loads(file.read_text())["seconds"] for file in files)


def _write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))
