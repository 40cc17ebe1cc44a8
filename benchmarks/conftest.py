"""Options of `pytest benchmarks`."""

import os

import pytest

# Before torch is loaded: threads that spin while they wait make a busy machine a hundred times slower (docs/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The full grid of shapes takes hours."""
    parser.addoption("--every-shape", action="store_true", help="all shapes of every operator, not the short list")
