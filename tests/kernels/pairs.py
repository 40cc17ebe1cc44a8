"""The losses of lists of pairs of maps, as one kind of thing: what the tests that hold for all of them share."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from fastfuse import functional
from fastfuse.kernels.attention_mse import op as attention_op
from fastfuse.kernels.attention_mse import triton_kernels as attention_kernels
from fastfuse.kernels.normalized_lp import op as lp_op
from fastfuse.kernels.normalized_lp import triton_joint, triton_kernels
from fastfuse.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
REDUCTIONS = ["mean", "sum", "none"]
X, Y, DEEP, ROWS = (2, 3, 5, 4), (2, 7, 5, 4), (2, 9, 3, 3), (2, 7)
MAP, DEEP_MAP = (2, 5, 4), (2, 3, 3)


class Pairs(NamedTuple):
    """A loss of pairs.

    Attributes:
        op: its name among the operators.
        call: the public function; one loss per pair, or a tuple of several.
        module, launcher: its op.py and the file of its launchers.
        inputs, targets: shapes of three pairs, of every kind that it takes; the first two are X and DEEP.
        recorded: the recordings whose sum it is; none if there is no recording.
        saved: how many tensors are kept for given wanted gradients of (*inputs, *targets).
    """

    op: str
    call: Callable
    module: ModuleType
    launcher: ModuleType
    inputs: list[tuple[int, ...]]
    targets: list[tuple[int, ...]]
    recorded: tuple[str, ...]
    saved: Callable[[tuple[int, ...]], int]


def _both_maps(wanted):
    """Tensors kept where a pair that needs any gradient keeps both its maps."""
    pairs = len(wanted) // 2
    return 2 * sum(a or b for a, b in zip(wanted[:pairs], wanted[pairs:], strict=True))


def _lp(p, call, launcher, third, recorded, small):
    """normalized_lp or its joint form; `small` counts the small tensors that it keeps."""
    shapes = [X, DEEP, third]
    recorded = recorded if p == 2 else ()
    return Pairs(
        "normalized_lp", partial(call, p=p), lp_op, launcher, shapes, shapes, recorded,
        lambda wanted: small + _both_maps(wanted),
    )  # fmt: skip


ATTENTION = Pairs(
    "attention_mse", functional.attention_mse, attention_op, attention_kernels,
    [X, DEEP, MAP], [Y, DEEP_MAP, X], ("attention_mse",), lambda wanted: 2 + sum(wanted),
)  # fmt: skip
LP = {p: _lp(p, functional.normalized_lp, triton_kernels, ROWS, ("feature_mse",), 1) for p in (2, 1)}
JOINT = {
    p: _lp(p, functional.normalized_lp_joint, triton_joint, (2, 6, 1, 1), ("feature_mse", "attention_mse"), 2)
    for p in (2, 1)
}
# The interpreter is slow: `make test` has the distances of whole maps in test_backends_agree.py, the rest is long.
_LPS = [
    pytest.param(losses[p], id=f"{name} p={p}", marks=pytest.mark.long)
    for name, losses in (("normalized_lp", LP), ("normalized_lp_joint", JOINT))
    for p in losses
]
each_lp = pytest.mark.parametrize("loss", _LPS)
each_loss = pytest.mark.parametrize("loss", [pytest.param(ATTENTION, id="attention_mse"), *_LPS])


def maps(*shapes, dtype=SINGLE, formats=(), gradient=True):
    """Random tensors, ready attention maps (three dimensions) not negative; formats[i] is that of map i."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        x = x.abs() if len(shape) == 3 else x
        last = i < len(formats) and formats[i] == LAST and len(shape) == 4
        found.append((x.contiguous(memory_format=LAST) if last else x).requires_grad_(gradient))
    return found


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    wide = maps((2, 8, 5, 4), gradient=False)[0]
    return {
        "a student's channels in a stack of students": wide[:, 3:6],
        "the same, channels-last": wide.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": maps((2, 3, 8, 4), gradient=False)[0][:, :, 1:6],
        "cropped across: neither": maps((2, 3, 5, 8), gradient=False)[0][..., 1:5],
        "height and width swapped": maps((2, 3, 4, 5), gradient=False)[0].transpose(2, 3),
        "every other sample": maps((4, 3, 5, 4), gradient=False)[0][::2],
        "one sample for all": maps((1, 3, 5, 4), gradient=False)[0].expand(2, 3, 5, 4),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


def nearly_equal():
    """x and a y that is a multiple of it but for the least bit: 1 - cos between 1e-10 and 1e-3."""
    x = maps((2, 4, 40, 40), gradient=False)[0]
    channels = torch.tensor([1.0, 0.0, 3.0, 1e-3], device=DEVICE)[:, None, None]
    ramp = torch.linspace(0.98, 1.02, 40, device=DEVICE)[:, None]
    noise = torch.randn_like(x)
    return {
        "noise, 1e-2, scales 3 apart": (x, 3 * x + 1e-2 * noise),
        "noise, 1e-4, scales 1e-5 apart": (x, 1e-5 * (x + 1e-4 * noise)),
        "tiles of different scale": (x, x * ramp),
        "a dead channel and one of small values": (x * channels, 2 * x * channels + 1e-2 * noise * channels),
        "a channel that is dead in one map only": (x, x * (channels > 0)),
    }


def evaluate(loss, tensors, backend, reduction="mean", call=None):
    """Losses of pairs (first half: inputs, second half: targets) and gradients of those tensors that take one."""
    pairs = len(tensors) // 2
    losses = losses_of((call or loss.call)(tensors[:pairs], tensors[pairs:], reduction=reduction, backend=backend))
    cotangents = [
        torch.linspace(0.5 + i, 2 - i, each.numel(), device=each.device).view(each.shape).to(each)
        for i, each in enumerate(losses)
    ]
    wanted = [x for x in tensors if x.requires_grad]
    return [*losses, *(torch.autograd.grad(losses, wanted, cotangents) if wanted else ())]


def exactly(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def agree(loss, tensors, reduction="mean"):
    """Kernels and reference on the same tensors, within the error budget; gives the gradients."""
    ours, eager = (evaluate(loss, tensors, backend, reduction) for backend in ("triton", "reference"))
    truth = evaluate(loss, exactly(tensors), "reference", reduction)
    for i, (a, t, e) in enumerate(zip(ours, truth, eager, strict=True)):
        assert_within_budget(a, t, e, what=f"result {i}")
    return ours[len(ours) - sum(x.requires_grad for x in tensors) :]


def losses_of(found):
    """What a loss gives, always as a list."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


def launches(monkeypatch, loss):
    """Numbers of pairs of the calls of the forward launcher from now on."""
    seen = []
    forward = loss.launcher.forward
    monkeypatch.setattr(loss.launcher, "forward", lambda *a: seen.append(len(a[0])) or forward(*a))
    return seen
