"""Several processes take the steps of one: gradients, statistics, counts and records (gloo, CPU)."""

import os
import time
from datetime import timedelta

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastfuse import data
from fastfuse.config import TrainConfig
from fastfuse.data.share import Share
from fastfuse.errors import FastfuseError, InputError
from fastfuse.methods import MethodOutput
from fastfuse.train import distributed
from fastfuse.train.distributed import current
from fastfuse.train.engine import Engine
from fastfuse.train.micro import plan
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from fastfuse.train.terms import TermLog
from tests.methods import making
from tests.train.engines import dataset, state_of
from tests.train.ranks import together

# 11 images: three steps of 4, 4 and 3, which neither two nor four processes divide.
BATCH, STEPS = 4, 10


def trained(
    name, *, batch=BATCH, frozen=False, accumulate=1, steps=STEPS, synchronised=True, compiled=False, **options
):
    """Weights, statistics, optimizer states and the sums of terms after steps at learning rate 0.01, in float64."""
    torch.manual_seed(0)
    method = making.make(name, num_classes=5, **options).double().train()
    if frozen:
        for module in method.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    processes = current()
    step = TrainStep(
        method,
        build_optimizers(method, lr=0.01),
        compiled=compiled,
        accumulate=accumulate,
        processes=processes,
        sync_batchnorm=synchronised and not frozen,
    )
    form = {"dtype": torch.float64, "memory_format": step.memory_format}
    parts = method.image_parts
    batches = data.TrainingBatches(dataset(), batch_size=batch, parts=parts, share=processes.share, **form)
    engine = Engine(step, batches, TermLog(50))
    engine.progress = engine.progress.double()
    for number in range(steps):
        epoch, own = divmod(number, batches.steps)
        if own == 0 or number == 0:
            engine.start_epoch(seed=0, epoch=epoch, step=own, factors=[1.0] * batches.steps)
        images = engine.run(own)
        engine.terms.count(epoch=epoch, step=own, images=step.own(images))
    engine.terms.flush()
    engine.terms.collect(processes)
    found = state_of(engine)
    return found | {
        f"sum of {name}": torch.tensor(x) for name, x in (engine.terms.sums | {"n": engine.terms.images}).items()
    }


def agree(ours, truth, bound=1e-9):
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        difference = (ours[name].double() - expected.double()).norm()
        assert difference <= bound * expected.double().norm(), f"{name}: {difference / expected.double().norm():.2e}"


SHORT = [("ffsd", 2), ("ffl", 2)]
LONG = [("ffsd", 4), ("ffl", 4)]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]


@pytest.mark.parametrize(("name", "count"), CASES)
@pytest.mark.parametrize("frozen", [False, True], ids=["synchronised", "frozen"])
def test_processes_take_the_steps_of_one(name, count, frozen):
    truth = trained(name, frozen=frozen)
    found = together(count, lambda: trained(name, frozen=frozen))
    for ours in found:
        agree(ours, truth)
    # Not only near: every process has the same bits.
    assert all(torch.equal(ours[key], found[0][key]) for ours in found for key in truth)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in making.EVERY if name not in ("ffsd", "ffl")])
def test_every_method_does(name):
    # More than one step: the wrapper complains in the second about a parameter that got no gradient in the first.
    truth = trained(name, steps=4)
    for ours in together(2, lambda: trained(name, steps=4)):
        agree(ours, truth)


def test_batches_of_fewer_images_than_processes():
    # Steps of two images and, the last one, of one: one process, then two of them only stand in.
    truth = trained("ffl", batch=2, steps=7)
    for ours in together(3, lambda: trained("ffl", batch=2, steps=7)):
        agree(ours, truth)


@pytest.mark.long
def test_a_search_without_images_for_a_process_in_either_half():
    truth = trained("dfa-search", batch=4, steps=4)
    for ours in together(3, lambda: trained("dfa-search", batch=4, steps=4)):
        agree(ours, truth)


