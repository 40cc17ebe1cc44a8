"""Imports point one way: cli -> train -> methods -> losses -> nn, models -> functional -> kernels/<op>/op.py.

Every import counts, also one inside a function or for type checkers only: the arrows are about who may know whom.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each layer may know besides itself and `errors`. Kernels are reached through functional; info and testing, which
# speak about backends, look at them directly.
BELOW_LOSSES = {"nn", "models", "functional"}
BELOW_METHODS = {"losses", *BELOW_LOSSES}
BELOW_TRAIN = {"methods", "data", "config", "info", *BELOW_METHODS}
MAY_KNOW = {
    "__main__": {"cli"},
    "cli": {"__init__", "train", *BELOW_TRAIN},
    "train": {"__init__", *BELOW_TRAIN},
    "methods": BELOW_METHODS,
    "losses": BELOW_LOSSES,
    "nn": {"functional"},
    "models": {"functional"},
    "data": {"functional"},
    "config": set(),
    "info": {"__init__", "functional", "kernels"},
    "testing": {"functional", "kernels"},
    "functional": {"kernels"},
    "kernels": set(),
    "errors": set(),
    "__init__": BELOW_LOSSES | {"losses"},  # names them for type checkers; test_cold_import holds that it loads none
}
BACKENDS = ("reference", "triton_kernels", "cuda")
# Slow, or absent on some machines: imported where they are used. So are the few modules that are made of them.
CARRIERS = re.compile(r"fastfuse\.(kernels\.(_device|\w+\.triton_\w+)|train\.display)(\.|$)")
HEAVY = re.compile(r"(torchvision|rich|tyro|triton|matplotlib|tensorboard|torch\.utils\.tensorboard|wandb)(\.|$)")


def targets(node: ast.AST, package: str) -> list[str]:
    """The dotted names that an import statement, or import_module with a literal name, asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        anchor = package.rsplit(".", node.level - 1)[0] if node.level else ""
        base = ".".join(part for part in (anchor, node.module) if part)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def executed_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no bodies of functions, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from executed_at_import(child)


def layer_of(target: str, tree: Path) -> str:
    """The layer that `fastfuse.x.y` belongs to; a name that is no module is one of the package's lazy public names."""
    first = target.split(".")[1] if "." in target else "__init__"
    is_module = (tree / "fastfuse" / first).is_dir() or (tree / "fastfuse" / f"{first}.py").exists()
    return first if is_module or first in MAY_KNOW else "__init__"


def fault(module: str, target: str, tree: Path) -> str | None:
    """Why `module` may not know `target`, or None."""
    if re.match(r"(tests|benchmarks)(\.|$)", target):
        return "the package knows no tests and no benchmarks"
    if not re.match(r"fastfuse(\.|$)", target):
        return None
    own, other = layer_of(module, tree), layer_of(target, tree)
    if own not in MAY_KNOW or other not in MAY_KNOW:
        return "a layer without a place in MAY_KNOW"
    if own != other and other != "errors" and other not in MAY_KNOW[own]:
        return f"{own} may not know {other}"
    if own == other == "kernels" and module.count(".") == 3 and module.endswith(BACKENDS):
        folder, backend = module.rsplit(".", 1)
        if re.match(rf"{folder}\.({'|'.join({*BACKENDS, 'op'} - {backend})})(\.|$)", target):
            return "a backend knows neither the other backends of its op nor the op"
    return None


def wrong_arrows(tree: Path) -> list[str]:
    """One line for each import in `tree`/fastfuse that points the wrong way or is made too early."""
    found = []
    for path in sorted((tree / "fastfuse").rglob("*.py")):
        parts = path.relative_to(tree).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = ".".join(parts[:-1])
        syntax = ast.parse(path.read_text())
        early = set(executed_at_import(syntax))
        for node in ast.walk(syntax):
            for target in targets(node, package):
                reason = fault(module, target, tree)
                if node in early and (HEAVY.match(target) or CARRIERS.match(target)) and not CARRIERS.match(module):
                    reason = "import it inside the function that needs it"
                if reason:
                    found.append(f"{path.relative_to(tree)}:{node.lineno}: {target}: {reason}")
    return found


def test_package_has_no_wrong_arrow():
    assert wrong_arrows(ROOT) == []


def test_every_layer_has_its_place():
    entries = (ROOT / "fastfuse").iterdir()
    layers = {entry.stem for entry in entries if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    assert layers <= set(MAY_KNOW)


PLANTED = [
    ("nn/a.py", "from fastfuse.methods import b", "a lower layer imports a higher one"),
    ("data/a.py", "import fastfuse.nn.b", "data knows functional only"),
    ("losses/a.py", "def f():\n    from fastfuse.train import b", "inside a function it is an arrow as well"),
    ("models/a.py", "from ..methods import b", "a relative import is an import"),
    ("models/a.py", "from fastfuse import methods", "the module is named as an attribute of the package"),
    ("losses/a.py", "from fastfuse import FFSD", "a lazy public name hides its layer"),
    ("kernels/op1/a.py", "import importlib\nimportlib.import_module('fastfuse.nn')", "an import by a literal name"),
    ("methods/a.py", "from fastfuse.kernels.op1.op import b", "kernels are reached through functional"),
    ("kernels/op1/cuda.py", "from fastfuse.kernels.op1.reference import b", "a backend imports another of its op"),
    ("kernels/op1/reference.py", "from fastfuse.kernels.op1 import op", "a backend imports its op"),
    ("train/a.py", "from tests import conftest", "the package imports its tests"),
    ("train/a.py", "from benchmarks.run import main", "the package imports its benchmarks"),
    ("data/a.py", "import torchvision.transforms", "heavy, at the top of a module"),
    ("cli.py", "try:\n    import tyro\nexcept ImportError:\n    tyro = None", "heavy, at the top, in a try"),
    ("kernels/op1/op.py", "from fastfuse.kernels.op1 import triton_kernels", "the Triton file is heavy itself"),
    ("train/a.py", "from fastfuse.train import display", "a module made of rich is heavy as well"),
    ("stray.py", "from fastfuse.nn import b", "a module nobody has given a place"),
]


@pytest.fixture
def tree(tmp_path):
    for layer in ("kernels", "functional", "nn", "models", "losses", "methods", "data", "train"):
        (tmp_path / "fastfuse" / layer).mkdir(parents=True)
    (tmp_path / "fastfuse" / "kernels" / "op1").mkdir()
    (tmp_path / "fastfuse" / "errors.py").touch()
    return tmp_path


@pytest.mark.parametrize(("file", "source", "why"), PLANTED, ids=[case[2] for case in PLANTED])
def test_planted_arrow_is_found(tree, file, source, why):
    (tree / "fastfuse" / file).write_text(source)
    assert len(wrong_arrows(tree)) == 1, why


def test_right_arrows_are_not_reported(tree):
    (tree / "fastfuse" / "train" / "a.py").write_text(
        "import torch\nfrom fastfuse.errors import E\nfrom fastfuse.methods import b\nfrom . import c\n"
        "def f():\n    import torchvision\n"
    )
    (tree / "fastfuse" / "kernels" / "op1" / "triton_kernels.py").write_text(
        "import triton\nfrom fastfuse.kernels import _triton\n"
    )
    (tree / "fastfuse" / "kernels" / "op1" / "op.py").write_text(
        "from fastfuse.kernels.op1 import reference\nfrom fastfuse.kernels import _dispatch\n"
        "def f():\n    from fastfuse.kernels.op1 import triton_kernels\n"
    )
    assert wrong_arrows(tree) == []
