"""A tiny run of every suite, and what is built for each provider."""

import csv
import functools
import gc
import json
import math
import re

import pytest
import torch

from benchmarks import epoch, epoch_data, programs, run, scaling, step, teachers
from benchmarks.programs import Case, Start
from benchmarks.selection import Form, Program
from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch
from tests.train.recorded import stand_in

CASE = Case("resnet8", 2, 4, "off", torch.device("cpu"))
LOOP = Form("eager", "loop")
SMALL = ["--device", "cpu", "--model", "resnet8", "--batch-size", "4", "--modes", "eager", "--repeats", "2"]


@pytest.fixture(scope="module")
def start():
    return Start(CASE)


def test_the_quick_step_prints_one_line(capsys):
    arguments = ["--suite", "step", "--quick", *SMALL, "--strategies", "loop"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"ratio published/fastfuse: \d+\.\d\d\n", printed.out)
    assert "ratio" not in re.sub("explain this ratio", "", printed.err) and "median ms" in printed.err


def test_a_step_is_measured_case_by_case_and_saved_as_each_ends(tmp_path, capsys, monkeypatch):
    saved = []
    original = step._measure

    def measure(case, *others):
        saved.append((case.students, sorted(path.name for path in tmp_path.iterdir())))
        original(case, *others)

    monkeypatch.setattr(step, "_measure", measure)
    kinds = "published,published-amp,networks-only,fastfuse"
    arguments = ["--suite", "step", *SMALL, "--students", "3,2", "--strategies", "loop", "--providers", kinds]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    name = "step_resnet8_s2+3_b4_off_cpu"
    # What the first case gave is on the disk before the second one begins.
    assert saved == [(2, []), (3, [f"{name}.csv", f"{name}.json"])]
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert [(row["students"], row["provider"]) for row in kept["rows"]] == [
        (s, p)
        for s in (2, 3)
        for p in ("published", "published-amp", "networks-only eager/loop", "fastfuse eager/loop")
    ]
    for published, _, floor, ours in (kept["rows"][:4], kept["rows"][4:]):
        assert ours["published_ratio"] == pytest.approx(published["median_ms"] / ours["median_ms"])
        assert ours["distillation_share"] == pytest.approx(ours["median_ms"] / floor["median_ms"])
        assert ours["images_per_s"] == pytest.approx(4e3 / ours["median_ms"])
        assert (ours["waits"], floor["waits"]) == (0, 0) and published["waits"] == 7 * published["students"] + 7
        assert floor["ops"] < ours["ops"] < published["ops"]
        assert (ours["peak_mb"], ours["of_roofline"], ours["kernels"]) == ("-", "-", "-")
    lines = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len(lines) == 8 and {line["copy_gb_per_s"] for line in lines} == {"not measured"}
    printed = capsys.readouterr().out
    assert printed.count("ratio resnet8 S=3 published/fastfuse eager/loop: ") == 1
    assert printed.count("resnet8 │ 2 │") == 4  # each case is shown once


