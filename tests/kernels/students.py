"""The losses of several students' maps, as one kind of thing: what the tests that hold for all of them share."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from fastfuse import functional
from fastfuse.kernels.feature_kl import closed_form as kl_closed_form
from fastfuse.kernels.feature_kl import triton_kernels as kl_kernels
from fastfuse.kernels.feature_mse import closed_form as mse_closed_form
from fastfuse.kernels.feature_mse import triton_kernels as mse_kernels
from fastfuse.testing import assert_within_budget, relative_l2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
X, Y = (2, 3, 5, 4), (1, 5, 3, 3)


class StudentLoss(NamedTuple):
    """A loss of students' maps against one target or one each.

    Attributes:
        op: its name among the operators.
        call: the public function with its options.
        form: the same options as the schemas take them.
        closed_form, kernels: its files of these names.
        signed: its terms have both signs and cancel: eager may get a single loss right to the last bit by luck.
    """

    op: str
    call: Callable
    form: tuple
    closed_form: ModuleType
    kernels: ModuleType
    signed: bool


def kl(over, temperature=1.5):
    call = partial(functional.feature_kl, temperature=temperature, over=over)
    return StudentLoss("feature_kl", call, (temperature, over == "channels"), kl_closed_form, kl_kernels, True)


MSE = StudentLoss("feature_mse", functional.feature_mse, (), mse_closed_form, mse_kernels, False)
# The interpreter is slow: `make test` has feature_kl in test_backends_agree.py, the rest of it is long.
each_loss = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(MSE, id="feature_mse"),
        pytest.param(kl("positions"), id="feature_kl over positions", marks=pytest.mark.long),
        pytest.param(kl("channels"), id="feature_kl over channels", marks=pytest.mark.long),
    ],
)


def maps(*shapes, dtype=torch.float64, formats=(), gradient=True):
    """Random maps; formats[i] is that of map i, contiguous if there is none."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    formats = (*formats, *[torch.contiguous_format] * (len(shapes) - len(formats)))
    pairs = zip(found, formats, strict=True)
    return [x.contiguous(memory_format=f).requires_grad_(gradient) for x, f in pairs]


def single_maps(*shapes, **options):
    return maps(*shapes, dtype=torch.float32, **options)


def views():
    """Views that are neither contiguous nor channels-last, in the shape of X."""
    channels = single_maps((2, 8, 5, 4), gradient=False)[0]
    return {
        "a student's channels in a stack of students": channels[:, 3:6],
        "the same, channels-last": channels.contiguous(memory_format=LAST)[:, 3:6],
        "cropped: height and width do not collapse": single_maps((2, 3, 8, 4), gradient=False)[0][:, :, 1:6],
        "height and width swapped": single_maps((2, 3, 4, 5), gradient=False)[0].transpose(2, 3),
        "every other sample": single_maps((4, 3, 5, 4), gradient=False)[0][::2],
        "one sample for all": single_maps((1, 3, 5, 4), gradient=False)[0].expand(2, 3, 5, 4),
        "not aligned to 16 bytes": torch.randn(121, device=DEVICE)[1:].view(X),
    }


def value(loss, tensors, students, backend):
    """The first tensors are students, the others their target or targets."""
    targets = tensors[students:]
    return loss.call(tensors[:students], targets[0] if len(targets) == 1 else targets, backend=backend)


def evaluate(loss, tensors, students, backend):
    """Loss and gradients of all tensors that take one."""
    found = value(loss, tensors, students, backend)
    wanted = [x for x in tensors if x.requires_grad]
    return [found, *torch.autograd.grad(found, wanted, torch.full_like(found, 0.75))]


def usual_error(loss, tensors, students):
    """Root mean square of the eager loss's relative error when the tensors' elements are shuffled."""
    errors = []
    for _ in range(16):
        drawn = [x.detach().flatten()[torch.randperm(x.numel(), device=DEVICE)].view(x.shape) for x in tensors]
        eager = value(loss, drawn, students, "reference")
        errors.append(relative_l2(eager, value(loss, [x.double() for x in drawn], students, "reference")))
    return sum(e**2 for e in errors) ** 0.5 / 4


def agree(loss, tensors, students):
    """Kernel and reference on the same tensors, within the error budget."""
    ours, eager = (evaluate(loss, tensors, students, backend) for backend in ("triton", "reference"))
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    truth = evaluate(loss, exact, students, "reference")
    assert ours[0].dtype == eager[0].dtype
    if loss.signed:
        budget = 2 * (usual_error(loss, tensors, students) + torch.finfo(ours[0].dtype).eps)
        assert relative_l2(ours[0], truth[0]) <= budget
    for i, (a, t, e) in enumerate(zip(ours, truth, eager, strict=True)):
        if i or not loss.signed:
            assert_within_budget(a, t, e, what=f"result {i}")
    return ours
