"""The run: epochs of steps, evaluation, records and checkpoints; it knows nothing about distillation."""

import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastfuse import config as configuration
from fastfuse import data, info
from fastfuse.config import TrainConfig
from fastfuse.data import Dataset, Split
from fastfuse.errors import FastfuseError, NonFiniteLossError
from fastfuse.methods import Method
from fastfuse.train import build, checkpoint
from fastfuse.train.evaluate import Accuracy, evaluate
from fastfuse.train.optim import build_optimizers
from fastfuse.train.record import RunFolder
from fastfuse.train.schedule import learning_rate_factor
from fastfuse.train.step import TrainStep
from fastfuse.train.summary import Position, summarise
from fastfuse.train.terms import TermLog

if TYPE_CHECKING:
    from fastfuse.train.display import Display

EVALUATION_BATCH = 500


class InterruptedRun(FastfuseError):
    """Ctrl-C: the step was finished and a checkpoint written."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as configured, or go on from a checkpoint.

    Args:
        config: `resume` takes up the run in `out`; a run killed before its first checkpoint starts anew.

    Returns:
        The summary, as in summary.json.

    Raises:
        FastfuseError: bad input, before anything is written; a loss that is not finite or a disk that is full, with
            the last good checkpoint kept; InterruptedRun after Ctrl-C.
    """
    config = build.resolved(config)
    if config.out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        config = dataclasses.replace(config, out=Path("runs") / f"{stamp}_{config.method}_{config.model}_{config.data}")
    run = RunFolder(config.out)
    device = build.pick_device(config.device)
    dataset = build.load_data(config)
    method = build.make_method(config, dataset.num_classes)
    resuming = config.resume and run.checkpoint.exists()
    state = checkpoint.load_matching(run.checkpoint, config, dataset.fingerprint()) if resuming else None
    if state is None:
        build.initial_weights(method, config.init)
        build.try_out(method, dataset, config.batch_size)
    created = run.claim(resume=config.resume)
    try:
        run.write_config(config)
    except FastfuseError:
        if created:
            run.path.rmdir()
        raise
    trainer = Trainer(config, run, dataset, method, device)
    if state is not None:
        trainer.restore(state)
    return trainer.run_all()


