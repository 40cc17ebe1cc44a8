"""The options of the command line, and what each suite makes of those that are left out."""

import argparse
from pathlib import Path
from typing import NoReturn

from fastfuse.errors import InputError, unknown_name

# The kernels come last: their suite changes the compiler's settings.
SUITES = {
    "step": "one training step, batch in memory: the published program against fastfuse",
    "epoch": "a whole epoch, data in memory, against the sum of its steps",
    "scaling": "what more students and replicas cost",
    "teachers": "a forward of the frozen teachers of feed-parallel: plain, folded, stacked",
    "kernels": "every operator against eager and compiled reference",
    "methods": "what every method learns, beside the same network alone",
    "data": "training images from JPEG files, beside torchvision's usual pipeline",
}
# The suites of "all": without the one that takes hours, and the one that measures the processor.
MEASURING = tuple(name for name in SUITES if name not in ("methods", "data"))
STUDENTS = {"step": [2], "epoch": [2], "scaling": [2, 4, 8], "teachers": [5], "kernels": [2], "methods": [2]}
STUDENTS["data"] = [2]
QUICK_STUDENTS = STUDENTS | {"scaling": [2, 4]}
# Of the suites that are not here, and without --quick of all, a model's own: see `benchmarks.cases`.
QUICK_BATCH_SIZE = {"epoch": 16, "scaling": 16, "teachers": 16}
QUICK_REPEATS = {"step": 5, "epoch": 2, "scaling": 2, "teachers": 2, "kernels": 2, "methods": 1, "data": 2}
# Options of some suites alone: the others would pass over them in silence.
OF_SUITES = {"providers": ("step", "scaling"), "replicas": ("scaling",), "images": ("epoch", "methods", "data")}
OF_SUITES |= dict.fromkeys(("methods", "teacher_model"), ("step", "methods"))
OF_SUITES |= dict.fromkeys(("epochs", "seeds", "classes", "data_path", "data_root"), ("methods",))
OF_SUITES |= dict.fromkeys(("part", "ops", "max_time", "after"), ("kernels",))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def make_parser(description: str) -> argparse.ArgumentParser:
    """All suites have the same options; some ignore some."""
    parser = _Parser(prog="benchmarks/run.py", description=description, allow_abbrev=False)
    suites = "; ".join(f"{name}: {what}" for name, what in SUITES.items())
    add = parser.add_argument
    add("--suite", required=True, help=f"{suites}; all: these in turn, without methods")
    add("--model", type=_names, default=["resnet32"], help="networks, or all (resnet32)")
    add(
        "--students",
        type=_numbers,
        help="numbers of common students, such as 2,4,8 (2; scaling: 2,4,8); teachers: of teachers (5)",
    )
    add("--replicas", type=_numbers, help="of the suite scaling: numbers of replicas, such as 4 (none)")
    add(
        "--batch-size", type=int, help="images per step (128; ImageNet's networks 256, on a CPU 4; --quick: see README)"
    )
    add("--image-size", type=int, help="height and width of images (32, of ImageNet's networks 224)")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="of the engine (bf16 on a GPU)")
    add("--providers", type=_names, help="published, published-amp, compile, networks-only, fastfuse")
    add("--modes", type=_names, help="eager, compiled, graphed, graphed-compiled")
    add("--strategies", type=_names, help="loop, branches, grouped")
    add(
        "--images",
        type=int,
        help="of an epoch (50,000, ImageNet 5,120; on a CPU 8 and 2 batches); methods: of each class; data: files",
    )
    add("--methods", type=_names, help="of the suites step and methods: names, or all (ffsd; methods: all)")
    add("--teacher-model", help="of the suites step and methods: network of the frozen teachers (--model)")
    add("--epochs", type=int, help="of the suite methods: of every run (30; 1 with --quick)")
    add("--seeds", type=int, help="of the suite methods: runs of each method (3 of the papers' five, 1 of the others)")
    add("--data", default="digits", help="of the suite methods: digits, npz, cifar10 or cifar100")
    add("--data-path", type=Path, help="of the suite methods: the file of --data npz")
    add("--data-root", type=Path, help="of the suite methods: folder of the CIFAR files")
    add("--classes", type=int, help="of the suite methods: the first so many classes (all)")
    add("--repeats", type=int, help="timed turns of each provider (5; 2 with --quick, but for step)")
    add("--device", default="auto", help="auto, cpu or cuda (auto: cuda where there is one)")
    add("--quick", action="store_true", help="step: one ratio, in the form that suits the device; else: does it run")
    add("--part", help="i/n: the i-th of n parts of the suite kernels")
    add("--ops", type=_names, help="of the suite kernels: operators with commas (all)")
    add("--max-time", type=float, help="of the suite kernels: seconds after which no other case begins")
    add(
        "--after",
        type=Path,
        nargs="+",
        help="of the suite kernels: JSON files of earlier runs, whose cases are left out",
    )
    add(
        "--jobs", type=int, default=1, help="of the suite kernels on a GPU: processes that compile before it begins (1)"
    )
    add("--compile", help=argparse.SUPPRESS)
    add("--out", type=Path, help="directory for JSON and CSV files, written as each part ends")
    add("--plot", metavar="FILE", nargs="?", const="", help="a picture of step or scaling (in --out if not named)")
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuse what no suite can use.

    Raises:
        InputError: names the option.
    """
    if options.suite not in (*SUITES, "all"):
        raise unknown_name("suite", options.suite, (*SUITES, "all"))
    if options.plot is not None:
        if options.suite not in ("step", "scaling", "all"):
            raise InputError("--plot draws the suites step and scaling: leave it out")
        if not options.plot and options.out is None:
            raise InputError("--plot needs a file, or --out for a directory")
        if options.plot and options.suite == "all":
            raise InputError("--plot with the suite all needs --out instead of a file: there are several pictures")
    least = {"students": 2, "replicas": 1, "batch_size": 2, "image_size": 8, "repeats": 1, "images": 2}
    least |= {"epochs": 1, "seeds": 1, "classes": 2}
    for name, lowest in least.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < lowest:
                raise InputError(f"--{name.replace('_', '-')} must be at least {lowest}, not {value}")
    for name, suites in OF_SUITES.items():
        if getattr(options, name) is not None and options.suite not in (*suites, "all"):
            option, several = f"--{name.replace('_', '-')}", "s" if len(suites) > 1 else ""
            raise InputError(f"{option} is of the suite{several} {', '.join(suites)}: leave it out")
    if options.quick and options.suite == "step" and options.providers:
        raise InputError("--quick measures published and fastfuse: leave --providers or --quick out")
    if options.suite in ("step", "all") and options.methods not in (None, ["ffsd"]):
        for name in ("students", "providers", "quick", "plot"):
            if getattr(options, name) not in (None, False):
                raise InputError(f"--{name} is of the step of ffsd alone: leave it or --methods out")
    if (
        options.quick
        and options.suite in ("step", "all")
        and (len(options.model) > 1 or len(options.students or [2]) > 1)
    ):
        raise InputError("--quick measures one step: give one --model and one number of --students")


def for_suite(options: argparse.Namespace, suite: str) -> argparse.Namespace:
    """The options of one suite, with its defaults."""
    own = argparse.Namespace(**vars(options))
    quick = options.quick
    own.students = options.students or (QUICK_STUDENTS if quick else STUDENTS)[suite]
    own.batch_size = options.batch_size or (QUICK_BATCH_SIZE.get(suite) if quick else None)
    own.repeats = options.repeats or (QUICK_REPEATS[suite] if quick else 5)
    return own


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected one name or several with commas between them")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(number) for number in _names(text)})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, not {text!r}") from error
