"""What must travel from one call to the next, in few files of bounded size: the run folders, without what can be made.

Of a finished run its records, of an unfinished one also its newest checkpoint and the finished networks that it
learns from. A pack is a line of JSON (what is in it) and a .tar.gz per run, cut into pieces FILE.0, FILE.1, ... Each
piece begins with a line of JSON that says which one it is, and has checksums of itself and of the whole.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.train.runs import named, read_summary
from fastfuse.errors import CheckpointError, InputError
from fastfuse.train import checkpoint
from fastfuse.train.files import write_atomic

FORMAT = "fastfuse-pack"
VERSION = 1
RECORDS = (".json", ".jsonl", ".npz")
MIB = 2**20


class Packed(NamedTuple):
    """What `pack` has done.

    Attributes:
        pieces: the files.
        left_out: a line for every run that did not fit.
    """

    pieces: list[Path]
    left_out: list[str]


class Progress(NamedTuple):
    """How far a run is, with those that come before it; of two states of one run the greater one is the newer."""

    epochs: int
    finished: bool
    step: int


def run_folders(out: Path, rows: Iterable[str] | None = None) -> list[Path]:
    """The run folders of the table below OUT, of all rows or of those named."""
    kept = None if rows is None else set(rows)
    found = [file.parent for file in sorted((out / "runs").glob("*/*/config.json"))]
    return [path for path in found if path.suffix != ".tmp" and (kept is None or path.parent.name in kept)]


def pack(folders: Sequence[Path], target: Path, *, weights: bool, total: float, piece: float) -> Packed:
    """Write FILE.0, FILE.1, ... and delete those of an earlier pack of this name.

    Args:
        folders: of the runs; finished ones come first, then the others in their order, as long as there is room.
        target: FILE.
        weights: those of finished runs as well, which nothing but an export needs.
        total: MiB of all pieces, at most.
        piece: MiB of a piece, at most.

    Raises:
        WriteError: it cannot be written.
    """
    blobs, index, left_out, room = [], [], [], int(total * MIB) - 64 * 1024
    for folder in sorted(folders, key=is_open):
        blob = _archive(folder, weights=weights)
        if len(blob) > room:
            state = "unfinished, so it will go on from an earlier pack" if is_open(folder) else "finished"
            left_out.append(f"{named(folder)} ({len(blob) / MIB:.1f} MiB, {state})")
            continue
        room -= len(blob)
        blobs.append(blob)
        index.append({"run": named(folder), "progress": progress(folder), "bytes": len(blob)})
    head = json.dumps({"format": FORMAT, "version": VERSION, "runs": index}).encode() + b"\n"
    body = head + b"".join(blobs)
    return Packed(_write_pieces(body, target, int(piece * MIB)), left_out)


def unpack(pieces: Sequence[Path], out: Path) -> list[str]:
    """Put the runs of one or several packs into OUT/runs; of a run that is there, the newer state stays.

    Returns:
        A line for each run: where it stands, and if what was there stays.

    Raises:
        InputError: a piece that is damaged, missing or none; nothing is unpacked then.
    """
    said = []
    for body in _bodies(pieces):
        for entry, blob in _runs(body):
            folder = out / "runs" / entry["run"]
            given = Progress(*entry["progress"])
            if folder.exists() and progress(folder) >= given:
                said.append(f"{entry['run']}: the state that is there is as new, and stays")
                continue
            _extract(blob, folder)
            said.append(f"{entry['run']}: {'finished' if given.finished else 'unfinished'}, {given.epochs} epochs")
    return said


def progress(folder: Path) -> Progress:
    """How far the run in a folder is; a damaged checkpoint counts for nothing."""
    done = not is_open(folder)
    below = [file.parent for file in folder.rglob("metrics.jsonl") if not is_copy(file.parent)]
    epochs, step = {run: epochs_of(run) for run in below}, 0
    if not done and (folder / checkpoint.NAME).exists():
        try:
            position = checkpoint.load(folder / checkpoint.NAME)["position"]
        except CheckpointError:
            return Progress(-1, False, 0)
        epochs[folder], step = position["epoch"], position["step"]
    return Progress(sum(epochs.values()), done, step)


def is_open(folder: Path) -> bool:
    """Whether a run is not finished."""
    summary = read_summary(folder)
    return not (summary and summary["completed"])


def epochs_of(folder: Path) -> int:
    """How many epochs a run's metrics have."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def contents(folder: Path, *, weights: bool, below: bool = False) -> Iterator[Path]:
    """The files of a run folder that travel.

    Args:
        folder: of the run.
        weights: whether those of its networks are among them.
        below: it comes before another run, which is not finished and needs its networks.
    """
    done = not is_open(folder) and (folder / "config.json").exists()
    if (folder / "config.json").exists():
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            last = file.suffix == ".safetensors" and not file.stem.endswith("_best")
            network = done and (file.suffix == ".safetensors" if weights else last and below)
            if file.suffix in RECORDS or network or (file.name == checkpoint.NAME and not done):
                yield file
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if is_copy(inner):
            # Of replicas that go on, the copies are written anew when they end.
            yield from contents(inner, weights=weights, below=below) if done else ()
        elif not inner.is_symlink():
            yield from contents(inner, weights=weights, below=below or (_is_run(folder) and not done))


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").exists()


