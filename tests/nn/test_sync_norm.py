"""Synchronised batch norm against float64 batch norm of all values (gloo, CPU)."""

import copy

import pytest
import torch
from torch import nn

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError, InputError
from fastfuse.kernels._across import joined
from fastfuse.nn import stack
from fastfuse.nn.fusion import FusionHead
from fastfuse.nn.sync_norm import synchronise
from fastfuse.nn.transforms import DeepToShallow
from tests.train.ranks import together


def test_statistics_are_joined_as_of_all_values():
    # Large means against small deviations: sums of squares alone would lose ten digits.
    parts = [1e8 + torch.randn(n, 3, dtype=torch.float64) for n in (5, 1, 9)]
    counts = torch.tensor([5.0, 1, 0, 9], dtype=torch.float64)[:, None].expand(-1, 3)
    means, variances = (torch.zeros(4, 3, dtype=torch.float64) for _ in range(2))  # the third process has no values
    for row, x in zip((0, 1, 3), parts, strict=True):
        means[row], variances[row] = x.mean(0), (x - x.mean(0)).square().mean(0)
    whole = torch.cat(parts) - 1e8
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        count, mean, var = joined(counts[order], means[order], variances[order])
        assert torch.equal(count, torch.full_like(count, 15))
        torch.testing.assert_close(mean - 1e8, whole.mean(0), rtol=0, atol=5e-8)  # four roundings of 1e8
        torch.testing.assert_close(var, (whole - whole.mean(0)).square().mean(0), rtol=1e-7, atol=0)
    alone = joined(counts[2:], means[2:], variances[2:])
    assert torch.equal(torch.stack(alone[1:]), torch.stack((means[3], variances[3])))


class Block(nn.Module):
    """Norms of every kind that there is, each in the operator that takes it."""

    def __init__(self):
        super().__init__()
        self.head, self.transform = FusionHead([2, 2], 4, 3), DeepToShallow([2, 4])
        plain = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, momentum=0.3, eps=1e-3), nn.ReLU())
        self.stacked = stack([plain, copy.deepcopy(plain)])
        self.flat = nn.BatchNorm1d(3)

    def forward(self, x):
        fused = self.head(self.stacked(x).chunk(2, 1))
        (shallow,) = self.transform(fused.fused)
        per_image = [self.flat(fused.logits), shallow.tanh().flatten(1), fused.attention.flatten(1)]
        return torch.cat(per_image, 1)


def made(dtype=torch.float64):
    torch.manual_seed(0)
    block = Block()
    for parameter in block.parameters():  # no zeros, no ones
        nn.init.normal_(parameter)
    return block.to(dtype).train()


ROWS = ([0, 1, 2], [3], [0, 1])  # the third process only stands in


def found(block, images, weights):
    images = images.clone().requires_grad_()
    out = block(images)
    # A loss that is no even function of the output, each image with a weight of its own.
    (out.sin() * weights[:, None]).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return out.detach(), images.grad, gradients, {name: b.clone() for name, b in block.named_buffers()}


def test_values_gradients_and_running_statistics_are_those_of_one_process():
    torch.manual_seed(1)
    images, weights = 3 + torch.randn(4, 4, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    out, of_images, gradients, buffers = found(made(), images, weights)

    def own():
        rank = torch.distributed.get_rank()
        block = made()
        synchronise(block).counted = rank < 2
        rows = ROWS[rank]
        return found(block, images[rows], weights[rows] * (rank < 2))

    each = together(3, own)
    for rank, (its_out, its_images, _, its_buffers) in enumerate(each):
        torch.testing.assert_close(its_out, out[ROWS[rank]], rtol=1e-10, atol=1e-10)
        expected = of_images[ROWS[rank]] if rank < 2 else torch.zeros_like(its_images)
        torch.testing.assert_close(its_images, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(its_buffers, buffers, rtol=1e-11, atol=1e-11)
        assert all(torch.equal(its_buffers[name], each[0][3][name]) for name in buffers)
    for name, expected in gradients.items():
        total = sum(own[2][name] for own in each)
        torch.testing.assert_close(
            total, expected, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_half_precision_stays_and_is_summed_in_float32():
    x = 100 + torch.randn(8, 2, 4, 4)

    def own():
        norm = nn.BatchNorm2d(2)
        synchronise(norm)
        rank = torch.distributed.get_rank()
        return norm(x[4 * rank : 4 * rank + 4].bfloat16()).detach(), norm.running_mean

    each = together(2, own)
    # To float64 batch norm of the rounded images: the output's one rounding, and that of float32 statistics.
    truth = nn.functional.batch_norm(x.bfloat16().double(), None, None, training=True, eps=1e-5)
    out = torch.cat([part for part, _ in each])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=1e-3)
    expected = 0.1 * x.bfloat16().double().mean((0, 2, 3))
    torch.testing.assert_close(each[1][1].double(), expected, rtol=1e-6, atol=0)


def test_frozen_norms_and_evaluation_ask_nobody():
    # There is no group here: a norm that asked would fail.
    block = made()
    plain = copy.deepcopy(block).eval()
    synchronise(block)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(block.eval()(x), plain(x))
    with pytest.raises(ValueError, match="process group"):
        block.train()(x)


def test_nothing_but_the_class_of_a_norm_changes():
    block = made()
    before, state = list(block.parameters()), block.state_dict()
    across = synchronise(block)
    assert all(p is q for p, q in zip(block.parameters(), before, strict=True))
    assert list(block.state_dict()) == list(state)
    copied = copy.deepcopy(block)
    assert {id(m.across) for m in block.modules() if hasattr(m, "across")} == {id(across)}
    assert len({id(m.across) for m in copied.modules() if hasattr(m, "across")} - {id(across)}) == 1
    assert isinstance(block.flat, nn.BatchNorm1d) and isinstance(block.head.norm1, nn.BatchNorm2d)


class Strange(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Strange(2), "layer 1 (Strange) cannot be synchronised"),
        (nn.BatchNorm3d(2), "layer 1 (BatchNorm3d)"),
        (nn.BatchNorm2d(2, track_running_stats=False), "no running_mean"),
        (nn.BatchNorm2d(2, affine=False), "no weight"),
        (nn.BatchNorm2d(2, momentum=None), "momentum=None"),
    ],
)
def test_a_norm_that_is_not_known_is_named(norm, reason):
    networks = nn.Sequential(nn.BatchNorm2d(2), norm)
    with pytest.raises(InputError, match="leave --sync-batchnorm out") as error:
        synchronise(networks)
    assert reason in str(error.value)
    assert type(networks[0]) is nn.BatchNorm2d  # nothing was changed


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_step_aside(backend):
    x, ones = torch.ones(2, 4, 2, 2), torch.ones(4)
    norm = functional.BatchNorm(ones, ones, ones.clone(), ones.clone(), True, across=functional.Across())
    frozen = norm._replace(training=False)
    deep, pointwise = torch.ones(4, 4, 3, 3), torch.ones(4, 4, 1, 1)
    depthwise = torch.ones(4, 1, 3, 3)
    for call in (
        lambda: functional.batch_norm_act(x, norm, backend=backend),
        lambda: functional.concat_fuse([x], depthwise, frozen, pointwise, norm, backend=backend),
        lambda: functional.deep_to_shallow(x, [functional.Stage(deep, norm)], backend=backend),
    ):
        with pytest.raises(BackendUnavailableError, match=r"statistics of all processes.*leave --sync-batchnorm out"):
            call()
