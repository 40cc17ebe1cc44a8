"""The command line: parses, builds a configuration, calls one function."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastfuse.config.commands import (
    CompareOptions,
    EvalOptions,
    ExportOptions,
    InfoOptions,
    MethodsOptions,
    PredictOptions,
    ReconstructOptions,
    ReportOptions,
)
from fastfuse.config.help import EXIT_STATUS
from fastfuse.config.parsing import parse
from fastfuse.errors import (
    INTERRUPTED,
    PREEMPTED,
    CheckpointError,
    FastfuseError,
    InputError,
    InterruptedRun,
    unknown_name,
)

USAGE = """usage: fastfuse COMMAND [OPTIONS]

Feature-fusion knowledge distillation: train several networks together, deploy one.

commands:
  train        train networks (fastfuse train --help lists all options)
  eval         accuracy of a finished or interrupted run
  compare      what differs between runs: configuration, accuracy, speed
  report       one HTML page about runs: curves, attention maps, classes, configuration
  export       one trained network as a file of its own, with a model card
  predict      classes of images by an exported network
  methods      all methods: what each needs, what it deploys, its recipes
  reconstruct  how well an autoencoder reconstructs the features of trained networks (FEED's analysis)
  info         versions, devices, and what each operator can run on

examples:
  fastfuse train --method ffsd --model resnet20 --data digits --epochs 12 --batch-size 32
  fastfuse train --recipe cifar100-resnet32 --data-root data --download
  fastfuse train --resume --out runs/my-run
  fastfuse train --method feed-parallel --model resnet56 --data cifar100 --teachers runs/a runs/b
  fastfuse eval runs/my-run
  fastfuse export runs/my-run --format torch-export
  fastfuse predict runs/my-run/export/leader.pt2 photo.png
  fastfuse compare runs/a runs/b
  fastfuse report runs/a runs/b --html report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted, 75 pre-empted."""
    # OpenMP threads that wait by spinning make two busy processes slow each other down a hundredfold (docs/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n{EXIT_STATUS}")
        return 0
    if arguments[0] == "--version":
        import fastfuse

        print(fastfuse.__version__)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "export": _export,
        "predict": _predict,
        "compare": _compare,
        "report": _report,
        "methods": _methods,
        "reconstruct": _reconstruct,
        "info": _info,
    }
    try:
        if arguments[0] not in commands:
            raise unknown_name("command", arguments[0], commands)
        return commands[arguments[0]](arguments[1:])
    except FastfuseError as error:
        rank = int(os.environ.get("RANK", "0"))  # of several processes, which torchrun started
        print(f"fastfuse: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
        if isinstance(error, InterruptedRun):
            return error.status
        return 2 if isinstance(error, InputError | CheckpointError) else 1
    except BrokenPipeError:  # the reader has gone, as in `fastfuse train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _Preempted as signalled:
        print(f"fastfuse: stopped by {signalled} outside of the training steps; go on with --resume", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("fastfuse: interrupted", file=sys.stderr)
        return INTERRUPTED


class _Preempted(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 where there is no step to finish; like Ctrl-C, nothing that mends errors may catch it."""


@contextlib.contextmanager
def _preemptible() -> Iterator[None]:
    """A block that SIGTERM and SIGUSR1 end; the trainer's steps hear them themselves and write a checkpoint first."""

    def stop(number: int, frame: Any) -> None:
        raise _Preempted(signal.Signals(number).name)

    # Of several processes one that left alone would make the others fail: torchrun ends them all.
    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1) if alone}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _train(arguments: list[str]) -> int:
    with _preemptible():
        return _train_to_the_end(arguments)


def _train_to_the_end(arguments: list[str]) -> int:
    config = parse_train(arguments)
    from fastfuse.config import adapted
    from fastfuse.train.display import results_table
    from fastfuse.train.distributed import together
    from fastfuse.train.run import train

    with together(config.device) as processes:
        summaries = [train(config)]
        if config.baseline and summaries[0]["completed"]:
            out = Path(summaries[0]["run"]) / "independent"
            alone = dataclasses.replace(adapted(config, method="independent"), students=1, out=out, baseline=False)
            summaries.append(train(alone))
    if not processes.leads:
        return 0
    if finished := [s for s in summaries if s["networks"]]:
        results_table(finished)
    else:
        print("no epoch has finished yet: nothing was evaluated")
    print(f"run folder: {summaries[0]['run']}")
    for summary in summaries:
        if not summary["completed"]:
            print(f"stopped by --max-time; go on with: fastfuse train --resume --out {summary['run']}")
    return 0


def parse_train(arguments: list[str]) -> Any:
    """The configuration that a command line asks for: defaults, then recipe or resumed run, then its options."""
    from fastfuse import config as configuration

    # What decides the defaults must be known before the options are parsed.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--recipe", "--out", "--method", "--model", "--students", "--teacher-model"):
        early.add_argument(name)
    early.add_argument("--resume", action="store_true")
    try:
        known, rest = early.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see fastfuse train --help") from error
    default = configuration.TrainConfig()
    if known.recipe is not None:
        default = configuration.from_recipe(known.recipe)
    if known.resume:
        if known.out is None:
            raise InputError("--resume needs --out: the folder of the run to go on with")
        if (Path(known.out) / "config.json").exists():
            from fastfuse.train.record import RunFolder

            default = dataclasses.replace(RunFolder(Path(known.out)).read_config(), max_time=None)
        elif {*rest} <= {"--quiet"} and {name for name, value in vars(known).items() if value} == {"resume", "out"}:
            # Jobs that are started again and again give all options beside --resume; a run of defaults nobody wants.
            raise InputError(f"{known.out} holds no run to resume (config.json is missing): check --out")
    default = configuration.adapted(default, method=known.method, model=known.model, students=known.students)

    text = f"Train networks together and deploy one.\n\nRecipes: {', '.join(configuration.recipes())}."
    kind = configuration.TrainConfig
    parsed = parse(kind, "train", arguments, default=default, repeatable=("init", "log"), text=text)
    config = kind(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)})
    if known.teacher_model is not None and not known.resume:
        from fastfuse.train.teachers import check_teacher_model

        check_teacher_model(config)
    return config


