"""A step of the engine with its phases marked, for the profiler and for counting; `profile_step.py` is the door."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import trace_parts as parts
from benchmarks.cases import Case
from benchmarks.epoch_data import synthetic
from benchmarks.programs import Start, engine_step
from benchmarks.selection import Form
from fastfuse.config import TrainConfig
from fastfuse.data import training_batches
from fastfuse.train.engine import Engine
from fastfuse.train.terms import TermLog

BATCHES = 12  # of an epoch


def made(case: Case, strategy: str, *, graphed: bool, batches: int = BATCHES) -> tuple[Engine, Callable[[], None]]:
    """An engine on random images, and what makes it stand before its first step."""
    form = Form("graphed" if graphed else "eager", strategy)
    step, _ = engine_step("fastfuse", form, case, Start(case))
    dataset = synthetic(batches * case.batch_size, case)
    drawn = training_batches(dataset, batch_size=case.batch_size, memory_format=step.memory_format)
    engine = Engine(step, drawn, TermLog(TrainConfig().log_interval, case.device), graphed=graphed)

    def start() -> None:
        engine.start_epoch(seed=0, epoch=9, step=0, factors=[1.0] * drawn.steps)
        for row in engine.terms.tensors():  # nobody reads the terms, and there is room for an epoch's
            row.zero_()

    return engine, start


class Counter(TorchDispatchMode):
    """Bytes and products of what is dispatched, by part; `phase` is that of the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self.work: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace in ("aten", "fastfuse", "fastfuse_cuda"):
            name = str(func)
            # Backward carries no phase: of PyTorch's own operators there, only those of networks say what they are.
            networks = any(word in name for word in ("convolution", "batch_norm"))
            phase = self.phase or (parts.NETWORKS if networks else None)
            own = self.work.setdefault(parts.part_of(name, parts.Place(phase, (name,))), [0, 0])
            tensors = {x.data_ptr(): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            own[0] += sum(x.nbytes for x in tensors.values())
            if (flops := flop_registry.get(func._overloadpacket)) is not None:
                own[1] += flops(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def marked(engine: Engine, counter: Counter | None = None) -> Iterator[None]:
    """The phases of an eager step, as ranges of the profiler and for a counter."""
    method = engine.step.method
    places = (
        (engine.batches, "fetch", parts.DRAW),
        (engine.batches, "draw", parts.DRAW),
        (method, "outputs", parts.NETWORKS),
        (method, "losses", parts.LOSSES),
        (engine.step.optimizers, "step", parts.OPTIMIZER),
        (engine.step.optimizers, "zero_grad", parts.OPTIMIZER),
        (engine.step.optimizers, "set_factor", parts.OPTIMIZER),
        (engine.terms, "note", parts.BOOKKEEPING),
    )

    def wrapped(function: Callable, phase: str) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            before = None if counter is None else counter.phase
            if counter is not None:
                counter.phase = phase
            with record_function(parts.MARK + phase):
                found = function(*arguments, **options)
            if counter is not None:
                counter.phase = before
            return found

        return call

    with ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(mock.patch.object(owner, name, wrapped(getattr(owner, name), phase)))
        yield


def traced(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The exported profile of a call."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as seen:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text())
