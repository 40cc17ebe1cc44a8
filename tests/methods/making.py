"""Every method ready to train, with what it must be given: teachers, paraphrasers, searched weights."""

import copy
from typing import Any

import torch
from torch import Tensor

from fastfuse import models
from fastfuse.methods import METHODS, Method, build_method
from fastfuse.methods.branching import Branched
from fastfuse.methods.replicas import Replicas
from fastfuse.nn.factor import Paraphraser
from tests.losses.batches import differing
from tests.nn.stacking import untidy

# Nothing that these train is a network that classifies images on its own.
WITHOUT_STUDENTS = tuple(name for name in ("paraphraser", "dfa-search") if name in METHODS)
# They have no networks that read the images side by side, nor a trunk with branches.
LOOP_ONLY = WITHOUT_STUDENTS
WITH_STUDENTS = tuple(name for name in METHODS if name not in WITHOUT_STUDENTS)
SIDE_BY_SIDE = tuple(name for name in METHODS if name not in LOOP_ONLY)
# Methods with options that add networks: a name for the tests, the method, its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ffcl in full": ("ffcl", {"fused_stages": 3, "feature_distance": "mse", "regularization": "self"}),
}
EVERY = (*METHODS, *VARIANTS)


def branched(name: str, num_classes: int, *, branches: int, stage: int | None = None, **options: Any) -> Branched:
    """Sub-networks of one name on a shared trunk."""
    return Branched([models.build(name, num_classes, **options) for _ in range(branches)], stage=stage)


def method_of(name: str) -> type[Method]:
    """The class behind a method's or a variant's name."""
    return METHODS[VARIANTS.get(name, (name, {}))[0]]


def students_of(name: str, wanted: int) -> int:
    """As many students as wanted, or as many as the method can have."""
    return min(wanted, METHODS[name].maximum_students or wanted)


def ingredients(name: str, *, model: str = "resnet8", num_classes: int, **options: Any) -> dict[str, Any]:
    """What a method is given besides networks and hyper-parameters: untrained, but with statistics of their own."""
    name, own = VARIANTS.get(name, (name, {}))
    options = own | options
    method = METHODS[name]
    if options.get("regularization") == "self":
        copies = options.get("students", 2) + 1  # and the teacher, all of one architecture
        return {"teachers": [untidy(models.build(model, num_classes)).float() for _ in range(copies)]}
    if not method.teacher_count:
        return {}
    # The search weighs the blocks of a stage: with one in each there is nothing to learn.
    model = {"resnet8": "resnet14", "wrn10_1": "wrn16_1"}.get(model, model) if name == "dfa-search" else model
    given: dict[str, Any] = {
        "teachers": [untidy(models.build(model, num_classes)).float() for _ in range(method.teacher_count)]
    }
    hyper = {**method.defaults, **options}
    if name == "ft" or hyper.get("factor_targets") == "paraphrased":
        widths = [teacher.feature_channels[-1] for teacher in given["teachers"]]
        given["paraphrasers"] = [Paraphraser(c, round(c * hyper["factor_ratio"])).state_dict() for c in widths]
    if hyper.get("aggregation") == "searched":
        counts = [len(blocks) for blocks in given["teachers"][0].stage_blocks]
        given["searched"] = {"groups": [{"weights": [1 / n] * n} for n in counts]}
    return given


def smallest(name: str) -> str:
    """The smallest network that a method has something to train on: a search needs two blocks to weigh."""
    return "resnet14" if name == "dfa-search" else "resnet8"


def make(name: str, students: int = 2, *, model: str | None = None, num_classes: int, **options: Any) -> Method:
    """A method in training mode, of networks of one name; the teachers' too."""
    model = model or smallest(name)
    given = ingredients(name, model=model, num_classes=num_classes, **options, students=students)
    name, own = VARIANTS.get(name, (name, {}))
    options = own | options
    return build_method(
        name, model=model, students=students_of(name, students), num_classes=num_classes, **given, **options
    ).train()


def replicas_differing(methods: list[Method], strategy: str, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of methods run as replicas on a batch each: the terms that are not those of the methods alone, in float64."""
    alone = copy.deepcopy(methods)
    names = [f"r{i}" for i in range(len(methods))]
    together = Replicas(methods, names)
    assert together.arrange(strategy) == strategy
    parameters = [p for groups in together.parameter_groups() for group in groups for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(map(id, together.parameters()))
    progress = torch.tensor(5.0, dtype=torch.float64)
    images, labels = torch.cat([x for x, _ in batches], 1), torch.stack([y for _, y in batches])
    terms = together(images, labels, progress).terms
    wanted = {
        f"{name}/{term}": value
        for name, own, given in zip(names, alone, batches, strict=True)
        for term, value in own(*given, progress).terms.items()
    }
    return differing({name: terms[name] for name in wanted}, wanted, 1e-9)
