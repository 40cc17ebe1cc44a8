"""The methods, one file each, and how to build one by name."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastfuse import models
from fastfuse.errors import InputError, unknown_name
from fastfuse.methods.base import Method, MethodOutput, check_students
from fastfuse.methods.dml import DML
from fastfuse.methods.ffl import FFL
from fastfuse.methods.ffsd import FFSD
from fastfuse.methods.independent import Independent

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (FFSD, FFL, Independent, DML)}

__all__ = ["METHODS", "Method", "MethodOutput", "build_method"]


def build_method(
    name: str,
    *,
    model: str,
    students: int,
    num_classes: int,
    model_options: Mapping[str, Any] | None = None,
    **hyperparameters: Any,
) -> Method:
    """A method with freshly initialised networks.

    Args:
        name: ffsd, ffl, independent or dml.
        model: a name of `fastfuse.models`.
        students: number of common students or sub-networks.
        num_classes: K.
        model_options: named deviations of the network, see `fastfuse.models.build`.
        hyperparameters: of the method; see its `defaults`.

    Raises:
        InputError: an unknown method, model or hyper-parameter, or too few students.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    method = METHODS[name]
    check_students(method, students)
    for key in hyperparameters:
        if key not in method.defaults:
            known = ", ".join(method.defaults) or "none"
            raise InputError(f"{name} has no hyper-parameter {key}; it has {known}")
    options = dict(model_options or {})
    make = models.branched if method is FFL else models.build
    arguments = {"branches": students} if method is FFL else {}
    return method(partial(make, model, num_classes, **arguments, **options), students, num_classes, **hyperparameters)
