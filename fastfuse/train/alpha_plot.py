"""A picture of a search: the weight of each of the teacher's blocks, epoch by epoch, group by group."""

import json
from pathlib import Path
from typing import Any

from fastfuse.errors import InputError


def plot_alphas(run: Path, picture: Path) -> Path:
    """Draw what `dfa-search` wrote into a run's metrics.jsonl: a panel for each group, a line for each candidate.

    Args:
        run: folder of the search.
        picture: file to write; its suffix is the format.

    Returns:
        The file.

    Raises:
        InputError: matplotlib is not installed, the run has no weights yet, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a picture of the weights needs matplotlib, which is not installed: pip install 'fastfuse[plot]'"
        ) from error
    epochs, found = read_alphas(run)
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (axes, group) in enumerate(zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True)):
        for candidate, weights in group.items():
            axes.plot(epochs, weights, label=candidate)
        axes.set(title=f"group {i + 1}", xlabel="epoch", ylabel="alpha", ylim=(0, 1))
        axes.legend()
    try:
        figure.savefig(picture)
    except (OSError, ValueError) as error:
        raise InputError(f"{picture} cannot be written ({error}): give a path as alphas.png, .svg or .pdf") from error
    return picture


def read_alphas(run: Path) -> tuple[list[int], list[dict[str, list[float]]]]:
    """Epochs, and for each group the weights of each candidate in these epochs.

    Raises:
        InputError: the run has no epoch with weights.
    """
    file = Path(run) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): give the folder of a dfa-search run") from error
    lines = [line for line in lines if "groups" in line.get("aggregation", {})]
    if not lines:
        raise InputError(f"{file} holds no aggregation weights: give the folder of a dfa-search run of one seed")
    each: list[list[dict[str, Any]]] = [line["aggregation"]["groups"] for line in lines]
    groups = [
        {candidate: [groups[i]["weights"][j] for groups in each] for j, candidate in enumerate(group["candidates"])}
        for i, group in enumerate(each[0])
    ]
    return [line["epoch"] for line in lines], groups
