"""Networks run together; modules that hold the parameters of fusion head, trans-fusion, transforms and connectors."""

from fastfuse.nn.networks import Networks
from fastfuse.nn.stacked import stack, unstack
from fastfuse.nn.strategy import STRATEGIES
from fastfuse.nn.teachers import Teachers

__all__ = ["STRATEGIES", "Networks", "Teachers", "stack", "unstack"]
