"""What only a GPU can show of the trainer."""

import pytest
import torch

from fastfuse.methods import METHODS, build_method
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_step_waits_for_nothing(name, amp):
    method = build_method(name, model="resnet8", students=2, num_classes=10).cuda()
    step = TrainStep(method, build_optimizers(method), amp=amp)
    images, labels = torch.randn(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda")
    progress = torch.zeros((), device="cuda")
    step(images, labels, progress)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in range(3):
            step.optimizers.set_factor(0.5**epoch)
            output = step(images, labels, progress.fill_(epoch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(output.loss).item()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(name):
    torch.manual_seed(0)
    on_cpu = build_method(name, model="resnet8", students=2, num_classes=10)
    on_gpu = build_method(name, model="resnet8", students=2, num_classes=10)
    on_gpu.load_state_dict(on_cpu.state_dict())
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    torch.backends.cudnn.allow_tf32 = False
    cpu_step = TrainStep(on_cpu, build_optimizers(on_cpu))
    gpu_step = TrainStep(on_gpu.cuda(), build_optimizers(on_gpu))
    ours = gpu_step(images.cuda(), labels.cuda(), torch.tensor(3.0, device="cuda"))
    theirs = cpu_step(images, labels, torch.tensor(3.0))
    assert ours.terms.keys() == theirs.terms.keys()
    for term, value in theirs.terms.items():
        torch.testing.assert_close(
            ours.terms[term].cpu(), value, rtol=1e-3, atol=1e-6, msg=lambda m, t=term: f"{t}: {m}"
        )


@pytest.mark.parametrize("options", ["--method ffsd", "--method ffl --amp bf16", "--method dml --amp fp16 --ema 0.9"])
def test_a_run_on_the_gpu_ends_and_resumes(train, options):
    run = train(*options.split(), "--device", "cuda", "--epochs", "3", "--max-time", "0.0001")
    assert run.summary["completed"] is False
    again = train(*options.split(), "--device", "cuda", "--epochs", "3", "--resume")
    assert again.summary["completed"] and len(again.metrics) == 3
