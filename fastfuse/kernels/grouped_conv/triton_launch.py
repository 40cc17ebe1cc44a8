"""The launchers of grouped_conv."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._limits import check_count, check_positions, grid
from fastfuse.kernels._triton import launch_constants, map_strides
from fastfuse.kernels.grouped_conv import layout
from fastfuse.kernels.grouped_conv import triton_kernels as kernels

# Positions, outer and inner channels of a tile at most. Exact float32 products run on the ordinary arithmetic units,
# whose operands live in registers: smaller tiles. 64 inner channels spill on sm_80 with triton 3.8.
HALF_TILE, FLOAT_TILE = (128, 64, 32), (64, 32, 16)
HALF_STAGES, FLOAT_STAGES = 3, 2
WARP_ELEMENTS = 1024  # of a product's accumulator
LEAST = 16  # side of a tile that tl.dot takes
# The weight's gradient: taps and input channels, output channels of a tile, and positions at a time.
HALF_WEIGHT, FLOAT_WEIGHT = (64, 64, 64), (32, 32, 16)
# It sums over all positions: split until the device is filled twice, by shapes and these constants alone, and into no
# pieces smaller than this.
PROGRAMS, LEAST_POSITIONS = 264, 512
MERGE_BLOCK = 256
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def launch_fwd(x: Tensor, weight: Tensor, groups: int, stride: int) -> Tensor:
    """See `fastfuse::grouped_conv_fwd`."""
    check_positions("x", x)
    check_count("weight", weight, "elements", weight.numel())
    out = layout.empty_result(x, weight, stride)
    if out.numel() == 0 or weight.shape[1] == 0:
        return out.zero_()
    x, *x_strides = map_strides(x)
    weight, *w_strides = map_strides(weight)
    channels = weight.shape[0] // groups
    tile, options = _tile("grouped_conv_fwd", x, channels, weight.shape[1])
    positions = out.shape[0] * out.shape[2] * out.shape[3]
    programs = triton.cdiv(positions, tile[0]) * triton.cdiv(channels, tile[1]) * groups
    kernels.grouped_conv_fwd_kernel[grid("x", x, programs)](
        x, weight, out, groups, weight.shape[2], x.shape[0], tuple(x_strides), tuple(w_strides), map_strides(out)[1:],
        **_constants(x, out, weight, stride), **_precise(x), **_sides(tile), **options,
    )  # fmt: skip
    return out


def launch_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, stride: int, needs: Sequence[bool]
) -> list[Tensor]:
    """See `fastfuse::grouped_conv_bwd`."""
    of_map, of_weight = layout.empty_gradients(x, weight, needs)
    found = [y for y in (of_map, of_weight) if y is not None]
    if grad.numel() == 0 or weight.shape[1] == 0 or not found:
        return [y.zero_() for y in found]
    grad, *g_strides = map_strides(grad)
    weight, *w_strides = map_strides(weight)
    constants, (inner, outer) = _constants(x, grad, weight, stride), (weight.shape[0] // groups, weight.shape[1])
    partial, splits, merges, v_strides = None, 0, 0, (0, 0, 0)
    if of_weight is not None:
        partial = _weight_shares(grad, g_strides, x, groups, constants)
        splits, merges = partial.shape[0], triton.cdiv(weight.numel(), MERGE_BLOCK)
        v_strides = map_strides(of_weight)[1:]
    tile, options = _tile("grouped_conv_bwd_input", grad, outer, inner)
    height, width = (triton.cdiv(side, stride) for side in x.shape[2:])
    tiles = triton.cdiv(x.shape[0] * height * width, tile[0])
    programs = 0 if of_map is None else tiles * stride**2 * triton.cdiv(outer, tile[1]) * groups
    kernels.grouped_conv_bwd_gradients_kernel[grid("x", x, merges + programs)](
        partial, of_weight, grad, weight, of_map, merges, splits, tiles, groups, x.shape[0],
        tuple(g_strides), tuple(w_strides), v_strides, (0, 0, 0) if of_map is None else map_strides(of_map)[1:],
        **constants, **_precise(x), BLOCK=MERGE_BLOCK, **_sides(tile), **options,
    )  # fmt: skip
    return found


def _weight_shares(grad: Tensor, g_strides: Sequence[int], x: Tensor, groups: int, constants: dict[str, int]) -> Tensor:
    """Sums [splits, G, K K C_in, C_out] over shares of the positions, whose total is the weight's gradient."""
    x, *x_strides = map_strides(x)
    rows, columns = constants["KERNEL"] ** 2 * constants["CHANNELS_IN"], constants["CHANNELS_OUT"]
    single = x.dtype == torch.float32
    most = FLOAT_WEIGHT if single else HALF_WEIGHT
    own = launch_constants(
        "grouped_conv_bwd_weight", x, ROWS=most[0], COLUMNS=most[1], DEPTH=most[2], PROGRAMS=PROGRAMS,
        STAGES=FLOAT_STAGES if single else HALF_STAGES,
    )  # fmt: skip
    block_m, block_n, block_k = own.ROWS, _side(columns, own.COLUMNS), own.DEPTH
    blocks = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) * groups
    positions = grad.shape[0] * grad.shape[2] * grad.shape[3]
    splits = min(triton.cdiv(own.PROGRAMS, blocks), max(positions // LEAST_POSITIONS, 1))
    steps = triton.cdiv(triton.cdiv(positions, splits), block_k)
    partial = torch.empty((splits, groups, rows, columns), dtype=torch.float32, device=x.device)
    kernels.grouped_conv_bwd_weight_kernel[(blocks * splits,)](
        x, grad, partial, groups, splits, steps, x.shape[0], tuple(x_strides), tuple(g_strides),
        **constants, PRECISION=_precise(x)["PRECISION"], **_sides((block_m, block_n, block_k)),
        num_warps=4, num_stages=own.STAGES,
    )  # fmt: skip
    return partial


def _constants(x: Tensor, out: Tensor, weight: Tensor, stride: int) -> dict[str, int]:
    """What a compilation is for: a layer's sizes, so that places are found without divisions."""
    return {
        "HEIGHT": x.shape[2],
        "WIDTH": x.shape[3],
        "OUT_HEIGHT": out.shape[2],
        "OUT_WIDTH": out.shape[3],
        "KERNEL": weight.shape[2],
        "STRIDE": stride,
        "CHANNELS_IN": weight.shape[1],
        "CHANNELS_OUT": out.shape[1] * weight.shape[1] // x.shape[1],
    }


def _precise(x: Tensor) -> dict[str, object]:
    """Dtype of the products; those of float32 are exact, unless the user lets convolutions use TF32."""
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return {"DTYPE": DTYPES[x.dtype], "PRECISION": "tf32" if tf32 and x.dtype == torch.float32 else "ieee"}


def _tile(launch: str, read: Tensor, outer: int, inner: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Positions, outer and inner channels of a tile, no more than there are, and launch options.

    A map whose channels do not follow each other is read element by element, through registers: few at a time.
    """
    single = read.dtype == torch.float32
    most = FLOAT_TILE if single else HALF_TILE
    own = launch_constants(
        launch, read, ROWS=most[0], COLUMNS=most[1], DEPTH=most[2], WARP_ELEMENTS=WARP_ELEMENTS,
        STAGES=FLOAT_STAGES if single else HALF_STAGES,
    )  # fmt: skip
    depth = own.DEPTH if read.stride(1) == 1 else LEAST
    tile = own.ROWS, _side(outer, own.COLUMNS), _side(inner, depth)
    warps = min(max(4, tile[0] * tile[1] // own.WARP_ELEMENTS), 8)
    return tile, {"num_warps": warps, "num_stages": own.STAGES}


def _side(channels: int, most: int) -> int:
    """Of a tile: a power of two that holds the channels, as far as it may."""
    return min(most, max(LEAST, triton.next_power_of_2(channels)))


def _sides(tile: Sequence[int]) -> dict[str, int]:
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
