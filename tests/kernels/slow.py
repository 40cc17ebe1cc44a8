"""What the slow recomputations share."""

import numpy as np
import torch

from fastfuse.testing import relative_l2

BOUND = 1e-12


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def agrees(ours, slow):
    """Ours is the slow result, an array or nested lists of numbers, up to rounding."""
    assert relative_l2(ours, torch.as_tensor(np.array(slow, dtype=np.float64))) <= BOUND
