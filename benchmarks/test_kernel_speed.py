"""The suite "kernels" through pytest-benchmark: `pytest benchmarks --benchmark-only [--every-shape] [-k OP]`.

The same cases, providers and agreement as `benchmarks/run.py --suite kernels`; a group of its table is one operator at
one shape and dtype, forward or backward. On a CPU batches are small: it shows that everything runs and agrees, and what
is left out.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch._functorch import config as functorch_config

from benchmarks import kernels
from benchmarks.kernel_cases import KernelCase, cases

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CPU_BATCH = 4
PROVIDERS = ("reference", "compile", "fastfuse triton", "fastfuse cuda")
ROUNDS = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The short list of cases, or every one."""
    every = metafunc.config.getoption("--every-shape")
    chosen = [case for case in cases(batch=None if ON_GPU else CPU_BATCH) if every or case.quick]
    metafunc.parametrize("case", chosen, ids=[f"{case.op} {case.shape}" for case in chosen])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize("name", kernels.DTYPES)
def test_speed(benchmark: BenchmarkFixture, case: KernelCase, name: str, mode: str, provider: str) -> None:
    """One pass over all copies of the inputs, after the provider's results were found right."""
    dtype = kernels.DTYPES[name]
    providers, missing = kernels.providers_of(case, dtype, DEVICE)
    if provider not in providers:
        pytest.skip(next(reason for reason in missing if f"backend {provider.split()[-1]}:" in reason))
    copies = kernels.copies_of(case, dtype, DEVICE)
    if mode == "backward" and not any(x.requires_grad for x in copies[0]):
        pytest.skip(f"{case.op} has no gradient")
    kernels.agree(case, {p: providers[p] for p in dict.fromkeys(("reference", provider))}, copies[0])
    benchmark.group = f"{case.op} {case.shape} {name} {mode}"
    with functorch_config.patch(donated_buffer=False):  # a backward is timed many times over one forward
        call = kernels.one_pass(providers[provider], copies, mode, DEVICE)

        def synchronised() -> None:
            call()
            if ON_GPU:
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["copies"] = len(copies)
