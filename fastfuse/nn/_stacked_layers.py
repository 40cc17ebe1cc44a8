"""The layers of a stacked network: each holds the parameters of the same layer of several networks, one after another.

Dimension 0 of every parameter and buffer runs over the networks first: `tensor.view(networks, *shape)` takes them
apart.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.nn._norm import batch_norm
from fastfuse.nn._stacked_graph import refusal


def joined(parts: Sequence[Tensor], leaf: nn.Module) -> Tensor:
    """One tensor of a layer for all networks; the memory format of the parts stays."""
    # A linear layer's matrices are the batch of one product; numbers have no dimension to follow each other in.
    stacked = isinstance(leaf, nn.Linear) or parts[0].dim() == 0
    return torch.stack(list(parts)) if stacked else torch.cat(list(parts))


def convolution(layer: nn.Conv2d, *, networks: int, images: int = 0) -> nn.Conv2d:
    """A convolution for all networks at once, without values yet.

    Args:
        layer: that of one network.
        networks: how many there are.
        images: 0 for a layer that reads stacked maps; otherwise the number of image batches side by side in its input,
            each of which serves as many networks: to those the layer is one dense convolution.
    """
    given: Any = layer  # whose sizes are pairs, and are typed as tuples of any length
    made = StackedConv if StackedConv.serves(layer) and not images else nn.Conv2d
    return made(
        layer.in_channels * (images or networks),
        layer.out_channels * networks,
        given.kernel_size,
        given.stride,
        given.padding,
        given.dilation,
        images or layer.groups * networks,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
    )


class StackedConv(nn.Conv2d):
    """A convolution of stacked maps by the op `grouped_conv`, which takes what was measured to be the fastest."""

    @staticmethod
    def serves(layer: nn.Conv2d) -> bool:
        """Whether a convolution is one that the op computes."""
        side = layer.kernel_size[0]
        ordinary = layer.bias is None and layer.padding_mode == "zeros" and layer.dilation == (1, 1)
        halved = layer.kernel_size == (side, side) and side % 2 == 1 and layer.padding == (side // 2, side // 2)
        return ordinary and halved and layer.stride[0] == layer.stride[1]

    def forward(self, x: Tensor) -> Tensor:
        """[N, S C_in, H, W] to [N, S C_out, H', W']."""
        return functional.grouped_conv(x, self.weight, groups=self.groups, stride=self.stride[0])


class StackedNorm(nn.BatchNorm2d):
    """Batch norm over the channels of all networks, with the addition and the ReLU that follow it.

    Args:
        norm: that of one network.
        networks: how many there are.
    """

    def __init__(self, norm: nn.BatchNorm2d, networks: int) -> None:
        super().__init__(norm.num_features * networks, norm.eps, norm.momentum, device="meta")
        # Networks may have seen different numbers of batches before they were stacked.
        self.num_batches_tracked = torch.empty(networks, dtype=torch.long, device="meta")

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """[N, S C, H, W], and a residual of that shape, to the same; the batch is counted by the whole network."""
        norm = batch_norm(self, counters=[])
        if residual is None or (residual.shape == x.shape and residual.dtype == x.dtype):
            return functional.batch_norm_act(x, norm, residual=residual, relu=relu).out
        # What broadcasts, or is promoted under autocast.
        total = functional.batch_norm_act(x, norm, relu=False).out + residual
        return total.relu() if relu else total


class StackedLinear(nn.Module):
    """A linear layer of each network, as one batched product; weight [S, K, C], bias [S, K].

    Args:
        layer: that of one network.
        networks: S.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, networks: int) -> None:
        super().__init__()
        self.networks = networks
        self.weight = nn.Parameter(torch.empty(networks, layer.out_features, layer.in_features, device="meta"))
        bias = None if layer.bias is None else nn.Parameter(torch.empty(networks, layer.out_features, device="meta"))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, S C], or [S, N, C] of a linear layer before, to [S, N, K]."""
        if x.dim() == 2:
            x = x.view(x.shape[0], self.networks, -1).transpose(0, 1)
        weight = self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias.unsqueeze(1), x, weight)


def stacked_layer(name: str, layers: Sequence[nn.Module], images: int) -> nn.Module:
    """The same layer of several networks as one, with their values; `images` as for `convolution`."""
    first: Any = layers[0]
    made: nn.Module
    if isinstance(first, nn.Conv2d):
        made = convolution(first, networks=len(layers), images=images)
    elif isinstance(first, nn.BatchNorm2d):
        try:
            batch_norm(first, training=False)
        except InputError as error:
            raise refusal(f"layer {name} (BatchNorm2d)", str(error).partition(";")[0]) from error
        made = StackedNorm(first, len(layers))
    else:
        made = StackedLinear(first, len(layers))
    own = [dict(tensors_of(layer)) for layer in layers]
    for key, tensor in own[0].items():
        value = joined([tensors[key].detach() for tensors in own], first)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        setattr(made, key, value)
    return made


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers by every name that they have."""
    named = (module.named_parameters, module.named_buffers)
    return [entry for each in named for entry in each(remove_duplicate=False)]
