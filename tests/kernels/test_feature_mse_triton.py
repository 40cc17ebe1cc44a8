"""feature_mse's kernels alone; what it shares with feature_kl is in test_student_losses_triton.py."""

import numpy as np
import torch

from fastfuse import functional
from fastfuse.kernels.feature_mse import triton_kernels
from fastfuse.testing import assert_within_budget
from tests.kernels.students import DEVICE, LAST, MSE, agree, single_maps


def test_blocks_that_come_to_several_tiles(monkeypatch, nan_filled):
    """Nine tiles on four blocks: a block takes every fourth tile, and the last turn finds only one."""
    monkeypatch.setattr(triton_kernels, "TILE_BYTES", 64)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 4)
    agree(MSE, single_maps((1, 3, 9, 5), (1, 3, 9, 5)), 1)
    agree(MSE, single_maps((3, 3, 5, 3), (3, 3, 5, 3), formats=(LAST,)), 1)


def test_more_partial_sums_than_the_last_kernel_takes_at_once(monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE_BYTES", 64)
    monkeypatch.setattr(triton_kernels, "FINISH_BLOCK", 4)
    agree(MSE, single_maps((1, 3, 9, 5), (1, 3, 9, 5)), 1)


def test_recorded_values(golden):
    """Squared distance of the recorded maps once normalised: what the published programs call feature loss."""
    with np.load(golden / "ops.npz", allow_pickle=False) as file:
        names = [key.removesuffix("/feature_mse/loss") for key in file if key.endswith("feature_mse/loss")]
        assert names
        for name in names:
            x, y = (torch.from_numpy(file[f"{name}/{k}"]).to(DEVICE) for k in "xy")
            unit = [v.flatten(1).div(v.flatten(1).norm(dim=1, keepdim=True)).view_as(v) for v in (x, y)]
            truth = torch.from_numpy(file[f"{name}/feature_mse/loss"])
            single = [v.float() for v in unit]
            ours, eager = (functional.feature_mse(single[:1], single[1], backend=b) for b in ("triton", "reference"))
            assert_within_budget(ours, truth.view(()), eager, what=name)
