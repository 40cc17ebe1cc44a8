"""Code blocks of Markdown files, and how they run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks in these languages, in order; ```console blocks are for reading only."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


def run_block(language: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a ```python or ```sh block in a folder, with the commands of this environment."""
    script = folder / f"block.{'py' if language == 'python' else 'sh'}"
    script.write_text(code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = [sys.executable] if language == "python" else ["bash", "-eu"]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(
        [*shell, str(script)], capture_output=True, text=True, timeout=900, cwd=folder, env=environment
    )


def training_arguments(text: str) -> list[list[str]]:
    """The arguments of every `fastfuse train` in the ```sh blocks, but of those that resume a run."""
    lines = [line.split("#")[0].strip() for _, code in blocks(text, "sh") for line in code.splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("fastfuse train") and "--resume" not in line]