def is_copy(folder: Path) -> bool:
    """Whether a folder is that of one of the replicas of the run above it."""
    try:
        return (
            folder.name.startswith("seed") and json.loads((folder.parent / "config.json").read_text())["replicas"] > 1
        )
    except (OSError, ValueError, KeyError):
        return False


def _archive(folder: Path, *, weights: bool) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=6) as archive:
        for file in contents(folder, weights=weights):
            archive.add(file, str(file.relative_to(folder)), recursive=False)
    return data.getvalue()


def _write_pieces(body: bytes, target: Path, size: int) -> list[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{target.name}.*"):
        if old.suffix[1:].isdecimal():
            old.unlink()
    room = size - 512  # the line before it
    cuts = [body[start : start + room] for start in range(0, len(body), room)]
    whole = hashlib.sha256(body).hexdigest()
    written = []
    for i, cut in enumerate(cuts):
        line = {"format": FORMAT, "piece": i, "pieces": len(cuts), "whole": whole}
        line["sha256"] = hashlib.sha256(cut).hexdigest()
        written.append(target.with_name(f"{target.name}.{i}"))
        content = json.dumps(line).encode() + b"\n" + cut
        write_atomic(written[-1], lambda file, content=content: file.write(content))
    return written


def _bodies(pieces: Sequence[Path]) -> list[bytes]:
    """The packs that these pieces are of, each checked and whole."""
    packs: dict[str, dict[int, bytes]] = {}
    counts: dict[str, int] = {}
    for path in pieces:
        line, cut = _piece(path)
        packs.setdefault(line["whole"], {})[line["piece"]] = cut
        counts[line["whole"]] = line["pieces"]
    bodies = []
    for whole, found in packs.items():
        missing = [str(i) for i in range(counts[whole]) if i not in found]
        if missing:
            raise InputError(
                f"{pieces[0].with_suffix('')}: piece {', '.join(missing)} of {counts[whole]} pieces of a pack is "
                "missing: name all of them in --unpack"
            )
        bodies.append(b"".join(found[i] for i in range(counts[whole])))
        if hashlib.sha256(bodies[-1]).hexdigest() != whole:
            raise InputError(f"{pieces[0].with_suffix('')}: the pieces do not fit one another: copy the pack again")
    return bodies


def _piece(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        head, _, cut = path.read_bytes().partition(b"\n")
        line = json.loads(head)
        if line["format"] != FORMAT:
            raise ValueError("another format")
        sound = line["sha256"] == hashlib.sha256(cut).hexdigest()
        _ = line["whole"], line["piece"], line["pieces"]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check --unpack") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no piece of a pack: name the files that --pack wrote") from None
    if not sound:
        raise InputError(f"{path} is damaged, its bytes do not fit their checksum: copy it again")
    return line, cut


def _runs(body: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    head, _, rest = body.partition(b"\n")
    index = json.loads(head)
    if index["version"] != VERSION:
        raise InputError(f"the pack is of version {index['version']}, this program reads {VERSION}: unpack it there")
    start = 0
    for entry in index["runs"]:
        parts = Path(entry["run"]).parts
        if len(parts) != 2 or ".." in parts or Path(entry["run"]).is_absolute():
            raise InputError(f"the pack names a run {entry['run']!r}, expected ROW/SEED: it is not of this program")
        yield entry, rest[start : start + entry["bytes"]]
        start += entry["bytes"]


def _extract(blob: bytes, folder: Path) -> None:
    """Into a folder beside it first, so that what is there goes only when the other one is whole."""
    fresh = folder.with_name(f"{folder.name}.unpacked.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(blob), mode="r:gz") as archive:
        archive.extractall(fresh, filter="data")
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)
