"""Which programs a suite measures, and the words for what is left out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastfuse.errors import InputError, unknown_name
from fastfuse.models import IMAGENET
from fastfuse.nn import STRATEGIES
from fastfuse.train.modes import pick_mode

KINDS = {
    "published": "the published program, line by line, float32",
    "published-amp": "the same in bfloat16 autocast, channels-last",
    "compile": "torch.compile of the clean loop, no fused kernels",
    "networks-only": "the same networks trained by this engine without distillation",
    "fastfuse": "the engine",
}
# Measured in every mode and strategy; the others are one program each.
WITH_FORMS = ("networks-only", "fastfuse")
MODES = ("eager", "compiled", "graphed", "graphed-compiled")
# In the order of the tables. ImageNet's come last: they are the widest.
GRID = ("resnet20", "resnet32", "resnet56", "wrn16_2", *IMAGENET)


class Form(NamedTuple):
    """How the engine runs: one of `MODES`, and one of `fastfuse.nn.STRATEGIES` or "auto"."""

    mode: str
    strategy: str

    @property
    def compiled(self) -> bool:
        """Whether torch.compile takes forward and backward."""
        return self.mode.endswith("compiled")

    @property
    def graphed(self) -> bool:
        """Whether the step is replayed as a CUDA graph."""
        return self.mode.startswith("graphed")

    def __str__(self) -> str:
        return f"{self.mode}/{self.strategy}"


class Program(NamedTuple):
    """One thing to measure: a key of `KINDS`, and its form where it has one."""

    kind: str
    form: Form | None = None

    def __str__(self) -> str:
        return self.kind if self.form is None else f"{self.kind} {self.form}"


def programs(
    kinds: Sequence[str] | None, modes: Sequence[str] | None, strategies: Sequence[str] | None, device: torch.device
) -> tuple[list[Program], list[str]]:
    """The programs to measure, in the order of `KINDS`, and a line for each that is left out.

    None stands for all that the device can do and that say something there.

    Raises:
        InputError: an unknown name, something asked for by name that the device cannot do, or nothing left.
    """
    chosen, left_out = _kinds(kinds, device)
    forms, without = ([], []) if not set(chosen) & set(WITH_FORMS) else available_forms(modes, strategies, device)
    found: list[Program] = []
    for kind in chosen:
        found += [Program(kind, form) for form in forms] if kind in WITH_FORMS else [Program(kind)]
    return found, left_out + without


def available_forms(
    modes: Sequence[str] | None, strategies: Sequence[str] | None, device: torch.device
) -> tuple[list[Form], list[str]]:
    """The forms that the engine can take; see `programs`."""
    left_out: list[str] = []
    usable = []
    for what, asked, known in (("mode", modes, MODES), ("strategy", strategies, STRATEGIES)):
        names = []
        for name in asked or known:
            if name not in known:
                raise unknown_name(what, name, known)
            reason = _why_not(what, name, device)
            if reason is None:
                names.append(name)
            elif asked:
                option = "--modes" if what == "mode" else "--strategies"
                raise InputError(f"{option} {name} {reason}: leave it out")
            else:
                left_out.append(f"{what} {name} left out: it {reason}")
        usable.append(names)
    forms = [Form(mode, strategy) for mode in usable[0] for strategy in usable[1]]
    kept = [form for form in forms if not (form.compiled and form.strategy == "branches")]
    if len(kept) < len(forms):
        left_out.append("strategy branches left out of compiled modes: the compiler takes no streams")
    if not kept:
        raise InputError("--modes and --strategies leave nothing to measure: give eager or graphed with branches")
    return kept, left_out


def best_form(modes: Sequence[str] | None, strategies: Sequence[str] | None, device: torch.device) -> Form:
    """The form of the quick suite: the one that this device is fastest in, but for what was asked for.

    Raises:
        InputError: more than one form asked for, or one that the device cannot take.
    """
    if any(names is not None and len(names) > 1 for names in (modes, strategies)):
        raise InputError("--quick measures one form: give one of --modes and one of --strategies, or none")
    mode = modes[0] if modes else "graphed" if device.type == "cuda" else "compiled"
    form = available_forms([mode], strategies or ["loop"], device)[0][0]
    return form if strategies else Form(form.mode, "auto")


def models(names: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The networks to measure, and a line for those of the grid that are left out; "all" is the grid."""
    asked = [name for name in names if name != "all"]
    if "all" not in names:
        return asked, []
    kept = [name for name in GRID if name in asked or not (device.type == "cpu" and name in IMAGENET)]
    missing = [name for name in GRID if name not in kept]
    others = [name for name in asked if name not in GRID]
    reason = "slow on a CPU; name them, perhaps with --image-size 128, to see them there"
    return [*kept, *others], [f"{', '.join(missing)} left out: {reason}"] if missing else []


def _kinds(kinds: Sequence[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    for kind in kinds or ():
        if kind not in KINDS:
            raise unknown_name("provider", kind, KINDS)
    if kinds:
        return [kind for kind in KINDS if kind in kinds], []
    if device.type == "cuda":
        return list(KINDS), []
    return [kind for kind in KINDS if kind not in ("published-amp", "compile")], [
        "published-amp left out: few CPUs compute faster in bfloat16; name it in --providers to see this one",
        "compile left out: operators on a CPU are their references, so fastfuse compiled/loop is this program",
    ]


def _why_not(what: str, name: str, device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    if what == "strategy":
        return f"needs CUDA streams, and the device is {device}" if name == "branches" else None
    if name.startswith("graphed"):
        return f"needs a CUDA device, not {device}"
    try:
        pick_mode(name, device)
    except InputError as error:
        return str(error).removeprefix(f"--mode {name} ")
    return None
