"""Frozen networks with their batch norms folded into the convolutions before them."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(network: nn.Module) -> nn.Module:
    """A copy for evaluation without the norms that follow a convolution; equal within rounding.

    A network whose forward torch.fx cannot trace, or that has hooks or a layer called more than once, is copied as it
    is: hooks would be lost, and a layer called twice would be folded twice.

    Args:
        network: any; its norms' running statistics are taken, whatever its mode.
    """
    plain = copy.deepcopy(network).eval()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if any(getattr(module, kind) for module in plain.modules() for kind in hooks):
        return plain
    try:
        traced = fx.symbolic_trace(copy.deepcopy(plain))
    except Exception:  # what a tracer stumbles over can raise anything
        return plain
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    if any(count > 1 and list(traced.get_submodule(name).parameters()) for name, count in calls.items()):
        return plain
    for node in list(traced.graph.nodes):
        _fold(traced, node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


@torch.no_grad()
def _fold(traced: fx.GraphModule, node: fx.Node) -> None:
    """Fold a call of a norm into the convolution whose result it alone reads, if it is one."""
    source: Any = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    norm, convolution = _layer(traced, node), _layer(traced, source)
    if type(norm) is not nn.BatchNorm2d or type(convolution) is not nn.Conv2d or len(source.users) > 1:
        return
    if norm.running_mean is None:  # it takes the batch's statistics in evaluation too
        return
    traced.set_submodule(source.target, fuse_conv_bn_eval(convolution, norm))
    node.replace_all_uses_with(source)
    traced.graph.erase_node(node)


def _layer(traced: fx.GraphModule, node: Any) -> nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return traced.get_submodule(str(node.target)) if is_call else None
