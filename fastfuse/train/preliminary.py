"""What a method needs trained before it: teachers, their paraphrasers, aggregation weights, earlier students.

Each is a run of its own below the run folder, started, resumed or found finished:

    teachers/            the teachers that --teachers does not name; several as one run of replicas
    copies/NAME/         a copy of each network, for its own regularisation (ffcl)
    paraphrasers/N/      of teacher N (ft, and feed-* with paraphrased targets)
    search/              the aggregation weights (dfa)
    stages/stageN/       the students before the last (feed-sequential)
"""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastfuse import config as configuration
from fastfuse import models
from fastfuse.config import TrainConfig, adapted
from fastfuse.errors import InputError, InterruptedRun
from fastfuse.methods import Method
from fastfuse.train import distributed
from fastfuse.train.teachers import load_teacher, told_model
from fastfuse.train.weights import model_options, read_weights

Train = Callable[[TrainConfig], dict[str, Any]]

# Seeds of teachers lie far from those of replicas: a teacher must not start from a student's initial weights.
_TEACHER_SEED = 1000
# The search as DARTS does it (first order); the paper of DFA does not say. Half of a batch trains the weights.
_SEARCH = {"lr": 0.025, "weight_decay": 3e-4, "nesterov": False, "schedule": "cosine", "batch_size": 128}


class OutOfTime(Exception):
    """--max-time is over before everything that comes first is trained."""


def resolved(config: TrainConfig, method: type[Method]) -> TrainConfig:
    """The configuration with what comes before the run written out.

    Raises:
        InputError: an option of something that the method does not have.
    """
    copied = len(_copied(config))
    frozen = copied or method.teacher_count
    own = {
        "teacher_model": frozen > 0 or method.extra_network == "teacher",
        "teachers": frozen > 0,
        "teacher_count": frozen > 0,
        "teacher_epochs": frozen > 0,
        "paraphraser_epochs": _paraphrases(config),
        "search_epochs": _searches(config),
        "feed_stages": config.method == "feed-sequential",
        "aggregation_file": config.method == "dfa" and config.aggregation == "searched",
    }
    for name in configuration.TEACHER_FIELDS:
        if getattr(config, name) and not own[name]:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{_described(config)} has no use for {option}: leave it out")
    count = len(config.teachers) or config.teacher_count or frozen
    if config.teachers and config.teacher_count not in (None, count):
        raise InputError(f"--teachers names {count}, --teacher-count asks for {config.teacher_count}: leave one out")
    if copied and count != copied:
        raise InputError(
            f"{_described(config)} has a trained copy of each of its {copied} networks, not {count}: name one for each "
            "in --teachers, or leave --teachers and --teacher-count out"
        )
    students: list[Any] = config.student_models or [config.model]
    files = any(Path(entry).is_file() for entry in config.teachers)
    # Run folders and networks of libraries say themselves what they are, and need not be alike.
    needed = not config.teachers or files or method.extra_network == "teacher"
    filled: dict[str, Any] = {
        "teacher_model": config.teacher_model or (students[0] if needed else None),
        "teacher_count": count,
        "teacher_epochs": config.teacher_epochs or config.epochs,
        "paraphraser_epochs": config.paraphraser_epochs or config.epochs,
        "search_epochs": config.search_epochs or config.epochs,
        "feed_stages": config.feed_stages or 5,
    }
    return dataclasses.replace(config, **{name: value for name, value in filled.items() if own[name]})


def stand_in(config: TrainConfig, num_classes: int) -> tuple[TrainConfig, dict[str, Any]]:
    """Configuration and ingredients of the same method, without what would have to be trained first.

    A method made of it has the right shapes, so that bad input is found before hours of training, and nothing else.
    """
    if not config.teacher_count:
        return config, {}
    given: dict[str, Any] = {"teachers": _loaded(config.teachers, config, num_classes)}
    models_of = list(_copied(config).values()) or [str(config.teacher_model)] * config.teacher_count
    for model in models_of[len(given["teachers"]) :]:
        given["teachers"].append(_fresh_teacher(config, model, num_classes))
    if _paraphrases(config):
        from fastfuse.nn.factor import Paraphraser

        ratio = config.factor_ratio
        channels = [teacher.feature_channels[-1] for teacher in given["teachers"]]
        given["paraphrasers"] = [Paraphraser(c, round(c * ratio)).state_dict() for c in channels]
    if config.aggregation_file is not None:
        given["searched"] = _read_aggregation(config.aggregation_file)
    elif _searches(config):
        config = dataclasses.replace(config, aggregation="uniform")
    return config, given


