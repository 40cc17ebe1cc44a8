"""`fastfuse eval`: the accuracy of a run from what it wrote."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

from fastfuse.config import TrainConfig, adapted
from fastfuse.data import lost_workers_explained
from fastfuse.errors import CheckpointError, InputError
from fastfuse.train import build, checkpoint, preliminary
from fastfuse.train.evaluate import Accuracy
from fastfuse.train.loop import Trainer
from fastfuse.train.record import RunFolder
from fastfuse.train.teachers import deployed_model


def evaluate_run(
    path: Path, *, data_root: Path | None = None, data_path: Path | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Accuracy of every head of a run's checkpoint, and of its best deployed weights, on the test images.

    Args:
        path: the run folder.
        data_root, data_path: where the data are now, if they have moved.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        `epoch` (epochs done), `accuracy` by name: `top1` and `top5` in percent.

    Raises:
        InputError, CheckpointError: no run, no checkpoint, or one that does not fit.
    """
    run = RunFolder(path)
    config = run.read_config()
    config = dataclasses.replace(
        config, data_root=data_root or config.data_root, data_path=data_path or config.data_path, device=device
    )
    # One pass does not earn a compilation, a capture, or a cache: test images are the same without.
    config = dataclasses.replace(config, mode="eager", data_cache=None)
    if config.replicas > 1:
        raise InputError(f"{path} holds {config.replicas} replicas; name one of them, such as {path}/seed{config.seed}")
    if not checkpoint.kept(run.checkpoint):
        raise InputError(f"{path} has no checkpoint yet; go on training with: fastfuse train --resume --out {path}")
    dataset = build.load_data(config)
    config = dataclasses.replace(config, out=path)  # it may have been moved
    given = preliminary.prepared(config, dataset.num_classes, None)
    method = build.make_method(config, dataset.num_classes, given, image_size=dataset.image_size)
    on = build.pick_device(device)
    trainer = Trainer(config, run, dataset, method.to(on), on, preliminary.fingerprint(given))
    try:
        trainer.restore(checkpoint.load_newest(run.checkpoint))
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{run.checkpoint} does not fit the run's config.json: {reason}") from error
    with closing(dataset), lost_workers_explained():
        accuracy = _accuracy(trainer, config, path, method.deployed)
    return {"run": str(path), "epoch": trainer.position.epoch, "accuracy": accuracy}


def _accuracy(trainer: Trainer, config: TrainConfig, path: Path, deployed: str) -> Accuracy:
    accuracy = trainer.evaluate(trainer.dataset.test)
    best = path / f"{deployed}_best.safetensors"
    if best.exists() and deployed in accuracy:
        plain = dataclasses.replace(adapted(config, method="independent", model=deployed_model(config)), students=1)
        network = build.make_method(plain, trainer.dataset.num_classes).to(trainer.device)
        build.initial_weights(network, (f"student0={best}",))
        evaluate = trainer.evaluator(trainer.dataset.test, network)
        accuracy[f"{deployed} (best)"] = evaluate()["student0"]
    return accuracy