def test_an_epoch_is_every_image_once(tmp_path, capsys, monkeypatch):
    seen = []
    original = programs.TrainStep.__call__

    def call(self, images, labels, *others):
        seen.append(len(labels))
        return original(self, images, labels, *others)

    monkeypatch.setattr(programs.TrainStep, "__call__", call)
    arguments = ["--suite", "epoch", *SMALL, "--strategies", "loop", "--images", "10", "--repeats", "1"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    # Two steps for the losses; then twice, to warm up and to measure, an epoch of three batches and one step.
    assert seen == [4, 4, *[4, 4, 2, 4] * 2]
    (row,) = json.loads((tmp_path / "epoch_resnet8_s2_b4_off_cpu.json").read_text())["rows"]
    assert row["steps_s"] == pytest.approx(row["step_ms"] * 2.5e-3)
    assert row["overhead"] == pytest.approx(row["epoch_s"] / row["steps_s"])
    assert "ratio fastfuse eager/loop epoch/steps: " in capsys.readouterr().out


def test_an_epoch_of_imagenet_is_of_crops_that_lie_on_the_device(monkeypatch):
    monkeypatch.setattr(epoch_data, "IMAGENET", ("resnet8",))  # a small network in the place of theirs
    seen = []
    original = programs.TrainStep.__call__

    def call(self, images, labels, *others):
        seen.append((images.clone(), labels.clone()))
        return original(self, images, labels, *others)

    monkeypatch.setattr(programs.TrainStep, "__call__", call)
    case = Case("resnet8", 2, 4, "off", torch.device("cpu"), image_size=16, classes=7)
    data = epoch_data.synthetic(10, case)
    run_epoch = epoch._epoch(LOOP, case, Start(case), data)
    for _ in range(2):
        run_epoch()
    assert [len(labels) for _, labels in seen] == [4, 4, 2] * 2
    # In ImageNet's statistics and nothing else: no crop, no mirror, every image once.
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    normalised = (data.train.source.images.permute(0, 3, 1, 2) / 255 - mean) / std
    for shown in (seen[:3], seen[3:]):
        images, labels = (torch.cat(parts) for parts in zip(*shown, strict=True))
        torch.testing.assert_close(images, normalised, rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, data.train.source.labels)


def test_scaling_is_measured_in_turn_over_the_students(tmp_path, capsys, monkeypatch):
    orders = []
    original = step.measure_in_turn

    def measure(providers, **settings):
        orders.append([f"{program} {size}" for program, size in providers])
        return original(providers, **settings)

    monkeypatch.setattr(step, "measure_in_turn", measure)
    arguments = ["--suite", "scaling", *SMALL, "--strategies", "loop", "--students", "2,3", "--repeats", "1"]
    assert run.main([*arguments, "--replicas", "2", "--out", str(tmp_path)]) == 0
    names = ("published", "fastfuse eager/loop")
    assert orders == [[*(f"{name} {(1, s)}" for s in (2, 3) for name in names), f"{names[1]} {(2, 2)}"]]
    rows = json.loads((tmp_path / "scaling_resnet8_s2+3_b4_off_cpu.json").read_text())["rows"]
    *alone, replicas = rows
    assert [(row["provider"], row["students"]) for row in alone] == [(name, s) for name in names for s in (2, 3)]
    for two, three in (alone[:2], alone[2:]):
        assert two["cost"] == 1.0 and three["cost"] == pytest.approx(three["median_ms"] / two["median_ms"])
    assert (replicas["provider"], replicas["students"], replicas["replicas"]) == (names[1], 2, 2)
    assert replicas["cost"] == pytest.approx(replicas["median_ms"] / alone[2]["median_ms"])
    assert replicas["images_per_s"] == pytest.approx(2 * 4 / replicas["median_ms"] * 1e3)
    printed = capsys.readouterr().out
    assert "ratio fastfuse eager/loop S=3/S=2: " in printed and "ratio fastfuse eager/loop S=2 R=2/S=2: " in printed


def test_teachers_are_measured_as_given_folded_and_stacked(tmp_path, capsys):
    arguments = ["--suite", "teachers", *SMALL, "--students", "2,3", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    rows = json.loads((tmp_path / "teachers_resnet8_s2+3_b4_off_cpu.json").read_text())["rows"]
    labels = ["unfolded eager", "fastfuse eager/loop", "fastfuse eager/grouped"]
    assert [(row["teachers"], row["provider"]) for row in rows] == [(n, label) for n in (2, 3) for label in labels]
    for plain, folded, grouped in (rows[:3], rows[3:]):
        # The nine norms of each network are gone, and what is left is done once for all.
        assert plain["ops"] - folded["ops"] == 9 * plain["teachers"] and grouped["ops"] < folded["ops"] / 1.5
        for row in (plain, folded, grouped):
            assert row["lowest_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] <= row["highest_ms"]
            assert row["baseline_ratio"] == pytest.approx(plain["median_ms"] / row["median_ms"])
            assert row["images_per_s"] == pytest.approx(4e3 / row["median_ms"])
    assert "ratio resnet8 N=3 unfolded eager/fastfuse eager/grouped: " in capsys.readouterr().out


def test_no_speed_of_other_teachers(monkeypatch):
    case = Case("resnet8", 2, 4, "off", torch.device("cpu"))
    forms = [Form("eager", "plain"), Form("eager", "grouped")]
    assert set(teachers.prepared(case, forms)) == set(forms)
    original = teachers.Teachers.arrange

    def arrange(self, strategy):
        self._plain[1].fc.bias.data.add_(1.0)
        return original(self, strategy)

    monkeypatch.setattr(teachers.Teachers, "arrange", arrange)
    with pytest.raises(AssertionError, match="fastfuse eager/grouped is off by"):
        teachers.prepared(case, forms)


def test_all_suites_run_in_turn_with_their_own_defaults(monkeypatch, tmp_path):
    ran = []
    for module in (step, epoch, scaling, teachers):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "run", lambda options, name=name: ran.append((name, options.students)) or iter(()))
    from benchmarks import kernels, plot

    monkeypatch.setattr(plot, "check", lambda: None)
    monkeypatch.setattr(kernels, "run", lambda options: ran.append(("kernels", options.repeats)) or iter(()))
    assert run.main(["--suite", "all", "--device", "cpu", "--out", str(tmp_path), "--plot"]) == 0
    assert ran == [("step", [2]), ("epoch", [2]), ("scaling", [2, 4, 8]), ("teachers", [5]), ("kernels", 5)]


def test_a_model_that_does_not_exist_is_one_line(capsys):
    assert run.main(["--suite", "step", "--device", "cpu", "--model", "resnet9", "--modes", "eager"]) == 2
    printed = capsys.readouterr()
    assert "6n + 2" in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("kind", ["published", "published-amp", "networks-only", "fastfuse"])
def test_no_speed_of_another_program(kind, start, monkeypatch):
    form = LOOP if kind in ("networks-only", "fastfuse") else None
    programs.prepare(Program(kind, form), CASE, start)
    build = programs.build
    monkeypatch.setattr(programs, "build", lambda *a: (lambda step: (lambda: step() * 1.02, None))(build(*a)[0]))
    with pytest.raises(AssertionError, match=rf"{kind}.* computes a loss of .* in step 1"):
        programs.prepare(Program(kind, form), CASE, start)


def test_a_program_that_does_not_learn_is_found_out(start, monkeypatch):
    monkeypatch.setattr(programs, "build_optimizers", lambda method, lr: optimizers(method))

    def optimizers(method):
        from fastfuse.train.optim import build_optimizers

        return build_optimizers(method, lr=0.0)

    with pytest.raises(AssertionError, match="in step 2"):
        programs.prepare(Program("fastfuse", LOOP), CASE, start)


def test_the_floor_is_as_many_networks_and_no_more(start):
    method = programs.engine_step("networks-only", LOOP, CASE, start)[0].method
    assert len(method.peers) == CASE.students + 1
    leader = {key: value for key, value in start.states["leader"].items() if not key.startswith("trans_fusion")}
    assert sum(p.numel() for p in method.parameters()) == 3 * sum(
        value.numel() for key, value in leader.items() if key.endswith((".weight", ".bias"))
    )
    assert torch.equal(method.peers[-1].conv1.weight, leader["conv1.weight"])


def test_the_compiled_baseline_runs_on_references_and_leaves_the_process_as_it_was(start, monkeypatch):
    seen = []
    original = programs.TrainStep.__call__

    def call(self, *tensors):
        seen.append((_dispatch._process_default, self._forward is self.method))
        return original(self, *tensors)

    monkeypatch.setattr(programs.TrainStep, "__call__", call)
    monkeypatch.setattr(torch, "compile", lambda module, **options: lambda *tensors: module(*tensors))
    before = _dispatch._process_default
    programs.prepare(Program("compile"), CASE, start)
    assert seen == [("reference", False)] * 2 and _dispatch._process_default is before


@pytest.mark.parametrize("mode", ["graphed", "graphed-compiled"])
def test_a_graph_holds_the_step_and_all_that_it_changes(mode, start, monkeypatch):
    captured = []

    def capture(function, state):
        captured.append((function, state))
        return function

    compiled = []
    monkeypatch.setattr(programs, "Captured", capture)
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(module) or module)
    made = programs.prepare(Program("fastfuse", Form(mode, "loop")), CASE, start)
    ((function, state),) = captured
    assert made.step is function and len(compiled) == (mode == "graphed-compiled")
    before = [x.detach().clone() for x in state()]
    function()
    assert any(not torch.equal(x, old) for x, old in zip(state(), before, strict=True))


def test_a_replayed_step_keeps_all_that_it_reads(start, monkeypatch):
    stand_in(monkeypatch)
    made = programs.prepare(Program("fastfuse", Form("graphed", "loop")), CASE, start)
    gc.collect()
    assert math.isfinite(float(made.step()))


def test_a_full_memory_costs_the_program_that_finds_it_full(monkeypatch, capsys):
    chosen = [Program("published"), Program("compile"), Program("fastfuse", LOOP)]
    original = programs.prepare

    def fill(program, case, start):
        if program in full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(program, case, start)

    monkeypatch.setattr(step, "prepare", fill)
    full, warnings = chosen[1:2], []
    made = step.prepared(CASE, chosen, warnings, asked=True)
    assert list(made) == [chosen[0], chosen[2]] and len(warnings) == 1
    assert warnings[0].startswith("resnet8 S=2 compile left out: the GPU's memory") and "--batch-size" in warnings[0]
    full = chosen
    with pytest.raises(InputError, match="resnet8 S=2: the GPU's memory does not hold it; lower --batch-size"):
        step.prepared(CASE, chosen, [], asked=False)

    def turn(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "measure_in_turn", turn)
    with pytest.raises(InputError, match="2 programs at once: the GPU's memory"):
        step.timed(made, CASE.device, 1)
    full = []
    monkeypatch.setattr(epoch, "_epoch", turn)
    assert run.main(["--suite", "epoch", *SMALL, "--strategies", "loop"]) == 2
    assert "2 programs at once: the GPU's memory" in capsys.readouterr().err
    capsys.readouterr()


def test_a_program_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    original = programs.prepare

    def refuse(program, case, start):
        if program.kind == "networks-only":
            raise RuntimeError("operation not permitted when stream is capturing")
        return original(program, case, start)

    monkeypatch.setattr(step, "prepare", refuse)
    arguments = ["--suite", "step", *SMALL, "--strategies", "loop", "--providers", "published,networks-only,fastfuse"]
    with pytest.raises(AssertionError, match=r"networks-only eager/loop left out, for it failed: .* not permitted"):
        run.main([*arguments, "--out", str(tmp_path)])
    (saved,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert [row["provider"] for row in saved["rows"]] == ["published", "fastfuse eager/loop"]
    assert "not permitted" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="not permitted"):
        step.prepared(CASE, [Program("networks-only", LOOP)], [], asked=True)


def test_batches_and_networks_are_those_of_the_case():
    case = Case("resnet8", 2, 6, "off", torch.device("cpu"), image_size=16, classes=7)
    start = Start(case)
    assert start.images.shape == (6, 3, 16, 16) and start.labels.max() < 7
    method = programs.engine_step("fastfuse", LOOP, case, start)[0].method
    assert method.predict(start.images)["leader"].shape == (6, 7)
    data = epoch_data.synthetic(5, case)
    assert data.train.images.shape == (5, 16, 16, 3) and len(data.class_names) == 7


@pytest.mark.long
def test_a_step_of_imagenet_is_measured_where_it_is_asked_for(tmp_path, capsys):
    arguments = ["--suite", "step", "--device", "cpu", "--model", "resnet18", "--batch-size", "2", "--image-size", "96"]
    kinds = ["--providers", "published,networks-only,fastfuse", "--modes", "eager", "--repeats", "1"]
    assert run.main([*arguments, *kinds, "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "step_resnet18_s2_b2_i96_off_cpu.json").read_text())
    assert (saved["settings"]["batch_size"], saved["settings"]["image_size"]) == (2, 96) and saved["rows"]
    forms = [f"{kind} eager/{s}" for kind in ("networks-only", "fastfuse") for s in ("loop", "grouped")]
    assert [row["provider"] for row in saved["rows"]] == ["published", *forms]
    assert {(row["model"], row["batch_size"], row["image_size"]) for row in saved["rows"]} == {("resnet18", 2, 96)}
    assert saved["rows"][0]["waits"] == 21 and {row["waits"] for row in saved["rows"][1:]} == {0}
    capsys.readouterr()


def test_networks_that_cannot_be_stacked_are_left_out_unless_asked_for(monkeypatch, capsys):
    original = programs.prepare

    def refuse(program, case, start):
        if program.form is not None and program.form.strategy == "grouped":
            raise InputError("cannot be stacked")
        return original(program, case, start)

    monkeypatch.setattr(step, "prepare", refuse)
    chosen = [Program("published"), Program("fastfuse", LOOP), Program("fastfuse", Form("eager", "grouped"))]
    warnings = []
    assert list(step.prepared(CASE, chosen, warnings, asked=False)) == chosen[:2]
    assert warnings == ["resnet8 S=2 fastfuse eager/grouped left out: cannot be stacked"]
    with pytest.raises(InputError, match="cannot be stacked"):
        step.prepared(CASE, chosen, warnings, asked=True)
    capsys.readouterr()


def test_a_stacked_program_computes_the_same(start):
    made = programs.prepare(Program("fastfuse", Form("eager", "grouped")), CASE, start)
    assert made.form == ("eager", "grouped")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["compile", "fastfuse", "networks-only"])
def test_a_compiled_program_computes_the_same(kind, start, monkeypatch):
    if kind == "networks-only":  # a part of the others: no code is generated for it
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    form = None if kind == "compile" else Form("compiled", "loop")
    made = programs.prepare(Program(kind, form), CASE, start)
    counted = step.counts(Program(kind, form), made, CASE.device)
    assert counted == dict.fromkeys(("ops", "waits", "kernels", "launches"), "-")


@pytest.mark.long
def test_the_quick_step_of_a_cpu_is_compiled(capsys):
    arguments = ["--suite", "step", "--quick", "--device", "cpu", "--model", "resnet8", "--batch-size", "4"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"ratio published/fastfuse: \d+\.\d\d\n", printed.out)
    assert re.search(r"fastfuse compiled/(loop|grouped) is ready", printed.err)
