"""What networks must have in common to be stacked."""

from collections.abc import Sequence

from torch import fx, nn

from fastfuse.errors import InputError
from fastfuse.nn import _stacked_graph as graphs
from fastfuse.nn._stacked_graph import refusal
from fastfuse.nn._stacked_layers import tensors_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether a module, apart from its children, has hooks, which a graph of its calls leaves out."""
    return any(getattr(module, kind) for kind in _HOOKS)


def check_alike(models: Sequence[nn.Module], traced: fx.GraphModule) -> None:
    """Refuse hooks, which would get lost, and networks that differ in more than values."""
    wanted = _description(models[0])
    for i, model in enumerate(models):
        for name, module in model.named_modules():
            if hooked(module):
                raise refusal(f"networks[{i}], layer {name or type(model).__name__},", "it has hooks")
        if i == 0:
            continue
        found = _description(model)
        for name in dict.fromkeys([*wanted, *found]):
            ours, theirs = found.get(name, "missing"), wanted.get(name, "missing")
            if ours != theirs:
                raise refusal(f"networks[{i}] beside networks[0]", f"{name} is {ours}, and {theirs} there")
        if graphs.trace(model).code != traced.code:
            raise refusal(f"networks[{i}] beside networks[0]", "its forward calls its layers in another way")


def are_alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks differ in values alone, as far as can be told: False where a forward cannot be traced."""
    try:
        check_alike([first, second], graphs.trace(first))
    except InputError:
        return False
    return True


def _description(model: nn.Module) -> dict[str, str]:
    """All that must agree besides values: the configuration and mode of layers, and what tensors are."""
    found = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            mode = "in training mode" if module.training else "in evaluation mode"
            found[f"layer {name}"] = f"{module!r} {mode}" if list(module.parameters()) else repr(module)
    for name, tensor in tensors_of(model):
        learns = "trained" if tensor.requires_grad else "frozen"
        kept = f" {learns}" if isinstance(tensor, nn.Parameter) else ""
        found[name] = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}{kept}"
    return found


def check_complete(model: nn.Module, stacked: nn.Module) -> None:
    """Nothing of a network may get lost because its forward does not reach it, or holds it twice."""
    held, found = tensors_of(model), dict(tensors_of(stacked))
    owners: dict[int, str] = {}
    for name, tensor in held:
        if name not in found:
            raise refusal(f"{type(model).__name__}.{name}", "the traced forward does not use it under this name")
        if owners.setdefault(id(tensor), name) != name:
            raise refusal(f"{type(model).__name__}.{name}", f"it is the same tensor as {owners[id(tensor)]}")
