import dataclasses
import json
import sys
import time

import pytest
import torch

from benchmarks import kernel_plan, kernels, run
from benchmarks.kernel_cases import KernelCase, cases
from benchmarks.options import for_suite, make_parser
from benchmarks.shares import compile_together, part_of
from tests.train.recorded import stand_in


def test_every_op_has_a_cifar_and_an_imagenet_case_in_the_short_list():
    short = {(case.op, case.shape.split()[0]) for case in cases() if case.quick}
    assert short == {(op, network) for op in {case.op for case in cases()} for network in ("cifar", "imagenet")}


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_does_not_exist_is_refused(part, capsys):
    assert run.main(["--suite", "kernels", "--device", "cpu", "--part", part]) == 2
    assert "--part must be i/n" in capsys.readouterr().err


def test_parts_cover_the_grid_once():
    chosen = cases(batch=2)
    parts = [part_of(chosen, f"{i}/7") for i in range(1, 8)]
    assert sorted(id(case) for part in parts for case in part) == sorted(map(id, chosen))


@pytest.fixture
def one_small_case(monkeypatch):
    (case,) = [c for c in cases(batch=2) if c.op == "feature_mse" and c.shape == "cifar deepest S=2 channels_last"]
    monkeypatch.setattr(kernel_plan, "cases", lambda: [case])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return case


def test_the_suite_measures_and_saves_every_provider(one_small_case, tmp_path, capsys):
    assert run.main(["--suite", "kernels", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "kernels_1of1_quick_cpu.json").read_text())
    found = {(row["dtype"], row["mode"], row["provider"]) for row in saved["rows"]}
    providers = {row["provider"] for row in saved["rows"]}
    assert {"reference", "compile"} <= providers
    assert found == {(d, m, p) for d in ("float32", "bfloat16") for m in ("forward", "backward") for p in providers}
    maps = 3 * 2 * 64 * 8 * 8
    bytes_moved = {(row["dtype"], row["mode"]): row["bytes"] for row in saved["rows"]}
    assert bytes_moved[("float32", "forward")] == 4 * maps + 4
    assert bytes_moved[("float32", "backward")] == 4 * maps + 4 + 4 * maps * 2 // 3
    assert all(row["gb_per_s"] > 0 for row in saved["rows"])
    assert "left out on backend cuda" in capsys.readouterr().err


def test_no_speed_of_a_wrong_answer(one_small_case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda tensors: function(tensors) * 1.1)
    with pytest.raises(AssertionError, match="compile differs from the reference"):
        run.main(["--suite", "kernels", "--quick", "--device", "cpu"])


def test_a_backward_is_captured_where_its_forward_ran_and_keeps_its_inputs(monkeypatch):
    """Autograd runs it on that stream, and the default one cannot be captured."""
    graphs, default, ran = stand_in(monkeypatch), torch.cuda.current_stream(), []

    def function(tensors):
        ran.append(torch.cuda.current_stream())
        return tensors[0] * 2

    kernels.captured_on.cache_clear()
    try:
        call = kernels.one_pass(function, [[torch.ones(3, requires_grad=True)]], "backward", torch.device("cuda"))
    finally:
        kernels.captured_on.cache_clear()
    call()
    assert ran == [graphs[0].stream] and ran[0] is not default and graphs[0].replays == 1


def test_what_a_forward_changes_in_place_is_every_providers_own(monkeypatch):
    """Running statistics: the compiled backward of batch norm saves them, and the next provider's forward writes."""
    case = KernelCase(
        "feature_mse",
        "in place",
        lambda device, dtype: [torch.randn(3, dtype=dtype, requires_grad=True), torch.ones(3, dtype=dtype)],
        lambda tensors, backend: tensors[0] * tensors[1].mul_(1),
        quick=True,
    )
    monkeypatch.setattr(kernel_plan, "cases", lambda: [case])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert run.main(["--suite", "kernels", "--quick", "--device", "cpu"]) == 0


def entries(*arguments):
    options = for_suite(make_parser("").parse_args(["--suite", "kernels", *arguments]), "kernels")
    found, skipped = kernel_plan.planned(options, torch.device("cuda"))
    return [(case.op, case.shape, name) for case, name in found], skipped


def test_large_maps_of_ffsds_operators_come_first():
    every, _ = entries()
    assert len(every) == len(set(every)) == 2 * len(cases())
    first = every[: len(kernel_plan.FIRST)]
    assert {op for op, _, _ in first} <= set(kernel_plan.FIRST)
    assert all(shape.startswith("imagenet") and name == "bfloat16" for _, shape, name in first)
    assert {name for _, _, name in every[-len(cases()) :]} == {"float32"}


def test_what_an_earlier_run_measured_is_left_out(tmp_path):
    every, _ = entries("--ops", "augment")
    file = tmp_path / "before.json"
    rows = [dict(zip(("op", "shape", "dtype"), every[0], strict=True))]
    file.write_text(json.dumps({"settings": {}, "environment": {}, "rows": rows}))
    assert entries("--ops", "augment", "--after", str(file)) == (every[1:], 1)


def test_shares_are_compiled_at_once_and_those_that_hang_are_ended(tmp_path):
    program = f"import pathlib, sys, time; pathlib.Path({str(tmp_path)!r}, sys.argv[2][0]).touch(); time.sleep(60)"
    began = time.monotonic()
    compile_together([sys.executable, "-c", program], 2, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"} and time.monotonic() - began < 30


def test_an_operator_that_does_not_exist_is_refused(capsys):
    assert run.main(["--suite", "kernels", "--device", "cpu", "--ops", "augmint"]) == 2
    assert "augment" in capsys.readouterr().err


def test_when_the_time_is_over_the_rest_is_counted(one_small_case, tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(kernels.time, "monotonic", lambda: clock[0])
    measured = kernels._measure
    monkeypatch.setattr(kernels, "_measure", lambda *given: (clock.__setitem__(0, clock[0] + 11), measured(*given))[1])
    arguments = ["--suite", "kernels", "--quick", "--device", "cpu", "--max-time", "10", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    saved = json.loads((tmp_path / "kernels_1of1_quick_cpu.json").read_text())
    assert {row["dtype"] for row in saved["rows"]} == {"bfloat16"}
    assert saved["warnings"][-1] == "the time was over before 1 of 2 cases"


def test_a_wrong_case_costs_the_others_nothing(one_small_case, tmp_path, monkeypatch):
    right = one_small_case.call
    wrong = dataclasses.replace(
        one_small_case, shape="wrong", call=lambda t, b: right(t, "reference") * (1 + (b != "reference"))
    )
    monkeypatch.setattr(kernel_plan, "cases", lambda: [wrong, one_small_case])
    with pytest.raises(AssertionError, match="wrong: fastfuse triton differs"):
        run.main(["--suite", "kernels", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "kernels_1of1_quick_cpu.json").read_text())["rows"]
    assert {row["shape"] for row in rows} == {one_small_case.shape}
