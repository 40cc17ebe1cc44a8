"""What a user can do wrong, as exceptions of one clear line: what was wrong, what was expected, how to mend it.

The command line prints that line without a traceback; every other exception is a fault of this package and shows one.
"""

import difflib
from collections.abc import Iterable

_LISTED = 50

# Exit statuses of a run that was stopped: by who sits there (128 + SIGINT, as shells have it), or by who wants the
# machine back (EX_TEMPFAIL of sysexits.h: come back later).
INTERRUPTED, PREEMPTED = 130, 75


class FastfuseError(Exception):
    """Base of all errors that a user can mend."""


class InputError(FastfuseError, ValueError):
    """A value, file, shape or option that cannot be used."""


class CheckpointError(FastfuseError):
    """A checkpoint that is damaged, is not one, or belongs to another run."""


class NonFiniteLossError(FastfuseError, ArithmeticError):
    """A loss term became infinite or not a number."""


class InterruptedRun(FastfuseError):
    """Ctrl-C, SIGTERM or SIGUSR1: the step was finished and a checkpoint written.

    Attributes:
        status: the command line's exit status: INTERRUPTED (130) after Ctrl-C, PREEMPTED (75) after the others.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class BackendUnavailableError(FastfuseError, RuntimeError):
    """An explicitly requested kernel backend cannot serve here."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among the known ones; it lists the near ones first, of all 50 at most."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known[:_LISTED])}{more}")
