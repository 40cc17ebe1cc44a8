"""Writing files so that a reader finds the old one or the new one, never a part."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastfuse.errors import FastfuseError, InputError


class WriteError(FastfuseError):
    """A file of the run cannot be written: disk full, folder gone or not writable."""


def write_atomic(
    path: Path, write: Callable[[BinaryIO], object], *, before_replacing: Callable[[], object] = lambda: None
) -> None:
    """Write to a temporary name in the same folder, flush to the disk, rename.

    Args:
        path: the file.
        write: puts its content into an open file.
        before_replacing: done when the content is safe, just before the rename.

    Raises:
        WriteError: it could not be written; an earlier file of that name is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before_replacing()
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write of its archive as a RuntimeError.
        with contextlib.suppress(OSError):  # as of a file system that can no longer be written to
            temporary.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path}: {_reason(error)}; free space or choose another --out") from error


def make_folder(path: Path) -> bool:
    """Create a folder and see that it can be written to; True if it was not there before.

    Raises:
        InputError: it cannot be created or written to.
    """
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-probe.tmp"
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot use {path} as a folder: {_reason(error)}; choose another --out") from error
    return created


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
