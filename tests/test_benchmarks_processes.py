"""What several processes exchange in a step, counted at the collectives and from the shapes."""

import pytest

from benchmarks import processes
from fastfuse.train.distributed import current
from tests.train.ranks import together


@pytest.mark.parametrize("synchronised", [False, True])
def test_a_step_exchanges_what_its_shapes_say(synchronised):
    options = ["--model", "resnet8", "--classes", "5", "--batch-size", "4", "--image-size", "8", "--device", "cpu"]

    def own():
        step, run = processes.made(parsed(*options), current(), processes.pick_device("cpu"))
        traffic = processes.Traffic(step)
        run()
        found = traffic.counting(run)
        return {kind: getattr(found, kind) for kind in ("gradients", "statistics", "buffers")}, processes.expected(
            step.method, synchronised=synchronised
        )

    def parsed(*arguments):
        return processes.parser().parse_args([*arguments, *(["--sync-batchnorm"] if synchronised else [])])

    for found, expected in together(2, own):
        assert found == expected
        assert (found["statistics"] > 0) == synchronised and found["gradients"] > 0
