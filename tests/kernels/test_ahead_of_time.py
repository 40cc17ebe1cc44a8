"""What the kernels become on GPUs that need not be there: see ahead_of_time.py, which runs in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_cases import cases
from fastfuse.kernels import _dispatch

# Shared memory that one block may have, in bytes (CUDA programming guide, compute capabilities 8.0, 9.0, 10.0).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PROGRAM = Path(__file__).with_name("ahead_of_time.py")
MATRIX_OPS = {"concat_conv1x1", "concat_fuse", "deep_to_shallow", "grouped_conv"}
OPS = {case.op for case in cases()}
WITH_TRITON = sorted(op for op in OPS if "no triton kernel" not in (_dispatch.why_not(op, "triton") or ""))


def few(target, dtype, why):
    """A short list of cases, compiled for one target."""
    return pytest.param((target, dtype, True), id=f"sm_{target} {dtype}: {why}", marks=pytest.mark.long)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, "bfloat16", True), id="sm_90 bfloat16: what an H200 trains with"),
        pytest.param((90, "bfloat16", False), id="sm_90 bfloat16, every case", marks=pytest.mark.long),
        few(90, "float32", "exact products"),
        few(80, "bfloat16", "A100"),
        few(80, "float32", "A100, exact products"),
        few(100, "bfloat16", "the next generation"),
        few(100, "float32", "the next generation, exact products"),
    ],
)
def target_and_rows(request):
    """The target and what the program says about every kernel compiled for it."""
    target, dtype, short = request.param
    command = [sys.executable, str(PROGRAM), "--targets", str(target), "--dtypes", dtype, *["--few"] * short]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return target, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_op_has_cases():
    assert set(_dispatch.ops()) == OPS
    assert WITH_TRITON


def test_kernels_compile_without_spills_and_fit(target_and_rows):
    target, rows = target_and_rows
    kernels = [row for row in rows if "kernel" in row]
    assert {row["op"] for row in kernels} == set(WITH_TRITON)
    assert not [row for row in kernels if row["shared"] > SHARED_LIMIT[target]]
    assert {row["kernel"]: row["spills"] for row in kernels if row["spills"]} == {}


def test_matrix_kernels_use_the_matrix_units_of_the_h200(target_and_rows):
    target, rows = target_and_rows
    if target != 90 or not any(row.get("dtype") == "bfloat16" for row in rows):
        pytest.skip("wgmma is an instruction of sm_90, used for half precision")
    for op in MATRIX_OPS & set(WITH_TRITON):
        assert any(row["wgmma"] for row in rows if row["op"] == op and "kernel" in row), op


def test_launchers_do_nothing_besides_their_kernels(target_and_rows):
    _, rows = target_and_rows
    called = {row["op"]: row["called"] for row in rows if "called" in row}
    assert called == {op: [] for op in WITH_TRITON}
