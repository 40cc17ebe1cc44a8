"""What the benchmarks measure, refuse and compute from timings; nothing is trained here."""

import builtins
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, counting_gpu, figures, memory, options, plot, report, roofline, run, selection, strategies
from benchmarks.selection import Form, Program
from benchmarks.timing import Timing
from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.nn.strategy import architecture, read_table, resolve_strategy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def names(programs):
    return [str(program) for program in programs]


def test_a_gpu_is_measured_in_every_form():
    programs, left_out = selection.programs(None, None, None, CUDA)
    forms = [
        f"{m}/{s}"
        for m in ("eager", "compiled", "graphed", "graphed-compiled")
        for s in ("loop", "branches", "grouped")
    ]
    forms = [form for form in forms if "compiled/branches" not in form]
    engine = [f"{kind} {form}" for kind in ("networks-only", "fastfuse") for form in forms]
    assert names(programs) == ["published", "published-amp", "compile", *engine]
    assert len(left_out) == 1 and "branches left out of compiled" in left_out[0]


def test_a_cpu_is_measured_in_what_it_can_do_and_the_rest_is_named():
    programs, left_out = selection.programs(None, None, None, CPU)
    forms = ("eager/loop", "eager/grouped", "compiled/loop", "compiled/grouped")
    assert names(programs) == ["published", *(f"{kind} {f}" for kind in ("networks-only", "fastfuse") for f in forms)]
    said = "\n".join(left_out)
    for what in ("published-amp", "compile left out", "mode graphed", "mode graphed-compiled", "strategy branches"):
        assert what in said


