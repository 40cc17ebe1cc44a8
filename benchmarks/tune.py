"""Measure launch constants of the Triton kernels on this GPU, and write what won into the table that launchers read.

    python benchmarks/tune.py [--launches batch_norm_act_fwd,...] [--kinds "bfloat16 channels_last"] [--max-time 300]

One constant after another is tried around the values written in the code (`launch_space.py`). Before a trial is timed,
its results and gradients must fit the error budget on fresh random inputs, with unwritten memory filled with NaN. It is
taken if ImageNet's cases together are at least 3 % faster, beyond the spread, and no case is 3 % slower. All trials are
compiled first, by several processes at once. The table is written anew whenever a launch is done.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python looks in this folder only: the package lies one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch._functorch import config as functorch_config

from benchmarks.command import one_line_on_error
from benchmarks.kernels import release
from benchmarks.launch_space import SEARCHES, Search
from benchmarks.report import environment
from benchmarks.shares import compile_together, part_of
from benchmarks.tuning import several, tune
from fastfuse.errors import InputError, unknown_name
from fastfuse.kernels import _triton
from fastfuse.train.files import write_atomic

KINDS = ("bfloat16 channels_last", "float32 channels_last", "bfloat16 contiguous", "float16 channels_last")


def compile_share(chosen: Sequence[tuple[Search, str]], part: str, device: torch.device) -> None:
    """Run every part-th trial once, so that its kernels lie in Triton's cache."""
    work = [(search, kind, trial) for search, kind in chosen for trial in ({}, *search.trials())]
    for search, kind, trial in part_of(work, part, "--compile"):
        dtype, _, layout = kind.partition(" ")
        for case in search.cases(layout):
            try:
                with _triton.trying(search.launch, **trial):
                    outputs = several(case.call(case.make(device, getattr(torch, dtype)), "triton"))
                    wanted = [y for y in outputs if y.requires_grad] if search.mode == "backward" else []
                    torch.autograd.backward(wanted, [torch.ones_like(y) for y in wanted])
            except Exception as error:
                print(f"{search.launch} {trial}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            release(device)


def merged(table: Path, launch: str, kind: str, row: dict[str, Any] | None) -> None:
    """Put a row into the table, or take one away that no longer wins."""
    rows = json.loads(table.read_text()) if table.exists() else {}
    own = rows.pop(launch, {})
    own.pop(kind, None)
    if row is not None:
        own[kind] = row
    if own:
        rows[launch] = own
    text = json.dumps(rows, indent=1, sort_keys=True) + "\n"
    table.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(table, lambda file: file.write(text.encode()))


def row_of(constants: dict[str, int], last: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row of the table: constants, microseconds with those in the code and with these, and where it was measured."""
    kept = {key: where[key] for key in ("device_key", "torch", "triton", "commit", "date")}
    return {"constants": constants, "microseconds": last["microseconds"], **kept} if constants else None


def run(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Tune launch after launch; a line for each."""
    functorch_config.donated_buffer = False  # a backward is timed many times over one forward
    end = time.monotonic() + options.max_time
    where, noted = environment(device), []
    for kind in options.kinds:
        for search in options.searches:
            if time.monotonic() > end:
                yield f"{search.launch} {kind}: not tuned, the time was over"
                continue
            began = time.monotonic()
            taken, tried = tune(search, kind, device)
            merged(options.table, search.launch, kind, row_of(taken, tried[-1], where))
            noted.append({"launch": search.launch, "kind": kind, "taken": taken, "tried": tried})
            if options.log is not None:
                text = json.dumps({"environment": where, "searches": noted}, indent=1)
                write_atomic(options.log, lambda file, text=text: file.write(text.encode()))
            refused = sum("refused" in note for note in tried)
            yield (
                f"{search.launch} {kind}: {taken or 'as written'} of {len(tried)} trials, {refused} refused, "
                f"{time.monotonic() - began:.0f} s"
            )


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--launches", help=f"names with commas, in their order ({', '.join(s.launch for s in SEARCHES)})")
    made.add_argument("--kinds", default=KINDS[0], help=f"dtype and memory format, with commas: {', '.join(KINDS)}")
    made.add_argument("--max-time", type=float, default=600, help="seconds after which no other launch begins (600)")
    made.add_argument("--jobs", type=int, default=12, help="processes that compile at once (12)")
    made.add_argument("--table", type=Path, help="the table to change (fastfuse/kernels/tables/<architecture>.json)")
    made.add_argument("--log", type=Path, help="JSON file of all trials")
    made.add_argument("--compile", help=argparse.SUPPRESS)
    return made


def chosen(options: argparse.Namespace) -> None:
    """Names to searches.

    Raises:
        InputError: an unknown launch or kind.
    """
    known = {search.launch: search for search in SEARCHES}
    names = options.launches.split(",") if options.launches else list(known)
    options.kinds = [kind.strip() for kind in options.kinds.split(",")]
    for what, given, names_of in (("launch", names, known), ("kind", options.kinds, KINDS)):
        for name in given:
            if name not in names_of:
                raise unknown_name(what, name, names_of)
    options.searches = [known[name] for name in names]


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what to mend."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    chosen(options)
    if not torch.cuda.is_available():
        raise InputError("tuning needs an NVIDIA GPU: torch.cuda.is_available() is False; nothing was written")
    device = torch.device("cuda", torch.cuda.current_device())
    if options.compile:
        compile_share([(s, k) for k in options.kinds for s in options.searches], options.compile, device)
        return 0
    like = torch.empty(1, device=device)
    options.table = options.table or _triton.TABLES / f"{_triton.architecture(like)}.json"
    began = time.monotonic()
    if options.jobs > 1:
        compile_together([sys.executable, __file__, *arguments], options.jobs, options.max_time / 3)
    options.max_time -= time.monotonic() - began
    for line in run(options, device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
