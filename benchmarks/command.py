"""How the programs of this folder end."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from fastfuse.errors import FastfuseError

P = ParamSpec("P")


def one_line_on_error(main: Callable[P, int]) -> Callable[P, int]:
    """A `main` that gives exit status 2, with one line that says what to mend, where it raises a `FastfuseError`."""

    @functools.wraps(main)
    def ended(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except FastfuseError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return ended
