"""The extension as nvcc makes it, without a GPU: it compiles, fits the GPUs, loads, and says what it is and is not."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastfuse import info
from fastfuse.errors import InputError
from fastfuse.kernels import _build, _dispatch, _extension, _triton

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities 8.0 and 9.0).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
SETTINGS = ("TORCH_CUDA_ARCH_LIST", "FASTFUSE_BUILD")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Compiled for the default list of GPUs, warnings being errors."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        if (reason := _build.missing()) is not None:
            pytest.skip(f"the extension cannot be compiled here: {reason}")
        path = tmp_path_factory.mktemp("extension") / _build.library_name()
        _build.build(path)
    return path


def python(program, **environment):
    """What a program in a process of its own prints: one process can hold one library."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cuobjdump():
    beside = _build.toolkit() / "bin" / "cuobjdump"
    if beside.exists():
        return str(beside)
    triton = pytest.importorskip("triton", reason="neither the toolkit nor triton brings cuobjdump")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def resources(library):
    """(target, kernel) to registers, stack, local and shared bytes."""
    said = subprocess.run([cuobjdump(), "--dump-resource-usage", str(library)], capture_output=True, text=True).stdout
    found, target, kernel = {}, 0, ""
    for line in said.splitlines():
        if match := re.search(r"\barch = sm_(\d+)", line):
            target = int(match[1])
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[target, kernel] = {n: int(v) for n, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
    return found


def kernels_in_sources():
    text = "".join(path.read_text() for path in _build.SOURCES.glob("*.cu"))
    return set(re.findall(r"__global__ void __launch_bounds__\(THREADS, \w+\)\s+(\w+)\(", text))


def test_kernels_fit_the_gpus_without_spills(library):
    found = resources(library)
    for target, limit in SHARED_LIMIT.items():
        own = {kernel: row for (t, kernel), row in found.items() if t == target}
        for name in kernels_in_sources():
            assert any(name in kernel for kernel in own), f"{name} is not there for sm_{target}"
        assert not {k: row for k, row in own.items() if row["STACK"] or row["LOCAL"]}, "registers spill"
        assert not {k: row for k, row in own.items() if row["SHARED"] > limit}


def test_sources_hold_kernels():
    assert len(kernels_in_sources()) >= 5
    assert all(re.fullmatch(r"[a-z0-9_]+_(fwd|bwd)(_[a-z]+)?_kernel", name) for name in kernels_in_sources())


SCHEMAS = """
import json, sys, torch
from fastfuse.kernels import _extension, _library
before = set(_library.cuda_names())
_extension.load(sys.argv[1] if len(sys.argv) > 1 else {path!r})
def schema(namespace, name):
    operator = getattr(getattr(torch.ops, namespace), name, None)
    return operator and str(operator.default._schema).replace(namespace + "::", "", 1)
print(json.dumps({{
    name: [
        schema("fastfuse_cuda", name),
        schema("fastfuse", name),
        torch._C._dispatch_has_kernel_for_dispatch_key("fastfuse_cuda::" + name, "CUDA"),
    ]
    for name in _library.cuda_names()
}}))
"""


def test_it_loads_and_its_schemas_are_those_of_python(library):
    found = json.loads(python(SCHEMAS.format(path=str(library))))
    assert {"attention_mse_fwd", "attention_mse_bwd"} <= set(found)
    for name, (own, other, has_kernel) in found.items():
        assert has_kernel, f"{name} has no kernel for CUDA tensors"
        assert other is None or own == other, name
    # What has no counterpart is a piece that a launcher in Python joins with others.
    pieces = {name for name, (_, other, _) in found.items() if other is None}
    assert pieces == set(PIECES)


PIECES = ("concat_fuse_fwd_first", "concat_fuse_bwd_first")


def test_state_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(_build, "missing", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTFUSE_BUILD", raising=False)
    assert _extension.state().startswith(f"compiled on first use, kept in {tmp_path}")
    assert _extension.state().endswith("(not yet)")
    _extension.cached().parent.mkdir(parents=True)
    _extension.cached().touch()
    assert not _extension.state().endswith("(not yet)")
    _extension.prebuilt().touch()
    assert _extension.state() == info.info()["extension"] == "prebuilt"


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "build", lambda target: pytest.fail("it was compiled"))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    _extension._loaded.cache_clear()
    yield monkeypatch
    _extension._loaded.cache_clear()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"FASTFUSE_BUILD": "0"}, "FASTFUSE_BUILD=0 forbids compiling", id="forbidden"),
        pytest.param({"PATH": "", "CUDA_HOME": "", "CUDA_PATH": ""}, "there is no nvcc", id="no nvcc"),
        pytest.param({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere holds no bin/nvcc", id="a wrong CUDA_HOME"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST takes entries such as 9.0", id="a name"),
    ],
)
def test_reasons_why_there_is_none(settings, reason, nothing_built):
    for name, value in settings.items():
        nothing_built.setenv(name, value)
    assert reason in _extension.state() and _extension.state().startswith("absent: ")
    assert reason in _extension.unloadable()
    nothing_built.setattr(torch.cuda, "is_available", lambda: True)
    assert reason in _extension.why_not(None)
    assert info.info()["ops"]["attention_mse"]["cuda"] == _extension.why_not(None)