def _eval(arguments: list[str]) -> int:
    options = parse(EvalOptions, "eval", arguments, names="RUN")
    path = _one_run("eval", options.names)
    from fastfuse.train.evaluate_run import evaluate_run

    found = evaluate_run(path, data_root=options.data_root, data_path=options.data_path, device=options.device)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    print(f"{path}: test images after epoch {found['epoch']}")
    table = Table("network", "top-1 %", "top-5 %")
    for name, accuracy in found["accuracy"].items():
        table.add_row(name, f"{accuracy['top1']:.2f}", f"{accuracy['top5']:.2f}")
    Console(file=sys.stdout).print(table)
    return 0


def _one_run(command: str, names: Sequence[str]) -> Path:
    if len(names) != 1:
        raise InputError(f"fastfuse {command} needs one run folder, not {len(names)}: fastfuse {command} RUN [OPTIONS]")
    return Path(names[0])


def _compare(arguments: list[str]) -> int:
    options = parse(CompareOptions, "compare", arguments, names="RUN_A RUN_B [RUN ...]")
    from fastfuse.train.compare import compare, print_tables

    found = compare([Path(run) for run in options.names])
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_tables(found)
    return 0


def _report(arguments: list[str]) -> int:
    options = parse(ReportOptions, "report", arguments, names="RUN [RUN ...]")
    from fastfuse.train.report import report

    page, *pictures = report([Path(run) for run in options.names], options.html)
    if not options.quiet:
        print(f"{page}\n{len(pictures)} PNG files beside it")
    return 0


def _export(arguments: list[str]) -> int:
    options = parse(ExportOptions, "export", arguments, names="RUN")
    path = _one_run("export", options.names)
    from fastfuse.train.export import export

    found = export(path, options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    if not found["completed"]:
        print(f"{path} has not ended yet: taken from {found['source']}, epoch {found['epoch']}")
    own, plain = (f"{c['parameters']:,} parameters, {c['multiply_adds']:,} multiply-adds" for c in found["costs"])
    same = "the plain network's" if own == plain else f"the plain network: {plain}"
    print(f"{found['network']}: {own} ({same}); logits checked, largest difference {found['error']:.2g}")
    print(f"{found['file']}\n{found['card']}")
    return 0


def _predict(arguments: list[str]) -> int:
    options = parse(PredictOptions, "predict", arguments, names="EXPORTED IMAGE [IMAGE ...]")
    if len(options.names) < 2:
        raise InputError("fastfuse predict needs an exported file and images: fastfuse predict EXPORTED IMAGE [...]")
    from fastfuse.train.predict import predict

    file, *images = map(Path, options.names)
    found = list(predict(file, images))
    if options.json:
        print(json.dumps([one.plain() for one in found], indent=2))
    elif any(one.top for one in found):
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table("image", "class", "probability")
        for one in found:
            for place, (name, share) in enumerate(one.top):
                table.add_row("" if place else escape(one.image), escape(name), f"{share:.4f}")
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    for one in found:
        if one.error:
            print(f"fastfuse: {one.error}", file=sys.stderr)
    return 2 if any(one.error for one in found) else 0


def _reconstruct(arguments: list[str]) -> int:
    options = parse(ReconstructOptions, "reconstruct", arguments, names="RUN [RUN ...]")
    if not options.names:
        raise InputError("fastfuse reconstruct needs trained networks: fastfuse reconstruct RUN [RUN ...] [OPTIONS]")
    from fastfuse.train.reconstruction import configured, reconstruct, save

    given = {key: value for key, value in vars(options).items() if key not in ("json", "names")}
    config = configured(list(options.names), given)
    rows = reconstruct(list(options.names), config)
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        save(rows, config)
        return 0
    from rich.console import Console
    from rich.table import Table

    headings = ("network", "map", "code", "train", "test", "test / mean |F|")
    table = Table(*headings, title="Mean absolute error of the rebuilt last map")
    for row in rows:
        share = f"{row.test / row.scale:.3f}" if row.scale else ""
        sizes, wrong = (row.channels, row.factor_channels), (row.train, row.test)
        table.add_row(row.network, *map(str, sizes), *(f"{x:.4f}" for x in wrong), share)
    Console(file=sys.stdout).print(table)
    print("\n".join(map(str, save(rows, config))))
    return 0


def _methods(arguments: list[str]) -> int:
    options = parse(MethodsOptions, "methods", arguments)
    from fastfuse.train.catalogue import catalogue, print_catalogue

    found = catalogue()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_catalogue(found)
    return 0


def _info(arguments: list[str]) -> int:
    options = parse(InfoOptions, "info", arguments)
    from fastfuse.info import info

    found = info()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"commit {found['commit']}")
    print("  ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))
    for device, name in found["devices"].items():
        print(f"{device}: {name}")
    print(f"CUDA extension: {found['extension']}")
    for op, backends in found["ops"].items():
        print(f"{op}: " + "; ".join(f"{backend}: {reason}" for backend, reason in backends.items()))
    return 0
