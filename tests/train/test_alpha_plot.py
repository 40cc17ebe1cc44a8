"""The picture of a search: what it reads, what it draws, what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from fastfuse.errors import InputError
from fastfuse.train.alpha_plot import plot_alphas, read_alphas


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two epochs of two groups, of two and of three candidates."""
    lines = []
    for epoch, (first, second) in enumerate([([0.5, 0.5], [0.2, 0.3, 0.5]), ([0.75, 0.25], [0.1, 0.1, 0.8])], start=1):
        groups = [
            {"candidates": ["layer1.0", "layer1.1"], "weights": first},
            {"candidates": ["layer2.0", "layer2.1", "layer2.2"], "weights": second},
        ]
        lines.append(json.dumps({"epoch": epoch, "aggregation": {"groups": groups, "teacher": "t"}}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_weights_are_read_by_group_and_candidate(run: Path) -> None:
    epochs, groups = read_alphas(run)
    assert epochs == [1, 2]
    assert groups[0] == {"layer1.0": [0.5, 0.75], "layer1.1": [0.5, 0.25]}
    assert groups[1] == {"layer2.0": [0.2, 0.1], "layer2.1": [0.3, 0.1], "layer2.2": [0.5, 0.8]}


def test_the_picture_has_a_panel_for_each_group_and_a_line_for_each_candidate(run: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    text = plot_alphas(run, run / "alphas.svg").read_text()
    assert text.count('<g id="axes_') == 2
    # Two and three lines, and as many in the legends; ticks and frames are other elements.
    assert text.count("group 1") == text.count("group 2") == 1
    assert all(text.count(f"<!-- {name} -->") == 1 for name in ("layer1.0", "layer1.1", "layer2.0", "layer2.2"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read .*give the folder of a dfa-search run"),
        ("{", "cannot be read"),
        ('{"epoch": 1}\n', "holds no aggregation weights"),
        ('{"epoch": 1, "aggregation": {"seed0": {"groups": []}}}\n', "dfa-search run of one seed"),
        ("", "holds no aggregation weights"),
    ],
    ids=["no file", "no json", "another method", "replicas", "no epoch"],
)
def test_runs_without_weights_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        read_alphas(tmp_path)


def test_an_unknown_format_is_refused(run: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    with pytest.raises(InputError, match=r"alphas\.nothing cannot be written .*give a path as alphas\.png"):
        plot_alphas(run, run / "alphas.nothing")


def test_without_matplotlib_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(InputError, match=r"needs matplotlib, which is not installed: pip install 'fastfuse\[plot\]'"):
        plot_alphas(run, run / "alphas.png")
