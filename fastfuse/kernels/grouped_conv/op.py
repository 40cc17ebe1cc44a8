"""Public form of grouped_conv."""

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels.grouped_conv import autograd, reference

# cuDNN first as long as no measured row puts these kernels before it.
_dispatch.register("grouped_conv", {"reference": None, "triton": _triton.why_not})


def grouped_conv(x: Tensor, weight: Tensor, *, groups: int, stride: int = 1, backend: str = "auto") -> Tensor:
    """Convolutions of G networks whose maps lie side by side as channels, padded by half the kernel, without bias.

    `torch.nn.functional.conv2d(x, weight, stride=stride, padding=K // 2, groups=G)`.

    Args:
        x: [B, G C_in, H, W]; meant for channels-last, contiguous maps take the same kernels at less speed.
        weight: [G C_out, C_in, K, K], K odd; under autocast it is cast as it is read, and its gradient keeps its dtype.
        groups: G, the number of networks.
        stride: of rows and columns.
        backend: "auto", "reference", "triton" or "cuda". "auto" is torch's own convolution unless these kernels were
            measured to be faster on this GPU for such a layer.

    Returns:
        [B, G C_out, ceil(H / stride), ceil(W / stride)] in the format of x.

    Raises:
        InputError, TypeError: shapes, devices or dtypes that do not fit.
        BackendUnavailableError: the backend asked for cannot serve here.
    """
    _check(x, weight, groups, stride)
    outputs, inputs, kernel, _ = weight.shape
    kind = f"{inputs} to {outputs // groups}, {kernel}x{kernel}, stride {stride}"
    if _dispatch.resolve("grouped_conv", backend, x, kind=kind) == "reference":
        return reference.grouped_conv(x, weight, groups, stride)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}, x {x.dtype}; convert one of them or use autocast")
    return autograd.GroupedConv.apply(x, weight, groups, stride)


def _check(x: Tensor, weight: Tensor, groups: int, stride: int) -> None:
    _numerics.check_floating("x", x, (4,))
    _numerics.check_floating("weight", weight, (4,))
    _numerics.check_same_device("x", x, weight=weight)
    for name, number in (("groups", groups), ("stride", stride)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    kernel = weight.shape[2]
    if weight.shape[3] != kernel or kernel % 2 == 0:
        raise InputError(f"weight must have a square kernel of odd size, not {list(weight.shape)}")
    if x.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups:
        raise InputError(
            f"weight {list(weight.shape)} does not fit x {list(x.shape)} in {groups} groups: it must be "
            "[groups * C_out, C_in, K, K] for x [B, groups * C_in, H, W]"
        )
