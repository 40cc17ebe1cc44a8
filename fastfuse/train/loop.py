"""The run: epochs of steps, evaluation, records and checkpoints; it knows nothing about distillation."""

import dataclasses
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastfuse import config as configuration
from fastfuse import data, info
from fastfuse.config import TrainConfig
from fastfuse.data import Dataset, Split
from fastfuse.errors import CheckpointError, InterruptedRun, NonFiniteLossError
from fastfuse.methods import Method
from fastfuse.methods.replicas import Replicas
from fastfuse.train import build, checkpoint, distributed, keepsakes, modes
from fastfuse.train.average import MovingAverage
from fastfuse.train.distributed import ALONE, Processes
from fastfuse.train.engine import Engine
from fastfuse.train.evaluate import Accuracy, Evaluator
from fastfuse.train.files import WriteError
from fastfuse.train.loggers import Loggers
from fastfuse.train.optim import build_optimizers
from fastfuse.train.record import RunFolder
from fastfuse.train.replicas import write_run_folders
from fastfuse.train.saving import CheckpointWriter, Files, host_copy, warn_of
from fastfuse.train.schedule import learning_rate_factor
from fastfuse.train.step import TrainStep
from fastfuse.train.stopping import Stopping
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
        processes: those that train together; the first one writes and speaks.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        dataset: Dataset,
        method: Method,
        device: torch.device,
        given: str | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.processes = config, processes
        self.run = run
        self.loggers = Loggers(run, config) if processes.leads else Loggers.none()
        self.writer, self.files = CheckpointWriter(run.checkpoint, keep=config.keep_checkpoints), Files()
        self.given = given
        self.fingerprint = dataset.fingerprint()
        self.dataset = dataset.to(device)
        self.method = method.train()
        amp = modes.pick_amp(config.amp, device)
        max_bad = modes.pick_max_bad_steps(config.max_bad_steps, amp)
        settings = {"clip_norm": config.clip_norm, "skip_bad": max_bad > 0, **build.optimizer_settings(config)}
        self.optimizers = build_optimizers(self.method, **settings)
        mode = modes.pick_mode(config.mode, device, processes=processes.count)
        self.step = TrainStep(
            self.method,
            self.optimizers,
            amp=amp,
            channels_last=config.channels_last,
            compiled=mode.endswith("compiled"),
            graphed=mode.startswith("graphed"),
            accumulate=config.accumulate,
            processes=processes,
            sync_batchnorm=config.sync_batchnorm,
        )
        self.average = MovingAverage(self.method, config.ema) if config.ema else None
        batches = data.training_batches(
            self.dataset,
            batch_size=config.batch_size,
            replicas=config.replicas,
            parts=self.method.image_parts,
            share=processes.share,
            memory_format=self.step.memory_format,
        )
        self.steps_per_epoch = batches.steps
        self.terms = TermLog(config.log_interval, device, max_bad=max_bad)
        graphs = {"graphed": mode.startswith("graphed"), "fall_back": config.mode == "auto"}
        self.engine = Engine(self.step, batches, self.terms, average=self.average, **graphs)
        self._mode = mode
        self._evaluators: dict[int, Evaluator] = {}
        self.position = Position()
        self.device = device
        self.stopping = Stopping(config, processes)
        self._started = time.monotonic()

    @property
    def mode(self) -> str:
        """How steps are run, now that it has been tried."""
        return self._mode if self.engine.graphed or not self._mode.startswith("graphed") else "eager"

    def run_all(self) -> dict[str, Any]:
        """Train to the end, to --max-time, or to a signal."""
        from fastfuse.train.display import Display

        config, position = self.config, self.position
        self.loggers.write(position.history)
        title = f"{config.method} {config.networks} on {config.data}"
        quiet = config.quiet or not self.processes.leads
        display = Display(title, config.epochs, self.steps_per_epoch, quiet=quiet, device=self.device)
        if position.history:
            display.known(position.history[-1], position.best, self._evaluated().deployed_states())
        with self.stopping.listening(), display:
            while position.epoch < config.epochs:  # whatever the limit, every start gets on
                to_take = self.steps_per_epoch - position.step
                self._train_epoch(display)
                if position.step < self.steps_per_epoch or self._stops(had_steps=to_take > 0):
                    break
                self._end_epoch(display)
            if position.step:
                self._save()
            self.writer.finish()
            self.files.flush(last=True)
            self.stopping.decide()
        if self.stopping.status is not None:
            raise InterruptedRun(
                f"interrupted at epoch {position.epoch + 1}, step {position.step}; the checkpoint is written, "
                f"go on with: fastfuse train --resume --out {self.run.path}",
                status=self.stopping.status,
            )
        summary, reached = summarise(self), self._state()
        if self.processes.leads:
            self._write_results(summary, reached)
        return summary

    def _stops(self, *, had_steps: bool) -> bool:
        """Whether to stop before the epoch that is done is evaluated; a start without a step left goes on at least."""
        stop = self.stopping.decide().stop
        return stop and (had_steps or self.stopping.status is not None)

    def _write_results(self, summary: dict[str, Any], reached: dict[str, Any]) -> None:
        config, position = self.config, self.position
        if position.history:
            for name, state in self._evaluated().deployed_states().items():
                self.run.write_weights(name, state)
        if isinstance(self.method, Replicas):
            write_run_folders(self.run, self.method, config, reached, summary)
        self.run.write_summary(summary)
        keepsakes.keep(self, self._evaluated())

    def evaluate(self, split: Split) -> Accuracy:
        """Accuracy on a split of the trained networks, or of their moving average if there is one."""
        if id(split) not in self._evaluators:
            share = self.processes.share
            own = split if self.processes.count == 1 else split.part(share.drawn(len(split)))
            evaluator = self.evaluator(own, self._evaluated(), graphed=self.engine.graphed)
            evaluator.processes, evaluator.stands_in = self.processes, not share.own(len(split))
            self._evaluators[id(split)] = evaluator
        return self._evaluators[id(split)]()

    def evaluator(self, split: Split, method: Method, *, graphed: bool = False) -> Evaluator:
        """What counts a method's right answers on a split of this run's data, in this run's precision."""
        batches = data.evaluation_batches(
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
        self.terms.load_state_dict(state["terms"], self.processes)
        self.position = Position(**state["position"])
        checkpoint.restore_generators(state["generators"])
        if (before := state.get("processes", 1)) != self.processes.count and self.processes.leads:
            print(distributed.changed(before, self.processes.count, self.config), file=sys.stderr)

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
            self.terms.count(epoch=position.epoch, step=position.step, images=self.step.own(images))
            position.step += 1
            position.steps_done += 1
            position.images_done += images * config.replicas
            display.step(position.epoch, position.step, self.terms.means(), images=images * config.replicas)
            clock.lap()
            if not self.stopping.due(last=position.step == steps):
                continue
            decision = self.stopping.decide()
            if decision.stop:
                break
            if position.step < steps and decision.save:
                self._save()
        self.terms.flush()
        clock.lap()

    def _end_epoch(self, display: "Display") -> None:
        """Evaluate, record and move to the next epoch."""
        position, dataset = self.position, self.dataset
        self.terms.collect(self.processes)
        self.processes.as_leader(list(self._evaluated().buffers()))
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
        if self.terms.max_bad:
            line["bad_steps"] = self.terms.bad
        if self.step.scaler is not None:
            line["loss_scale"] = self.step.scaler.get_scale()
        line["images_per_second"] = self.terms.images * self.config.replicas / max(position.epoch_seconds, 1e-9)
        line["seconds"] = position.seconds + time.monotonic() - self._started
        position.history.append(line)
        improved = self._note_best(line)
        position.epoch, position.step, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.terms.reset()
        deployed = self._evaluated().deployed_states()
        if self.processes.leads:
            self._write_epoch(deployed, improved, results)
        self._save()
        display.epoch(line, position.best, deployed)

    def _write_epoch(self, deployed: dict[str, Any], improved: set[str], results: dict[str, Any]) -> None:
        for name in deployed.keys() & improved:
            write = partial(self.run.write_weights, f"{name}_best", host_copy(deployed[name]))
            self.files.add(f"{name}_best", write)
        for name, result in results.items():
            self.files.add(name, partial(self.run.write_result, name, result))
        self.files.add("metrics", partial(self.loggers.write, self.position.history))
        self.files.flush()

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
        self._started = now
        self.stopping.saved()
        state = self._state()
        if not self.processes.leads:
            return
        try:
            self.writer.save(state)
        except WriteError as error:
            warn_of(error)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; to be asked for by all processes."""
        return {
            "method": self.method.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "scaler": self.step.scaler.state_dict() if self.step.scaler is not None else None,
            "ema": self.average.method.state_dict() if self.average is not None else None,
            "terms": self.terms.state_dict(self.processes),
            "processes": self.processes.count,
            "position": dataclasses.asdict(self.position),
            "generators": checkpoint.generator_states(),
            "config": configuration.to_plain(self.config),
            "data": self.fingerprint,
            "given": self.given,
            "versions": {**info.versions(), "commit": info.commit()},
        }

    def _check_weights(self) -> None:
        """A finite loss may still have given an infinite update: that must not replace the last good checkpoint."""
        values = [*self.method.parameters(), *(x for x in self.method.buffers() if x.is_floating_point())]
        norms = torch.stack(torch._foreach_norm(values))
        if not norms.isfinite().all():
            raise NonFiniteLossError(
                f"weights or statistics became infinite or not a number before epoch {self.position.epoch + 1}, step "
                f"{self.position.step + 1}; lower --lr, add --warmup-epochs, or try --amp off"
            )


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
