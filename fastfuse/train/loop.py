"""The run: epochs of steps, evaluation, records and checkpoints; it knows nothing about distillation."""

import dataclasses
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fastfuse import config as configuration
from fastfuse import data, info
from fastfuse.config import TrainConfig
from fastfuse.data import Dataset, Split
from fastfuse.errors import CheckpointError, InterruptedRun, NonFiniteLossError
from fastfuse.methods import Method
from fastfuse.methods.replicas import Replicas
from fastfuse.train import build, checkpoint, modes
from fastfuse.train.average import MovingAverage
from fastfuse.train.engine import Engine
from fastfuse.train.evaluate import Accuracy, Evaluator
from fastfuse.train.loggers import Loggers
from fastfuse.train.optim import build_optimizers
from fastfuse.train.record import RunFolder
from fastfuse.train.replicas import write_run_folders
from fastfuse.train.schedule import learning_rate_factor
from fastfuse.train.step import TrainStep
from fastfuse.train.summary import Position, summarise
from fastfuse.train.terms import TermLog

if TYPE_CHECKING:
    from fastfuse.train.display import Display

EVALUATION_BATCH = 500


class Trainer:
    """One run in progress.

    Args:
        config: resolved.
        run: its folder, claimed.
        dataset: on the CPU.
        method: on the device, with initial weights, its networks arranged.
        device: where to train.
        given: fingerprint of what the method was given besides, such as teachers.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        dataset: Dataset,
        method: Method,
        device: torch.device,
        given: str | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.loggers = Loggers(run, config)
        self.given = given
        self.fingerprint = dataset.fingerprint()
        self.dataset = dataset.to(device)
        self.method = method.train()
        self.optimizers = build_optimizers(self.method, **build.optimizer_settings(config))
        mode = modes.pick_mode(config.mode, device)
        self.step = TrainStep(
            self.method,
            self.optimizers,
            amp=modes.pick_amp(config.amp, device),
            channels_last=config.channels_last,
            compiled=mode.endswith("compiled"),
        )
        self.average = MovingAverage(self.method, config.ema) if config.ema else None
        batches = data.TrainingBatches(
            self.dataset,
            batch_size=config.batch_size,
            replicas=config.replicas,
            parts=self.method.image_parts,
            memory_format=self.step.memory_format,
        )
        self.steps_per_epoch = batches.steps
        self.terms = TermLog(config.log_interval, device)
        graphs = {"graphed": mode.startswith("graphed"), "fall_back": config.mode == "auto"}
        self.engine = Engine(self.step, batches, self.terms, average=self.average, **graphs)
        self._mode = mode
        self._evaluators: dict[int, Evaluator] = {}
        self.position = Position()
        self.device = device
        self.interrupted = False
        self._saved = self._started = self._began = time.monotonic()

    @property
    def mode(self) -> str:
        """How steps are run, now that it has been tried."""
        return self._mode if self.engine.graphed or not self._mode.startswith("graphed") else "eager"

    def run_all(self) -> dict[str, Any]:
        """Train to the end, to --max-time, or to Ctrl-C."""
        from fastfuse.train.display import Display

        config, position = self.config, self.position
        self.loggers.write(position.history)
        title = f"{config.method} {config.networks} on {config.data}"
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
            for name, state in self._evaluated().deployed_states().items():
                self.run.write_weights(name, state)
        if isinstance(self.method, Replicas):
            write_run_folders(self.run, self.method, config, self._state(), summary)
        self.run.write_summary(summary)
        return summary

    def evaluate(self, split: Split) -> Accuracy:
        """Accuracy on a split of the trained networks, or of their moving average if there is one."""
        if id(split) not in self._evaluators:
            self._evaluators[id(split)] = self.evaluator(split, self._evaluated(), graphed=self.engine.graphed)
        return self._evaluators[id(split)]()

    def evaluator(self, split: Split, method: Method, *, graphed: bool = False) -> Evaluator:
        """What counts a method's right answers on a split of this run's data, in this run's precision."""
        batches = data.EvaluationBatches(
            split,
            mean=self.dataset.mean,
            std=self.dataset.std,
            batch_size=EVALUATION_BATCH,
            memory_format=self.step.memory_format,
        )
        return Evaluator(method, batches, self.step.autocast, graphed=graphed)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint.

        Raises:
            CheckpointError: the teachers are others now.
        """
        if state.get("given") != self.given:
            raise CheckpointError(
                f"{self.run.checkpoint} was trained with {state.get('given')}, and is given {self.given} now; name the "
                "same --teachers, or choose another --out"
            )
        self.method.load_state_dict(state["method"])
        self.optimizers.load_state_dict(state["optimizers"])
        if self.step.scaler is not None:
            self.step.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.method.load_state_dict(state["ema"])
        self.terms.load_state_dict(state["terms"])
        self.position = Position(**state["position"])
        checkpoint.restore_generators(state["generators"])

    def _train_epoch(self, display: "Display") -> None:
        config, position = self.config, self.position
        steps = self.steps_per_epoch
        self.engine.start_epoch(
            seed=config.seed,
            epoch=position.epoch,
            step=position.step,
            factors=[learning_rate_factor(config, position.epoch, step, steps) for step in range(steps)],
        )
        clock = _Clock(position)
        while position.step < steps:
            images = self.engine.run(position.step)
            self.terms.count(epoch=position.epoch, step=position.step, images=images)
            position.step += 1
            position.steps_done += 1
            position.images_done += images * config.replicas
            display.step(position.epoch, position.step, self.terms.means().get("loss"))
            clock.lap()
            if self._must_stop():
                break
            if position.step < steps and time.monotonic() - self._saved > 60 * config.checkpoint_minutes:
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
        results = self._evaluated().results()
        line |= results
        line["images_per_second"] = self.terms.images * self.config.replicas / max(position.epoch_seconds, 1e-9)
        line["seconds"] = position.seconds + time.monotonic() - self._started
        position.history.append(line)
        improved = self._note_best(line)
        position.epoch, position.step, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.terms.reset()
        deployed = self._evaluated().deployed_states()
        for name in deployed.keys() & improved:
            self.run.write_weights(f"{name}_best", deployed[name])
        for name, result in results.items():
            self.run.write_result(name, result)
        self.loggers.write(position.history)
        self._save()
        display.epoch(line, {name: position.best[name]["top1"] for name in deployed if name in position.best})

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
        return self.method if self.average is None else self.average.method

    def _save(self) -> None:
        self.terms.flush()
        self._check_weights()
        now = time.monotonic()
        self.position.seconds += now - self._started
        self._started = self._saved = now
        checkpoint.save(self.run.checkpoint, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "method": self.method.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "scaler": self.step.scaler.state_dict() if self.step.scaler is not None else None,
            "ema": self.average.method.state_dict() if self.average is not None else None,
            "terms": self.terms.state_dict(),
            "position": dataclasses.asdict(self.position),
            "generators": checkpoint.generator_states(),
            "config": configuration.to_plain(self.config),
            "data": self.fingerprint,
            "given": self.given,
            "versions": {**info.versions(), "commit": info.commit()},
        }

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
