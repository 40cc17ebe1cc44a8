"""What keeps a run's weights finite: clipping, steps that are left out, and when to give up."""

import copy
import math
import os
import signal

import pytest
import torch

from fastfuse import cli
from fastfuse.methods import build_method
from fastfuse.methods.ffsd import FFSD
from fastfuse.train import checkpoint, modes
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep


def made(**options):
    torch.manual_seed(1)
    method = build_method("ffsd", model="resnet8", students=2, num_classes=3)
    optimizers = build_optimizers(method, **options)
    optimizers.create_state()
    return method, optimizers


def give_gradients(method, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def everything(method, optimizers) -> list[torch.Tensor]:
    states = optimizers.state_dict()
    held = [value for state in states for own in state.values() for value in own.values()]
    return [x.detach().clone() for x in (*method.parameters(), *held)]


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [1e-6, 10.0], ids=["below the norm", "above it"])
def test_clipping_is_by_the_norm_of_all_gradients_together(scale):
    method, optimizers = made(clip_norm=0.5)
    plain, unclipped = made()
    give_gradients(method, 0, scale)
    give_gradients(plain, 0, scale)
    squares = sum(parameter.grad.double().square().sum() for parameter in plain.parameters())
    factor = min(1.0, 0.5 / squares.sqrt().item())
    for parameter in plain.parameters():
        parameter.grad *= factor
    optimizers.step()
    unclipped.step()
    for ours, theirs in zip(method.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["peers.0", "transforms"], ids=["of SGD", "of Adam"])
def test_a_bad_gradient_leaves_everything_as_it_was(value, place, clip_norm):
    method, optimizers = made(skip_bad=True, clip_norm=clip_norm)
    other, plain = made(clip_norm=clip_norm)
    for seed in range(2):
        give_gradients(method, seed)
        optimizers.step()
        assert optimizers.bad == 0
    before = everything(method, optimizers)
    give_gradients(method, 7)
    parameter = next(p for name, p in method.named_parameters() if place in name)
    parameter.grad.view(-1)[3] = value
    optimizers.step()
    assert optimizers.bad > 0
    assert_same(everything(method, optimizers), before)
    give_gradients(method, 8)
    optimizers.step()
    assert optimizers.bad == 0
    # The same as steps that never met the bad one, without anybody looking.
    for seed in (0, 1, 8):
        give_gradients(other, seed)
        plain.step()
    assert_same(everything(method, optimizers), everything(other, plain))


