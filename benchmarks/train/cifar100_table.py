"""The CIFAR-100 table, in as many calls as it takes: every row is a recipe of `fastfuse train`, by the same code.

Where a machine is lent for minutes, each call unpacks what the last one packed, trains until --max-time, and packs
again; a run goes on bit for bit. Needs no installation and neither git nor network; README.md has the commands.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# Run as a script, Python looks in this folder only: the package and its neighbour fastfuse lie two above.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Before torch is loaded: threads that spin while they wait make a busy machine a hundred times slower (docs/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from fastfuse.errors import FastfuseError, InputError, InterruptedRun

if TYPE_CHECKING:
    from benchmarks.train.rows import Row

RECORDS = Path(__file__).resolve().parents[1] / "records"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_parser() -> argparse.ArgumentParser:
    """One call may unpack, train, summarise and pack, in this order."""
    parser = _Parser(prog="benchmarks/train/cifar100_table.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--rows", help="what to train, or to pack: names with commas, or all; list prints them with what was published")
    add("--data", type=Path, nargs="+", help="the .npz of the images, or all parts that parts.py made of it")
    add("--out", type=Path, default=Path("runs/cifar100-table"), help="folder of the runs (runs/cifar100-table)")
    add("--seeds", type=_seeds, default=[0, 1, 2], help="of every row, with commas (0,1,2)")
    add("--replicas", action="store_true", help="train all seeds of a row in one pass")
    add("--epochs", type=int, help="instead of the recipe's; such a row is partial")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another field likewise, as lr=0.05")
    add("--max-time", type=float, help="seconds until all is saved and packed; the next call goes on from there")
    add("--amp", default="auto", help="off, bf16, fp16, or auto (bf16 on a GPU)")
    add("--mode", default="auto", help="as of fastfuse train (auto)")
    add("--strategy", default="auto", help="as of fastfuse train (auto)")
    add("--device", default="auto", help="as of fastfuse train (auto)")
    add("--commit", help="of this checkout, where git cannot tell; or FASTFUSE_COMMIT")
    add("--unpack", type=Path, nargs="+", default=[], metavar="PIECE", help="pieces of packs, before anything else")
    add("--pack", type=Path, metavar="FILE", help="write what must travel to FILE.0, FILE.1, ..., after all else")
    add("--pack-mib", type=float, default=60, help="of all pieces together, at most (60)")
    add("--piece-mib", type=float, default=15, help="of a piece, at most (15)")
    add("--weights", action="store_true", help="pack the weights of finished runs too")
    add("--summarise", action="store_true", help="print the table, and write table.md and table.json into --out")
    add("--record", metavar="SLUG", help="and, with all epochs of all runs, into benchmarks/records/<date>_SLUG")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, also where time ran out; 1 if training failed, 2 with one line that says what to mend."""
    started = time.monotonic()  # importing torch counts
    try:
        options = make_parser().parse_args(arguments)
        if options.commit:
            os.environ["FASTFUSE_COMMIT"] = options.commit
        # Imported late: --help and a mistyped option need no torch.
        from benchmarks.train import rows

        if options.rows == "list":
            print("\n".join(rows.listed()))
            return 0
        return _call(options, None if options.rows is None else rows.chosen(options.rows), started)
    except FastfuseError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, InterruptedRun):
            return error.status
        return 2 if isinstance(error, InputError) else 1


def _call(options: argparse.Namespace, chosen: "list[Row] | None", started: float) -> int:
    from benchmarks.train import pack, runs

    clock = runs.Clock(options.max_time, since=started)
    if not (options.unpack or options.data or options.pack or options.summarise or options.record):
        raise InputError("nothing to do: give --rows and --data to train, or --summarise, --pack, --unpack")
    if options.data and chosen is None:
        raise InputError("--data needs --rows: what to train on it; --rows list prints them")
    for line in pack.unpack(options.unpack, options.out) if options.unpack else []:
        print(f"unpacked {line}", file=sys.stderr)
    done = True
    try:
        if options.data and chosen is not None:
            done = _train(options, chosen, clock)
        if options.summarise or options.record:
            _summarise(options)
    finally:
        if options.pack is not None:
            _pack(options, chosen)
    return 0 if done else 1


def _train(options: argparse.Namespace, chosen: "list[Row]", clock: Any) -> bool:
    from benchmarks.train import runs

    own = {key: getattr(options, key) for key in ("amp", "mode", "strategy", "device")}
    own |= {"data": "npz", "data_path": _data(options), **_overrides(options)}
    planned = runs.plan(chosen, options.seeds, options.out, replicas=options.replicas)
    outcome = runs.learn([dataclasses.replace(config, **own) for config in planned], clock)
    if outcome is runs.Outcome.STOPPED:
        print("time is over; the same command goes on from here", file=sys.stderr)
    return outcome is not runs.Outcome.FAILED


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """--epochs and --set as fields of a configuration."""
    from fastfuse import config as configuration

    values: dict[str, Any] = {} if options.epochs is None else {"epochs": options.epochs}
    for entry in options.set:
        name, separator, text = entry.partition("=")
        if not separator:
            raise InputError(f"--set {entry!r} must be FIELD=VALUE, as lr=0.05")
        try:
            values[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            values[name.replace("-", "_")] = text
    return configuration.from_plain(values)


def _data(options: argparse.Namespace) -> Path:
    """The one file of the images, made of parts where those are given."""
    from benchmarks.train import parts

    first: Path = options.data[0]
    if len(options.data) == 1 and not parts.is_part(first):
        return first
    parts.join(options.data, options.out / "images.npz")
    return options.out / "images.npz"


def _summarise(options: argparse.Namespace) -> None:
    from benchmarks.train import page, table

    found = table.summarised(options.out, options.seeds)
    text = page.markdown(found)
    options.out.mkdir(parents=True, exist_ok=True)
    table.write(found, text, options.out)
    print(text)
    if options.record:
        folder = RECORDS / f"{datetime.now(UTC):%Y-%m-%d}_{options.record}"
        table.record(options.out, found, text, folder)
        print(f"wrote {folder}", file=sys.stderr)


def _pack(options: argparse.Namespace, chosen: "list[Row] | None") -> None:
    from benchmarks.train import pack

    folders = pack.run_folders(options.out, None if chosen is None else [row.name for row in chosen])
    limits = {"total": options.pack_mib, "piece": options.piece_mib}
    packed = pack.pack(folders, options.pack, weights=options.weights, **limits)
    for path in packed.pieces:
        print(f"packed {path} {path.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)
    for line in packed.left_out:
        print(f"left out, for it does not fit into {options.pack_mib:g} MiB: {line}", file=sys.stderr)


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(",") if part.strip()]
    if not seeds or min(seeds) < 0:
        raise argparse.ArgumentTypeError("expected numbers from 0 with commas between them")
    return list(dict.fromkeys(seeds))


if __name__ == "__main__":
    sys.exit(main())
