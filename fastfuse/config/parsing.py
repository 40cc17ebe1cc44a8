"""Options and names on a command line, parsed by tyro from a dataclass. Imports tyro when it parses."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from fastfuse.config.help import below_options
from fastfuse.errors import InputError


def parse(
    kind: type,
    command: str,
    arguments: Sequence[str],
    *,
    names: str = "",
    default: Any = None,
    repeatable: Sequence[str] = (),
    text: str | None = None,
) -> Any:
    """Options, and names among them; a wrong one is one line.

    Args:
        kind: a frozen dataclass whose fields are options, described by the texts below them.
        command: of fastfuse, for its help and errors.
        arguments: all that stands behind the command.
        names: what may stand before or behind the options, as "RUN [RUN ...]"; "": nothing.
        default: an instance of `kind`, or None for the fields' own defaults.
        repeatable: fields of several values that take one each time their option is given.
        text: above the options in the help; None: what `kind` says of itself.

    Returns:
        An instance of `kind` which has, where there are `names`, these as a tuple of that name.

    Raises:
        InputError: an option that is unknown or lacks a value, or names where there are none.
        SystemExit: help was asked for, and has been printed.
    """
    import tyro

    told = _told(kind, names, repeatable, kind.__doc__ if text is None else text)
    printed, program = io.StringIO(), f"fastfuse {command}"
    given = {} if default is None else {"default": told(**vars(default))}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(told, prog=program, args=list(arguments), **given)
    except SystemExit as stop:
        if not stop.code:  # --help was asked for
            print(f"\n{below_options(command)}")
            raise
        raise InputError(_one_line(printed.getvalue(), program)) from None


def _told(kind: type, names: str, repeatable: Sequence[str], text: str | None) -> Any:
    """The dataclass as tyro shall read it: with names, and without defaults that say nothing."""
    import tyro

    def hint(default: str) -> str:
        return "" if default in ("None", "") else f"(default: {default})"

    annotated: Any = Annotated  # of types that are known when this runs, which type checkers cannot follow
    repeated, positional = (getattr(tyro.conf, marker) for marker in ("UseAppendAction", "Positional"))
    types, fields = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        own = types[field.name]
        own = repeated[own] if field.name in repeatable else annotated[own, tyro.conf.arg(help_behavior_hint=hint)]
        fields.append((field.name, own, dataclasses.field(default=field.default)))
    if names:
        told = tyro.conf.arg(metavar=names, help="As in the examples below.", help_behavior_hint="")
        fields.append(("names", positional[annotated[tuple[str, ...], told]], dataclasses.field(default=())))
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, namespace={"__doc__": text})


def _one_line(box: str, program: str) -> str:
    words = []
    for line in box.splitlines():
        if line.startswith("╭"):  # the title says less than the text
            continue
        text = line.strip("│╭╮╰╯─ ")
        if text.startswith(("Argument helptext", "For full helptext")):
            break
        words.append(text)
    message = " ".join(word for word in words if word)
    return f"{message}; see {program} --help"
