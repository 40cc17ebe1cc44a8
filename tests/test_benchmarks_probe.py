"""The probe's questions on tiny shapes: a CPU captures nothing, but everything is called as on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import probe

CPU = torch.device("cpu")


def test_every_form_of_a_layer_is_timed():
    rows = list(probe.convolutions(CPU, batch=2, networks=(2,), layers=((4, 8, 6, 2),)))
    assert [row["pass"] for row in rows] == list(probe.PASSES)
    assert all(row[f"{form}_us"] > 0 for row in rows for form in ("loop", "branches", "grouped"))


@pytest.mark.parametrize("mask", probe.PASSES.values(), ids=probe.PASSES)
def test_networks_side_by_side_compute_what_they_compute_apart(mask):
    calls = probe._Calls((4, 8, 6, 2), 3, 2, CPU)
    apart, together = [calls.one(i, mask) for i in range(3)], calls.together(mask)
    if mask is not None:
        which = mask.index(True)
        apart, together = [own[which] for own in apart], together[which]
    torch.testing.assert_close(torch.cat(apart, 0 if mask and mask[1] else 1), together)
    if mask is None:
        x, weight, _ = calls.apart[0]
        torch.testing.assert_close(apart[0], F.conv2d(x, weight, stride=2, padding=1))


def test_cheap_questions_have_an_answer():
    assert all(value > 0 for value in probe.launches(CPU, chain=8).values())
    assert probe.cache(CPU, channels=2, batch=2)["mb"] == 2 * 2 * 2 * 1024 * 2 / 1e6
    found = probe.eager(CPU, "resnet8", batch=4)
    assert found.keys() == {"published", "fastfuse"}
    assert all(0 < own["host_ms"] <= own["step_ms"] for own in found.values())


def test_the_time_ends_the_rows_and_an_error_is_an_answer(monkeypatch, capsys):
    saved = []
    rates = type("Rates", (), {"_asdict": lambda self: {"copy": 1.0}})()
    monkeypatch.setattr(probe, "measured_rates", lambda *_: rates)
    monkeypatch.setattr(probe, "launches", lambda device: {"eager_us": 12.3456})

    def full(device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probe, "cache", full)
    monkeypatch.setattr(probe, "eager", lambda device: {})
    monkeypatch.setattr(probe, "convolutions", lambda device: iter([{"loop_us": 1.0}, {"loop_us": 2.0}]))
    found = probe.run(CPU, -1, lambda found: saved.append(len(found)))
    assert found["cache"] == {"error": "out of memory"} and found["convolutions"] == [{"loop_us": 1.0}]
    said = capsys.readouterr().out
    assert "launches: {'eager_us': 12.35}" in said and "the time was over after 1 rows" in said
    assert saved == [2, 3, 4, 5, 6]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: it would be probed")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert probe.main(["--out", str(tmp_path / "probe.json")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
