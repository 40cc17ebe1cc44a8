"""Whole training steps against the published order: one backward and one optimizer per network, losses from stale maps.

The recordings hold one shape each (ResNet-20, two students); these runs carry the proof to other networks and numbers.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fastfuse.methods import Method, build_method
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.losses import published
from tests.losses.batches import differing, error

BOUND = 1e-9
CLASSES, BATCH = 6, 4
# Inside the warm-up (or ramp), again there, and after it: statistics and momenta of one step act on the next.
PROGRESS = (1.0, 2.0, 90.0)
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": False}


def rampup(current: float, length: float) -> float:
    return math.exp(-5 * (1 - min(current, length) / length) ** 2)


class Published:
    """Copies of a method's networks and modules, each with its own optimizer as in the published programs."""

    def __init__(self, method: Method, networks: list[nn.Module]) -> None:
        self.networks = copy.deepcopy(networks)
        self.state = published.trainable_copy(method.criterion)
        self.optimizers = [torch.optim.SGD(n.parameters(), weight_decay=1e-4, **SGD) for n in self.networks]
        self.fusion = torch.optim.SGD(self.parameters("fusion."), weight_decay=1e-5, **SGD)

    def parameters(self, prefix: str) -> list[Tensor]:
        return [t for name, t in self.state.items() if name.startswith(prefix) and t.requires_grad]


def update(optimizer: torch.optim.Optimizer, total: Tensor) -> None:
    optimizer.zero_grad()
    total.backward()
    optimizer.step()


def publish_ffsd(
    reference: Published, images: Tensor, labels: Tensor, progress: float, adams: dict[str, torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """One step: everything forward once, then students, fusion head, leader and transforms, each on its own loss."""
    *students, leader = [network(images) for network in reference.networks]
    hyper = {"temperature": 2.0, "diversity_mode": "published"}
    hyper |= {"lambda_diversity": 1e-5, "lambda_fusion": 10.0, "lambda_self_distillation": 1000.0}
    terms = published.ffsd(
        reference.state,
        hyper,
        [s.features for s in students],
        [s.logits for s in students],
        labels,
        leader_features=leader.features,
        leader_logits=leader.logits,
        factor=rampup(progress + 1, 5),
    )
    totals = {name: sum(own.values()) for name, own in terms.items()}
    order = {f"student{i}": reference.optimizers[i] for i in range(len(students))}
    order |= {"fusion": reference.fusion, "leader": reference.optimizers[-1]} | adams
    assert set(order) == set(totals)
    for name, optimizer in order.items():
        update(optimizer, totals[name])
    return published.flat(terms)


def publish_ffl(reference: Published, images: Tensor, labels: Tensor, progress: float) -> dict[str, Tensor]:
    """One step: one backward over the sum, one update of the sub-networks and one of the fusion head."""
    students = reference.networks[0](images)
    terms = published.ffl(
        reference.state,
        {"temperature": 3.0, "kl_target_epsilon": 0.0},
        [s.features[-1] for s in students],
        [s.logits for s in students],
        labels,
        factor=rampup(progress, 80),
    )
    flat = published.flat(terms)
    for optimizer in (reference.fusion, *reference.optimizers):
        optimizer.zero_grad()
    sum(flat.values()).backward()
    for optimizer in (*reference.optimizers, reference.fusion):
        optimizer.step()
    return flat


def compare(method: Method, networks: list[nn.Module], reference: Published) -> None:
    """Every parameter and running statistic, relative to its tensor's largest element."""
    off = {}
    for i, (ours, theirs) in enumerate(zip(networks, reference.networks, strict=True)):
        wanted = theirs.state_dict()
        off |= {f"{i}.{name}": error(t.double(), wanted[name].double()) for name, t in ours.state_dict().items()}
    own = method.criterion.state_dict()
    off |= {name: error(own[name], t.detach()) for name, t in reference.state.items()}
    assert {name: e for name, e in off.items() if e > BOUND} == {}


def batches(size: int) -> list[tuple[Tensor, Tensor, float]]:
    return [
        (torch.randn(BATCH, 3, size, size, dtype=torch.float64), torch.randint(CLASSES, (BATCH,)), progress)
        for progress in PROGRESS
    ]


def terms_equal(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(ours) == set(wanted)
    assert differing(ours, {name: term.detach() for name, term in wanted.items()}, BOUND) == {}


@pytest.mark.parametrize(
    ("model", "students", "size"),
    [
        pytest.param("resnet8", 2, 16, id="resnet8, two students"),
        pytest.param("resnet8", 3, 8, id="resnet8, three students, maps of 2x2"),
        pytest.param("wrn10_1", 2, 16, id="wrn10_1: biased convolutions, signed shallow maps, last norm momentum 0.9"),
        pytest.param("wrn10_1", 3, 12, id="wrn10_1, three students, maps of 3x3"),
        pytest.param("resnet8", 2, 13, id="resnet8, odd maps: transforms reach 2n - 1"),
    ],
)
def test_ffsd(model: str, students: int, size: int) -> None:
    method = build_method("ffsd", model=model, students=students, num_classes=CLASSES).double().train()
    networks = list(method.peers)
    reference = Published(method, networks)
    # The trans-fusion is part of the leader: same optimizer, same weight decay.
    leader = [*reference.networks[-1].parameters(), *reference.parameters("trans_fusion.")]
    reference.optimizers[-1] = torch.optim.SGD(leader, weight_decay=1e-4, **SGD)
    adams = {
        name.replace("student", "transform") if name != "leader" else "transform_leader": torch.optim.Adam(
            reference.parameters(f"transforms.{name}."), lr=1e-3, weight_decay=1e-4, foreach=False
        )
        for name in (*(f"student{i}" for i in range(1, students)), "leader")
    }
    step = TrainStep(method, build_optimizers(method))
    for images, labels, progress in batches(size):
        output = step(images, labels, torch.tensor(progress, dtype=torch.float64))
        terms_equal(output.terms, publish_ffsd(reference, images, labels, progress, adams))
        compare(method, networks, reference)


@pytest.mark.parametrize(
    ("students", "size"),
    [
        pytest.param(2, 16, id="two sub-networks"),
        pytest.param(3, 8, id="three sub-networks, maps of 2x2"),
        pytest.param(2, 13, id="odd maps"),
    ],
)
def test_ffl(students: int, size: int) -> None:
    method = build_method("ffl", model="resnet8", students=students, num_classes=CLASSES).double().train()
    reference = Published(method, [method.peers])
    step = TrainStep(method, build_optimizers(method))
    for images, labels, progress in batches(size):
        output = step(images, labels, torch.tensor(progress, dtype=torch.float64))
        terms_equal(output.terms, publish_ffl(reference, images, labels, progress))
        compare(method, [method.peers], reference)
