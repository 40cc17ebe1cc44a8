"""What the tests of deep_to_shallow share: shapes, layouts, drawn tensors, results by name, counted launches."""

from itertools import pairwise

import torch

from fastfuse import functional
from fastfuse.kernels.deep_to_shallow import triton_backward, triton_kernels
from fastfuse.testing import assert_within_budget
from tests.kernels.op_cases import FORMATS

LAST = torch.channels_last
# shape of the deep map, channels of the stages, sizes, reason
SHAPES = [
    ((2, 3, 4, 3), (5,), [(7, 6)], "an odd height only"),
    ((2, 5, 3, 2), (4, 3), None, "two stages, doubled twice"),
    ((1, 3, 3, 4), (2, 4), [(12, 13), (6, 7)], "odd widths, a batch of one"),
    ((3, 3, 7, 7), (2,), [(13, 13)], "more positions than one tile, across samples"),
    ((2, 35, 2, 2), (33,), None, "more channels than one tile of float32 on either side"),
    ((3, 2, 1, 1), (1, 3), [(2, 1), (1, 1)], "a single position and a single channel, where layouts look alike"),
]
CHAIN = SHAPES[1][:2]
FIELDS = ("weight", "gamma", "beta", "running mean", "running variance")
# Formats of the map, of the weights and of the cotangents.
LAYOUTS = {
    "contiguous": FORMATS[:1] * 3,
    "channels_last": [LAST] * 3,
    "mixed": [LAST, FORMATS[0], FORMATS[0]],
    "mixed otherwise": [FORMATS[0], LAST, LAST],
}


def draw(shape, channels, dtype=torch.float32, formats=LAYOUTS["contiguous"], seed=0):
    """The deep map, and weight, gamma, beta, running mean and variance of each stage: the same numbers in any dtype."""
    generator = torch.Generator().manual_seed(shape[0] + channels[0] + 100 * seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).half().to(dtype)

    x = normal(*shape).contiguous(memory_format=formats[0]).requires_grad_()
    stages = []
    for deep, shallow in pairwise((shape[1], *channels)):
        weight = normal(deep, shallow, 3, 3).contiguous(memory_format=formats[1]).requires_grad_()
        gamma, beta = (1 + normal(shallow) / 2).requires_grad_(), normal(shallow).requires_grad_()
        stages.append([weight, gamma, beta, normal(shallow), 0.5 + normal(shallow).abs()])
    return x, stages


def chain(tensors, training):
    return [functional.Stage(s[0], functional.BatchNorm(*s[1:], training)) for s in tensors]


def cast(tensors, dtype):
    return [[t.detach().to(dtype).requires_grad_(t.requires_grad) for t in stage] for stage in tensors]


def cotangents(maps, memory_format=FORMATS[0]):
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(y.shape, generator=generator, dtype=torch.float64).half().to(y.dtype) for y in maps]
    return [x.contiguous(memory_format=memory_format) for x in found]


def evaluate(backend, x, tensors, training, sizes=None, cotangent_format=FORMATS[0]):
    """Maps, running statistics, then the gradients of x and of every stage's weight, gamma and beta, with names."""
    maps = functional.deep_to_shallow(x, chain(tensors, training), sizes=sizes, backend=backend)
    return named(x, tensors, maps, torch.autograd.grad(maps, leaves(x, tensors), cotangents(maps, cotangent_format)))


def leaves(x, tensors):
    return [t for t in (x, *(t for stage in tensors for t in stage)) if t.requires_grad]


def named(x, tensors, maps, gradients):
    """The results of one transform by name."""
    own = {"x": x} | {f"{f} of stage {j}": t for j, s in enumerate(tensors) for f, t in zip(FIELDS, s, strict=True)}
    found = {f"map {i}": y for i, y in enumerate(maps)} | {n: t for n, t in own.items() if n.startswith("running")}
    wanted = [f"gradient of {name}" for name, t in own.items() if t.requires_grad]
    return found | dict(zip(wanted, gradients, strict=True))


def three(function, dtype=torch.float32):
    """A function of (backend, dtype) for the kernels, the truth in float64, and eager in the kernels' dtype."""
    return [function(*case) for case in (("triton", dtype), ("reference", torch.float64), ("reference", dtype))]


def compare(found, truth, eager):
    """Results of each, by name or in order, within the budget; None where there is none."""
    for name in found if isinstance(found, dict) else range(len(found)):
        assert (found[name] is None) == (eager[name] is None), name
        if found[name] is not None:
            assert_within_budget(found[name], truth[name], eager[name], what=str(name))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, name, ran):
        self.kernel, self.name, self.ran = kernel, name.removeprefix("deep_to_shallow_").removesuffix("_kernel"), ran

    def __getitem__(self, grid):
        self.ran[self.name] = self.ran.get(self.name, 0) + 1
        return self.kernel[grid]


def count_launches(monkeypatch):
    """Kernels' launches by name, from now on."""
    ran = {}
    for module in (triton_kernels.conv, triton_kernels.norm, triton_backward.products):
        for name in dir(module):
            if name.startswith("deep_to_shallow_"):
                monkeypatch.setattr(module, name, Counted(getattr(module, name), name, ran))
    return ran
