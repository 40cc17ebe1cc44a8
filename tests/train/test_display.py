"""The live view and the plain lines: all that is promised is there, and nothing in them waits for a device."""

import io
import re

import pytest
import torch
from rich.console import Console

from fastfuse.train import display
from fastfuse.train.display import Display, memory


def line(epoch: int, **accuracy: float) -> dict:
    return {
        "epoch": epoch,
        "losses": {"loss": 1.5, "student0_ce": 1.0, "leader_kl": 0.25},
        "accuracy": {name: {"top1": top1, "top5": 100.0} for name, top1 in accuracy.items()},
        "images_per_second": 1234.0,
        "seconds": 60.0,
    }


def console(*, terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ={})


def make(*, terminal: bool = True, quiet: bool = False, width: int = 120, **options) -> Display:
    given = console(terminal=terminal, width=width)
    given.quiet = quiet
    return Display("ffsd resnet8 on digits", 10, 40, quiet=quiet, console=given, **options)


def shown(view: Display) -> str:
    """The live view as text."""
    onto = console(terminal=True, width=view.console.width)
    onto.print(view.view())
    return onto.file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_the_live_view_has_all_that_is_promised(clock):
    view = make()
    with view:
        view.known(
            line(2, leader=70.0, student0=60.0), {"leader": {"top1": 72.5}, "student0": {"top1": 60.0}}, ["leader"]
        )
        clock[0] += 4.0
        for step in (1, 2):
            view.step(2, step, {"loss": 2.25, "student0_ce": 2.0, "leader_kl": 0.125}, images=100)
        text = shown(view)
    assert "epoch 3/10  step 2/40  loss 2.2500  50 images/s" in text
    assert re.search(
        r"82/400 \d:\d\d:\d\d (\d:\d\d:\d\d|-:--:--) left\n", text
    )  # the time that has passed, and what is left
    assert (
        "top-1 % after epoch 2 (best)" in text and "leader 70.00 (72.50)" in text and "student0 60.00 (60.00)" in text
    )
    assert "student0_ce 2" in text and "leader_kl 0.125" in text and "loss 2.25 " not in text
    assert re.search(r"peak memory \d+\.\d\d GiB", text)


def test_at_the_end_there_is_no_time_left(clock):
    view = make()
    with view:
        view.step(9, 40, {}, images=100)
        assert re.search(r"400/400 \d:\d\d:\d\d *\n", shown(view))


def test_before_the_first_look_at_the_loss_the_last_epochs_terms_stand(clock):
    view = make()
    view.epoch(line(1, leader=50.0), {"leader": {"top1": 50.0}}, ["leader"])
    view.step(1, 1, {}, images=10)
    text = shown(view)
    assert "student0_ce 1" in text and "loss 1.5000" in text


def test_in_a_terminal_a_line_of_each_epoch_stays(clock):
    view = make()
    view.epoch(line(1, leader=50.0, student0=40.0), {"leader": {"top1": 50.0}}, ["leader"])
    (first,) = view.console.file.getvalue().splitlines()
    assert first == "ffsd resnet8 on digits  epoch 1/10  loss 1.5000  leader 50.00 % (best 50.00)  1234 images/s"


def test_without_a_terminal_plain_lines_have_everything(clock):
    view = make(terminal=False, width=40)
    with view:
        view.step(0, 1, {}, images=10)
        clock[0] += 100.0
        view.epoch(
            line(1, leader=50.0, student0=40.0), {"leader": {"top1": 55.0}, "student0": {"top1": 40.0}}, ["leader"]
        )
        clock[0] += 100.0
        view.epoch(line(10, leader=50.0), {"leader": {"top1": 55.0}}, ["leader"])
    first, terms, last, _ = view.console.file.getvalue().splitlines()  # no bar, and no line is broken
    assert first.startswith(
        "ffsd resnet8 on digits  epoch 1/10  loss 1.5000  leader 50.00 % (best 55.00)  student0 40.00 %"
    )
    assert "  1234 images/s  0:15:00 left  peak memory " in first  # nine more of 100 s
    assert terms == "  terms: student0_ce 1  leader_kl 0.25"
    assert "left" not in last


def test_time_left_of_a_resumed_run_counts_its_own_epochs(clock):
    view = make(terminal=False)
    with view:
        view.known(line(5, leader=1.0), {}, [])
        view.step(5, 1, {}, images=10)
        clock[0] += 60.0
        view.epoch(line(6, leader=1.0), {"leader": {"top1": 1.0}}, ["leader"])
    assert "0:04:00 left" in view.console.file.getvalue()


def test_quiet_shows_nothing(clock, capsys):
    for terminal in (True, False):
        view = make(terminal=terminal, quiet=True)
        with view:
            view.step(0, 1, {"loss": 1.0}, images=10)
            view.epoch(line(1, leader=50.0), {"leader": {"top1": 50.0}}, ["leader"])
        assert view.console.file.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_names_are_no_markup(clock):
    view = make(terminal=False)
    view.title = "[red]x[/red]"
    view.epoch(line(1, **{"[b]": 1.0}), {"[b]": {"top1": 1.0}}, ["[b]"])
    assert "[red]x[/red]" in view.console.file.getvalue() and "[b] 1.00 %" in view.console.file.getvalue()


def test_many_replicas_are_cut_short(clock):
    names = {f"seed{r}/student{i}": 10.0 for r in range(8) for i in range(8)}
    view = make()
    view.known(line(1, **names), {name: {"top1": 10.0} for name in names}, [])
    text = shown(view)
    assert f"and {64 - display.NETWORKS} more" in text and len(text.splitlines()) < 24


def test_memory_of_a_gpu_is_the_allocators_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)

    def waits(*arguments):
        raise AssertionError("waits for the device")

    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    assert memory(torch.device("cuda", 0)) == "peak GPU memory 1.50 GiB"


def test_memory_of_a_cpu_is_the_process_own():
    held = torch.ones(2**24)  # 64 MiB
    text = memory(torch.device("cpu"))
    assert held.sum() == 2**24
    assert 0.06 < float(re.search(r"([\d.]+) GiB", text)[1]) < 64
