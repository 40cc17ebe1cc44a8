"""Extents around 2^31: what Triton kernels cannot count in 32 bits is refused before a launch, the rest is exact."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor

from fastfuse import functional as ff
from fastfuse.errors import InputError
from fastfuse.kernels import _limits
from fastfuse.kernels._device import tile_place, tile_turns
from fastfuse.kernels.batch_norm_act import triton_forward
from tests.kernels.op_cases import CASES, batch_norm
from tests.kernels.test_backends_agree import run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16


def huge(*shape, dtype=torch.float32):
    """A map of one value: the extents of a large one, without its memory."""
    return torch.zeros((), dtype=dtype, device=DEVICE).expand(shape)


def norm(channels):
    return batch_norm(torch.zeros(channels, device=DEVICE), torch.zeros(channels, device=DEVICE), True)


def weight(*shape):
    return torch.zeros(shape, device=DEVICE)


def fuse(x):
    return ff.concat_fuse([x], weight(1, 1, 3, 3), norm(1), weight(1, 1, 1, 1), norm(1), backend="triton")


def draw(images):
    vectors = torch.ones(2, images.shape[3], device=DEVICE)
    indices = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    options = {"mean": vectors[0], "std": vectors[1], "padding": 0, "backend": "triton"}
    return ff.augment(images, indices, indices.expand(1, 2), indices.bool(), **options)


def slopes(x):
    """Backward of attention_mse alone: its grid has an axis that the forward's has not."""
    return torch.ops.fastfuse.attention_mse_bwd(huge(1), huge(2, 1), huge(4, 1, 1), [x], [0], [0], "mean")


def refused(reason, x, call, message):
    return pytest.param(x, call, message, id=reason)


# 2^31 positions, all samples together.
MANY = huge(2**16, 1, 2**8, 2**7)
# Samples of as many, and of more than a grid's second axis has tiles.
WHOLE, LONG = huge(1, 1, 2**16, 2**15), huge(1, 1, 2**16, 2**7 + 1)
COUNTED = "[65536, 1, 256, 128] makes 2,147,483,648 positions"
ACROSS = "programs, a GPU takes at most 65,535 along the second and third axis"


@pytest.mark.parametrize(
    ("x", "call", "message"),
    [
        refused("batch_norm_act", MANY, lambda x: ff.batch_norm_act(x, norm(1), backend="triton"), f"x {COUNTED}"),
        refused(
            "concat_conv1x1",
            MANY,
            lambda x: ff.concat_conv1x1([x], weight(1, 1, 1, 1), backend="triton"),
            f"features[0] {COUNTED}",
        ),
        refused("concat_fuse", MANY, fuse, f"features[0] {COUNTED}"),
        refused(
            "grouped_conv",
            MANY,
            lambda x: ff.grouped_conv(x, weight(1, 1, 3, 3), groups=1, backend="triton"),
            f"x {COUNTED}",
        ),
        refused(
            "deep_to_shallow",
            MANY[:, :, :, ::2],
            lambda x: ff.deep_to_shallow(
                [x], [[ff.Stage(weight(1, 1, 3, 3), norm(1)) for _ in range(2)]], backend="triton"
            ),
            "x[0] [65536, 1, 256, 64] makes 4,294,967,296 positions before stage 1",
        ),
        refused(
            "attention_map of a long sample",
            LONG,
            lambda x: ff.attention_map(x, backend="triton"),
            f"features[0] [1, 1, 65536, 129] makes a grid of 1 x 66,048 {ACROSS}",
        ),
        refused(
            "attention_mse of a long sample",
            LONG,
            slopes,
            f"[1, 1, 65536, 129] makes a grid of 1 x 66,048 x 1 {ACROSS}",
        ),
        refused(
            "attention_mse of many samples",
            huge(2**29, 1, 1, 1),
            lambda x: ff.attention_mse(x, x, backend="triton"),
            "inputs [536870912, 1, 1, 1] makes 2,147,483,648 statistics",
        ),
        refused(
            "attention_mse of a whole sample",
            WHOLE,
            lambda x: ff.attention_mse(x, x, backend="triton"),
            "a sample of a map [1, 1, 65536, 32768] spans 2,147,483,648 elements",
        ),
        refused(
            "normalized_lp of long rows",
            huge(1, 2**28 + 1),
            lambda x: ff.normalized_lp(x, x, backend="triton"),
            f"inputs [1, 268435457] makes a grid of 1 x 65,537 x 1 {ACROSS}",
        ),
        refused(
            "normalized_lp of many rows",
            huge(2**29, 1),
            lambda x: ff.normalized_lp(x, x, backend="triton"),
            "inputs [536870912, 1] makes 2,684,354,560 partial sums",
        ),
        refused(
            "normalized_lp_joint of a long sample",
            LONG,
            lambda x: ff.normalized_lp_joint(x, x, backend="triton"),
            f"inputs [1, 1, 65536, 129] makes a grid of 1 x 66,048 x 1 {ACROSS}",
        ),
        refused(
            "normalized_lp_joint of many samples",
            huge(2**29, 1, 1, 1),
            lambda x: ff.normalized_lp_joint(x, x, backend="triton"),
            "inputs [536870912, 1, 1, 1] makes 2,684,354,560 partial sums",
        ),
        refused(
            "diversity of many samples",
            huge(2**31, 1, 3, 1),
            lambda x: ff.diversity_loss(x, x, backend="triton"),
            "y [2147483648, 1, 3, 1] makes 2,147,483,648 samples",
        ),
        refused(
            "feature_kl over positions",
            WHOLE,
            lambda x: ff.feature_kl([x], x, temperature=1.0, backend="triton"),
            "features [1, 1, 65536, 32768] makes 2,147,483,648 values of a distribution",
        ),
        refused(
            "feature_kl over channels",
            WHOLE,
            lambda x: ff.feature_kl([x], x, temperature=1.0, over="channels", backend="triton"),
            "features [1, 1, 65536, 32768] makes 2,147,483,648 distributions of a sample",
        ),
        refused(
            "feature_mse of many samples that do not lie alike",
            huge(2**30, 2049, 1, 1),
            lambda x: ff.feature_mse([x], x, backend="triton"),
            "a map [1073741824, 2049, 1, 1] makes 2,147,483,648 tiles",
        ),
        refused(
            "peer_kl_ce of many classes",
            huge(1, 2**31),
            lambda x: ff.peer_kl(x, [x], temperature=1.0, backend="triton"),
            "logits [1, 2147483648] makes 2,147,483,648 classes",
        ),
        refused(
            "augment of whole images",
            huge(1, 2**16, 2**15, 1, dtype=torch.uint8),
            draw,
            "a sample of images [1, 65536, 32768, 1] spans 2,147,483,648 elements",
        ),
    ],
)
def test_refused_before_anything_is_launched(x, call, message, monkeypatch):
    runs = GridExecutor if DEVICE == "cpu" else triton.JITFunction
    monkeypatch.setattr(runs, "__call__" if DEVICE == "cpu" else "run", lambda *_, **__: pytest.fail("a launch"))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        call(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reason", ["concat_fuse on batch statistics", "diversity_loss as published", "peer_kl from two peers"]
)
def test_a_grid_that_is_too_large_is_refused(reason, monkeypatch):
    """With axes of one program, in place of tensors that need more than there are."""
    (case,) = [case for case in CASES if case.reason == reason]
    monkeypatch.setattr(_limits, "ACROSS", 0)
    tensors = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in case.tensors(torch.float32)]
    with pytest.raises(InputError, match="a GPU takes at most 0 along the second and third axis"):
        run(case, tensors, "triton", monkeypatch)


