"""The table as a page of Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report import MISSING
from benchmarks.train.rows import ROWS

_INTRODUCTION = """\
Top-1 on the test images in percent, mean ± sample deviation over seeds. The last epoch comes first: the best one is
chosen on the test images and flatters. A gain is the difference to the row's baseline of the same seed after the last
epoch, both by one commit on one kind of device. Seconds are of training with evaluation, and of all calls with loading
and saving; of replicas, seconds and images/s are of all seeds together. Memory is what the GPU's allocator reserved at
most."""
_HEADINGS = ("row", "deployed, last epoch", "best epoch", "gain", "other heads, last (best)", "published", "seeds")
_COSTS = ("amp", "seconds", "of all calls", "images/s", "MiB")


def markdown(found: Mapping[str, Any]) -> str:
    """What `table.summarised` found, all of it."""
    seeds = " ".join(map(str, found["seeds_needed"]))
    lines = ["# CIFAR-100", "", _INTRODUCTION, "", f"## Complete: all epochs of the recipe, seeds {seeds}", ""]
    lines += _table((*_HEADINGS, *_COSTS), [_row(row) for row in found["rows"]])
    lines += ["", "## Partial: no results yet", ""]
    headings = ("run", "seed", "epochs", "what it lacks", "last epoch so far", *_COSTS)
    lines += _table(headings, [_partial(run) for run in found["partial"]])
    lines += ["", "## On the way", "", "Means over the seeds that have come so far; complete or not.", ""]
    for course in found["course"]:
        lines += [*_course(course), ""]
    lines += ["## Made by", "", *_made(found), "", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def shown(value: Mapping[str, Any] | None, digits: int = 2, sign: str = "") -> str:
    """A spread as `mean ± deviation`."""
    if value is None:
        return MISSING
    return f"{value['mean']:{sign}.{digits}f}" + ("" if value["sd"] is None else f" ± {value['sd']:.{digits}f}")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["None."]
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _row(row: Mapping[str, Any]) -> list[str]:
    own, *others = row["heads"].items()
    best = f"{shown(own[1]['best'])} (epochs {' '.join(map(str, own[1]['best_epochs']))})"
    gain = row["gain"] if isinstance(row["gain"], str) else f"{shown(row['gain'], sign='+')} over {row['baseline']}"
    heads = "; ".join(f"{name} {shown(x['last'])} ({shown(x['best'])})" for name, x in others) or MISSING
    together = "" if row["replicas"] == [1] else f", {' '.join(map(str, row['replicas']))} in one pass"
    return [
        row["row"],
        f"{own[0]} {shown(own[1]['last'])}",
        best,
        gain,
        heads,
        "; ".join(map(str, ROWS[row["row"]].published)) or "none found",
        f"{len(row['seeds'])} ({' '.join(map(str, row['seeds']))}{together})",
        row["amp"],
        shown(row["seconds"], 0),
        shown(row["wall_seconds"], 0),
        shown(row["images_per_second"], 0),
        _whole(row["peak_mb"]),
    ]


def _partial(run: Mapping[str, Any]) -> list[str]:
    return [
        run["folder"],
        str(run["seed"]),
        str(run["epochs"]),
        "; ".join(run["lacks"]),
        "; ".join(f"{name} {top1:.2f}" for name, top1 in run["last"].items()),
        run["amp"],
        f"{run['seconds']:.0f}",
        _whole(run["wall"]),
        f"{run['images_per_second']:.0f}",
        _whole(run["peak_mb"]),
    ]


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def _course(course: Mapping[str, Any]) -> Iterator[str]:
    """Accuracies, learning rate and loss terms of one row: a column for each epoch looked at."""
    points = course["points"]
    rows = [
        [f"{head}, top-1 %", *(shown(p["top1"][head]) for p in points)]
        for head in dict.fromkeys(head for p in points for head in p["top1"])
    ]
    if course["baseline"]:
        rows.append([f"{course['baseline']}, top-1 %", *(shown(p["baseline"]) for p in points)])
    rows.append(["seeds", *(str(p["top1"][course["deployed"]]["n"]) for p in points)])
    rows.append(["learning rate", *(f"{p['learning_rate']:g}" for p in points)])
    for term in dict.fromkeys(term for p in points for term in p["losses"]):
        rows.append([term, *(f"{p['losses'][term]:.4g}" if term in p["losses"] else MISSING for p in points)])
    yield f"### {course['row']}"
    yield ""
    yield from _table(("after epoch", *(str(p["epoch"]) for p in points)), rows)


def _made(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each way in which runs were made, and which ones."""
    ways: dict[str, list[str]] = {}
    for entry in (*found["rows"], *found["partial"]):
        made = entry["made"]
        said = {key: ", ".join(values) for key, values in made.items()}
        way = f"commit {said['commit']} on {said['device']}; {said['versions']}; {said['data']}"
        ways.setdefault(way, []).append(entry.get("folder", entry["row"]))
    for way, names in ways.items():
        yield f"- {way}: {', '.join(dict.fromkeys(names))}."