def test_forwards_one_after_another_take_the_same_step():
    # Frozen, since batch statistics are those of each forward. Steps of 7 and 4: neither 3 nor 2 x 2 divide them.
    truth = trained("ffl", batch=7, frozen=True, steps=3)
    agree(trained("ffl", batch=7, frozen=True, steps=3, accumulate=3), truth)
    for ours in together(2, lambda: trained("ffl", batch=7, frozen=True, steps=3, accumulate=2)):
        agree(ours, truth)


@pytest.mark.parametrize("name", making.EVERY)
def test_every_loss_is_a_mean_over_images(name):
    # Term by term: what lets a process's loss be weighted by its share. And every parameter has a gradient.
    torch.manual_seed(0)
    method = making.make(name, num_classes=5).double().train()
    for module in method.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 5
    progress = torch.tensor(3.0, dtype=torch.float64)
    whole = method(images, labels, progress)
    whole.loss.backward()
    assert [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.requires_grad}
    method.zero_grad()
    parts = method.image_parts
    terms = dict.fromkeys(whole.terms, 0.0)
    for rank in range(3):
        (micro,) = plan(8, share := Share(rank, 3), parts=parts)
        rows = torch.cat([torch.arange(8).view(parts, -1)[part, share.drawn(8 // parts)] for part in range(parts)])
        found = method(images[rows], labels[rows], progress)
        (found.loss * micro.weight / 3).backward()
        terms = {key: value + found.terms[key] * micro.weight / 3 for key, value in terms.items()}
    for key, expected in whole.terms.items():
        torch.testing.assert_close(
            terms[key], expected, rtol=1e-10, atol=1e-14, msg=lambda text, key=key: f"{key}: {text}"
        )
    agree({key: p.grad for key, p in method.named_parameters() if p.requires_grad}, gradients)


def test_without_synchronised_norms_all_processes_have_the_same_weights():
    first, second = together(2, lambda: trained("ffsd", steps=4, synchronised=False))
    norms = {key for key in first if "running" in key}
    assert all(torch.equal(first[key], second[key]) for key in first.keys() - norms)
    assert any(not torch.equal(first[key], second[key]) for key in norms)  # each has seen its own images


def test_a_process_whose_steps_were_all_bad_adds_nothing():
    def own():
        log = TermLog(4, max_bad=9)
        value = torch.tensor((2.0, float("nan"))[current().share.rank])
        log.note(MethodOutput(value, {}, {"ce": 2 * value}))
        log.count(epoch=0, step=0, images=3)
        log.flush()
        log.collect(current())
        return log.means()

    assert together(2, own) == [{"loss": 2.0, "ce": 4.0}] * 2


@pytest.mark.parametrize("count", range(1, 9))
def test_a_plan_covers_every_image_once(count):
    for processes in (1, 2, 3, 5):
        for accumulate in (1, 2, 3, 9):
            plans = [plan(count, Share(rank, processes), accumulate=accumulate) for rank in range(processes)]
            assert len({len(own) for own in plans}) == 1  # all take part in as many forwards
            assert sum(micro.weight for own in plans for micro in own) == pytest.approx(processes)
            seen = []
            for rank, own in enumerate(plans):
                drawn = range(count)[Share(rank, processes).drawn(count)]
                assert all(len(drawn[micro.rows]) for micro in own)
                seen += [i for micro in own if micro.weight for i in drawn[micro.rows]]
                assert sum(micro.share for micro in own) == pytest.approx(float(Share(rank, processes).own(count) > 0))
            assert seen == list(range(count))


def test_drawn_rows_are_those_of_one_process():
    whole = data.TrainingBatches(dataset(), batch_size=4, parts=2)
    whole.start(seed=3, epoch=1)
    images, labels = whole.draw(4)
    for rank, rows in enumerate(([0, 2], [1, 3], [0, 1, 2, 3])):  # the third one has none, and stands in
        own = data.TrainingBatches(dataset(), batch_size=4, parts=2, share=Share(rank, 3))
        own.start(seed=3, epoch=1)
        its_images, its_labels = own.draw(4)
        assert torch.equal(its_images, images[rows]) and torch.equal(its_labels, labels[rows])


class Clock:
    """Ten steps a second."""

    def __init__(self, agreement):
        self.now, self.agreement = 0.0, agreement

    def monotonic(self):
        return self.now


def test_wishes_are_exchanged_at_the_same_steps(monkeypatch):
    def heard():
        processes = current()
        clock = Clock(agreement := distributed.Agreement(processes))
        monkeypatch.setattr(distributed.time, "monotonic", clock.monotonic)
        agreement._began, asked = 0.0, []
        for number in range(200):
            clock.now += 0.1 * (1 + processes.share.rank)  # one is twice as slow
            if agreement.due(last=number == 149):
                # Only the second process is told to stop, and only once, at step 100.
                wish = processes.share.rank == 1 and number >= 100
                asked.append((number, agreement.decide([wish, False])))
        return asked

    first, second = together(2, heard)
    assert first == second
    numbers = [number for number, _ in first]
    assert 149 in numbers and len(numbers) < 20  # about every two seconds
    assert all(answer == [number >= 100, False] for number, answer in first)


def test_others_wait_for_the_first_one_for_longer_than_for_anything_else(tmp_path):
    def own():
        asked, make = [], torch.distributed.new_group

        def new_group(**options):
            asked.append(options["timeout"])
            return make(**options)

        torch.distributed.new_group = new_group  # in a forked process: nobody else sees it
        torch.distributed.all_reduce = None  # what all else is told through, and must answer within half an hour
        with (processes := current()).leader_first():
            time.sleep(0.2 * processes.leads)
            seen = (tmp_path / "made").exists()
            (tmp_path / "made").touch()
        return seen, asked

    assert together(3, own) == [(number > 0, [timedelta(days=2)]) for number in range(3)]


def test_the_end_of_another_process_is_one_line(tmp_path):
    def own():
        if current().share.rank == 1:
            os._exit(0)
        said = r"^another process of this run has ended; .*$"
        with pytest.raises(FastfuseError, match=said), distributed.lost_processes_explained():
            current().wait()
        (tmp_path / "said").touch()

    with pytest.raises(AssertionError):
        together(2, own, seconds=60)
    assert (tmp_path / "said").exists()
    with pytest.raises(RuntimeError, match="something else"), distributed.lost_processes_explained():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "branches"}, "--strategy branches is for one process"),
        ({"mode": "compiled", "sync_batchnorm": True}, "--mode compiled cannot take --sync-batchnorm.*--mode eager"),
        ({"mode": "graphed-compiled", "sync_batchnorm": True}, "--mode graphed-compiled cannot take --sync-batchnorm"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(options, said):
    config = TrainConfig(out="run", **options)
    assert distributed.configured(config, distributed.ALONE) is config
    with pytest.raises(InputError, match=said):
        distributed.configured(config, distributed.Processes(Share(0, 2)))


@pytest.mark.parametrize("mode", ["eager", "compiled", "graphed", "graphed-compiled"])
def test_several_processes_take_every_mode(mode):
    config = TrainConfig(out="run", mode=mode)
    assert distributed.configured(config, distributed.Processes(Share(0, 2))) is config


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed.pick_device("auto") == torch.device("cuda")  # alone
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.pick_device("auto") == distributed.pick_device("cuda") == torch.device("cuda:1")
    assert distributed.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda:0 is one GPU"):
        distributed.pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine has no GPU, there are 2"):
        distributed.pick_device("auto")


def test_a_restart_resumes_and_needs_a_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match="--max-restarts needs --out"):
        distributed.configured(TrainConfig(), distributed.ALONE)
    assert not distributed.configured(TrainConfig(out="run"), distributed.ALONE).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.configured(TrainConfig(out="run"), distributed.ALONE).resume


def test_one_process_asks_nobody():
    assert current() == distributed.ALONE and not torch.distributed.is_initialized()
    alone = distributed.ALONE
    assert (alone.sum([1, 2]), alone.most([True]), alone.agreed("x")) == ([1, 2], [True], "x")
    with alone.leader_first(), distributed.together("cpu") as processes:
        assert processes.leads and not torch.distributed.is_initialized()
