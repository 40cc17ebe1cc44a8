"""From reports of the suite "kernels" to the backend that `auto` takes."""

import json

import pytest
import torch

from benchmarks import preferences
from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch

GPU = "NVIDIA H200"


def row(op, provider, median, shape="A", mode="forward"):
    return {"op": op, "provider": provider, "shape": shape, "dtype": "bfloat16", "mode": mode, "median_us": median}


def report(*rows, device=GPU, quick=False, suite="kernels"):
    where = {"device_key": device, "commit": "abc"}
    return {"settings": {"suite": suite, "quick": quick}, "environment": where, "rows": list(rows)}


TRITON, CUDA, EAGER = "fastfuse triton", "fastfuse cuda", "reference"
MEASURED = [
    report(row("attention_mse", TRITON, 10.0), row("attention_mse", CUDA, 14.0), row("attention_mse", EAGER, 1.0)),
    report(row("attention_mse", TRITON, 10.0, "B"), row("attention_mse", CUDA, 5.0, "B")),
    # A shape that one backend cannot take says nothing about the two.
    report(row("attention_mse", TRITON, 1000.0, "C"), row("augment", TRITON, 3.0)),
]


def test_the_smaller_sum_over_what_all_have_run_wins():
    found = preferences.rows(MEASURED)
    sums = {"cuda": 19.0, "triton": 20.0}
    assert found == {"attention_mse": {"backend": "cuda", "microseconds": sums, "commit": "abc"}}


def test_kinds_of_calls_have_rows_of_their_own_and_torchs_convolution_is_one_of_the_backends(tmp_path, monkeypatch):
    """grouped_conv prefers the reference: of narrow layers the kernels were faster, of wide ones they were not."""
    narrow, wide = ({"kind": f"{width} to {width}, 3x3, stride 1"} for width in (16, 64))
    times = [(narrow, TRITON, 3.0), (narrow, EAGER, 9.0), (wide, TRITON, 30.0), (wide, EAGER, 10.0)]
    found = preferences.rows([report(*(row("grouped_conv", provider, t) | kind for kind, provider, t in times))])
    assert {key: own["backend"] for key, own in found.items()} == {
        "grouped_conv 16 to 16, 3x3, stride 1": "triton", "grouped_conv 64 to 64, 3x3, stride 1": "reference",
    }  # fmt: skip
    monkeypatch.setattr(_dispatch, "preferences", lambda: {GPU: found})
    monkeypatch.setattr(_dispatch, "_process_default", "auto")
    monkeypatch.setattr(_dispatch, "_gpu_name", lambda device: GPU)
    monkeypatch.setitem(_dispatch._ops, "grouped_conv", {"reference": None, "triton": lambda tensor: None})
    chosen = {
        width: _dispatch.resolve("grouped_conv", "auto", Placed(0), kind=f"{width} to {width}, 3x3, stride 1")
        for width in (16, 32, 64)
    }
    assert chosen == {16: "triton", 32: "reference", 64: "reference"}


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([report(quick=True)], "quick"),
        ([report(suite="step")], "suite kernels"),
        ([report(), report(device="other")], "several devices"),
        ([report(row("augment", TRITON, 3.0))], "two backends"),
    ],
    ids=["quick", "another suite", "two devices", "one backend"],
)
def test_reports_that_cannot_tell_are_refused(reports, said):
    with pytest.raises(InputError, match=said):
        preferences.rows(reports)


def test_auto_follows_the_table_where_the_backend_is_usable(tmp_path, monkeypatch, capsys):
    table, files = tmp_path / "preferences.json", []
    table.write_text(json.dumps({GPU: {"peer_kl_ce": {"backend": "triton"}}}))
    for i, saved in enumerate(MEASURED):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(saved))
    assert preferences.main([*map(str, files), "--table", str(table)]) == 0
    assert "attention_mse: cuda" in capsys.readouterr().out
    assert json.loads(table.read_text())[GPU].keys() == {"attention_mse", "peer_kl_ce"}

    monkeypatch.setattr(_dispatch, "PREFERENCES", table)
    monkeypatch.setattr(_dispatch, "_process_default", "auto")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU if device == 0 else "another")
    usable = {"triton": lambda tensor: None, "cuda": lambda tensor: None, "reference": None}
    monkeypatch.setattr(_dispatch, "_ops", {"attention_mse": usable, "augment": usable})
    for cached in (_dispatch.preferences, _dispatch._gpu_name):
        cached.cache_clear()
    try:
        assert _dispatch.resolve("attention_mse", "auto", Placed(0)) == "cuda"
        assert _dispatch.resolve("attention_mse", "auto", Placed(1)) == "triton", "another GPU has no row"
        assert _dispatch.resolve("augment", "auto", Placed(0)) == "triton", "no row for this op"
        usable["cuda"] = lambda tensor: "not built"
        assert _dispatch.resolve("attention_mse", "auto", Placed(0)) == "triton", "measured, but not usable here"
    finally:
        for cached in (_dispatch.preferences, _dispatch._gpu_name):
            cached.cache_clear()


class Placed:
    """Stands for a tensor on a GPU."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


def test_a_file_that_is_no_report(tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text("{}")
    assert preferences.main([str(file)]) == 2
    assert "is no saved report" in capsys.readouterr().err


def test_the_committed_table_names_backends_that_ops_have():
    for ops in _dispatch.preferences().values():
        for op, row in ops.items():
            assert row["backend"] in _dispatch.backends(op.split()[0]) and len(row["microseconds"]) > 1
