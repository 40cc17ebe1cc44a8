"""Everything that only a GPU can tell about the kernels, in one call: `make gpu-check [OUT=DIR] [COMMIT=...]`.

In this order, each part saved as it ends: the tests marked `gpu` (none may fail or be skipped), compute-sanitizer's
memcheck and racecheck on the operators, and the short benchmark of the kernels, which a red test forbids.
Uses the running interpreter, installs nothing, needs neither network nor git. Without a GPU it writes nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
# One call of every kernel is enough for the sanitizer, which makes each a hundred times slower.
SHORT = [
    "tests/kernels/test_backends_agree.py",
    "tests/kernels/test_cuda_kernels.py",
    "-k",
    "(triton_equals or on_a_gpu) and float32 and channels_last",
]
SANITIZED = {tool: ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] for tool in ("memcheck", "racecheck")}


def main() -> int:
    """Run all parts; 0 if everything was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/<gpu>)")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU: torch.cuda.is_available() is False; nothing was run", file=sys.stderr)
        return 1
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / name
    out.mkdir(parents=True, exist_ok=True)

    status, text = _run(PYTEST, out / "tests.txt")
    skipped = re.search(r"(\d+) skipped", text)
    if status or skipped or not re.search(r"\d+ passed", text):
        print(
            f"the gpu tests are not green ({skipped[0] if skipped else f'exit status {status}'}): no speed is measured"
        )
        return 1
    for tool, command in SANITIZED.items():
        if shutil.which(command[0]) is None:
            print(f"{command[0]} is not on the PATH: {tool} cannot be run", file=sys.stderr)
            return 1
        status, _ = _run([*command, *PYTEST, *SHORT], out / f"{tool}.txt")
        if status:
            print(f"{tool} found errors: see {out / f'{tool}.txt'}")
            return 1
    run = [sys.executable, "benchmarks/run.py", "--suite", "kernels", "--quick", "--repeats", "5", "--out", str(out)]
    status, _ = _run(run, out / "kernels.txt")
    return status


def _run(command: list[str], log: Path) -> tuple[int, str]:
    print("+", " ".join(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
    )
    log.write_text(done.stdout)
    print(done.stdout[-3000:], flush=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