def prepared(config: TrainConfig, num_classes: int, train: Train | None) -> dict[str, Any]:
    """What the method is given besides its networks: trained now, or found finished.

    Args:
        config: resolved, with its run folder.
        num_classes: K.
        train: trains a configuration to its end or to --max-time; None: everything must be there.

    Raises:
        InputError: something that was named cannot be found, or is not there and `train` is None.
        OutOfTime: --max-time has passed.
        InterruptedRun: Ctrl-C, SIGTERM or SIGUSR1.
    """
    if not config.teacher_count:
        return {}
    runs = _Runs(config, train)
    entries = list(config.teachers) or (runs.copies() if _copied(config) else runs.teachers())
    if config.method == "feed-sequential":
        entries = [runs.stages(entries[0])]
    given: dict[str, Any] = {"teachers": _loaded(entries, config, num_classes)}
    if _paraphrases(config):
        files = [runs.paraphraser(i, entry) / "paraphraser.safetensors" for i, entry in enumerate(entries)]
        given["paraphrasers"] = [read_weights(file) for file in files]
    if _searches(config):
        given["searched"] = _read_aggregation(config.aggregation_file or runs.search(entries) / "aggregation.json")
    return given


def fingerprint(given: dict[str, Any]) -> str | None:
    """Checksum of all that a method was given; None for nothing."""
    if not given:
        return None
    checksum = zlib.crc32(json.dumps(given.get("searched"), sort_keys=True).encode())
    states = [teacher.state_dict() for teacher in given["teachers"]] + given.get("paraphrasers", [])
    for tensor in (tensor for state in states for tensor in state.values()):
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return f"{len(given['teachers'])} teachers, crc {checksum:08x}"


