"""Paraphraser and translators from their definition, and translators together against each alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.errors import InputError
from fastfuse.nn.factor import Paraphraser, Translator, Translators


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def fmap(channels: int = 4, batch: int = 3, size: tuple[int, int] = (5, 7)) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64)


def joined(singles: list[Translator], together: Translator) -> None:
    """Give translators that run together the values of single ones."""
    own = [single.state_dict() for single in singles]
    counters = [name for name in own[0] if own[0][name].dim() == 0]
    state = {name: torch.cat([values[name] for values in own]) for name in own[0] if name not in counters}
    together.load_state_dict(state | {name: own[0][name] for name in counters}, strict=True)


def test_translator_is_three_convolutions_with_bias_and_no_norm():
    module = Translator(4, 3).double()
    assert [tuple(p.shape) for p in module.parameters()] == [
        (4, 4, 3, 3), (4,), (3, 4, 3, 3), (3,), (3, 3, 3, 3), (3,),
    ]  # fmt: skip
    assert not list(module.buffers())
    x = wanted = fmap()
    for conv in (module.conv1, module.conv2, module.conv3):
        wanted = leaky(F.conv2d(wanted, conv.weight, conv.bias, padding=1))
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)


def test_paraphraser_mirrors_its_encoder():
    module = Paraphraser(6, 3).double()
    x = fmap(6)
    factor = module.encoder(x)
    assert factor.shape == (3, 3, 5, 7)
    decoder = module.decoder
    assert [tuple(layer.weight.shape[:2]) for layer in (decoder.conv1, decoder.conv2, decoder.conv3)] == [
        (3, 3), (3, 6), (6, 6),
    ]  # fmt: skip
    wanted = factor
    for conv in (decoder.conv1, decoder.conv2, decoder.conv3):
        # A transposed convolution of stride 1 is one with the kernel turned and its channels swapped.
        turned = conv.weight.transpose(0, 1).flip(2, 3)
        wanted = leaky(F.conv2d(wanted, turned, conv.bias, padding=1))
    assert wanted.shape == x.shape
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("widths", [[3], [4, 4], [3] * 5, [3, 5, 3]], ids=str)
def test_together_they_equal_each_alone(widths, norm):
    together = Translators(4, widths, norm=norm).double()
    singles = [Translator(4, width, norm=norm).double() for width in widths]
    for network, width in zip(together.together, dict.fromkeys(widths), strict=True):
        joined([single for single, own in zip(singles, widths, strict=True) if own == width], network)
    x = fmap().requires_grad_()
    same = x.detach().clone().requires_grad_()
    found, wanted = together(x), [single(same) for single in singles]
    cotangents = [torch.randn_like(y) for y in wanted]
    torch.autograd.backward(found, cotangents)
    torch.autograd.backward(wanted, cotangents)
    for ours, theirs in zip([*found, x.grad], [*wanted, same.grad], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for network, width in zip(together.together, dict.fromkeys(widths), strict=True):
        own = [dict(s.named_parameters()) for s, w in zip(singles, widths, strict=True) if w == width]
        for name, parameter in network.named_parameters():
            gradient = torch.cat([parameters[name].grad for parameters in own])
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)


def test_norms_come_before_the_activation_and_take_the_place_of_biases():
    module = Translator(4, 3, norm=True)
    assert [type(layer) for layer in module] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 3
    assert all(layer.bias is None for layer in module if isinstance(layer, nn.Conv2d))


def test_joint_translators_start_as_single_ones_do():
    """Initial weights do not shrink with the number of translators: uniform within 1 / sqrt(9 C)."""
    together = Translators(16, [8] * 5).together[0]
    for conv, fan in ((together.conv1, 16), (together.conv2, 16), (together.conv3, 8)):
        largest = conv.weight.abs().max().item()
        assert largest == pytest.approx(1 / (9 * fan) ** 0.5, rel=1e-2)


def test_refusals():
    with pytest.raises(InputError, match=r"4 channels cannot be turned into 0: .*raise --factor-ratio"):
        Paraphraser(4, 0)
    with pytest.raises(InputError, match="at least one translator"):
        Translators(4, [])
