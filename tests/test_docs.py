"""The API's pages, and what they are made of: a docstring and full annotations for every public name."""

import html
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastfuse
from fastfuse import functional

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("losses", "nn", "models", "methods", "data", "config", "errors", "info", "testing", "functional")


def public_names() -> list:
    """(name, object) of every function and class that a public module defines or passes on."""
    found = {f"fastfuse.{name}": getattr(fastfuse, name) for name in fastfuse.__all__}
    for short in MODULES:
        module = importlib.import_module(f"fastfuse.{short}")
        names = getattr(module, "__all__", None) or [
            n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
        ]
        found |= {f"fastfuse.{short}.{name}": getattr(module, name) for name in names if not name.startswith("_")}
    return [pytest.param(value, id=name) for name, value in found.items() if callable(value)]


def methods_of(kind: type) -> list:
    own = [value for name, value in vars(kind).items() if not name.startswith("_") or name == "__init__"]
    return [value for value in own if inspect.isfunction(value)]


@pytest.mark.parametrize("public", public_names())
def test_a_public_name_has_a_docstring_and_full_annotations(public):
    assert inspect.getdoc(public), f"{public} has no docstring"
    if inspect.isclass(public) and public.__doc__ is None:
        pytest.fail(f"{public} has only the docstring of what it is derived from")
    for function in methods_of(public) if inspect.isclass(public) else [inspect.unwrap(public)]:
        if "<string>" in function.__code__.co_filename or not function.__module__.startswith("fastfuse"):
            continue  # written by dataclasses or NamedTuple
        signature = inspect.signature(function)
        bare = [
            parameter.name
            for index, parameter in enumerate(signature.parameters.values())
            if parameter.annotation is parameter.empty and not (index == 0 and parameter.name in ("self", "cls"))
        ]
        assert bare == [] and signature.return_annotation is not signature.empty, f"{function.__qualname__}: {bare}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "docs" / "api.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "warn" not in done.stderr.lower(), done.stderr
    return folder


@pytest.mark.long
@pytest.mark.parametrize("page", ["fastfuse", "fastfuse/functional"])
def test_every_public_name_has_an_entry_with_its_docstring(pages, page):
    module = fastfuse if page == "fastfuse" else functional
    text = (pages / f"{page}.html").read_text()
    entries = dict(re.findall(r'<section id="([\w.]+)">(.*?)</section>', text, re.DOTALL))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            assert (pages / "fastfuse" / f"{name}.html").exists()
            continue
        assert name in entries, f"{name} has no entry"
        if callable(value):
            shown = " ".join(html.unescape(re.sub("<[^>]+>", "", entries[name])).split())
            first_words = " ".join(re.sub(r"[`*]", "", inspect.getdoc(value)).split()[:4])
            assert first_words in shown, f"the entry of {name} lacks its docstring"


@pytest.mark.long
def test_pages_exist_for_every_public_module(pages):
    names = [file.relative_to(pages).with_suffix("").as_posix() for file in pages.rglob("*.html")]
    assert {"index", "fastfuse", *(f"fastfuse/{module}" for module in MODULES)} <= set(names)
    assert not [name for name in names if "ScriptModule" in (pages / f"{name}.html").read_text()]  # torch's own words


@pytest.mark.long
def test_a_warning_ends_the_build(tmp_path):
    program = (
        "import pathlib, sys\nsys.path.insert(0, 'docs')\nimport api, fastfuse.losses\n"
        "fastfuse.losses.__all__ = [*fastfuse.losses.__all__, 'missing']\n"
        f"api.build(pathlib.Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode != 0 and "UserWarning" in done.stderr and "missing" in done.stderr, done.stderr
