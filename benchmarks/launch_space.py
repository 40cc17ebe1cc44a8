"""What benchmarks/tune.py tries: for each launch the constants that matter, around those written in the code.

In the order of value: memory-bound passes over whole maps first, then the matrix products.
"""

from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks.kernel_cases import KernelCase, cases


@dataclass(frozen=True)
class Search:
    """One launch.

    Attributes:
        launch: its name in `fastfuse.kernels._triton.launch_constants`.
        op: the operator whose cases it is timed in.
        mode: forward or backward.
        shapes: of these cases, without network and memory format; * stands for anything.
        values: what to try in place of each constant.
    """

    launch: str
    op: str
    mode: str
    shapes: tuple[str, ...]
    values: dict[str, tuple[int, ...]]

    def cases(self, layout: str, *, batch: int | None = None) -> list[KernelCase]:
        """ImageNet's cases, which decide, then CIFAR's, which must not become slower."""
        wanted = {f"{network} {shape} {layout}" for network in ("imagenet", "cifar") for shape in self.shapes}
        own = [
            case for case in cases(batch=batch) if case.op == self.op and any(fnmatch(case.shape, w) for w in wanted)
        ]
        return sorted(own, key=lambda case: case.shape.startswith("cifar"))

    def trials(self) -> list[dict[str, int]]:
        """Every value alone: all that can be compiled before anything is timed."""
        return [{name: value} for name, values in self.values.items() for value in values]


_NORM = {"TILE_BYTES": (4096, 16384), "WIDEST": (32, 128), "PROGRAMS": (264, 1056), "WARP_ELEMENTS": (256, 1024)}
_PAIRS = {"TILE": (2048, 4096, 16384), "WARPS": (4, 16), "LONG_SIDE": (64, 256)}
_JOINT = {"TILE": (1024, 4096), "WARPS": (2, 8), "LONG_SIDE": (64, 256)}
_DISTANCE = {"TILE": (2048, 8192), "WARPS": (2, 8)}
_TILE = {"ROWS": (32, 128), "COLUMNS": (32, 128), "DEPTH": (16, 64), "STAGES": (2, 4), "WARP_ELEMENTS": (256, 1024)}
_CONV = {"ROWS": (64, 256), "COLUMNS": (32, 128), "DEPTH": (16, 64), "STAGES": (2, 4), "WARP_ELEMENTS": (512, 2048)}
_PRODUCT = {"INNER": (16, 64), "WARPS": (4,), "STAGES": (2, 4)}
_BLOCKS = ("shallowest S=2", "shallowest S=2 + x")
_CHAIN, _ATTENTION = "two transforms, all stages", "two transforms, attention"
_WALK = {"MAP_TILE": (1024, 4096), "WARPS": (4, 16)}
_CONVOLUTION = ("* to *, 3x3, stride 1 at *, S=3",)
_FUSION = ("deepest S=2 and mirror",)
_LP, _BOTH = ("all stages p=2",), ("with attention p=2",)

SEARCHES = (
    Search("batch_norm_act_fwd", "batch_norm_act", "forward", _BLOCKS, _NORM),
    Search("batch_norm_act_bwd", "batch_norm_act", "backward", _BLOCKS, _NORM),
    Search("normalized_lp_joint_fwd", "normalized_lp", "forward", _BOTH, _JOINT),
    Search("normalized_lp_joint_bwd", "normalized_lp", "backward", _BOTH, _JOINT),
    Search("attention_mse_fwd", "attention_mse", "forward", ("all stages",), _PAIRS),
    Search("attention_mse_bwd", "attention_mse", "backward", ("all stages",), _PAIRS),
    Search("deep_to_shallow_fwd", "deep_to_shallow", "forward", (_CHAIN,), _TILE),
    Search("deep_to_shallow_attention", "deep_to_shallow", "forward", (_ATTENTION,), _TILE),
    Search("deep_to_shallow_bwd_norm", "deep_to_shallow", "backward", (_CHAIN,), _WALK),
    Search("deep_to_shallow_bwd_weight", "deep_to_shallow", "backward", (_CHAIN,), _TILE),
    Search("deep_to_shallow_bwd_input", "deep_to_shallow", "backward", (_CHAIN,), _TILE),
    Search(
        "concat_fuse_fwd", "concat_fuse", "forward", _FUSION, {"MOMENTS_WARPS": (8,), "HIDDEN_WARPS": (2, 8)}
    ),
    Search("concat_fuse_bwd", "concat_fuse", "backward", _FUSION, {"WARPS": (4, 16)}),
    Search("concat_conv1x1_fwd", "concat_conv1x1", "forward", ("deepest S=2",), {"OUTPUTS": (32, 128), **_PRODUCT}),
    Search(
        "concat_conv1x1_bwd_features", "concat_conv1x1", "backward", ("deepest S=2",),
        {"CHANNELS": (32, 128), **_PRODUCT},
    ),
    Search(
        "concat_conv1x1_bwd_weight", "concat_conv1x1", "backward", ("deepest S=2",),
        {"OUTPUTS": (32, 128), "CHANNELS": (32, 128), **_PRODUCT},
    ),
    Search("grouped_conv_fwd", "grouped_conv", "forward", _CONVOLUTION, _CONV),
    Search("grouped_conv_bwd_input", "grouped_conv", "backward", _CONVOLUTION, _CONV),
    Search(
        "grouped_conv_bwd_weight", "grouped_conv", "backward", _CONVOLUTION,
        {"ROWS": (32, 128), "COLUMNS": (32, 128), "DEPTH": (32, 128), "STAGES": (2, 4), "PROGRAMS": (132, 528)},
    ),
    Search("normalized_lp_fwd", "normalized_lp", "forward", _LP, _DISTANCE),
    Search("normalized_lp_bwd", "normalized_lp", "backward", _LP, _DISTANCE),
)  # fmt: skip
