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
        bytes_ = {kind: getattr(found, kind) for kind in ("gradients", "statistics", "buffers")}
        return bytes_, processes.expected(step.method, synchronised=synchronised), found.gathers

    def parsed(*arguments):
        return processes.parser().parse_args([*arguments, *(["--sync-batchnorm"] if synchronised else [])])

    for found, expected, gathers in together(2, own):
        assert found == expected
        # Of three networks of 9 norms side by side, the fusion head's 2, the students' transforms' 2 side by side, the
        # leader's 2; forward and backward.
        assert gathers == (2 * (9 + 2 + 2 + 2) if synchronised else 0)
        assert (found["statistics"] > 0) == synchronised and found["gradients"] > 0
