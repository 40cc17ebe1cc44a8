"""What the benchmarks compute, tabulate and draw from timings; nothing is trained here."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import counting_gpu, figures, memory, plot, report, roofline, strategies
from benchmarks.selection import Form, Program
from benchmarks.timing import Timing
from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.nn.strategy import architecture, read_table, resolve_strategy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOOP, GROUPED = Form("eager", "loop"), Form("eager", "grouped")
MEDIANS = {
    Program("published"): 12.0,
    Program("published-amp"): 6.0,
    Program("networks-only", LOOP): 4.0,
    Program("fastfuse", LOOP): 5.0,
    Program("fastfuse", GROUPED): 3.0,
}


def test_ratios_are_of_medians_and_shares_of_the_same_form():
    assert figures.ratios(MEDIANS, Program("fastfuse", LOOP)) == {
        "published_ratio": 2.4,
        "published_amp_ratio": 1.2,
        "compile_ratio": "-",
        "distillation_share": 1.25,
    }
    assert figures.ratios(MEDIANS, Program("fastfuse", GROUPED))["distillation_share"] == "-"
    baseline = figures.ratios(MEDIANS, Program("published"))
    assert baseline["published_ratio"] == "-" and baseline["published_amp_ratio"] == 0.5


def test_costs_are_over_the_fewest_students_of_the_same_program():
    one, other = Program("published"), Program("fastfuse", LOOP)
    medians = {(one, 8): 60.0, (one, 2): 20.0, (other, 4): 9.0, (other, 2): 6.0, (other, 8): 12.0}
    medians |= {(Program("compile"), 4): 5.0, (Program("compile"), 8): 10.0}
    costs = figures.costs(medians)
    assert (costs.pop((Program("compile"), 4)), costs.pop((Program("compile"), 8))) == (1.0, 2.0)
    assert costs == {(one, 8): 3.0, (one, 2): 1.0, (other, 4): 1.5, (other, 2): 1.0, (other, 8): 2.0}


def test_an_epoch_is_compared_with_as_many_steps_as_it_has_images_for():
    row = figures.epoch(Timing((1800.0, 2000.0, 2200.0)), Timing((10.0,)), images=1050, batch_size=10)
    assert row["steps_s"] == pytest.approx(1.05) and row["overhead"] == pytest.approx(2.0 / 1.05)
    assert (row["epoch_s"], row["images_per_s"], row["step_ms"]) == (2.0, 525.0, 10.0)
    assert row["p20_s"] < row["epoch_s"] < row["p80_s"]


def test_doubt_is_cast_on_engine_programs_alone():
    published = Timing((10.0, 11.0, 12.0))
    timings = {
        Program("published"): published,
        Program("published-amp"): published,
        Program("fastfuse", LOOP): Timing((11.5, 11.6, 11.7)),
        Program("fastfuse", GROUPED): Timing((5.0, 5.1, 5.2)),
    }
    (doubt,) = figures.doubts(timings)
    assert "fastfuse eager/loop" in doubt and "grouped" not in doubt and "published-amp" not in doubt
    del timings[Program("published")]
    assert figures.doubts(timings) == []


def test_least_work_of_a_network_that_can_be_counted_by_hand(monkeypatch):
    class OneBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 4, 3, padding=1)
            self.pool = torch.nn.MaxPool2d(2)
            self.second = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)

        def forward(self, images):
            return self.second(self.pool(self.first(images)))

    monkeypatch.setattr(models, "build", lambda name, classes: OneBlock())
    work = roofline.least_work("any", networks=5, batch_size=2, image_size=8, element_bytes=2)
    image, middle, pooled, last = 2 * 3 * 64, 2 * 4 * 64, 2 * 4 * 16, 2 * 8 * 4
    # Forward and weight's gradient of both; the images need no gradient.
    elements = (2 * image + 3 * middle) + (2 * pooled + 3 * last) + (2 * last + 2 * pooled)
    elements += middle + 2 * pooled  # max pooling
    elements += 6 * last  # by its name the class is a block, which ends in a sum
    flops = 2 * 2 * middle * 27 + 3 * 2 * last * 36
    assert work == (5 * 2 * elements, 5 * flops)


@pytest.mark.parametrize(("model", "width"), [("resnet20", 64), ("resnet18", 512)])
def test_the_count_of_a_real_network_is_that_of_torch(model, width):
    from torch.utils.flop_counter import FlopCounterMode

    work = roofline.least_work(model, networks=3, batch_size=2, image_size=32, element_bytes=2)
    network = models.build(model, 10)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    # The linear layer is not in it: three products of [2, width] and [width, 10].
    assert work.flops == 3 * (counter.get_total_flops() - 3 * 2 * 2 * width * 10)


def test_the_bound_is_the_slower_of_memory_and_arithmetic():
    rates = roofline.Rates(copy=4e12, matrix=8e14)
    assert roofline.least_ms(roofline.Work(4 * 10**9, 1), rates) == pytest.approx(1.0)
    assert roofline.least_ms(roofline.Work(1, 16 * 10**11), rates) == pytest.approx(2.0)


def test_a_profile_is_tallied_without_ranges_and_waits():
    from torch.autograd import DeviceType

    def event(name, device=DeviceType.CPU, marked=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=marked)

    on_host = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"]
    others = ["cudaStreamSynchronize", "aten::copy_", "cudaEventRecord"]
    events = [event(name) for name in on_host + others]
    events += [event("sgemm", DeviceType.CUDA), event("Memset (Device)", DeviceType.CUDA)]
    events += [event("Optimizer.step#SGD.step", DeviceType.CUDA, marked=True)]
    assert counting_gpu.tally(events) == (2, 5)


def test_waits_are_what_cuda_warns_of(monkeypatch):
    import warnings

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert counting_gpu._waits(step) == 3 and modes == ["warn", "default"]


def test_memory_is_what_is_reserved_beyond_the_rest(monkeypatch):
    reserved = {"now": 100 * 2**20, "peak": 0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: reserved["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reserved.update(peak=reserved["now"]))
    before = memory.held(CUDA)
    reserved["now"] += 30 * 2**20  # weights, and what a graph keeps
    step = lambda: reserved.update(peak=reserved["now"] + 12 * 2**20)  # noqa: E731
    assert memory.peak_mb(step, before, CUDA) == 42.0
    assert memory.held(CPU) == 0 and memory.peak_mb(step, 0, CPU) == "-"


def saved_report(device_type="cpu", quick=False):
    settings = {
        "suite": "step",
        "quick": quick,
        "device_type": device_type,
        "amp": "off",
        "repeats": 5,
    }
    environment = {"device_key": "cpu", "commit": "abc", "python": "3.11", "torch": "2.15", "triton": "none"}
    found = [
        ("published", "-", "-", 2, 9.0),
        ("networks-only", "eager", "grouped", 2, 0.1),
        ("fastfuse", "eager", "loop", 2, 5.0),
        ("fastfuse", "eager", "grouped", 2, 4.0),
        ("fastfuse", "compiled", "grouped", 2, 0.5),
        ("fastfuse", "eager", "loop", 4, 8.0),
        ("fastfuse", "eager", "grouped", 4, 9.0),
        ("fastfuse", "eager", "loop", 8, 1.0),
    ]
    keys = ("kind", "mode", "strategy", "students", "median_ms")
    shape = {"batch_size": 128, "image_size": 32}
    rows = [{"model": "resnet8", **shape, **dict(zip(keys, row, strict=True))} for row in found]
    return {"settings": settings, "environment": environment, "rows": rows}


def test_a_report_becomes_the_table_that_auto_follows(tmp_path, capsys):
    path, table = tmp_path / "report.json", tmp_path / "table.json"
    path.write_text(json.dumps(saved_report()))
    table.write_text('{"rows": []}')
    assert strategies.main([str(path), "--table", str(table)]) == 0
    networks = [models.build("resnet8", 10) for _ in range(5)]
    rows = read_table(table)
    # Eight students were measured one way only: no row, since there is nothing to choose from.
    assert [(row.networks, row.milliseconds) for row in rows] == [
        (3, {"loop": 5.0, "grouped": 4.0}),
        (5, {"loop": 8.0, "grouped": 9.0}),
    ]
    assert rows[0].architecture == architecture(networks[0]) and rows[0].settings["mode"] == "eager"
    assert (rows[0].settings["batch_size"], rows[0].settings["image_size"]) == (128, 32)
    assert resolve_strategy("auto", networks[:3], table=table) == "grouped"
    assert resolve_strategy("auto", networks, table=table) == "loop"
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    ("saved", "arguments", "message"),
    [
        pytest.param(saved_report(quick=True), [], "only a whole run of the suite step", id="quick"),
        pytest.param(
            saved_report(), ["--mode", "compiled"], "no two strategies of fastfuse in mode compiled", id="one"
        ),
        pytest.param(saved_report("cuda"), [], "in mode graphed", id="the-mode-of-the-device"),
        pytest.param({"rows": []}, [], "is no saved report", id="not-a-report"),
    ],
)
def test_a_report_that_says_nothing_of_strategies_is_refused(saved, arguments, message, tmp_path, capsys):
    path, table = tmp_path / "report.json", tmp_path / "table.json"
    path.write_text(json.dumps(saved))
    table.write_text('{"rows": []}')
    assert strategies.main([str(path), "--table", str(table), *arguments]) == 2
    assert message in capsys.readouterr().err and read_table(table) == []


def finished(students):
    keys = {"model": "resnet8", "p20_ms": 1.0, "p80_ms": 4.0, "waits": "-"}
    rows = [{**keys, "students": s, "provider": p, "median_ms": 1.0 * s} for s in students for p in ("a", "b")]
    where, settings = {"device": "cpu"}, {"amp": "off", "batch_size": 4}
    columns = {"provider": "provider", "median_ms": "median ms", "waits": "host waits"}
    return report.Report("name", settings, where, columns, rows, {"a/b": 2.0}, {}, [])


@pytest.mark.parametrize(("students", "panels"), [([2], 1), ([2, 4], 2)])
def test_a_picture_has_bars_and_with_several_numbers_of_students_lines(students, panels, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.append((self, path)))
    plot.draw(finished(students), tmp_path / "x.png")
    (picture, path) = drawn[0]
    assert path == tmp_path / "x.png" and len(picture.axes) == panels
    assert [bar.get_width() for bar in picture.axes[0].patches] == [float(s) for s in students for _ in "ab"]
    if panels == 2:
        assert [list(line.get_ydata()) for line in picture.axes[1].lines] == [[2.0, 4.0]] * 2


def test_replicas_have_bars_of_their_own_and_are_no_point_of_the_lines():
    rows = [
        {"model": "m", "provider": "p", "students": s, "replicas": r, "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
        for s, r, ms in ((2, 1, 1.0), (4, 1, 2.0), (2, 4, 3.0))
    ]
    given = report.Report("name", {}, {}, {}, rows, {}, {}, [])
    assert [plot._name(row) for row in rows] == ["m S=2 p", "m S=4 p", "m S=2 R=4 p"]

    class Axes:
        def __getattr__(self, name):
            return lambda *drawn, **_: seen.setdefault(name, drawn)

    seen = {}
    plot._lines(Axes(), given, [2, 4])
    assert seen["plot"] == ([2, 4], [1.0, 2.0])


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(InputError, match="--plot cannot write"):
        plot.draw(finished([2]), tmp_path / "none" / "x.png")
    plot.draw(finished([2]), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_no_column_of_which_nothing_is_known(capsys):
    report.show(finished([2, 4]), since=2)
    printed = capsys.readouterr().out
    assert "median ms" in printed and "host waits" not in printed
    assert "4.00" in printed and "│      2.00 │" not in printed and printed.count("ratio a/b: 2.00") == 1
