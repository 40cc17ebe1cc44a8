"""The options of every command but `fastfuse train`. Imports nothing heavy."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Accuracy of a run's networks on its test images, from its checkpoint and its best deployed weights."""

    data_root: Path | None = None
    """Folder of the CIFAR files, if they have moved."""
    data_path: Path | None = None
    """The file of --data npz, if it has moved."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What differs between runs; finished ones that differ in nothing but the seed are one column, with mean and
    deviation."""

    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Runs as one HTML page that needs nothing else, with its figures as PNGs beside it (pip install 'fastfuse[plot]').

    Finished runs that differ in nothing but the seed are one curve; a run that goes on counts as far as it is.
    """

    html: Path | None = None
    """The page (default: RUN/report/report.html of the first run); its PNGs lie beside it."""
    quiet: bool = False
    """Print nothing."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """One trained network of a run as a file of its own, checked against the run, with a model card beside it."""

    network: str | None = None
    """Network of the run, such as student1 (default: the one that the method deploys)."""
    format: str = "safetensors"
    """safetensors or torch: the plain network's weights; torch-export (.pt2) or onnx: the whole program, any batch."""
    best: bool = False
    """Weights of the best epoch (default: the last one's)."""
    fold_batchnorm: bool = False
    """Fold batch norms into the convolutions before them; torch-export and onnx."""
    out: Path | None = None
    """The file (default: RUN/export/NETWORK with the format's suffix)."""
    data_root: Path | None = None
    """Folder of the CIFAR files, if they have moved."""
    data_path: Path | None = None
    """The file of --data npz, if it has moved."""
    device: str = "auto"
    """Where latency is measured: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """The five most probable classes of images, by a .pt2 file of fastfuse export."""

    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class InfoOptions:
    """Versions, devices, and every operator's backends."""

    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class ReconstructOptions:
    """How well an autoencoder rebuilds the last map of each of several trained networks, as FEED asks."""

    epochs: int = 6
    """Epochs of each autoencoder (the paraphraser of Factor Transfer)."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.1
    """Learning rate (SGD, momentum 0.9)."""
    weight_decay: float = 5e-4
    """L2."""
    factor_ratio: float = 0.5
    """Channels of the code per channel of the map."""
    seed: int = 0
    """Decides the autoencoders' initial weights, order and augmentation: the same for all networks."""
    teacher_model: str | None = None
    """Network of weight files."""
    data: str | None = None
    """Data set (default: the first run's)."""
    data_root: Path | None = None
    """Folder of the CIFAR files (default: the first run's)."""
    data_path: Path | None = None
    """The file of --data npz (default: the first run's)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Folder for runs, table and plot (default: runs/<time>_reconstruct)."""
    resume: bool = False
    """Go on in --out."""
    quiet: bool = False
    """Print the final table alone."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class MethodsOptions:
    """All methods: what each needs, what it deploys, its recipes."""

    json: bool = False
    """Print JSON."""