class _Runs:
    """The runs below a run."""

    def __init__(self, config: TrainConfig, train: Train | None) -> None:
        assert config.out is not None  # see `prepared`
        self.config, self.train = config, train
        self.folder = config.out
        self.began = time.monotonic()

    def teachers(self) -> list[str]:
        """As many as asked for, alike but for their seeds."""
        config, count = self.config, self.config.teacher_count
        assert count is not None  # as it is resolved
        seed = config.seed + _TEACHER_SEED
        own: dict[str, Any] = {"model": config.teacher_model, "students": 1, "seed": seed, "replicas": count}
        path = self._run("teachers", "independent", config.teacher_epochs, **own)
        return [str(path / f"seed{seed + i}") for i in range(count)] if count > 1 else [str(path)]

    def copies(self) -> list[str]:
        """Of every network that learns, alone and from a start of its own."""
        found = []
        for i, (name, model) in enumerate(_copied(self.config).items()):
            own: dict[str, Any] = {"model": model, "students": 1, "seed": self.config.seed + _TEACHER_SEED + i}
            found.append(str(self._run(f"copies/{name}", "independent", self.config.teacher_epochs, **own)))
        return found

    def paraphraser(self, index: int, teacher: str) -> Path:
        """Of one teacher."""
        model = self._model_of(teacher)
        own: dict[str, Any] = {"teachers": (teacher,), "teacher_model": model, "model": model, "students": 1}
        own |= {"factor_ratio": self.config.factor_ratio, "strategy": "auto"}
        return self._run(f"paraphrasers/{index}", "paraphraser", self.config.paraphraser_epochs, **own)

    def search(self, teachers: list[str]) -> Path:
        """The aggregation weights for this teacher and this student."""
        own: dict[str, Any] = {"teachers": tuple(teachers), "teacher_model": self._model_of(teachers[0]), **_SEARCH}
        own |= {"students": 1, "strategy": "auto"}  # it has no networks side by side
        return self._run("search", "dfa-search", self.config.search_epochs, **own)

    def stages(self, teacher: str) -> str:
        """All students but the last, each the next one's teacher; gives the last one's teacher."""
        config = self.config
        assert config.feed_stages is not None  # as it is resolved
        for stage in range(1, config.feed_stages):
            own: dict[str, Any] = {"teachers": (teacher,), "teacher_model": self._model_of(teacher), "feed_stages": 1}
            own["seed"] = config.seed + _TEACHER_SEED + stage
            teacher = str(self._run(f"stages/stage{stage}", config.method, config.epochs, **own))
        return teacher

    def _model_of(self, teacher: str) -> str | None:
        return told_model(teacher) or self.config.teacher_model

    def _run(self, name: str, method: str, epochs: int | None, **own: Any) -> Path:
        path, processes = self.folder / name, distributed.current()
        finished, there = processes.agreed((_finished(path), path.exists()))
        if finished:
            return path
        if self.train is None:
            raise InputError(
                f"{path} is missing or has not ended; go on with: fastfuse train --resume --out {self.folder}"
            )
        config = self.config
        model = own.pop("model", config.model)
        base: dict[str, Any] = {"init": (), "replicas": 1, "baseline": False, "recipe": None, "epochs": epochs}
        base |= {"out": path, "resume": there, "val_seed": config.seed if config.val_seed is None else config.val_seed}
        base["milestones"] = config.milestones if epochs == config.epochs else None
        base["max_time"] = None if config.max_time is None else self._minutes_left(config.max_time)
        single = dataclasses.replace(adapted(config, method=method, model=model), **{**base, **own})
        try:
            summary = self.train(single)
        except InterruptedRun as error:
            raise InterruptedRun(
                f"interrupted while training {path}; its checkpoint is written, go on with: fastfuse train --resume "
                f"--out {self.folder}",
                status=error.status,
            ) from error
        if not summary["completed"]:
            raise OutOfTime
        return path

    def _minutes_left(self, max_time: float) -> float:
        left = distributed.current().agreed(max_time - (time.monotonic() - self.began) / 60)
        if left <= 0:
            raise OutOfTime
        return left


def _finished(path: Path) -> bool:
    try:
        return bool(json.loads((path / "summary.json").read_text())["completed"])
    except (OSError, ValueError, KeyError):
        return False


def _read_aggregation(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as aggregation weights ({error}); give the aggregation.json of a dfa-search run"
        ) from error


def _loaded(entries: Sequence[str], config: TrainConfig, num_classes: int) -> list[nn.Module]:
    """The trained networks; a copy that is a weight file is one of its network's model."""
    of_each = list(_copied(config).values())[: len(entries)] or [str(config.teacher_model)] * len(entries)
    each = [dataclasses.replace(config, teacher_model=model) for model in of_each]
    return [load_teacher(entry, own, num_classes) for entry, own in zip(entries, each, strict=True)]


def _fresh_teacher(config: TrainConfig, model: str, num_classes: int) -> nn.Module:
    options = model_options(config) if model.startswith("wrn") else {}
    return models.build(model, num_classes, taps=config.taps if model == config.model else (), **options)


def _paraphrases(config: TrainConfig) -> bool:
    feeds = config.method in ("feed-parallel", "feed-sequential")
    return config.method == "ft" or (feeds and config.factor_targets == "paraphrased")


def _copied(config: TrainConfig) -> dict[str, str]:
    """The networks of which trained copies are needed, with their models."""
    if config.method != "ffcl" or config.regularization != "self":
        return {}
    students = config.student_models or [str(config.model)] * int(config.students or 1)
    names = {f"student{i}": model for i, model in enumerate(students)}
    return names | {"teacher": config.teacher_model or students[0]}


def _searches(config: TrainConfig) -> bool:
    return config.method == "dfa" and config.aggregation == "searched"


def _described(config: TrainConfig) -> str:
    if config.method == "dfa" and config.aggregation != "searched":
        return f"{config.method} with --aggregation {config.aggregation}"
    if config.method == "ffcl":
        return f"ffcl with --regularization {config.regularization}"
    if config.method.startswith("feed-"):
        return f"{config.method} with --factor-targets {config.factor_targets}"
    return config.method
