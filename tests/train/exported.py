"""The network of a finished run, and the images that it is tested on."""

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from fastfuse import models


def trained(finished, name="leader") -> nn.Module:
    network = models.build("resnet8", 3)
    network.load_state_dict(load_file(finished / f"{name}.safetensors"), strict=True)
    return network.eval()


def labelled_images(tiny_npz) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = np.load(tiny_npz)
    mean, std = (getattr(arrays["train_images"].reshape(-1, 3) / 255, x)(0) for x in ("mean", "std"))
    images = torch.from_numpy((arrays["test_images"] / 255 - mean) / std).float().permute(0, 3, 1, 2)
    return images, torch.from_numpy(arrays["test_labels"])
