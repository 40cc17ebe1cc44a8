"""What the saved runs of the suite "methods" say together: a row for each method, and a page of Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import MISSING, Value

BASELINE = "independent"
COLUMNS = {
    "method": "method",
    "top1": "top-1 %",
    "top1_sd": "sd",
    "gain": "gain",
    "gain_sd": "sd of gain",
    "other": "best other head",
    "other_top1": "its top-1 %",
    "other_sd": "its sd",
    "seeds": "seeds",
    "seconds": "seconds",
    "before_s": "before",
    "failed": "failed",
}


def summaries(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Value]]:
    """A row for each method in the order in which they were first trained, teachers last; deviations are of samples.

    Args:
        runs: as `benchmarks.methods` saves them.
    """
    alone = {run["seed"]: _deployed(run) for run in runs if run["name"] == BASELINE and "top1" in run}
    names = list(dict.fromkeys(run["name"] for run in runs))
    return [
        _summary(name, [run for run in runs if run["name"] == name], alone)
        for name in sorted(names, key=lambda name: name.startswith("teacher"))
    ]


def markdown(settings: Mapping[str, Value], runs: Sequence[Mapping[str, Any]]) -> str:
    """The table with all that is needed to read and to repeat it."""
    head = ("method", "deployed network, top-1 %", "gain over independent", "best other head, top-1 %", "seeds")
    lines = ["| " + " | ".join((*head, "seconds a run", "seconds before")) + " |", "| --- " * 7 + "|"]
    for row in summaries(runs):
        if row["seeds"] == 0:
            lines.append(f"| {row['method']} | failed: {row['failed']} " + "| - " * 5 + "|")
            continue
        other = f"{_pm(row['other_top1'], row['other_sd'])} {row['other']}" if row["other"] != MISSING else MISSING
        cells = (
            str(row["method"]),
            _pm(row["top1"], row["top1_sd"]),
            _pm(row["gain"], row["gain_sd"], "+"),
            other,
            str(row["seeds"]) if row["failed"] == MISSING else f"{row['seeds']}; another failed: {row['failed']}",
            f"{row['seconds']:.0f}",
            f"{row['before_s']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    made = [run for run in runs if "top1" in run]
    commits, devices = (", ".join(sorted({str(run[key]) for run in made})) for key in ("commit", "device"))
    versions = dict.fromkeys(f"{name} {number}" for run in made for name, number in run["versions"].items())
    return "\n".join(
        [
            "# What the methods make of one network",
            "",
            NOTES.format(**settings),
            "",
            *lines,
            "",
            "Settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + ".",
            "",
            f"Made by commit {commits} on {devices}; {', '.join(versions)}.",
            "",
        ]
    )


NOTES = """Every row trains the same network, {model}, for {epochs} epochs on the same {train_images} images
of {classes} classes in batches of {batch_size}, with the same rates and augmentation. Teachers are {teacher_model},
trained alike once per seed and shared by the methods. Top-1 is that of the last epoch on {test_images} test images:
mean over seeds ± sample deviation. A gain is the difference to `independent` of the same seed, mean ± sample deviation;
of one seed there is no deviation, and that of `independent` says how little it means. Of the other heads the one with
the best mean is shown.

Hyper-parameters are each method's own, but what the papers tie to epochs is in proportion: every `rampup_epochs` is
multiplied by {epochs}/{paper_epochs}, and the search of dfa lasts an eighth of a run as in the recipes, here
{search_epochs} of {epochs} epochs. Learning rates are the same for all and fall at 50 % and 75 % of the epochs.

Seconds a run: of its own epochs, evaluation included. Seconds before: what it trained first (earlier stages,
paraphrasers, search), without the shared teachers, which have a row of their own."""


def _summary(name: str, runs: Sequence[Mapping[str, Any]], alone: Mapping[int, float]) -> dict[str, Value]:
    done = [run for run in runs if "top1" in run]
    failed = next((str(run["failed"]) for run in runs if "failed" in run), MISSING)
    row: dict[str, Value] = dict.fromkeys(COLUMNS, MISSING) | {"method": name, "seeds": len(done), "failed": failed}
    if not done:
        return row
    row["top1"], row["top1_sd"] = spread([_deployed(run) for run in done])
    gains = [_deployed(run) - alone[run["seed"]] for run in done if run["seed"] in alone]
    if gains and name != BASELINE and not name.startswith("teacher"):
        row["gain"], row["gain_sd"] = spread(gains)
    # By the mean over seeds, so that it is one head and not the luckiest of each run.
    heads = {head: [run["top1"][head] for run in done] for head in done[0]["top1"] if head != done[0]["deployed"]}
    if heads:
        row["other"] = max(heads, key=lambda head: statistics.fmean(heads[head]))
        row["other_top1"], row["other_sd"] = spread(heads[row["other"]])
    for key in ("seconds", "before_s"):
        row[key] = statistics.fmean(run[key] for run in done)
    return row


def spread(values: Sequence[float]) -> tuple[float, Value]:
    """Mean and sample deviation, which one value does not have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else MISSING


def _deployed(run: Mapping[str, Any]) -> float:
    return run["top1"][run["deployed"]]


def _pm(mean: Value, deviation: Value, sign: str = "") -> str:
    if mean == MISSING:
        return MISSING
    return f"{mean:{sign}.2f}" + ("" if deviation == MISSING else f" ± {deviation:.2f}")
