"""In which order the suite "kernels" measures its cases: what a short time must not leave out comes first."""

import argparse

import torch

from benchmarks.kernel_cases import KernelCase, cases
from benchmarks.report import read
from benchmarks.shares import part_of
from fastfuse.errors import unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The operators of FFSD's step: its convolutions, then those over the largest maps first; the others come after them.
FIRST = (
    "grouped_conv",
    "batch_norm_act",
    "normalized_lp",
    "attention_mse",
    "deep_to_shallow",
    "concat_fuse",
    "concat_conv1x1",
    "peer_kl_ce",
    "diversity_target",
    "augment",
)


def planned(options: argparse.Namespace, device: torch.device) -> tuple[list[tuple[KernelCase, str]], int]:
    """Cases and dtypes in the order of their value, large and low-precision maps first, and how many earlier runs had.

    Raises:
        InputError: no such operator or part.
    """
    every = cases()
    known = {case.op for case in every}
    for op in options.ops or ():
        if op not in known:
            raise unknown_name("operator", op, sorted(known))
    dtypes = ["bfloat16"] if options.quick and device.type == "cuda" else list(DTYPES)
    found = [(case, name) for case in every if case.quick or not options.quick for name in dtypes]
    found = [(case, name) for case, name in found if case.op in (options.ops or known)]
    found = part_of(sorted(found, key=_rank), options.part)
    done = {(row["op"], row["shape"], row["dtype"]) for path in options.after or () for row in read(path)["rows"]}
    left = [(case, name) for case, name in found if (case.op, case.shape, name) not in done]
    return left, len(found) - len(left)


def _rank(entry: tuple[KernelCase, str]) -> tuple:
    case, name = entry
    place = FIRST.index(case.op) if case.op in FIRST else len(FIRST)
    small, other = not case.shape.startswith("imagenet"), "contiguous" in case.shape
    return name != "bfloat16", place == len(FIRST), not case.quick, small, other, place