def test_a_pytorch_without_cuda(nothing_built):
    nothing_built.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in _extension.unloadable()


def test_a_build_that_fails_is_a_reason(nothing_built):
    def fails(target):
        raise _build.CannotBuildError("nvcc exits with 1: error: no such thing")

    nothing_built.setattr(_build, "missing", lambda: None)
    nothing_built.setattr(_build, "build", fails)
    assert _extension.unloadable() == "its library cannot be loaded: nvcc exits with 1: error: no such thing"


def test_a_wrong_setting_is_refused(nothing_built):
    nothing_built.setenv("FASTFUSE_BUILD", "yes")
    with pytest.raises(InputError, match="FASTFUSE_BUILD is auto, 0 or 1, not 'yes'"):
        _extension.unloadable()


def test_tensors_it_cannot_serve_load_nothing(nothing_built):
    assert _extension.why_not(torch.ones(1)) == "its kernels run on CUDA tensors, this one is on cpu"
    if not torch.cuda.is_available():
        assert _extension.why_not(None) == "this machine has no CUDA device"
        # The interpreter, which Triton's reason names, would not help an operator that needs both.
        nothing_built.setattr(_triton, "interpreting", lambda: False)
        assert _dispatch.why_not("concat_fuse", "cuda") == "this machine has no CUDA device"


def test_of_several_first_users_one_compiles(nothing_built):
    """Each opens the lock for itself, as processes do."""
    compiled = []

    def build(target):
        compiled.append(target)
        time.sleep(0.2)
        target.write_text("library")

    nothing_built.setattr(_build, "build", build)
    found = []
    users = [threading.Thread(target=lambda: found.append(_extension._compiled())) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(compiled) == 1 and found == [_extension.cached()] * 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[sm_90,compute_90]"]),
        ("9.0a 10.0+PTX", ["arch=compute_90a,code=[sm_90a]", "arch=compute_100,code=[sm_100,compute_100]"]),
    ],
    ids=["the default", "a list of one's own"],
)
def test_architectures(given, expected, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert _build.architectures()[1::2] == expected


def test_fingerprint_follows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "a.cu").write_text("one")
    monkeypatch.setattr(_build, "SOURCES", tmp_path)
    names = []
    for text in ("one", "two", "one"):
        (tmp_path / "a.cu").write_text(text)
        _build.fingerprint.cache_clear()
        names.append(_build.library_name())
    monkeypatch.undo()
    _build.fingerprint.cache_clear()
    assert names[0] == names[2] != names[1]


def test_an_error_of_nvcc_is_one_line(tmp_path, monkeypatch):
    if (reason := _build.missing()) is not None:
        pytest.skip(f"nothing can be compiled here: {reason}")
    (tmp_path / "a.cu").write_text("__global__ void kernel() { int unused; }\n")
    monkeypatch.setattr(_build, "SOURCES", tmp_path)
    with pytest.raises(_build.CannotBuildError, match=r"nvcc exits with \d: .*unused") as caught:
        _build.build(tmp_path / "out" / "library.so")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


WHEEL = ["-m", "pip", "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]


def wheel(tmp_path, **settings):
    """Build a wheel from a copy of the tracked kinds of files; the finished process and the wheels."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(ROOT / "fastfuse", source / "fastfuse", ignore=shutil.ignore_patterns("__pycache__", "_cuda_*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS} | settings
    command = [sys.executable, *WHEEL, "--wheel-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=600)
    return done, list((tmp_path / "out").glob("*.whl"))


def names_in(path):
    import zipfile

    return zipfile.ZipFile(path).namelist()


@pytest.mark.long
def test_a_wheel_without_the_extension_is_pure_python_and_holds_the_sources(tmp_path):
    done, wheels = wheel(tmp_path, FASTFUSE_BUILD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name.endswith("-py3-none-any.whl") for path in wheels] == [True]
    names = names_in(wheels[0])
    assert "fastfuse/csrc/registration.cpp" in names and "fastfuse/csrc/common.cuh" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.long
def test_a_wheel_with_the_extension_serves_every_python(tmp_path):
    if (reason := _build.missing()) is not None:
        pytest.skip(f"the extension cannot be compiled here: {reason}")
    done, wheels = wheel(tmp_path, FASTFUSE_BUILD="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [bool(re.search(r"-py3-none-linux_\w+\.whl$", path.name)) for path in wheels] == [True]
    assert f"fastfuse/kernels/{_build.library_name()}" in names_in(wheels[0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"FASTFUSE_BUILD": "1", "CUDA_HOME": "/nowhere"}, "FASTFUSE_BUILD=1, but the CUDA extension cannot be built"),
        ({"FASTFUSE_BUILD": "yes"}, "FASTFUSE_BUILD is auto, 0 or 1, not 'yes'"),
    ],
    ids=["something is missing", "a wrong setting"],
)
def test_a_wheel_that_cannot_be_built_says_why(settings, said, tmp_path):
    done, wheels = wheel(tmp_path, **settings)
    assert done.returncode != 0 and said in done.stdout + done.stderr
    assert wheels == []
