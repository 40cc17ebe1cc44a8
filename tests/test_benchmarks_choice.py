"""What the benchmarks measure and refuse; nothing is trained here."""

import builtins
import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

from benchmarks import cases, epoch_data, options, run, selection
from benchmarks.selection import Form, Program
from fastfuse import models
from fastfuse.errors import InputError

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
        pytest.param(
            "epoch", ["--providers", "fastfuse"], "is of the suites step, scaling: leave it out", id="in-vain"
        ),
        pytest.param("step", ["--part", "1/2"], "--part is of the suite kernels: leave it out", id="of-one-suite"),
        pytest.param(
            "step", ["--quick", "--providers", "compile"], "published and fastfuse: leave", id="quick-programs"
        ),
        pytest.param("all", ["--plot", "x.png"], "needs --out instead of a file", id="several-pictures"),
        pytest.param("steps", [], "unknown suite 'steps': did you mean step", id="suite"),
    ],
)
def test_a_suite_refuses_what_is_not_its(suite, arguments, message, capsys):
    assert run.main(["--suite", suite, "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["step", "methods_step", "epoch", "scaling", "teachers", "data", "kernels"])
def test_every_column_is_explained(suite):
    text = (Path(run.__file__).parent / "README.md").read_text()
    columns = importlib.import_module(f"benchmarks.{suite}").COLUMNS
    assert [key for key in columns if f"`{key}`" not in text] == []


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
    assert selection.models(["all"], CUDA) == ([*SMALL_IMAGES, "resnet18", "resnet34"], [])
    assert set(selection.GRID) <= set(models.NAMES)
    grid, left_out = selection.models(["all"], CPU)
    assert grid == SMALL_IMAGES and len(left_out) == 1
    assert left_out[0].startswith("resnet18, resnet34 left out: ") and "--image-size" in left_out[0]
    # What is named is measured, beside the grid or alone.
    assert selection.models(["resnet8"], CPU) == (["resnet8"], [])
    assert selection.models(["resnet18"], CPU) == (["resnet18"], [])
    grid, left_out = selection.models(["resnet34", "all", "resnet8"], CPU)
    assert grid == [*SMALL_IMAGES, "resnet34", "resnet8"] and left_out[0].startswith("resnet18 left out")


def test_an_epoch_has_images_of_the_networks_data():
    case = cases.Case("resnet18", 2, 256, "bf16", CUDA)
    assert epoch_data.count(case) == 5120 and epoch_data.count(dataclasses.replace(case, model="wrn16_2")) == 50_000
    host = dataclasses.replace(case, device=CPU, batch_size=4)
    assert epoch_data.count(host) == 8 and epoch_data.count(dataclasses.replace(host, model="resnet8")) == 32


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
