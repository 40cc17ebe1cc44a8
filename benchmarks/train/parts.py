"""An .npz of images in files of bounded size, for a machine into which little can be carried at a time.

    python benchmarks/train/parts.py cifar100.npz carry --mib 48     # carry/cifar100.0.npz, carry/cifar100.1.npz, ...

Images [N, H, W, 3] become lossless WebP strips, about half of their bytes; everything else stays as it is. `join` makes
an .npz of the same arrays from all parts, checked by their checksum. Needs Pillow, which torchvision brings.
"""

import argparse
import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# Run as a script, Python looks in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.command import one_line_on_error
from fastfuse.errors import InputError
from fastfuse.train.files import write_atomic

# A WebP image has at most 16383 rows.
_ROWS = 16_000
_MARK = "fastfuse_part"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def split(source: Path, folder: Path, *, mib: float) -> list[Path]:
    """Write the arrays of an .npz as parts of at most `mib` MiB.

    Raises:
        InputError: an array that is no part of a data set, or one that does not fit into a part.
    """
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except _DAMAGE as error:
        raise InputError(f"{source} cannot be read as .npz ({error}): write it with numpy.savez") from None
    parts: list[dict[str, np.ndarray]] = [{}]
    room = limit = int(mib * 2**20) - 4096  # what the file needs besides
    for key, array in _pieces(arrays):
        size = array.nbytes + 512
        if size > limit:
            raise InputError(f"{source}: {key} has {size} bytes: give --mib above {size / 2**20 + 0.1:.1f}")
        if size > room:
            parts.append({})
            room = limit
        parts[-1][key] = array
        room -= size
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, part in enumerate(parts):
        written.append(folder / f"{source.stem}.{i}.npz")
        _write(written[-1], [digest(arrays), str(i), str(len(parts))], part)
    return written


def join(parts: Sequence[Path], target: Path) -> None:
    """Write the .npz that all these parts were made of, unless it is there.

    Raises:
        InputError: a part is missing, twice there, damaged, or of other data.
    """
    found, whole, count = _read(parts)
    if target.exists() and _mark_of(target) == whole:
        return
    missing = [str(i) for i in range(count) if i not in found]
    if missing:
        raise InputError(f"of {count} parts of the data {', '.join(missing)} is missing: name all of them in --data")
    pieces: dict[str, np.ndarray] = {key: array for i in range(count) for key, array in found[i].items()}
    arrays = {key: array for key, array in pieces.items() if "/" not in key}
    images = sorted({key.partition("/")[0] for key in pieces if "/" in key})
    with ThreadPoolExecutor() as pool:
        for key in images:
            strips = [pieces[name] for name in sorted(pieces) if name.startswith(f"{key}/")]
            arrays[key] = np.concatenate(list(pool.map(_decoded, strips)))
    if digest(arrays) != whole:
        raise InputError(f"{parts[0]} and the other parts do not give the data that they were made of: make them anew")
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, [whole], arrays)


def is_part(path: Path) -> bool:
    """Whether a file is a part, which a whole data set is not."""
    return _mark_of(path, length=3) is not None


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and content."""
    found = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        found.update(f"{key} {array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _write(path: Path, mark: list[str], arrays: dict[str, np.ndarray]) -> None:
    content: dict[str, Any] = {_MARK: np.array(mark), **arrays}
    write_atomic(path, lambda file: np.savez(file, **content))


def _pieces(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays, the large ones of images as strips; those that are not go first."""
    for key, array in sorted(arrays.items(), key=lambda item: item[0].endswith("_images")):
        if not key.endswith("_images"):
            yield key, array
            continue
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise InputError(f"{key} is {array.dtype} {list(array.shape)}, expected uint8 [N, H, W, 3]: convert it")
        of_each = max(1, _ROWS // array.shape[1])
        for start in range(0, len(array), of_each):
            yield f"{key}/{start:08d}", _encoded(array[start : start + of_each])


def _encoded(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] to the bytes of one strip, its height before them."""
    from PIL import Image

    count, height, width, _ = images.shape
    data = io.BytesIO()
    strip = Image.fromarray(np.ascontiguousarray(images).reshape(count * height, width, 3))
    strip.save(data, "webp", lossless=True, exact=True, method=4)
    return np.frombuffer(height.to_bytes(4, "little") + data.getvalue(), np.uint8)


def _decoded(strip: np.ndarray) -> np.ndarray:
    from PIL import Image

    data = strip.tobytes()
    pixels = np.asarray(Image.open(io.BytesIO(data[4:])).convert("RGB"))
    return pixels.reshape(-1, int.from_bytes(data[:4], "little"), pixels.shape[1], 3)


def _read(parts: Sequence[Path]) -> tuple[dict[int, dict[str, np.ndarray]], str, int]:
    """The arrays of each part by its number, the checksum of the whole, and how many parts there are."""
    found: dict[int, dict[str, np.ndarray]] = {}
    marks: list[tuple[Any, Any]] = []
    for path in parts:
        try:
            with np.load(path, allow_pickle=False) as file:
                whole, number, count = file[_MARK].tolist()
                found[int(number)] = {key: file[key] for key in file.files if key != _MARK}
        except _DAMAGE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} is damaged or no part of a data set ({reason}): copy it again") from None
        marks.append((whole, int(count)))
    if len(set(marks)) != 1:
        raise InputError(f"{', '.join(map(str, parts))} are parts of different data: name those of one")
    return found, *marks[0]


def _mark_of(path: Path, *, length: int = 1) -> str | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            mark = file[_MARK].tolist()
    except _DAMAGE:
        return None
    return str(mark[0]) if len(mark) == length else None


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Split a file; exit status 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=float, default=48.0, help="the most that a part may have (48)")
    options = parser.parse_args(arguments)
    for path in split(options.source, options.folder, mib=options.mib):
        print(f"{path} {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
