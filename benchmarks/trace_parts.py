"""Which part of a training step each kernel of a profile belongs to.

A replayed graph tells the names of its kernels and nothing of where they come from. So an eager step with marked phases
is profiled beside it: there each kernel has a launch, each launch lies within operators on a thread, and a backward
operator carries the sequence number of its forward one. Kernels of the replay take the parts of the same kernels there.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

# Phases that benchmarks/profile_step.py marks.
DRAW, NETWORKS, LOSSES, OPTIMIZER, BOOKKEEPING = PHASES = ("draw", "networks", "losses", "optimizer", "bookkeeping")
MARK = "part: "
# Our operators, by what they are in FFSD's step.
OPERATORS = {
    "augment": "augmentation",
    "grouped_conv": "convolutions",
    "batch_norm_act": "batch norm",
    "concat_fuse": "fusion and trans-fusion",
    "concat_conv1x1": "fusion and trans-fusion",
    "attention_mse": "attention losses",
    "attention_map": "attention losses",
    "deep_to_shallow": "transforms",
    "normalized_lp": "transforms' losses",
    "peer_kl_ce": "cross-entropy and KL",
    "diversity_target": "diversity",
}
OPERATOR = re.compile(rf"({'|'.join(OPERATORS)})_(?:fwd|bwd)")
OF_PHASE = {DRAW: "augmentation", OPTIMIZER: "optimizer", BOOKKEEPING: "bookkeeping", LOSSES: "distillation, other"}
OF_NETWORKS = {"convolution": "convolutions", "batch_norm": "batch norm", "mm": "classifiers", "linear": "classifiers"}
OTHER, UNKNOWN = "networks, other", "unassigned"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cuda_runtime", "cuda_driver")


class Kernel(NamedTuple):
    """What the device ran: name, start and duration in microseconds, and the number of its launch."""

    name: str
    start: float
    duration: float
    launch: int


class Place(NamedTuple):
    """Where something was launched: a phase, and the operators around it from the outside in."""

    phase: str | None
    operators: tuple[str, ...]


def kernels(trace: dict[str, Any]) -> list[Kernel]:
    """All kernels, copies and fills of an exported profile, in the order of their starts."""
    found = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in ON_DEVICE]
    made = [Kernel(e["name"], e["ts"], e["dur"], e.get("args", {}).get("correlation", -1)) for e in found]
    return sorted(made, key=lambda kernel: kernel.start)


def places(trace: dict[str, Any], wanted: Sequence[str] = ON_HOST) -> dict[int, Place]:
    """The place of every launch, by its number; of other events that are `wanted`, by their number in the trace."""
    threads: dict[Any, list[dict[str, Any]]] = {}
    for number, event in enumerate(trace["traceEvents"]):
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation", *wanted):
            threads.setdefault(event["tid"], []).append(event | {"number": number})
    found: dict[int, tuple[list[str], list[int]]] = {}
    phases: dict[int, str] = {}  # of forward operators, by sequence number
    for events in threads.values():
        for event, around in _nested(events):
            names = [e["name"] for e in around]
            numbers = [n for e in around if (n := e.get("args", {}).get("Sequence number", -1)) >= 0]
            if event.get("cat") in wanted:
                found[event.get("args", {}).get("correlation", event["number"])] = names, numbers
            number = event.get("args", {}).get("Sequence number", -1)
            # An operator without a gradient carries the number that the next one with a gradient will have.
            if number >= 0 and (phase := _phase(names)) in (NETWORKS, LOSSES):
                phases[number] = phase
    result = {}
    for launch, (names, numbers) in found.items():
        own = next((phases[n] for n in reversed(numbers) if n in phases), None)
        operators = tuple(name for name in names if not name.startswith(MARK))
        result[launch] = Place(_phase(names) or own, operators)
    return result


def _nested(events: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The events of one thread, each with those around it from the outside in."""
    around: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while around and around[-1]["ts"] + around[-1]["dur"] < event["ts"] + event["dur"]:
            around.pop()
        yield event, around
        around.append(event)


def _phase(names: Sequence[str]) -> str | None:
    marked = [name.removeprefix(MARK) for name in names if name.startswith(MARK)]
    return marked[-1] if marked else None


def part_of(name: str, place: Place | None) -> str:
    """The part that a kernel belongs to, by its name, the operators around its launch, and the phase."""
    for text in (name, *reversed(place.operators if place else ())):
        if own := OPERATOR.search(text):
            return OPERATORS[own[1]]
    if place is None or place.phase is None:
        return UNKNOWN
    if place.phase != NETWORKS:
        return OF_PHASE[place.phase]
    for word, part in OF_NETWORKS.items():
        if any(word in operator for operator in place.operators):
            return part
    return OTHER


def assigned(eager: Sequence[tuple[str, str]], replayed: Sequence[str]) -> list[str]:
    """Parts of a replay's kernels.

    Args:
        eager: names and parts of the eager step's kernels, in their order.
        replayed: names of the replay's kernels, in their order.

    Returns:
        Where runs of names agree, the parts of the same kernels; elsewhere what most kernels of this name are there,
        else what the name itself says.
    """
    names = [name for name, _ in eager]
    usual: dict[str, Counter[str]] = {}
    for name, part in eager:
        usual.setdefault(name, Counter())[part] += 1
    found = [usual[name].most_common(1)[0][0] if name in usual else part_of(name, None) for name in replayed]
    for block in SequenceMatcher(None, names, replayed, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            found[block.b + i] = eager[block.a + i][1]
    return found


def busy_us(run: Sequence[Kernel]) -> float:
    """Microseconds in which at least one kernel ran; kernels of parallel branches overlap."""
    total, end = 0.0, float("-inf")
    for kernel in sorted(run, key=lambda k: k.start):
        total += max(0.0, kernel.start + kernel.duration - max(end, kernel.start))
        end = max(end, kernel.start + kernel.duration)
    return total


def span_us(run: Sequence[Kernel]) -> float:
    """Microseconds from the first start to the last end."""
    return max(k.start + k.duration for k in run) - min(k.start for k in run)