class Trainer:
    """One run in progress.

    Args:
        config: resolved.
        run: its folder, claimed.
        dataset: on the CPU.
        method: on the CPU, with initial weights.
        device: where to train.
    """

    def __init__(
        self, config: TrainConfig, run: RunFolder, dataset: Dataset, method: Method, device: torch.device
    ) -> None:
        self.config = config
        self.run = run
        self.fingerprint = dataset.fingerprint()
        self.dataset = dataset.to(device)
        self.method = method.to(device).train()
        self.optimizers = build_optimizers(self.method, **build.optimizer_settings(config))
        self.step = TrainStep(self.method, self.optimizers, amp=config.amp, channels_last=config.channels_last)
        self.ema = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.method, multi_avg_fn=average, use_buffers=True)
        self.steps_per_epoch = data.steps_per_epoch(len(dataset.train), config.batch_size)
        self.terms = TermLog(config.log_interval)
        self.position = Position()
        self.progress = torch.zeros((), device=device)
        self.device = device
        self.interrupted = False
        self._saved = self._started = self._began = time.monotonic()

    def run_all(self) -> dict[str, Any]:
        """Train to the end, to --max-time, or to Ctrl-C."""
        from fastfuse.train.display import Display

        config, position = self.config, self.position
        self.run.write_metrics(position.history)
        title = f"{config.method} {config.model} on {config.data}"
        display = Display(title, config.epochs, self.steps_per_epoch, quiet=config.quiet)
        with self._catching_interrupts(), display:
            while position.epoch < config.epochs and not self._must_stop():
                self._train_epoch(display)
                if position.step < self.steps_per_epoch or self._must_stop():
                    break
                self._end_epoch(display)
        if position.step:
            self._save()
        if self.interrupted:
            raise InterruptedRun(
                f"interrupted at epoch {position.epoch + 1}, step {position.step}; the checkpoint is written, "
                f"go on with: fastfuse train --resume --out {self.run.path}"
            )
        summary = summarise(self)
        if position.history:
            self.run.write_weights(self.method.deployed, self._evaluated().deployed_state())
        self.run.write_summary(summary)
        return summary

    def evaluate(self, split: Split, method: Method | None = None) -> Accuracy:
        """Accuracy on a split of the trained networks (their moving average if there is one), or of another method."""
        mean, std = self.dataset.mean, self.dataset.std
        batches = data.evaluation_batches(
            split, mean=mean, std=std, batch_size=EVALUATION_BATCH, memory_format=self.step.memory_format
        )
        return evaluate(method or self._evaluated(), batches, self.step.autocast)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.method.load_state_dict(state["method"])
        self.optimizers.load_state_dict(state["optimizers"])
        if self.step.scaler is not None:
            self.step.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.terms.load_state_dict(state["terms"])
        self.position = Position(**state["position"])
        checkpoint.restore_generators(state["generators"])

    def _train_epoch(self, display: "Display") -> None:
        config, position = self.config, self.position
        self.progress.fill_(position.epoch)
        batches = data.batches(
            self.dataset,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=position.epoch,
            start_step=position.step,
            memory_format=self.step.memory_format,
        )
        clock = _Clock(position)
        for images, labels in batches:
            factor = learning_rate_factor(config, position.epoch, position.step, self.steps_per_epoch)
            self.optimizers.set_factor(factor)
            output = self.step(images, labels, self.progress)
            if self.ema is not None:
                self.ema.update_parameters(self.method)
            self.terms.add(output.loss, output.terms, epoch=position.epoch, step=position.step, images=len(labels))
            position.step += 1
            position.steps_done += 1
            position.images_done += len(labels)
            display.step(position.epoch, position.step, self.terms.means().get("loss"))
            clock.lap()
            if self._must_stop():
                break
            if position.step < self.steps_per_epoch and time.monotonic() - self._saved > 60 * config.checkpoint_minutes:
                self._save()
        self.terms.flush()
        clock.lap()

    def _end_epoch(self, display: "Display") -> None:
        """Evaluate, record and move to the next epoch."""
        position, dataset = self.position, self.dataset
        line: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "learning_rate": self.config.lr
            * learning_rate_factor(self.config, position.epoch, self.steps_per_epoch - 1, self.steps_per_epoch),
            "losses": self.terms.means(),
            "accuracy": self.evaluate(dataset.test),
        }
        if dataset.validation is not None:
            line["validation"] = self.evaluate(dataset.validation)
        line["images_per_second"] = self.terms.images / max(position.epoch_seconds, 1e-9)
        line["seconds"] = position.seconds + time.monotonic() - self._started
        position.history.append(line)
        improved = self._note_best(line)
        position.epoch, position.step, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.terms.reset()
        deployed = self.method.deployed
        if deployed in improved:
            self.run.write_weights(f"{deployed}_best", self._evaluated().deployed_state())
        self.run.write_metrics(position.history)
        self._save()
        display.epoch(line, deployed, position.best[deployed]["top1"])

    def _note_best(self, line: dict[str, Any]) -> set[str]:
        chosen_on = line.get("validation", line["accuracy"])
        improved = set()
        for name, accuracy in chosen_on.items():
            if name not in self.position.best or accuracy["top1"] > self.position.best[name]["chosen"]:
                test = line["accuracy"][name]["top1"]
                self.position.best[name] = {"chosen": accuracy["top1"], "top1": test, "epoch": line["epoch"]}
                improved.add(name)
        return improved

    def _evaluated(self) -> Method:
        return self.method if self.ema is None else self.ema.module

    def _save(self) -> None:
        self.terms.flush()
        self._check_weights()
        now = time.monotonic()
        self.position.seconds += now - self._started
        self._started = self._saved = now
        checkpoint.save(
            self.run.checkpoint,
            {
                "method": self.method.state_dict(),
                "optimizers": self.optimizers.state_dict(),
                "scaler": self.step.scaler.state_dict() if self.step.scaler is not None else None,
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "terms": self.terms.state_dict(),
                "position": dataclasses.asdict(self.position),
                "generators": checkpoint.generator_states(),
                "config": configuration.to_plain(self.config),
                "data": self.fingerprint,
                "versions": {**info.versions(), "commit": info.commit()},
            },
        )

    def _check_weights(self) -> None:
        """A finite loss may still have given an infinite update: that must not replace the last good checkpoint."""
        norms = torch.stack(torch._foreach_norm(list(self.method.parameters())))
        if not norms.isfinite().all():
            raise NonFiniteLossError(
                f"weights became infinite or not a number before epoch {self.position.epoch + 1}, step "
                f"{self.position.step + 1}; lower --lr, add --warmup-epochs, or try --amp off"
            )

    def _must_stop(self) -> bool:
        limit = self.config.max_time
        return self.interrupted or (limit is not None and time.monotonic() - self._began >= 60 * limit)

    @contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        """Ctrl-C asks to stop after the step; a second one stops at once."""

        def ask(signum: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            previous = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: the caller deals with signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


class _Clock:
    """Adds the time spent training, without evaluation and saving, to a position."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.last = time.monotonic()

    def lap(self) -> None:
        now = time.monotonic()
        self.position.train_seconds += now - self.last
        self.position.epoch_seconds += now - self.last
        self.last = now
