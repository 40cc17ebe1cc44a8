"""The rows of the CIFAR-100 table: the recipe and method of each, its baseline, and what others have reported."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.errors import unknown_name

BASELINE = "independent"
# In the order of the published table.
_FFSD = ("resnet20", "resnet32", "resnet56", "wrn16_2", "wrn40_2", "densenet40_12", "googlenet")
# Recipes of other methods, whose names begin with the method, and the one whose budget their baseline has.
_OTHERS = {
    "ffl-resnet32": "ffl-resnet32",
    "ffl-separate-resnet32": "ffl-resnet32",
    "one-resnet32": "one-resnet32",
    "feed-resnet56": "feed-resnet56",
    "dfa-wrn16_4": "dfa-wrn16_4",
    "dfa-wrn28_2": "dfa-wrn28_2",
    "dfa-wrn16_2": "dfa-wrn16_2",
    "dfa-resnet56": "dfa-resnet56",
}

BEST = "best epoch on the test images"
UNSTATED = "epoch not stated"


@dataclasses.dataclass(frozen=True)
class Published:
    """A value that others have reported.

    Attributes:
        top1: percent.
        head: whose it is, by the name that it has in a run.
        chosen: of which epoch.
        source: where it stands, and what keeps it from being comparable.
    """

    top1: float
    head: str
    chosen: str
    source: str

    def __str__(self) -> str:
        return f"{self.top1:.2f} {self.head} ({self.chosen}; {self.source})"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is trained, with every seed that is asked for.

    Attributes:
        name: of the row.
        recipe: of `fastfuse train`.
        method: instead of the recipe's own, as with --method beside --recipe.
        students: instead of the recipe's own.
        baseline: the row of the same network alone under the same budget; None: it is such a row.
        published: what others have reported.
        overrides: fields of the configuration that differ from the recipe's.
        images: how the fingerprint of its data begins, of training and test images.
    """

    name: str
    recipe: str
    method: str | None = None
    students: int | None = None
    baseline: str | None = None
    published: tuple[Published, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    images: str = "50000+10000 images"

    def config(self) -> TrainConfig:
        """The configuration of `fastfuse train --recipe RECIPE [--method METHOD --students N]`."""
        own = configuration.adapted(configuration.from_recipe(self.recipe), method=self.method)
        students = own.students if self.students is None else self.students
        return dataclasses.replace(own, students=students, **dict(self.overrides))


def chosen(names: str) -> list[Row]:
    """Rows by their names with commas, or "all".

    Raises:
        InputError: one that does not exist.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in (*ROWS, "all"):
            raise unknown_name("row", name, (*ROWS, "all"))
    return [ROWS[name] for name in (ROWS if "all" in asked else dict.fromkeys(asked))]


def listed() -> Iterator[str]:
    """A line for each row: recipe, epochs, baseline, and what was published."""
    for row in ROWS.values():
        config = row.config()
        yield f"{row.name}: {config.method} {config.model}, recipe {row.recipe}, {config.epochs} epochs" + (
            f", beside {row.baseline}" if row.baseline else ""
        )
        yield from (f"    published: {value}" for value in row.published)


_README = "FFSD's README, mean of three runs"
_SURVEY = "survey of 2024, Lightweight Deep Learning for Resource-Constrained Environments, very likely the paper's"
_PCL = "second-hand, PCL's table, three peers"
_CMFF = "second-hand, README of CMFF"
_SCRATCH = "README of overhaul distillation, from scratch"
_DFA = "second-hand, a summary of the paper"

_PUBLISHED = {
    "ffsd-resnet20": (Published(72.70, "leader", BEST, _README),),
    "ffsd-resnet32": (Published(74.85, "leader", BEST, _README),),
    "ffsd-resnet56": (Published(75.80, "leader", BEST, _README),),
    "ffsd-wrn16_2": (Published(75.81, "leader", BEST, _README),),
    "ffsd-wrn40_2": (Published(79.14, "leader", BEST, _README),),
    "ffsd-densenet40_12": (Published(77.39, "leader", BEST, _README),),
    "ffsd-googlenet": (Published(81.60, "leader", BEST, _README),),
    "independent-resnet32": (Published(69.96, "student0", UNSTATED, _SURVEY),),
    "independent-resnet56": (Published(71.55, "student0", UNSTATED, _SURVEY),),
    "dml-resnet32": (Published(73.68, "student0", UNSTATED, _PCL), Published(73.59, "student0", UNSTATED, _CMFF)),
    "dml-densenet40_12": (Published(73.06, "student0", UNSTATED, _PCL),),
    "one-resnet32": (Published(73.79, "student0", UNSTATED, _PCL), Published(73.64, "student0", UNSTATED, _CMFF)),
    "ffl-resnet32": (
        Published(72.18, "student0", UNSTATED, _PCL),
        Published(74.44, "fusion", UNSTATED, f"{_CMFF}; which head is inferred"),
    ),
    "dfa-wrn16_4": (Published(79.74, "student0", UNSTATED, _DFA),),
    "dfa-wrn28_2": (Published(78.18, "student0", UNSTATED, f"{_DFA}; the pair of networks is inferred"),),
    "dfa-wrn16_2": (Published(75.85, "student0", UNSTATED, f"{_DFA}; the pair of networks is inferred"),),
    "independent-dfa-wrn16_4": (Published(77.28, "student0", UNSTATED, _SCRATCH),),
    "independent-dfa-wrn28_2": (Published(75.12, "student0", UNSTATED, _SCRATCH),),
    "independent-dfa-wrn16_2": (Published(72.68, "student0", UNSTATED, _SCRATCH),),
    "independent-dfa-resnet56": (Published(72.32, "student0", UNSTATED, _SCRATCH),),
}


def _all() -> Iterator[Row]:
    for method in ("ffsd", "dml", BASELINE):
        for model in _FFSD:
            baseline = None if method == BASELINE else f"{BASELINE}-{model}"
            own = None if method == "ffsd" else method
            yield Row(f"{method}-{model}", f"cifar100-{model}", own, _alone(method), baseline)
    for name, budget in _OTHERS.items():
        yield Row(name, f"cifar100-{name}", baseline=f"{BASELINE}-{budget}")
    for budget in dict.fromkeys(_OTHERS.values()):
        yield Row(f"{BASELINE}-{budget}", f"cifar100-{budget}", method=BASELINE, students=_alone(BASELINE))


def _alone(method: str) -> int | None:
    return 1 if method == BASELINE else None


ROWS = {row.name: dataclasses.replace(row, published=_PUBLISHED.get(row.name, ())) for row in _all()}
