"""Memory of the gradients of maps."""

import torch
from torch import Tensor

from fastfuse.kernels import _triton


def gradient_like(x: Tensor) -> Tensor:
    """Memory for the gradient of a map, in the map's own format, with one stride for its positions."""
    return _triton.map_strides(torch.empty_like(x))[0]
