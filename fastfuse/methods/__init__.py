"""The methods, one file each, and how to build one by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from fastfuse import models
from fastfuse.errors import InputError, unknown_name
from fastfuse.methods.at import AT
from fastfuse.methods.base import Method, MethodOutput, check_students
from fastfuse.methods.dfa import DFA
from fastfuse.methods.dfa_search import DFASearch
from fastfuse.methods.dml import DML
from fastfuse.methods.factor_transfer import FactorTransfer
from fastfuse.methods.feed import FeedParallel, FeedSequential
from fastfuse.methods.ffcl import FFCL
from fastfuse.methods.ffl import FFL
from fastfuse.methods.ffsd import FFSD
from fastfuse.methods.independent import Independent
from fastfuse.methods.kd import KD
from fastfuse.methods.one import ONE
from fastfuse.methods.paraphraser import ParaphraserTraining

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        FFSD,
        FFL,
        FFCL,
        ONE,
        Independent,
        DML,
        KD,
        AT,
        FactorTransfer,
        FeedParallel,
        FeedSequential,
        ParaphraserTraining,
        DFA,
        DFASearch,
    )
}

__all__ = ["METHODS", "Method", "MethodOutput", "build_method"]


def build_method(
    name: str,
    *,
    students: int | Sequence[str],
    num_classes: int,
    model: str | None = None,
    leader: str | None = None,
    teacher_model: str | None = None,
    taps: Sequence[str] = (),
    model_options: Mapping[str, Any] | None = None,
    **hyperparameters: Any,
) -> Method:
    """A method with freshly initialised networks.

    Args:
        name: one of `METHODS`.
        students: how many common students, sub-networks or networks there are, or the name of each.
        num_classes: K.
        model: a name of `fastfuse.models`, of all students where `students` is a number.
        leader: the leader's (ffsd), without a word that of the first student.
        teacher_model: that of the teacher that is trained beside (ffcl), without a word that of the first student.
        taps: layers of `model` whose maps are its features; none: its own.
        model_options: named deviations of the networks, see `fastfuse.models.build`; of networks of several names
            those that have them.
        hyperparameters: of the method, see its `defaults`; and what it takes besides, such as `teachers`.

    Raises:
        InputError: an unknown method, model or hyper-parameter, a number of students that it cannot have, or a network
            that it does not have.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    method = METHODS[name]
    names = [model] * students if isinstance(students, int) else list(students)
    if None in names:
        raise InputError("model must be given where students is a number: the name of the network")
    check_students(method, len(names))
    for key in hyperparameters:
        if key not in (*method.defaults, *_INGREDIENTS):
            known = ", ".join(method.defaults) or "none"
            raise InputError(f"{name} has no hyper-parameter {key}; it has {known}")
    extra = {"leader": leader, "teacher": teacher_model}
    for role, given in extra.items():
        if given is not None and role != method.extra_network:
            raise InputError(f"{name} has no {role} that is trained beside its students: leave {given} out")
    options = _options_by_name(dict(model_options or {}), {*names, *filter(None, extra.values())})

    def maker(own: Any) -> Callable[[], nn.Module]:
        tapped: dict[str, Any] = {"taps": tuple(taps)} if taps and own == model else {}
        return partial(models.build, own, num_classes, **tapped, **options[own])

    if method.extra_network is not None:
        hyperparameters[method.extra_network] = maker(extra[method.extra_network] or names[0])
    return method([maker(own) for own in names], num_classes, **hyperparameters)


# What a method is given besides networks and hyper-parameters.
_INGREDIENTS = ("teachers", "paraphrasers", "searched", "image_size")


def _options_by_name(options: dict[str, Any], names: set[str]) -> dict[str, dict[str, Any]]:
    """The options of each network: of several names those of their family, which are Wide ResNet's alone so far."""
    if len(names) == 1:
        return dict.fromkeys(names, options)
    return {name: options if name.startswith("wrn") else {} for name in names}