@triton.jit
def walk_kernel(found, extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles a walk has, and where the last one's last element that exists lies."""
    turns = tile_turns(extent, BLOCK_C, BLOCK_N)
    sample, channel, position, inside = tile_place(turns - 1, extent, BLOCK_C, BLOCK_N)
    tl.store(found, turns)
    tl.store(found + 1, sample)
    tl.store(found + 2, tl.max(tl.max(tl.where(inside, channel + position * 0, -1), 1), 0))
    tl.store(found + 3, tl.max(tl.max(tl.where(inside, channel * 0 + position, -1), 1), 0))


@pytest.mark.parametrize(
    ("extent", "tiles"),
    [
        pytest.param((1, 1, 2**31 - 1), 2**21, id="the last tile ends beyond 32 bits"),
        pytest.param((1, 1, 2**33 + 1), 2**23 + 1, id="an extent beyond 32 bits"),
        pytest.param((3, 2**31 - 1, 5), 3 * 2**28, id="channels"),
        pytest.param((2, 3, 0), 2, id="no position"),
    ],
)
def test_a_walk_ends_with_the_last_element(extent, tiles):
    found = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    sides = (1, 1024) if extent[1] == 1 else (8, 8)
    walk_kernel[(1,)](found, extent, *sides)
    assert found.tolist() == [tiles, extent[0] - 1, *(n - 1 if all(extent) else -1 for n in extent[1:])]


def test_attention_of_wide_networks_is_added_up_beyond_32_bits(tmp_path):
    """Of three blocks of channels; memory that is never touched costs nothing."""
    size, before = 2**30 + 8, 2**31  # where an offset that has become negative finds zeros
    if DEVICE == "cuda":
        parts = torch.zeros(before + 3 * size, device=DEVICE)[before:]
    else:
        parts = torch.from_file(str(tmp_path / "parts"), shared=True, size=before + 3 * size)[before:]
    for i in range(3):
        parts[i * size : i * size + 16] = 1 + i
    found = torch.zeros(16, device=DEVICE)
    triton_forward.batch_norm_act_fwd_attention_kernel[(1,)](parts, found, size, PARTS=3, BLOCK=16)
    assert found.tolist() == [6.0] * 16
