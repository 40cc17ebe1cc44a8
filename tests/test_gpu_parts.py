"""The check on a GPU with stand-ins for its parts: order, limits, failures, going on, red operators."""

import json
import sys
import tarfile
import time

import pytest

from benchmarks import gpu_check, gpu_parts, gpu_summary, gpu_tests
from benchmarks.gpu_parts import NAMES, PARTS, Part
from benchmarks.options import for_suite, make_parser
from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch

OPS = ["attention_mse", "diversity_target", "normalized_lp"]
LAUNCHES = {"attention_mse_fwd": "attention_mse", "normalized_lp_bwd": "normalized_lp"}
KEYS = ("device", "torch", "triton", "python", "commit", "date")
WHERE = {key: f"some {key}" for key in KEYS}


def check(work, end=None):
    return gpu_check.Check(work, end, WHERE, OPS, LAUNCHES)


@pytest.fixture
def script(tmp_path):
    """Makes a part of a few lines of Python; its arguments are `words`."""

    def make(name, text, *words, seconds=60, timed=()):
        file = tmp_path / f"{name}.py"
        file.write_text("import json, pathlib, sys, time\n" + text)
        return Part(name, seconds, (str(file), *words), timed)

    return make


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(script, tmp_path, capsys):
    parts = [
        script("build", "print('no nvcc'); sys.exit(3)"),
        script("probe", "print('begun', flush=True); time.sleep(60)", seconds=30),
        script("step", "pathlib.Path(sys.argv[1], 'step.json').write_text('1'); print('ratio 2')", "{out}"),
        script("kernels", "print('warning: the time was over before 3 of 9 cases')"),
    ]
    made = check(tmp_path / "work", time.monotonic() + gpu_parts.LEAST + gpu_parts.RESERVE + 3)
    limits = iter([20.0, 3.0, 20.0, 20.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "allotted", lambda part, left: next(limits))
        assert gpu_check.carry_out(made, parts, tmp_path / "out") == 1
    found = {name: part["status"] for name, part in made.parts.items()}
    assert found == {"build": "failed", "probe": "cut off", "step": "ok", "kernels": "partial"}
    assert made.parts["probe"]["said"] == ["begun"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.tar.gz", "summary.txt"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as packed:
        assert {"state.json", "step/step.json", "build/log.txt"} <= set(packed.getnames())
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "no nvcc" in text and "== step: ok" in text and "ratio 2" in text
    assert text in capsys.readouterr().out


def test_a_later_call_goes_on(script, tmp_path):
    text = f"pathlib.Path(sys.argv[1], 'kernels_1of1_cuda.json').write_text({NO_ROWS!r})\n"
    first = check(tmp_path / "work")
    first.red = ["diversity_target"]
    parts = [script("step", "print('measured')"), script("kernels", text + "print('the time was over')", "{out}")]
    parts.append(script("tune", f"pathlib.Path(sys.argv[1], 'tune.json').write_text({TUNED!r}); sys.exit(1)", "{out}"))
    assert gpu_check.carry_out(first, parts, tmp_path / "first") == 1

    second = check(tmp_path / "more")
    second.after(tmp_path / "first")
    say = "print(*sys.argv[1:])"
    parts = [script("step", "sys.exit(1)"), script("kernels", say), script("tune", say)]
    assert gpu_check.carry_out(second, parts, None) == 0
    assert second.parts["step"]["status"] == "before"
    (said,) = second.parts["kernels"]["said"]
    assert said.startswith("--after ") and "kernels_1of1_cuda.json --ops " in said
    assert said.endswith("attention_mse,diversity_target,normalized_lp"), "the tests were not run: nothing is red"
    assert second.parts["tune"]["said"] == ["--launches normalized_lp_bwd"]
    assert (tmp_path / "more" / "kernels" / "kernels_1of1_cuda.json").exists()

    other = gpu_check.Check(tmp_path / "x", None, WHERE | {"commit": "another"}, OPS, LAUNCHES)
    with pytest.raises(InputError, match="commit"):
        other.after(tmp_path / "first")
    with pytest.raises(InputError, match="no earlier check"):
        other.after(tmp_path / "nowhere")


NO_ROWS = json.dumps({"rows": []})
TUNED = json.dumps({"searches": [{"launch": "attention_mse_fwd"}]})


def test_red_operators_are_not_timed(script, tmp_path):
    made = check(tmp_path)
    made.red = ["attention_mse"]
    say = "print(*sys.argv[1:])"
    parts = [script(name, say) for name in ("kernels", "short", "tune", "step")]
    assert gpu_check.carry_out(made, parts, None) == 0
    others = "--ops diversity_target,normalized_lp"
    assert [made.parts[part.name]["said"] for part in parts] == [
        [others], [others], ["--launches normalized_lp_bwd"], []
    ]  # fmt: skip
    assert "no speed of these, their tests are red: attention_mse" in (tmp_path / "summary.txt").read_text()
    made.red = OPS
    made.run(script("kernels", say))
    assert made.parts["kernels"]["status"] == "refused"


def test_time_is_given_by_what_is_left():
    part = Part("x", 100, ("y.py", "{out}"), ("--max-time", "{seconds}"))
    assert gpu_parts.allotted(part, None) is None
    assert gpu_parts.allotted(part, 500) == 100
    assert gpu_parts.allotted(part, 60) == 60 - gpu_parts.RESERVE
    assert gpu_parts.allotted(part, gpu_parts.LEAST) == 0
    assert part.argv("o", None) == [sys.executable, "y.py", "o"]
    assert part.argv("o", 100.0, ["z"]) == [sys.executable, "y.py", "o", "--max-time", "85", "z"]


def test_parts_are_named_in_the_order_of_value():
    every = gpu_check.chosen("all")
    assert [part.name for part in every] == [name for name in NAMES if name != "short"]
    assert [part.name for part in gpu_check.chosen(None)] == list(gpu_parts.CHECK)
    assert [part.name for part in gpu_check.chosen("tune,probe")] == ["probe", "tune"]
    with pytest.raises(InputError, match="prob"):
        gpu_check.chosen("prob")


def test_the_commands_are_ones_that_exist():
    for part in PARTS:
        if part.command:
            assert (gpu_tests.ROOT / part.command[0]).exists(), part.name
        if part.command[:1] == ("benchmarks/run.py",):
            options = make_parser("").parse_args(part.argv("out", 100.0)[2:])
            assert for_suite(options, options.suite).out.name == "out"


FILE = """
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("case", ["attention_map of one", "diversity_loss as published", "normalized_lp: p = 1"])
def test_equals(case):
    assert not case.startswith("attention")
    if case.startswith("normalized"):
        pytest.skip("not built")

def test_a_step():
    pass
"""


def test_a_failed_test_makes_its_operator_red(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(FILE)
    (tmp_path / "tests" / "test_other.py").write_text("def test_nothing():\n    assert False\n")
    settings = '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\nmarkers = ["gpu: x"]\n'
    (tmp_path / "pyproject.toml").write_text(settings)
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load
    made = check(tmp_path / "work")
    found = made._tests(Part("tests", 60), 60)
    assert made.red == ["attention_mse"]
    assert found["status"] == "failed" and found["said"][0] == "2 of 4 passed; red operators: attention_mse"
    reasons = {test.partition("[")[2]: why.partition(":")[0] for test, why in found["bad"].items()}
    assert reasons == {"attention_map of one]": "failure", "normalized_lp: p = 1]": "skipped"}


def test_many_tests_of_one_operator_are_shared_out():
    tests = [f"t.py::a[attention_mse {i}]" for i in range(gpu_tests.MOST + 1)]
    pieces = gpu_tests.shards(tests, OPS)
    assert [len(own) for own in pieces.values()] == [gpu_tests.MOST, 1]
    assert [*pieces["attention_mse-1"], *pieces["attention_mse-2"]] == tests


def test_operators_come_first_and_what_needs_the_gpu_for_itself_last(tmp_path, monkeypatch):
    tests = ["t.py::test_offsets_beyond_32_bits[normalized_lp-cuda]", *(f"t.py::b[{i}]" for i in range(3))]
    tests += ["t.py::a[attention_mse]", "test_benchmarks_gpu.py::c"]
    assert list(gpu_tests.shards(tests, OPS)) == ["large-1", "t-1", "attention_mse-1", "alone-1"]
    order = []
    monkeypatch.setattr(gpu_tests, "limited", lambda command, log, seconds: order.append(log.stem) or 1)
    result = gpu_tests.run(tests, OPS, tmp_path, seconds=None, jobs=1)
    assert order == ["attention_mse-1", "t-1", "large-1", "alone-1"]
    assert result.red == {"attention_mse", "normalized_lp"}


def test_what_was_not_heard_of_is_red_if_it_began():
    groups = gpu_tests.shards(["t.py::a[attention_mse]", "t.py::a[normalized_lp]", "t.py::b"], OPS)
    statuses = {"attention_mse-1": None, "normalized_lp-1": -11, "t-1": 9}
    assert groups.keys() == statuses.keys()
    result = gpu_tests.judged(groups, OPS, statuses, lambda name: {"t.py::b": "passed"} if name == "t-1" else {})
    assert result.red == {"normalized_lp"}, "nothing says that the other one is wrong"
    assert result.bad["t.py::a[attention_mse]"] == "no time" and "-11" in result.bad["t.py::a[normalized_lp]"]
    assert result.bad["t-1"] == "exit status 9", "the sanitizer's word about a process whose tests pass"


FATAL = """
import os, pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("case", ["attention_map of one", "diversity_loss as published", "normalized_lp: p = 1"])
def test_equals(case):
    if case.startswith("diversity"):
        os._exit(3)
"""


def test_of_a_process_that_ends_too_early_what_it_said_counts(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(FATAL)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-ra"\nmarkers = ["gpu: x"]\n')
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "shards", lambda tests, ops: {"test_some-1": list(tests)})
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    tests = gpu_tests.collected()
    assert len(tests) == 3
    result = gpu_tests.run(tests, OPS, tmp_path / "out", seconds=None, jobs=1)
    assert result.passed == 1 and result.red == {"diversity_target", "normalized_lp"}
    reasons = [result.bad[test] for test in tests[1:]]
    assert reasons == ["it was running at the end", "nothing was heard (exit status 3)"]


@pytest.mark.parametrize(
    ("test", "op"),
    [
        ("a.py::test_x[normalized_lp_joint, p = 2-channels_last-float32-cuda]", "normalized_lp"),
        ("a.py::test_x[attention_map of two widths-contiguous]", "attention_mse"),
        ("a.py::test_x[peer_kl, averaged-float32]", "peer_kl_ce"),
        ("a.py::test_x[diversity_loss as published]", "diversity_target"),
        ("a.py::test_a_step_waits_for_nothing[ffsd-off-eager]", None),
        ("a.py::test_x", None),
    ],
)
def test_operators_of_tests(test, op):
    assert gpu_tests.op_of(test, _dispatch.ops()) == op


def test_the_summary_names_what_falls_short():
    row = {"op": "a", "dtype": "bfloat16", "provider": "fastfuse triton", "bytes": 2e8, "median_us": 100.0}
    rows = [
        row | {"shape": "large", "mode": "forward", "of_copy": 0.8, "compile_ratio": 1.5},
        row | {"shape": "small", "mode": "forward", "of_copy": 0.1, "compile_ratio": 0.9, "bytes": 1e6},
        row | {"shape": "other", "mode": "forward", "of_copy": 0.1, "compile_ratio": 0.1, "provider": "reference"},
    ]
    text = "\n".join(gpu_summary.kernel_lines(rows))
    assert "2 rows; 1 of 1 over 100 MB below 0.85 of the copy, 1 slower than compile" in text
    assert "of copy at least 0.80 (large" in text and "x compile at least 0.90 (small" in text