def test_with_a_gradient_scaler_the_flag_is_the_scalers_and_clipping_sees_true_gradients():
    method, optimizers = made(skip_bad=True, clip_norm=0.5)
    other, plain = made(clip_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(torch.zeros(()))
    give_gradients(method, 0, 2.0**8)
    give_gradients(other, 0)
    optimizers.step(scaler)
    plain.step()
    assert optimizers.bad == 0
    for ours, theirs in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    give_gradients(method, 1)
    next(method.parameters()).grad.view(-1)[0] = float("inf")
    weights = copy.deepcopy(list(method.peers.parameters()))
    optimizers.step(scaler)
    assert optimizers.bad > 0 and scaler.get_scale() == 2.0**7
    assert all(torch.equal(a, b) for a, b in zip(method.peers.parameters(), weights, strict=True))


@pytest.mark.parametrize("place", ["peers.0", "transforms"], ids=["of SGD", "of Adam"])
def test_with_a_gradient_scaler_one_optimizers_overflow_stops_both(place):
    method, optimizers = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(torch.zeros(()))
    for seed in range(2):
        give_gradients(method, seed)
        before = everything(method, optimizers)
        if seed == 1:
            next(p for name, p in method.named_parameters() if place in name).grad.view(-1)[0] = float("inf")
        optimizers.step(scaler)
    assert_same(everything(method, optimizers), before)
    assert scaler.get_scale() == 2.0**7, "halved once"


class Flat(torch.autograd.Function):
    """An infinite value whose gradient is an ordinary one, as that of a cross entropy at a logit of -inf."""

    @staticmethod
    def forward(ctx, x):
        return x + float("inf")

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def bad_images(step, images):
    images[0, 0, 0, 0] = float("nan")


def bad_loss(step, images):
    losses = step.method.losses
    step.method.losses = lambda *given: (out := losses(*given))._replace(loss=Flat.apply(out.loss))


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("spoil", [bad_images, bad_loss], ids=["in the statistics too", "of the loss alone"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_left_out_leaves_weights_and_statistics(amp, spoil, accumulate):
    method, optimizers = made(skip_bad=True)
    step = TrainStep(method.train(), optimizers, amp=amp, accumulate=accumulate)
    if step.scaler is not None:  # whose first scale overflows by itself
        step.scaler._scale.fill_(1.0)
    images, labels, progress = torch.randn(6, 3, 16, 16), torch.arange(6) % 3, torch.tensor(0.0)
    step(images, labels, progress)
    addresses = [x.data_ptr() for x in method.buffers()]
    before = [*everything(method, optimizers), *(x.clone() for x in method.buffers())]
    spoil(step, spoilt := images.clone())
    step(spoilt, labels, progress)
    assert optimizers.bad > 0
    assert_same([*everything(method, optimizers), *method.buffers()], before)
    assert [x.data_ptr() for x in method.buffers()] == addresses
    method.__dict__.pop("losses", None)
    step(images, labels, progress)
    assert optimizers.bad == 0 and not torch.equal(next(method.buffers()), before[len(everything(method, optimizers))])


def test_reproducible_is_for_a_while(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with modes.reproducible(on=False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), modes.reproducible(on=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def poisoned(monkeypatch):
    """Losses that are not a number in some of the steps of every run, numbered from 1."""

    def poison(*numbers: int) -> None:
        losses, steps = FFSD.losses, []

        def bad(self, *arguments):
            output = losses(self, *arguments)
            steps.extend([1] * torch.is_grad_enabled())  # and not when the method is tried out before
            if len(steps) not in numbers:
                return output
            terms = {**output.terms, "leader_kl": output.terms["leader_kl"] * float("nan")}
            return output._replace(loss=output.loss * float("nan"), terms=terms)

        monkeypatch.setattr(FFSD, "losses", bad)

    return poison


def test_bad_steps_are_left_out_and_counted(train, poisoned):
    poisoned(2, 3, 5)
    run = train("--max-bad-steps", 2)
    assert [line["bad_steps"] for line in run.metrics] == [2, 1]
    assert all(math.isfinite(value) for line in run.metrics for value in line["losses"].values())
    state = checkpoint.load(run.path / "checkpoint.pt")
    assert all(x.isfinite().all() for x in state["method"].values())
    assert (state["terms"]["bad"], state["terms"]["in_a_row"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "numbers", "said"),
    [
        pytest.param((), (2,), "epoch 1, step 2: leader_kl; lower", id="the first one by default"),
        pytest.param(("--max-bad-steps", 2), (2, 3, 4), "epoch 2, step 1: leader_kl (3 steps in a row)", id="in a row"),
        pytest.param(
            ("--amp", "fp16", "--max-bad-steps", 0), (2,), "epoch 1, step 2: leader_kl", id="fp16, told not to"
        ),
    ],
)
def test_too_many_bad_steps_end_the_run(train, refused, poisoned, options, numbers, said):
    poisoned(*numbers)
    assert said in refused(*options, folder_remains=True)


def test_fp16_bears_overflows_and_writes_its_scale_down(train, poisoned):
    poisoned(2)
    run = train("--amp", "fp16")
    assert run.metrics[0]["bad_steps"] >= 1
    assert all(0 < line["loss_scale"] <= 2.0**15 for line in run.metrics), "it began with 2 ** 16"


def test_bad_steps_in_a_row_are_counted_across_a_resume(tiny, refused, poisoned, monkeypatch, tmp_path):
    run_step, steps = TrainStep.__call__, []

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return run_step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    poisoned(2)
    assert cli.main([*tiny, "--max-bad-steps", "1", "--out", str(tmp_path / "run")]) == 130
    monkeypatch.undo()
    poisoned(1)
    message = refused("--max-bad-steps", 1, "--resume", folder_remains=True)
    assert "epoch 1, step 3: leader_kl (2 steps in a row)" in message


def test_gradients_alone_can_be_bad(train, refused, monkeypatch):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    losses = FFSD.losses

    def bad(self, *arguments):
        output = losses(self, *arguments)
        return output._replace(loss=Steep.apply(output.loss))

    monkeypatch.setattr(FFSD, "losses", bad)
    message = refused("--max-bad-steps", 2, folder_remains=True)
    assert "gradients are not finite at epoch 1, step 3, though the loss is (3 steps in a row)" in message


def test_statistics_that_are_not_finite_do_not_replace_a_checkpoint(train, refused, monkeypatch, tmp_path):
    run_step, steps = TrainStep.__call__, []

    def step(self, *arguments):
        output = run_step(self, *arguments)
        steps.append(1)
        if len(steps) == 6:
            next(x for name, x in self.method.named_buffers() if name.endswith("running_var")).fill_(float("inf"))
        return output

    monkeypatch.setattr(TrainStep, "__call__", step)
    assert "statistics became infinite" in refused(folder_remains=True)
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["position"]["epoch"] == 1