def test_what_is_asked_for_is_measured_in_the_order_of_the_tables():
    programs, left_out = selection.programs(["fastfuse", "published-amp"], ["eager"], ["grouped", "loop"], CPU)
    assert names(programs) == ["published-amp", "fastfuse eager/grouped", "fastfuse eager/loop"] and left_out == []
    # Modes say nothing about programs that have none.
    assert selection.programs(["published"], ["eager"], None, CPU) == ([Program("published")], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--providers", "publised"], "unknown provider 'publised': did you mean published", id="provider"),
        pytest.param(["--modes", "graph"], "unknown mode 'graph': did you mean graphed", id="mode"),
        pytest.param(["--strategies", "group"], "unknown strategy 'group': did you mean grouped", id="strategy"),
        pytest.param(["--modes", "eager,graphed"], "--modes graphed needs a CUDA device, not cpu", id="mode-of-gpus"),
        pytest.param(["--strategies", "branches"], "--strategies branches needs CUDA streams", id="strategy-of-gpus"),
        pytest.param(["--quick", "--modes", "eager,compiled"], "--quick measures one form", id="quick-forms"),
        pytest.param(["--quick", "--students", "2,4"], "--quick measures one step", id="quick-cases"),
        pytest.param(["--modes", ","], "expected one name or several", id="no-name"),
        pytest.param(["--plot"], "--plot needs a file, or --out", id="plot-where"),
        pytest.param(["--students", "2,1"], "--students must be at least 2, not 1", id="one-of-several"),
        pytest.param(["--image-size", "4"], "--image-size must be at least 8", id="image-size"),
        pytest.param(["--images", "1"], "--images must be at least 2", id="images"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(arguments, message, capsys):
    assert run.main(["--suite", "step", "--device", "cpu", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    ("suite", "arguments", "message"),
    [
        pytest.param("epoch", ["--plot", "x.png"], "draws the suites step and scaling", id="nothing-to-draw"),
        pytest.param("all", ["--plot", "x.png"], "needs --out instead of a file", id="several-pictures"),
        pytest.param("steps", [], "unknown suite 'steps': did you mean step", id="suite"),
    ],
)
def test_a_suite_refuses_what_is_not_its(suite, arguments, message, capsys):
    assert run.main(["--suite", suite, "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_compiling_without_a_compiler_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"--modes compiled needs a C\+\+ compiler.*no-such-compiler"):
        selection.available_forms(["compiled"], ["loop"], CPU)
    forms, left_out = selection.available_forms(None, ["loop"], CPU)
    assert forms == [Form("eager", "loop")] and any("mode compiled left out" in line for line in left_out)


def test_only_branches_of_compiled_code_leave_nothing():
    with pytest.raises(InputError, match="leave nothing to measure"):
        selection.available_forms(["compiled"], ["branches"], CUDA)


def test_the_quick_form_is_that_of_the_device():
    assert selection.best_form(None, None, CUDA) == ("graphed", "auto")
    assert selection.best_form(None, None, CPU) == ("compiled", "auto")
    assert selection.best_form(["eager"], ["grouped"], CPU) == ("eager", "grouped")


SMALL_IMAGES = ["resnet20", "resnet32", "resnet56", "wrn16_2"]


def test_the_grid_is_small_and_large_images_and_the_large_ones_need_a_gpu():
    assert selection.models(["all"], "step", CUDA) == ([*SMALL_IMAGES, "resnet18", "resnet34"], [])
    assert set(selection.GRID) <= set(models.NAMES)
    grid, left_out = selection.models(["all"], "scaling", CPU)
    assert grid == SMALL_IMAGES and len(left_out) == 1
    assert left_out[0].startswith("resnet18, resnet34 left out: ") and "--image-size" in left_out[0]
    # What is named is measured, beside the grid or alone.
    assert selection.models(["resnet8"], "step", CPU) == (["resnet8"], [])
    assert selection.models(["resnet18"], "step", CPU) == (["resnet18"], [])
    grid, left_out = selection.models(["resnet34", "all", "resnet8"], "step", CPU)
    assert grid == [*SMALL_IMAGES, "resnet34", "resnet8"] and left_out[0].startswith("resnet18 left out")


def test_an_epoch_of_imagenet_is_refused_or_left_out():
    for device in (CPU, CUDA):
        grid, left_out = selection.models(["all"], "epoch", device)
        assert grid == SMALL_IMAGES and "resnet18, resnet34 left out: this suite augments" in left_out[0]
    with pytest.raises(InputError, match="--model resnet34 cannot be measured by --suite epoch"):
        selection.models(["resnet34", "resnet20"], "epoch", CUDA)


def made(*arguments, models=("resnet32",), device=CUDA):
    given = options.for_suite(options.make_parser("").parse_args(["--suite", "step", *arguments]), "step")
    return cases.cases(given, models, "bf16", device)


def test_every_model_has_batches_of_its_own_data():
    small, large, wide = made(models=("resnet32", "resnet18", "resnet34"))
    assert (small.batch_size, small.image_size, small.classes) == (128, 32, 100)
    assert {(case.batch_size, case.image_size, case.classes) for case in (large, wide)} == {(256, 224, 1000)}
    assert cases.batches([small, large, wide]) == {"batch_size": "128+256", "image_size": "32+224"}
    assert cases.batches([large, wide]) == {"batch_size": 256, "image_size": 224}
    assert cases.stem("step", [small, large]) == "step_resnet32+resnet18_s2_b128+256_bf16_cuda"
    (quick,) = made("--quick", models=("resnet18",))
    assert quick == large
    (host,) = made(models=("resnet18",), device=CPU)
    assert (host.batch_size, host.image_size) == (4, 224)


def test_images_and_batches_that_are_asked_for_are_those_of_every_model():
    found = made("--image-size", "64", "--batch-size", "2", "--students", "4,2", models=("resnet8", "resnet18"))
    assert [(case.students, case.batch_size, case.image_size) for case in found] == [(2, 2, 64), (4, 2, 64)] * 2
    assert [case.classes for case in found] == [100, 100, 1000, 1000]
    assert cases.stem("scaling", found) == "scaling_resnet8+resnet18_s2+4_b2_i64_bf16_cuda"


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        pytest.param("resnet18", "48", "multiple of 32 from 64", id="maps-that-do-not-double"),
        pytest.param("resnet34", "32", "multiple of 32 from 64", id="one-position-is-no-map"),
        pytest.param("resnet20", "30", "multiple of 4 from 8", id="cifar"),
    ],
)
def test_images_that_do_not_suit_a_model_are_refused(model, size, says):
    with pytest.raises(InputError, match=f"--image-size {size} does not suit {model}: give a {says}"):
        made("--image-size", size, models=(model,))


def test_every_suite_has_its_defaults():
    def parsed(suite, *arguments):
        return options.for_suite(options.make_parser("").parse_args(["--suite", suite, *arguments]), suite)

    step, scaling = parsed("step", "--quick"), parsed("scaling")
    assert (step.model, step.students, step.batch_size, step.repeats) == (["resnet32"], [2], None, 5)
    assert (scaling.students, scaling.batch_size, scaling.repeats) == ([2, 4, 8], None, 5)
    assert parsed("scaling", "--quick").batch_size == parsed("epoch", "--quick").batch_size == 16
    given = parsed("scaling", "--quick", "--students", "8,2", "--batch-size", "4")
    assert (given.students, given.batch_size, given.repeats) == ([2, 8], 4, 2)


def test_without_matplotlib_a_picture_is_refused_before_anything_is_measured(monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run.main(["--suite", "step", "--device", "cpu", "--plot", "x.png"]) == 2
    printed = capsys.readouterr()
    assert "pip install 'fastfuse[plot]'" in printed.err and printed.out == ""


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
