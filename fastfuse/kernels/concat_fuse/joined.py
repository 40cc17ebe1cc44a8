"""concat_fuse on the backend "cuda": its first part in CUDA C++, the products and the second norm in Triton."""

from typing import Any

from torch import Tensor


def launch_fwd(*arguments: Any) -> list[Tensor]:
    """See `fastfuse::concat_fuse_fwd`."""
    from fastfuse.kernels.concat_fuse import cuda, triton_launch

    return triton_launch.launch_fwd(*arguments, first=cuda.forward)


def launch_bwd(*arguments: Any) -> list[Tensor]:
    """See `fastfuse::concat_fuse_bwd`."""
    from fastfuse.kernels.concat_fuse import cuda, triton_launch

    return triton_launch.launch_bwd(*arguments, first=cuda.backward)
