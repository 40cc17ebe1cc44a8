"""What a training run is told, as one frozen value, and the named recipes. Imports nothing heavy."""

import dataclasses
import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from fastfuse.config.method_options import METHOD_FIELDS, TEACHER_FIELDS, MethodOptions, TeacherOptions
from fastfuse.errors import InputError, unknown_name

__all__ = [
    "METHOD_FIELDS",
    "RUNTIME_FIELDS",
    "TEACHER_FIELDS",
    "WRN_FIELDS",
    "TrainConfig",
    "adapted",
    "check",
    "from_plain",
    "from_recipe",
    "recipes",
    "to_plain",
]

# May differ between a run and its resumption: they do not change what is computed.
RUNTIME_FIELDS = frozenset(
    {"recipe", "data_root", "data_path", "download", "out", "resume", "max_time", "device", "init", "log_interval"}
    | {"checkpoint_minutes", "keep_checkpoints", "baseline", "quiet", "mode", "strategy", "teachers"}
    | {"aggregation_file", "log", "workers"}
)

_COUNTS = (
    *(
        "epochs",
        "batch_size",
        "replicas",
        "students",
        "log_interval",
        "branch_stage",
        "teacher_count",
        "teacher_epochs",
    ),
    *("paraphraser_epochs", "search_epochs", "feed_stages", "accumulate", "keep_checkpoints", "fused_stages"),
)
_POSITIVE = (
    *("lr", "transform_lr", "gamma", "temperature", "max_time", "alpha_lr", "factor_ratio", "clip_norm"),
    *("regularization_temperature", "feature_temperature"),
)
_NOT_NEGATIVE = (
    *("momentum", "weight_decay", "fusion_weight_decay", "transform_weight_decay", "warmup_epochs", "rampup_epochs"),
    *("lambda_diversity", "lambda_fusion", "lambda_self_distillation", "at_weight", "factor_weight", "dfa_weight"),
    *("gamma_st", "gamma_ts", "alpha_weight_decay", "response_weight", "peer_weight", "attention_weight"),
    *("kl_target_epsilon", "workers", "checkpoint_minutes", "max_bad_steps", "seed", "val_seed"),
)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What every run is told, whatever its method."""

    method: str = "ffsd"
    """One of those that `fastfuse methods` lists."""
    model: str | None = None
    """Default resnet32. resnet20|32|56|110, wrn16_2|28_4|28_10|40_2, densenet40_12, any valid depth and width of these,
    googlenet, or a network of others: torchvision:NAME, timm:NAME, package.module:factory."""
    students: int | str | None = None
    """How many networks learn side by side (default: the method's, mostly 2), or their names: resnet20,wrn16_2."""
    leader: str | None = None
    """ffsd: network of the leader (default: --model, or the first of --students)."""
    taps: tuple[str, ...] = ()
    """Layers of --model whose maps are the features, shallow to deep, as layer2.3 (default: its stages)."""
    recipe: str | None = None
    """Published hyper-parameters by name; options given beside it win."""
    init: tuple[str, ...] = ()
    """[NETWORK=]FILE: start a network (student0, leader, ...) or all of them from a weight file; repeatable."""

    data: str = "digits"
    """digits, npz, cifar10, cifar100, imagefolder or imagenet."""
    data_root: Path | None = None
    """Folder of the CIFAR files (default: data), of an imagefolder's train/ and test/ with a folder a class, or of
    imagenet's train/ and val/."""
    data_path: Path | None = None
    """The file of --data npz."""
    download: bool = False
    """Let torchvision download CIFAR."""
    image_size: int | None = None
    """imagefolder, imagenet: pixels, height and width of the images in training (imagenet: default 224)."""
    stream: bool | None = None
    """imagefolder: decode while training, with random resized crops, instead of keeping all images on the device
    (default: from 4 GiB of decoded images on; imagenet always is)."""
    data_cache: Path | None = None
    """Streamed images: decode and resize all of them once into this folder, which training then reads."""
    workers: int | None = None
    """Streamed images: processes that decode, 0 for none (default: cores - 1, 1 to 16)."""
    val_fraction: float = 0.0
    """Share of the training images to hold out for choosing the best epoch."""
    val_seed: int | None = None
    """Draws that share (default: the seed)."""
    crop_padding: int | None = None
    """Pixels of reflect padding before the random crop (default: the data set's)."""
    flip: bool | None = None
    """Random horizontal flip (default: the data set's)."""

    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step, of all processes together."""
    accumulate: int = 1
    """Divide the images of a step into so many forwards and backwards, one after another."""
    seed: int = 0
    """Decides initial weights, order and augmentation."""
    lr: float = 0.1
    """Learning rate of networks and fusion head (SGD)."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 of the networks."""
    fusion_weight_decay: float = 1e-5
    """L2 of the fusion head."""
    transform_lr: float = 1e-3
    """Learning rate of the transforms (Adam)."""
    transform_weight_decay: float = 1e-4
    """L2 of the transforms, coupled."""
    schedule: str = "multistep"
    """multistep or cosine; both act on every optimizer."""
    milestones: tuple[int, ...] | None = None
    """Epochs after which multistep decays (default: 50 % and 75 % of --epochs)."""
    gamma: float = 0.1
    """Factor of each multistep decay."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up of the learning rate, step by step."""

    wrn_conv_bias: bool | None = None
    """wrn: convolutions with bias (default: True, as published)."""
    wrn_stride_on: str | None = None
    """wrn: conv1 or conv2 of a block is strided (default: conv2, as published)."""
    wrn_shortcut_input: str | None = None
    """wrn: a 1x1 shortcut reads the raw or the activated input (default: raw, as published)."""
    wrn_last_norm_momentum: float | None = None
    """wrn: momentum of the last batch norm (default: 0.9, as published; 0.1 recommended)."""

    mode: str = "auto"
    """eager, compiled (torch.compile), graphed (the whole step as one CUDA graph), graphed-compiled (both), or auto
    (graphed on a GPU, else eager; eager of several processes)."""
    replicas: int = 1
    """Train so many independent runs in one pass, of this seed and the next ones; reports mean and deviation."""
    strategy: str = "auto"
    """How the networks run: loop, branches (of a CUDA graph), grouped (as one network) or auto."""
    amp: str = "auto"
    """off, bf16, fp16 (with loss scaling) or auto (bf16 on a GPU, else off)."""
    tf32: bool = True
    """Let a GPU round float32 products to TF32, without --amp."""
    channels_last: bool = True
    """Keep maps and convolution weights channels-last; faster on CPUs and in half precision."""
    sync_batchnorm: bool = False
    """Of several processes (torchrun): batch norms take the statistics of all."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then evaluated and deployed; 0 is off."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    out: Path | None = None
    """Run folder (default: runs/<time>_<method>_<model>_<data>)."""
    resume: bool = False
    """Go on from the checkpoint in --out; its configuration is taken from there."""
    max_time: float | None = None
    """Stop with a checkpoint after so many minutes."""
    checkpoint_minutes: float = 5.0
    """Checkpoint inside an epoch when so many minutes have passed since the last one; every epoch's end has one."""
    keep_checkpoints: int = 2
    """So many checkpoints stay: the newest, and those before it, for when it turns out damaged."""
    clip_norm: float | None = None
    """Scale gradients down so that their norm, over everything that is trained, is at most this; none: as they are."""
    max_bad_steps: int | None = None
    """So many steps in a row may have a loss or gradient that is not finite; their update is left out. Without a word
    0, with fp16 32."""
    deterministic: bool = False
    """Only operators that give the same bits in every run on the same device; some are slower, and what a GPU has no
    such form of is an error. Runs on a CPU are so anyway."""
    log_interval: int = 50
    """Steps between two looks at the loss."""
    log: tuple[str, ...] = ()
    """tensorboard or wandb, beside metrics.jsonl and metrics.csv; off drops those of a resumed run."""
    baseline: bool = False
    """Train the same network alone afterwards, under the same budget, into <out>/independent."""
    quiet: bool = False
    """Print nothing but the final table."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(TeacherOptions, MethodOptions, RunOptions):
    """Train networks together and deploy one."""

    @property
    def student_models(self) -> list[str] | None:
        """The names in --students, or None where it is a number or unset."""
        return [name.strip() for name in self.students.split(",")] if isinstance(self.students, str) else None

    @property
    def networks(self) -> str:
        """What the students are, for titles."""
        return self.model or str(self.students)


def check(config: TrainConfig) -> None:
    """Refuse values that no run can use.

    Raises:
        InputError: names the option, its value and what is expected.
    """
    for name in _COUNTS:
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise InputError(f"{_option(name)} must be at least 1, not {value}")
    _check_networks(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{_option(field.name)} must be a finite number, not {value}")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise InputError(f"{_option(name)} must be positive, not {value}")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise InputError(f"{_option(name)} must not be negative, not {value}")
    if config.nesterov and config.momentum == 0:
        raise InputError("--nesterov needs a --momentum above 0; give --no-nesterov")
    if not 0 <= config.ema < 1:
        raise InputError(f"--ema must be at least 0 and below 1, not {config.ema}")
    if not 0 <= config.val_fraction < 1:
        raise InputError(f"--val-fraction must be at least 0 and below 1, not {config.val_fraction}")
    choices = {"schedule": ("multistep", "cosine"), "amp": ("auto", "off", "bf16", "fp16")}
    choices |= {"mode": ("auto", "eager", "compiled", "graphed", "graphed-compiled")}
    choices |= {"strategy": ("auto", "loop", "branches", "grouped")}
    choices["diversity_mode"] = ("published", "normalized")
    choices["log"] = ("tensorboard", "wandb", "off")
    for name, known in choices.items():
        value = getattr(config, name)
        for given in value if isinstance(value, tuple) else (value,):
            if given is not None and given not in known:
                raise unknown_name(_option(name), given, known)
    if config.milestones is not None and list(config.milestones) != sorted(config.milestones):
        raise InputError(f"--milestones must be in order, not {' '.join(map(str, config.milestones))}")
    if config.clip_norm is not None and config.replicas > 1:
        raise InputError("--clip-norm is of one run's gradients, not of --replicas: train the seeds one after another")


# Fields that belong to a family of networks.
WRN_FIELDS = ("wrn_conv_bias", "wrn_stride_on", "wrn_shortcut_input", "wrn_last_norm_momentum")


def adapted(
    config: TrainConfig, *, method: str | None = None, model: str | None = None, students: str | None = None
) -> TrainConfig:
    """A recipe's configuration for another method or networks: what belongs to the recipe's own is unset."""
    if method is not None and method != config.method:
        own: dict[str, Any] = dict.fromkeys((*METHOD_FIELDS, *TEACHER_FIELDS, "students", "leader")) | {"teachers": ()}
        config = dataclasses.replace(config, method=method, **own)
    if students is not None and not students.isdecimal():
        # The names of networks take the place of --model; given together they are an error.
        config = dataclasses.replace(config, model=None, taps=())
    if model is not None and model != config.model:
        config = dataclasses.replace(config, model=model, taps=())
        if not model.startswith("wrn"):
            unset: dict[str, Any] = dict.fromkeys(WRN_FIELDS)
            config = dataclasses.replace(config, **unset)
    return config


def recipes() -> list[str]:
    """Names of all recipes."""
    folder = resources.files("fastfuse") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def from_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe.

    Raises:
        InputError: there is no such recipe; the near ones are listed.
    """
    if name not in recipes():
        raise unknown_name("recipe", name, recipes())
    values = tomllib.loads((resources.files("fastfuse") / "recipes" / f"{name}.toml").read_text())
    return dataclasses.replace(TrainConfig(recipe=name), **from_plain(values))


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON can hold it."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}


def from_plain(values: dict[str, Any]) -> dict[str, Any]:
    """Field values from JSON or TOML.

    Raises:
        InputError: a field that a configuration does not have.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise unknown_name("configuration field", unknown[0], known)
    converted: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    paths = ("data_root", "data_path", "data_cache", "out", "aggregation_file")
    return {name: Path(v) if name in paths and v is not None else v for name, v in converted.items()}


def _check_networks(config: TrainConfig) -> None:
    names = config.student_models
    if names is None:
        return
    if config.model is not None:
        raise InputError(
            f"--model {config.model} and the list --students {config.students} name the same networks: give one of them"
        )
    if "" in names:
        raise InputError(f"--students {config.students!r} must be a number or names with commas, as resnet20,wrn16_2")
    if config.taps:
        raise InputError("--taps are layers of --model, and --students names several networks: leave one of them out")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
