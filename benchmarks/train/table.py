"""The table of what lies on the disk: complete rows first, everything shorter as partial, and nothing estimated."""

import dataclasses
import gzip
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.train import pack
from benchmarks.train.found import Found, collect
from benchmarks.train.rows import ROWS
from fastfuse.errors import InputError
from fastfuse.train.files import write_atomic

# After which a run is looked at on its way, besides its last one.
EPOCHS = (10, 50, 150, 300)


def summarised(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """What the disk says, as plain values.

    Args:
        out: OUT of the driver.
        seeds: that a row needs to be complete.

    Returns:
        `rows` that are complete, `partial` (runs of the others), `course` (what the seeds of a row were like after
        some epochs) and `notes`.

    Raises:
        InputError: a damaged file of a run.
    """
    found, notes = collect(out)
    by_row: dict[str, list[Found]] = {}
    for one in found:
        by_row.setdefault(one.row.name, []).append(one)
    whole = {name: own for name in ROWS if (own := _complete(by_row.get(name, []), seeds))}
    shorter = [one for one in found if one not in whole.get(one.row.name, [])]
    return {
        "seeds_needed": list(seeds),
        "rows": [_row(own, whole.get(str(own[0].row.baseline))) for own in whole.values()],
        "partial": [_partial(one, seeds, by_row[one.row.name]) for one in shorter],
        "course": [_course(by_row[name], by_row.get(str(ROWS[name].baseline), [])) for name in ROWS if name in by_row],
        "notes": notes,
    }


def write(found: Mapping[str, Any], page: str, folder: Path) -> None:
    """table.json and table.md."""
    write_atomic(folder / "table.json", lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    write_atomic(folder / "table.md", lambda file: file.write(page.encode()))


def record(out: Path, found: Mapping[str, Any], page: str, folder: Path) -> None:
    """The table with the records that it was made from: of every run the configuration, results, calls and epochs.

    Raises:
        InputError: the folder is there already.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already: choose another slug for --record")
    folder.mkdir(parents=True)
    write(found, page, folder)
    for run in pack.run_folders(out):
        for file in pack.contents(run, weights=False):
            if file.suffix not in (".json", ".jsonl") or pack.is_copy(file.parent):
                continue
            target = folder / "runs" / file.relative_to(out / "runs")
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.name == "metrics.jsonl":
                packed = gzip.compress(file.read_bytes(), mtime=0)
                target.with_name(f"{file.name}.gz").write_bytes(packed)
            else:
                target.write_bytes(file.read_bytes())


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample deviation (None of one value) and number."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}


def _complete(found: Sequence[Found], seeds: Sequence[int]) -> list[Found]:
    """The complete runs of a row, in the order of their seeds; none where a seed or a recipe is not whole."""
    whole = sorted((one for one in found if not one.lacks), key=lambda one: one.seed)
    same = len({one.amp for one in whole}) == 1
    return whole if same and set(seeds) <= {one.seed for one in whole} else []


def _heads(found: Sequence[Found]) -> list[str]:
    """The deployed network first; not the oracle, which is none."""
    names = [name for name in found[0].history[-1]["accuracy"] if not name.endswith("oracle")]
    return sorted(names, key=lambda name: name != found[0].deployed)


def _row(found: list[Found], baseline: list[Found] | None) -> dict[str, Any]:
    row, last = found[0].row, len(found[0].history)
    walls = [one.wall for one in found if one.wall is not None]
    heads = {}
    for head in _heads(found):
        best = [one.best(head) for one in found]
        heads[head] = {
            "last": spread([one.history[-1]["accuracy"][head]["top1"] for one in found]),
            "best": spread([top1 for top1, _ in best]),
            "best_epochs": [epoch for _, epoch in best],
        }
    return {
        "row": row.name,
        "recipe": row.recipe,
        "epochs": last,
        "seeds": [one.seed for one in found],
        "deployed": found[0].deployed,
        "amp": found[0].amp,
        "heads": heads,
        "gain": _gain(found, baseline),
        "baseline": row.baseline,
        "published": [dataclasses.asdict(value) for value in row.published],
        "replicas": sorted({one.replicas for one in found}),
        "seconds": spread([one.seconds for one in found]),
        "wall_seconds": spread(walls) if len(walls) == len(found) else None,
        "images_per_second": spread([one.images_per_second for one in found]),
        "peak_mb": max((one.peak_mb for one in found if one.peak_mb is not None), default=None),
        "made": {key: sorted({x for one in found for x in one.made[key]}) for key in found[0].made},
    }


def _gain(found: Sequence[Found], baseline: Sequence[Found] | None) -> dict[str, Any] | str:
    """Of the deployed network over the baseline of the same seed after the last epoch, or why there is none."""
    if found[0].row.baseline is None:
        return "it is a baseline"
    if not baseline:
        return f"{found[0].row.baseline} is not complete"
    for key in ("commit", "device", "data"):
        if len({x for one in (*found, *baseline) for x in one.made[key]}) != 1:
            return f"{found[0].row.baseline} has another {key}"
    alone = {one.seed: one.history[-1]["accuracy"][one.deployed]["top1"] for one in baseline}
    own = {one.seed: one.history[-1]["accuracy"][one.deployed]["top1"] for one in found}
    return spread([own[seed] - alone[seed] for seed in own if seed in alone])


def _partial(one: Found, seeds: Sequence[int], row: Sequence[Found]) -> dict[str, Any]:
    absent = sorted(set(seeds) - {other.seed for other in row if not other.lacks})
    lacks = one.lacks or [f"seeds {' '.join(map(str, absent))} of the row" if absent else "another precision, same row"]
    last = {head: one.history[-1]["accuracy"][head]["top1"] for head in _heads([one])}
    kept = ("folder", "seed", "deployed", "amp", "seconds", "wall", "images_per_second", "peak_mb", "replicas", "made")
    return {"row": one.row.name, "epochs": len(one.history), "last": last, "lacks": lacks} | {
        key: getattr(one, key) for key in kept
    }


def _course(found: Sequence[Found], baseline: Sequence[Found]) -> dict[str, Any]:
    """The seeds of a row after some epochs, each beside the baseline's seeds that have as many."""
    row = found[0].row
    points = []
    for epoch in sorted({*EPOCHS, max(len(one.history) for one in found)}):
        there = [one for one in found if len(one.history) >= epoch]
        if not there:
            continue
        alone = [value for one in baseline if (value := one.top1(one.deployed, epoch)) is not None]
        lines = [one.history[epoch - 1] for one in there]
        points.append(
            {
                "epoch": epoch,
                "top1": {h: spread([line["accuracy"][h]["top1"] for line in lines]) for h in _heads(there)},
                "baseline": spread(alone) if alone else None,
                "learning_rate": lines[0]["learning_rate"],
                "losses": _losses(lines),
            }
        )
    return {"row": row.name, "deployed": found[0].deployed, "baseline": row.baseline, "points": points}


def _losses(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over seeds of every loss term."""
    each = [line["losses"] for line in lines]
    return {name: statistics.fmean(own[name] for own in each) for name in each[0] if all(name in own for own in each)}
