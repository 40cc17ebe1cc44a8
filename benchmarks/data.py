"""Suite "data": how fast training images come out of JPEG files, and whether that feeds a step."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import figures, programs
from benchmarks.cases import IMAGENET_DATA, cases
from benchmarks.programs import Start
from benchmarks.report import MISSING, Report, Value, environment
from benchmarks.selection import Form, Program
from benchmarks.step import CALLS_PER_TURN, busy
from benchmarks.timing import Timing, measure_in_turn
from fastfuse import data
from fastfuse.data import pool, streaming
from fastfuse.models import IMAGENET
from fastfuse.train.build import pick_device
from fastfuse.train.modes import pick_amp

# The commonest size of ImageNet's files; quality 90 of pixels with a spectrum of 1/f gives about their bytes.
SOURCE = (375, 500)
QUALITY = 90
IMAGES = 256
QUICK_IMAGES = 16
BATCH = 32
BASELINE = "pillow"
COLUMNS = {
    "provider": "provider",
    "processes": "processes",
    "median_ms": "ms for all",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "images_per_s": "images/s",
    "per_core": "images/s of a core",
    "baseline_ratio": "x pillow",
    "fed": "x step",
}


def run(options: argparse.Namespace) -> Iterator[Report]:
    """Measure all providers in turn, once in this process with one thread, once with worker processes.

    Raises:
        InputError: an option that does not fit.
    """
    device = pick_device(options.device)
    images = options.images or (QUICK_IMAGES if options.quick else IMAGES)
    size = options.image_size or IMAGENET_DATA.image_size
    workers = pool.default_workers()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a core is what is measured, as in a worker
    settings = {"suite": "data", "source": "x".join(map(str, SOURCE)), "quality": QUALITY, "image_size": size}
    settings |= {"images": images, "workers": workers, "repeats": options.repeats, "quick": options.quick}
    report = Report(f"data_i{size}_{device.type}", settings, environment(device), COLUMNS, [], {}, {}, [*busy()])
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings["bytes_per_file"] = write(Path(folder), images)
            _measure(report, made(Path(folder), images, size, workers), _step(options, device), options.repeats)
    finally:
        torch.set_num_threads(threads)
    yield report


def write(root: Path, images: int) -> int:
    """`images` training files and one to test on; gives their mean size in bytes."""
    from PIL import Image

    generator = np.random.default_rng(0)
    names = [f"train/0/{i}.jpg" for i in range(images)] + ["val/0/0.jpg"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(natural(*SOURCE, generator)).save(root / name, quality=QUALITY)
    return sum((root / name).stat().st_size for name in names) // len(names)


def natural(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] with the amplitudes of photographs, which fall with 1/f, and correlated colours."""
    frequency = np.hypot(np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = np.inf
    noise = generator.normal(size=(4, height, width))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    return np.clip(128 + 40 * planes[0][..., None] + 20 * planes[1:].transpose(1, 2, 0), 0, 255).astype(np.uint8)


Call = Callable[[], object]


def made(root: Path, images: int, size: int, workers: int) -> dict[tuple[str, int], Call]:
    """What makes all images once, by provider and number of processes besides this one."""
    found: dict[tuple[str, int], Call] = {}
    for processes in (0, workers):
        form = {"root": root, "image_size": size, "workers": processes}
        found[BASELINE, processes] = _pillow(root, size, processes)
        found["fastfuse decode", processes] = _fastfuse(data.load("imagenet", **form), drawn=False)
        found["fastfuse", processes] = _fastfuse(data.load("imagenet", **form))
        found["fastfuse cache", processes] = _fastfuse(data.load("imagenet", cache=root / "cache", **form))
    return found


def _pillow(root: Path, size: int, workers: int) -> Call:
    """torchvision's usual pipeline, as its reference scripts and most programs have it."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(streaming.MEAN, streaming.STD)])
    kept = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(root / "train", transform), batch_size=BATCH, shuffle=True, num_workers=workers, **kept
    )

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def _fastfuse(dataset: data.StreamedDataset, *, drawn: bool = True) -> Call:
    """What a run does, up to the normalised batch; without it, which is the device's work, up to the uint8 one."""
    batches = data.training_batches(dataset, batch_size=BATCH)

    def epoch() -> None:
        batches.start(seed=0, epoch=0)
        for step in range(batches.steps):
            batches.fetch(step)
            if drawn:
                batches.draw(batches.count(step))

    return epoch


def _step(options: argparse.Namespace, device: torch.device) -> tuple[Call, int] | None:
    """A step of FFSD on the first network of ImageNet among --model, and its images; None where there is none."""
    models = [name for name in options.model if name in IMAGENET]
    if not models:
        return None
    case = cases(options, models[:1], pick_amp(options.amp, device), device)[0]
    form = Form("graphed" if device.type == "cuda" else "eager", "loop")
    step, _ = programs.build(Program("fastfuse", form), case, Start(case))
    calls = CALLS_PER_TURN[device.type]

    def several() -> None:
        for _ in range(calls):
            step()

    return several, calls * case.batch_size


def _measure(report: Report, calls: dict[tuple[str, int], Call], step: tuple[Call, int] | None, repeats: int) -> None:
    images = report.settings["images"]
    used: dict[tuple[str, int], list[float]] = {}
    own = {key: _clocked(call, used.setdefault(key, [])) for key, call in calls.items()}
    named: dict[tuple[str, int], Call] = own | ({} if step is None else {("step", 0): step[0]})
    timings = measure_in_turn(named, repeats=repeats, calls=1, warmup=1, device=torch.device("cpu"))
    rate = None if step is None else step[1] / timings["step", 0].median * 1e3
    for (provider, processes), timing in timings.items():
        if provider == "step":
            report.rows.append(dict.fromkeys(COLUMNS, MISSING) | _speed(provider, 0, timing, step[1]))
            continue
        row = _speed(provider, processes, timing, images)
        row["per_core"] = MISSING if processes else images / statistics.median(used[provider, 0][1:])
        row["baseline_ratio"] = timings[BASELINE, processes].median / timing.median
        row["fed"] = MISSING if rate is None else row["images_per_s"] / rate
        report.rows.append(row)
        report.samples_ms[f"{provider} {processes}"] = timing.samples_ms
        if provider != BASELINE:
            report.ratios[f"{BASELINE}/{provider}, {processes or 'no'} workers"] = row["baseline_ratio"]


def _clocked(call: Call, seconds: list[float]) -> Call:
    """The call, noting the processor's seconds of this process, to which others on the machine add little."""

    def clocked() -> None:
        before = time.process_time()
        call()
        seconds.append(time.process_time() - before)

    return clocked


def _speed(provider: str, processes: int, timing: Timing, images: int) -> dict[str, Value]:
    speed = {"images_per_s": images / timing.median * 1e3}
    return {"provider": provider, "processes": processes, **figures.spread(timing), **speed}
