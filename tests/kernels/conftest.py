import numpy as np
import pytest
import torch

from fastfuse.kernels import _dispatch, _extension
from fastfuse.train.modes import float32_products
from tests.kernels import cuda_on_host


@pytest.fixture(scope="session", autouse=True)
def interpreted_bfloat16():
    """Triton's interpreter keeps bfloat16 as integers, cuts digits off and multiplies the integers: here it rounds."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return cast(self, wide(src), dst_type)
        rounded = torch.from_numpy(np.array(src.data, np.float32)).bfloat16()
        return Handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", rounding_cast)
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))
        yield


@pytest.fixture
def nan_filled():
    """Memory that torch.empty gives is filled with NaN: a kernel that leaves an element unwritten is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def exact_products():
    """Eager convolutions in float32: with TF32, torch's default, a budget would let a thousandfold error pass."""
    with float32_products(tf32=False):
        yield


@pytest.fixture(scope="session")
def kernels_on_host(tmp_path_factory):
    """The kernels in CUDA C++ compiled for the host."""
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU the kernels themselves are tested")
    if (reason := cuda_on_host.missing()) is not None:
        pytest.skip(reason)
    found = cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"))
    _extension.load(found)
    return found


@pytest.fixture
def emulated(kernels_on_host, monkeypatch, nan_filled):
    """backend="cuda" serves CPU tensors, into memory filled with NaN."""
    for backends in _dispatch._ops.values():
        if "cuda" in backends:
            monkeypatch.setitem(backends, "cuda", None)
    return kernels_on_host
