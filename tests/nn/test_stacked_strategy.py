"""How `auto` decides: the measured table, its nearest row, and the rule without one."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.nn import STRATEGIES, Networks, networks
from fastfuse.nn.strategy import TABLE, Row, architecture, device_key, read_table, resolve_strategy, write_row

FACTS = {"settings": {"batch_size": 128}, "commit": "abc", "versions": {"torch": "2.11.0"}}


def build(count: int, name: str = "resnet8") -> list[nn.Module]:
    return [models.build(name, 5) for _ in range(count)]


def row(count: int, name: str = "resnet8", device: str = "cpu", **milliseconds: float) -> Row:
    return Row(device, architecture(models.build(name, 5)), count, milliseconds, **FACTS)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Rows of made-up times that are told apart by their winner."""
    path = tmp_path / "strategies.json"
    path.write_text('{"rows": []}')
    write_row(row(3, loop=2.0, grouped=1.0), table=path)
    write_row(row(9, loop=1.0, grouped=2.0), table=path)
    write_row(row(3, "resnet14", loop=1.0, grouped=2.0), table=path)
    write_row(row(3, device="NVIDIA H200", loop=3.0, grouped=2.0, branches=1.0), table=path)
    return path


@pytest.mark.parametrize(
    ("count", "model", "wanted", "why"),
    [
        (3, "resnet8", "grouped", "the row of this number"),
        (9, "resnet8", "loop", "the row of this number"),
        (1, "resnet8", "grouped", "3 is nearer than 9"),
        (6, "resnet8", "grouped", "of two as near, the smaller"),
        (7, "resnet8", "loop", "9 is nearer than 3"),
        (3, "resnet14", "loop", "another depth has rows of its own"),
        (3, "wrn10_1", "loop", "no row of this architecture"),
    ],
)
def test_auto_takes_the_nearest_row(table, count, model, wanted, why):
    assert resolve_strategy("auto", build(count, model), table=table) == wanted, why


def test_auto_without_rows_is_loop(tmp_path):
    (tmp_path / "empty.json").write_text('{"rows": []}')
    assert resolve_strategy("auto", build(3), table=tmp_path / "empty.json") == "loop"
    assert resolve_strategy("auto", [*build(2), *build(1, "wrn10_1")], table=tmp_path / "empty.json") == "loop"


def test_auto_of_networks_that_cannot_be_stacked_is_loop(monkeypatch, table):
    monkeypatch.setattr(networks, "resolve_strategy", lambda name, own: resolve_strategy(name, own, table=table))
    mixed = build(3)
    mixed[1].bn1.momentum = 0.3
    own = Networks(mixed)
    assert own.arrange("auto") == own.strategy == "loop"
    with pytest.raises(InputError, match="bn1"):
        own.arrange("grouped")
    alike = Networks(build(3))
    assert alike.arrange("auto") == alike.strategy == "grouped"


def test_an_explicit_strategy_needs_no_row(table):
    assert resolve_strategy("grouped", build(9), table=table) == "grouped"
    assert resolve_strategy("loop", build(3), table=table) == "loop"


def test_a_row_replaces_the_one_of_its_kind(table):
    before = read_table(table)
    write_row(row(3, loop=1.0, grouped=4.0), table=table)
    after = read_table(table)
    assert len(after) == len(before) == 4
    assert resolve_strategy("auto", build(3), table=table) == "loop"
    assert json.loads(table.read_text())["rows"] == [r._asdict() for r in sorted(after, key=lambda r: r[:3])]


@pytest.mark.parametrize("times", [{"loop": 1.0}, {"loop": 1.0, "grouped": 0.0}, {"loop": 1.0, "grupped": 2.0}, {}])
def test_rows_that_say_nothing_are_refused(table, times):
    before = table.read_text()
    with pytest.raises(InputError, match="positive times of at least two of loop, branches, grouped"):
        write_row(row(2, **times), table=table)
    assert table.read_text() == before


def test_depths_widths_and_families_are_told_apart():
    names = ["resnet20", "resnet32", "resnet56", "wrn16_2", "wrn16_1", "wrn28_2", "resnet110"]
    with torch.device("meta"):
        keys = [architecture(models.build(name, 10)) for name in names]
        assert (
            architecture(models.build("resnet32", 100)) == keys[1] == "CifarResNet, 33 convolutions, up to 64 channels"
        )
    assert len(set(keys)) == len(names)
    assert device_key(torch.device("cpu")) == "cpu"


def test_the_committed_table_can_be_read_and_is_packaged():
    for found in read_table():
        assert set(found.milliseconds) <= set(STRATEGIES) and len(found.milliseconds) > 1
        assert found.commit and found.versions["torch"] and found.settings
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fastfuse"]
    assert any(TABLE.relative_to(TABLE.parents[1]).match(pattern) for pattern in patterns)
