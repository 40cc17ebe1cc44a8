"""How several networks are run, and which way `auto` takes.

    loop      one after another
    branches  each on a CUDA stream of its own: parallel branches of a captured graph
    grouped   one stacked network, see `fastfuse.nn.stacked`

`auto` follows strategies.json, the table of measured rows beside this file: among the rows of this device ("cpu" for
every CPU) and this architecture it takes the one with the nearest number of networks, the smaller of two, and of that
row the fastest strategy. Without such a row, or where the networks cannot be stacked, it is "loop", which needs nothing
that is not measured.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastfuse.errors import InputError, unknown_name

STRATEGIES = ("loop", "branches", "grouped")
TABLE = Path(__file__).with_name("strategies.json")


class Row(NamedTuple):
    """One measurement.

    Attributes:
        device: see `device_key`.
        architecture: see `architecture`.
        networks: how many.
        milliseconds: of a training step, by strategy.
        settings: what it was measured with, such as batch size, precision and mode.
        commit: of this package.
        versions: of what it stands on.
    """

    device: str
    architecture: str
    networks: int
    milliseconds: Mapping[str, float]
    settings: Mapping[str, Any]
    commit: str
    versions: Mapping[str, str | None]


def resolve_strategy(strategy: str, networks: Sequence[nn.Module], *, table: Path = TABLE) -> str:
    """The strategy to use for networks; "auto" as the description of this module says.

    Raises:
        InputError: an unknown strategy, or one that this device does not have.
    """
    if strategy not in (*STRATEGIES, "auto"):
        raise unknown_name("strategy", strategy, (*STRATEGIES, "auto"))
    device = next(networks[0].parameters()).device
    if strategy == "branches" and device.type != "cuda":
        raise InputError(f"strategy branches needs CUDA streams, and the networks are on {device}; use --strategy loop")
    if strategy != "auto":
        return strategy
    kinds = {architecture(network) for network in networks}
    key = device_key(device), *kinds
    rows = [row for row in read_table(table) if (row.device, row.architecture) == key]
    if not rows:
        return "loop"
    nearest = min(rows, key=lambda row: (abs(row.networks - len(networks)), row.networks))
    return min(nearest.milliseconds, key=lambda name: nearest.milliseconds[name])


def device_key(device: torch.device) -> str:
    """A GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def architecture(network: nn.Module) -> str:
    """Class, number of convolutions and widest one: tells depths and widths of a family apart."""
    widths = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return f"{type(network).__name__}, {len(widths)} convolutions, up to {max(widths, default=0)} channels"


def read_table(table: Path = TABLE) -> list[Row]:
    """All measured rows."""
    return [Row(**row) for row in json.loads(table.read_text())["rows"]]


def write_row(row: Row, *, table: Path = TABLE) -> None:
    """Keep a measured row, in place of an earlier one of the same device, architecture and number of networks.

    Raises:
        InputError: a row that says nothing: fewer than two strategies, or a time that is not positive.
    """
    unknown = set(row.milliseconds) - set(STRATEGIES)
    if unknown or len(row.milliseconds) < 2 or not all(ms > 0 for ms in row.milliseconds.values()):
        names = ", ".join(STRATEGIES)
        raise InputError(f"a row needs positive times of at least two of {names}, not {dict(row.milliseconds)}")
    rows = {other[:3]: other for other in read_table(table)} | {row[:3]: row}
    lines = [rows[key]._asdict() for key in sorted(rows)]
    table.write_text(json.dumps({"rows": lines}, indent=2) + "\n")
