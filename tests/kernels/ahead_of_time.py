"""Compile every Triton kernel for GPUs that need not be there, as its launchers would.

    python ahead_of_time.py [--targets 80 90 100] [--dtypes float32 bfloat16] [--ops concat_fuse] [--few] [--table]

A stand-in driver names a target; the launchers run on CPU tensors, and every launch is compiled with Triton's own
specialisation instead of being run. Prints one JSON line per compiled kernel: op, kernel, target, dtype, the first
shape that needed it, warps, registers, bytes of stack and of spills, shared bytes, whether it uses wgmma; and one per
op with what else its launchers called.
Needs a process of its own: Triton decides at import whether it interprets.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.kernel_cases import KernelCase, cases
from fastfuse.kernels import _dispatch, _library, _triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HARMLESS = re.compile(
    r"aten\.(empty|empty_like|empty_strided|new_empty|view|_unsafe_view|expand|unbind|select|slice|alias|detach"
    r"|promote_types|as_strided|permute|transpose|t|unsqueeze|squeeze)\b|fastfuse\."
)


class Driver:
    """As much of a GPU driver as compilation asks for."""

    capability = 90

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Recorder(TorchDispatchMode):
    """Names of the operators called under it."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(str(function))
        return function(*arguments, **(options or {}))


def compile_instead_of_running(compiled: list) -> None:
    """Every launch from now on is compiled for the driver's target and noted."""
    run = JITFunction.run

    def warm_up(self, *arguments, grid, warmup=False, **options):
        found = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, found.result() if hasattr(found, "result") else found))
        return found

    JITFunction.run = warm_up


def watch_launchers(names: set[str]) -> None:
    """Note what the launchers call besides their kernels."""
    launcher_of = _library.launcher_of

    def watched(where: str) -> Callable:
        function = launcher_of(where)

        def call(*arguments):
            with Recorder(names):
                return function(*arguments)

        return call

    _library.launcher_of = watched


def spilled(ptx: str) -> int:
    """Bytes that the assembler spills; a stack frame may have other reasons, and without one there is no spill."""
    target = re.search(r"\.target (\w+)", ptx)[1]
    # Triton brings two assemblers; the newer one knows every PTX version and every target.
    assembler = TOOLS / "ptxas-blackwell"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))


def resources(kernel) -> dict:
    """Registers, spills and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spills": spilled(kernel.asm["ptx"]) if numbers["STACK"] + numbers["LOCAL"] else 0,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": "wgmma" in kernel.asm["ptx"],
    }


def forward_backward(case: KernelCase, dtype: torch.dtype) -> None:
    """Run a case through its Triton launchers."""
    outputs = case.call(case.make(torch.device("cpu"), dtype), "triton")
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    wanted = [x for x in outputs if x.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])


def chosen_cases(op: str, few: bool) -> list[KernelCase]:
    """The cases of an op: all of them, or the short list and the largest contiguous one."""
    # The kind of launch does not depend on the batch, except where one program may own a small one.
    large = [case for case in cases(batch=32) if case.op == "batch_norm_act" and "S=2" in case.shape]
    own = [case for case in [*cases(batch=2), *large] if case.op == op]
    if not few:
        return own
    return [case for case in own if case.quick] + [case for case in own if "contiguous" in case.shape][-1:]


def print_table(rows: list[dict]) -> None:
    """The largest registers and shared memory of every kernel over its shapes, as Markdown."""
    targets = sorted({row["target"] for row in rows})
    heads = [f"sm_{t} registers | sm_{t} shared bytes" for t in targets]
    print("| kernel | dtype | warps | " + " | ".join(heads) + " |")
    print("| --- " * (3 + 2 * len(targets)) + "|")
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        warps = "/".join(map(str, sorted({row["warps"] for row in own})))
        cells = [
            str(max((row[what] for row in own if row["target"] == t), default="-"))
            for t in targets
            for what in ("registers", "shared")
        ]
        print(f"| `{kernel}` | {dtype} | {warps} | " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ops", nargs="+", default=list(_dispatch.ops()), choices=_dispatch.ops(), metavar="OP")
    parser.add_argument("--few", action="store_true", help="a short list of cases")
    parser.add_argument("--table", action="store_true", help="print a table in place of the lines")
    options = parser.parse_args()
    rows: list[dict] = []
    stand_in = Driver()
    driver.set_active(stand_in)
    _triton.interpreting = lambda: True  # CPU tensors go to the launchers
    _triton.architecture = lambda like: f"sm_{stand_in.capability}"  # with the constants measured there
    compiled: list = []
    compile_instead_of_running(compiled)
    called: set[str] = set()
    watch_launchers(called)
    for op in options.ops:
        own = chosen_cases(op, options.few)
        if _dispatch.why_not(op, "triton", torch.empty(1)) is not None:
            print(json.dumps({"op": op, "missing": _dispatch.why_not(op, "triton", torch.empty(1))}))
            continue
        seen = set()
        for target in options.targets:
            stand_in.__class__.capability = target
            for name in options.dtypes:
                for case in own:
                    compiled.clear()
                    forward_backward(case, getattr(torch, name))
                    for kernel, binary in compiled:
                        key = (kernel, target, name, binary.hash)
                        if key not in seen:
                            seen.add(key)
                            row = {"op": op, "kernel": kernel, "target": target, "dtype": name, "shape": case.shape}
                            rows.append(row | resources(binary))
                            if not options.table:
                                print(json.dumps(rows[-1]), flush=True)
        others = sorted(name for name in called if not HARMLESS.search(name))
        if not options.table:
            print(json.dumps({"op": op, "called": others}))
        called.clear()
    if options.table:
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
