"""What the command line says about itself, and that it says so at once."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastfuse import cli, config
from fastfuse.config import commands
from fastfuse.config.help import EXAMPLES, EXIT_STATUS
from fastfuse.config.parsing import parse

COMMANDS = re.findall(r"^  (\w+)  ", cli.USAGE.split("commands:")[1].split("examples:")[0], re.MULTILINE)
# Numbers whose unit nobody can guess from the name.
UNITS = {
    "max_time": "minutes",
    "checkpoint_minutes": "minutes",
    "crop_padding": "pixels",
    "image_size": "pixels",
    "warmup_epochs": "epochs",
    "milestones": "epochs",
    "rampup_epochs": "default 5",
    "log_interval": "steps",
    "batch_size": "images per step",
    "val_fraction": "share",
}


def helped(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


def test_the_commands_of_the_usage_are_those_with_examples():
    assert set(COMMANDS) == set(EXAMPLES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    text = helped(command, capsys)
    assert text.startswith(f"usage: fastfuse {command}")
    assert EXIT_STATUS in text
    options = set(re.findall(r"--[a-z0-9-]+", text.split("examples:")[0]))
    lines = [shlex.split(line) for line in EXAMPLES[command].splitlines()]
    assert lines and all(line[:2] == ["fastfuse", command] for line in lines)
    used = {word for line in lines for word in line if word.startswith("--")}
    assert used <= options, f"examples of {command} use options that it does not have"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_answered_with_the_nearest(command, capsys):
    # A run and another one, for the commands that want them.
    positional = {"eval": 1, "export": 1, "reconstruct": 1, "predict": 2, "compare": 2}.get(command, 0)
    wrong = "--baselin" if command == "train" else "--jsonn"
    assert cli.main([command, *["there"] * positional, wrong]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and wrong in said and f"{wrong[:-1] if wrong == '--jsonn' else '--baseline'}" in said
    assert f"see fastfuse {command} --help" in said


@pytest.mark.parametrize("order", [["--html", "page.html", "a", "b"], ["a", "b", "--html", "page.html"]])
def test_names_stand_before_or_behind_options(order):
    options = parse(commands.ReportOptions, "report", order, names="RUN [RUN ...]")
    assert (options.names, options.html) == (("a", "b"), Path("page.html"))


@pytest.mark.parametrize("command", ["eval", "export"])
@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_a_command_for_one_run_takes_one(command, names, capsys):
    assert cli.main([command, "--json", *names]) == 2
    assert f"needs one run folder, not {len(names)}: fastfuse {command} RUN" in capsys.readouterr().err


def test_help_tells_of_no_default_that_is_none(capsys):
    text = " ".join(helped("train", capsys).replace("│", " ").split())
    assert "(default: 128)" in text and "(repeatable)" in text
    assert "default: None" not in text and "(default: )" not in text


@pytest.mark.parametrize("columns", [50, 139, 140, 200])
def test_methods_stay_readable_on_every_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["methods"]) == 0
    lines = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns
    words = set(" ".join(line.replace("│", " ") for line in lines).replace(";", " ").replace(",", " ").split())
    assert "…" not in "".join(lines)
    assert {"dfa-search", "feed-sequential", "aggregation", *config.recipes()} <= words


def test_every_option_has_a_text_and_numbers_have_units():
    kinds = [config.TrainConfig, *(k for k in vars(commands).values() if dataclasses.is_dataclass(k))]
    for kind in kinds:
        for base in kind.__mro__[:-1]:
            source = Path(sys.modules[base.__module__].__file__).read_text()
            body = source.split(f"class {base.__name__}")[1].split("\n@dataclasses")[0]
            for name in base.__annotations__ if "__annotations__" in vars(base) else ():
                (text,) = re.findall(rf'^    {name}: .*\n    """((?:.|\n)+?)"""', body, re.MULTILINE)
                assert len(text) >= 3, f"{name} has no text"
                if name in UNITS:
                    assert UNITS[name] in text.lower(), f"{name} does not say {UNITS[name]}"


def test_help_of_training_waits_for_no_torch():
    program = "import sys\nfrom fastfuse.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "print(*sorted(sys.modules))"], capture_output=True, text=True, timeout=900
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "tyro" in loaded  # else the next line would prove nothing
    assert loaded & {"torch", "torchvision", "triton", "matplotlib"} == set()
