"""The model card: what a network is, what it was trained on, how good it is and what it costs."""

from collections.abc import Mapping
from typing import Any

from fastfuse.train.cost import Cost, Latency
from fastfuse.train.deployable import Deployable

_LISTED = 200


def card(
    found: Deployable,
    facts: Mapping[str, Any],
    file: str,
    *,
    costs: tuple[Cost, Cost],
    times: Mapping[str, Latency],
    error: float,
    folded: bool,
) -> str:
    """Markdown.

    Args:
        found: the network.
        facts: what the file says of it.
        file: its name.
        costs: of what was exported, and of the plain network of that name.
        times: of both, by "exported" and "plain".
        error: largest difference of a logit from the trained network's.
        folded: whether batch norms are folded.
    """
    config, dataset = found.config, found.dataset
    height, width = dataset.image_size
    last = config.epochs if config.epochs else "?"
    stands = "" if found.completed else f"; the run had not ended (epoch {found.record['epochs']} of {last})"
    rows = {
        "Network": f"`{found.model}`, the {found.name} of the run{', batch norms folded' if folded else ''}",
        "Method": f"`{config.method}` with {config.networks}",
        "Data": f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images",
        "Weights": f"`{found.source.name}`, epoch {_or_unknown(found.epoch)}{stands}",
        "Accuracy": _accuracy(facts),
        "Input": f"RGB, {height}x{width} (height x width), values 0 to 1, normalised: (x - mean) / deviation",
        "Mean": ", ".join(f"{x:.6g}" for x in facts["mean"]),
        "Deviation": ", ".join(f"{x:.6g}" for x in facts["std"]),
        "Output": f"logits of {len(facts['classes'])} classes, before the softmax",
        "Trained with": _made(facts["trained"]),
        "Exported with": _made(facts["exported"]),
        "Checked": f"the logits are the trained network's on random images, largest difference {error:.2g}",
    }
    lines = [f"# {file}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([*lines, "", *_cost_table(found.model, costs, times), "", *_classes(facts["classes"])]) + "\n"


def _cost_table(model: str, costs: tuple[Cost, Cost], times: Mapping[str, Latency]) -> list[str]:
    own = times["exported"]
    lines = [
        "## Cost at inference",
        "",
        "| network | parameters | multiply-adds per image | latency, median (range) |",
        "| --- | --- | --- | --- |",
    ]
    for label, counted, time in zip(("this network", f"plain `{model}`"), costs, (own, times["plain"]), strict=True):
        taken = f"{time.median:.3f} ms ({time.fastest:.3f} to {time.slowest:.3f})"
        lines.append(f"| {label} | {counted.parameters:,} | {counted.multiply_adds:,} | {taken} |")
    how = f"Latency: {own.forwards} forwards of one image each, both networks in turn, eager, on {own.device}."
    return [*lines, "", how]


def _accuracy(facts: Mapping[str, Any]) -> str:
    found = facts["accuracy"]
    if not found:
        return "not evaluated yet"
    best = f"best {found['best_top1']:.2f} % (epoch {found['best_epoch']}, chosen on {facts['chosen_on']} images)"
    return f"top-1 on the test images: last epoch {found['last_top1']:.2f} %, {best}"


def _made(by: Mapping[str, Any]) -> str:
    versions = (f"{name} {version}" for name, version in by["versions"].items() if version)
    return ", ".join([f"commit {by['commit']}", *versions])


def _classes(names: list[str]) -> list[str]:
    shown = [f"{i}. {name}" for i, name in enumerate(names[:_LISTED])]
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ["## Classes", "", *shown, *more]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else str(value)
