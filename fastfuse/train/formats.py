"""A network as the bytes of a file, and back: state dicts, and programs that need no code of ours."""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.train.deployable import logits_of
from fastfuse.train.predict import DESCRIPTION, read_program

# The suffix of each format.
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt", "torch-export": ".pt2", "onnx": ".onnx"}
# Those that hold the computation too, and take any batch size.
PROGRAMS = ("torch-export", "onnx")
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Logits(nn.Module):
    """A network that gives its logits alone: no maps are computed for anybody."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to logits [B, K]."""
        return logits_of(self.network, images)


def check_format(name: str) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        InputError: names the package and how to install it.
    """
    for package in _ONNX_PACKAGES if name == "onnx" else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"--format onnx needs {package}, which cannot be imported ({error}): pip install 'fastfuse[export]', "
                "or use --format torch-export"
            ) from error


def encode(network: nn.Module, name: str, image_size: tuple[int, int], description: Mapping[str, Any]) -> bytes:
    """The content of the file.

    Args:
        network: in evaluation mode, on the CPU.
        name: a format whose packages are there.
        image_size: (height, width).
        description: plain values, kept in the file where the format has a place for them.

    Raises:
        InputError: the network cannot be traced.
    """
    text = json.dumps(description)
    state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    if name == "safetensors":
        from safetensors.torch import save

        return save(state, metadata={DESCRIPTION: text})
    buffer = io.BytesIO()
    if name == "torch":
        torch.save(state, buffer)
        return buffer.getvalue()
    program = _traced(network, image_size)
    if name == "torch-export":
        torch.export.save(program, buffer, extra_files={DESCRIPTION: text})
        return buffer.getvalue()
    return _onnx(program, text)


def decode(data: bytes, name: str, blank: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    """The network in the content of a file, images to logits; a module unless the format is onnx.

    Args:
        data: what `encode` gave.
        name: the format.
        blank: a plain network that a state dict is loaded into, `strict=True`.
    """
    if name == "torch-export":
        return read_program(io.BytesIO(data))[0]
    if name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if name == "safetensors":
        from safetensors.torch import load

        state = load(data)
    else:
        state = torch.load(io.BytesIO(data), weights_only=True)
    network = blank()
    network.load_state_dict(state, strict=True)
    return Logits(network).eval()


def _traced(network: nn.Module, image_size: tuple[int, int]) -> torch.export.ExportedProgram:
    # Two images: a dimension of one would be taken as fixed.
    images = torch.zeros(2, 3, *image_size)
    try:
        with torch.no_grad():
            batch = torch.export.Dim("batch", min=1)
            return torch.export.export(Logits(network).eval(), (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # what a tracer stumbles over can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the network cannot be traced by torch.export ({reason}); use --format safetensors or torch"
        ) from error


def _onnx(program: torch.export.ExportedProgram, text: str) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converter's own parts
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
            )
    except Exception as error:  # each operator's conversion can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the network cannot be converted to ONNX ({reason}); use --format torch-export") from error
    assert made is not None  # as it may be without dynamo
    model = made.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = DESCRIPTION, text
    return model.SerializeToString()
