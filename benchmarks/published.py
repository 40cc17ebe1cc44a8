"""FFSD the way its authors run it: the baseline of every speed claim, and an independent check of the engine.

One network after another, each with its own losses, `zero_grad`, `backward` and optimizer, every loss value read on the
host in every step. Plain PyTorch operations in the order of the published program; of fastfuse only the networks are
used, so that a fault in the engine cannot hide here too.

For ImageNet it is the same step on four tapped stages, so that a transform has three modules and a fused map of 7 x 7
is pooled; what else differs there lies outside of a step: rates that follow the iteration, and metrics.

Source: Li et al., arXiv 2103.14473, and the behaviour of its official program (CIFAR trainer, and the ImageNet trainer
for one GPU).
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfuse.models import IMAGENET, build

FUSION_WEIGHT_DECAY = 1e-5
TRANSFORM_LR = 1e-3
TRANSFORM_WEIGHT_DECAY = 1e-4
WARMUP_EPOCHS = 5


class FusionModule(nn.Module):
    """The students' last maps, concatenated, to one fused map and its logits."""

    def __init__(self, channels: int, students: int, num_classes: int) -> None:
        super().__init__()
        wide = channels * students
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.pointwise = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S*C, H, W] to logits [B, K] and the fused map [B, C, H, W]."""
        fused = F.relu(self.norm1(self.depthwise(x)))
        fused = F.relu(self.norm2(self.pointwise(fused)))
        pooled = F.avg_pool2d(fused, fused.shape[-2:]).flatten(1)
        return self.classifier(pooled), fused


class TransFusion(nn.Module):
    """The leader's last map, widened to the shape of the concatenated students' maps."""

    def __init__(self, channels: int, students: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels * students, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels * students)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, S*C, H, W]."""
        x = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(x)))


class TransformStage(nn.Module):
    """Transposed convolution, batch norm, ReLU: twice the extent."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(in_channels, out_channels, 3, 2, padding=1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, 2H, 2W]."""
        return F.relu(self.norm(self.deconv(x)))


class Transform(nn.Module):
    """A deep map to imitations of all shallower ones; `channels` are those of the tapped maps, shallow to deep."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(TransformStage(wide, narrow) for wide, narrow in pairwise(channels[::-1]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C_L, H, W] to L-1 maps, shallow to deep."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[::-1]


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_out))


def attention(feature: Tensor) -> Tensor:
    """Channel mean of squares, [B, C, H, W] to [B, H*W]."""
    return feature.pow(2).mean(1).flatten(1)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the two samplewise L2-normalised inputs [B, ...], 0-d."""
    return (F.normalize(x.flatten(1)) - F.normalize(y.flatten(1))).pow(2).mean()


def attention_distance(x: Tensor, y: Tensor) -> Tensor:
    """`distance` of the attention maps, 0-d."""
    return distance(attention(x), attention(y))


def cross_network_kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(sg target / T) || softmax(logits / T)), mean over the batch, 0-d."""
    log_p = F.log_softmax(logits / temperature, dim=1)
    q = F.softmax(target.detach() / temperature, dim=1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2


def _flipped(attention_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Diversity target t, normalised attention and un-normalised norm of [B, N]; the scale mix is the published one."""
    norm = attention_map.norm(dim=1, keepdim=True)
    normalised = F.normalize(attention_map)
    smallest = normalised.topk(attention_map.shape[1] // 3, dim=1, largest=False).values
    threshold = smallest[:, -1:]
    target = (norm / 2 - normalised) * torch.sign(normalised - threshold) + norm / 2
    return target, normalised, norm


def diversity_loss(x: Tensor, reference: Tensor) -> Tensor:
    """How far attention of `x` [B, C, H, W] is from the flipped attention of `reference` (no gradient to it), 0-d."""
    target, _, _ = _flipped(attention(reference.detach()))
    return (F.normalize(attention(x)) - target).pow(2).mean()


def diversity_target(feature: Tensor) -> Tensor:
    """`feature` [B, C, H, W] moved towards its flipped attention; no gradient."""
    feature = feature.detach()
    target, normalised, norm = _flipped(attention(feature))
    shift = (target - normalised) * norm / feature.shape[1]
    return feature + shift.view(feature.shape[0], 1, *feature.shape[2:])


def warmup(epoch: int) -> float:
    """Factor of the three lambdas in epoch `epoch` (1-based)."""
    return math.exp(-5.0 * (1.0 - epoch / WARMUP_EPOCHS) ** 2) if epoch <= WARMUP_EPOCHS else 1.0


class Activations(NamedTuple):
    """One forward of all networks; every loss of the step is computed from it, however stale it has become.

    Attributes:
        leader_logits, leader_maps: [B, K] and the leader's tapped maps, shallow to deep.
        trans_fused: [B, S*C, H, W] from the leader's last map.
        logits, maps: the same two for each student.
        concatenated: [B, S*C, H, W], the students' last maps without gradient.
        fused_logits, fused: what the fusion module makes of them, [B, K] and [B, C, H, W].
    """

    leader_logits: Tensor
    leader_maps: tuple[Tensor, ...]
    trans_fused: Tensor
    logits: list[Tensor]
    maps: list[tuple[Tensor, ...]]
    concatenated: Tensor
    fused_logits: Tensor
    fused: Tensor


class PublishedFFSD:
    """One FFSD training step, network by network.

    Args:
        model: a name of `fastfuse.models`, used for all students and the leader.
        students: S, at least 2.
        num_classes: K.
        lr, momentum, weight_decay: Nesterov SGD of students and leader; the fusion module's decay is 1e-5.
        temperature: T of every KL term.
        lambda_diversity, lambda_fusion, lambda_self_distillation: weights after the warm-up.
        device, dtype: of parameters and buffers.
        amp: the same program as its users would speed it up without changing it: forward and losses in bfloat16
            autocast, channels-last weights. Give it channels-last images.

    Attributes:
        networks: `student0`.., `leader` (with `trans_fusion` inside), `fusion`, `transform1`.., `transform_leader`.
        optimizers: one for each network, under the same names.

    Raises:
        ValueError: fewer than two students (their distillation term would divide by zero).
    """

    def __init__(
        self,
        model: str,
        *,
        students: int,
        num_classes: int,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        temperature: float = 2.0,
        lambda_diversity: float = 1e-5,
        lambda_fusion: float = 10.0,
        lambda_self_distillation: float = 1000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        amp: bool = False,
    ) -> None:
        if students < 2:
            raise ValueError(f"students must be at least 2, not {students}")
        self.students = students
        self.temperature = temperature
        self.lambda_diversity = lambda_diversity
        self.lambda_fusion = lambda_fusion
        self.lambda_self_distillation = lambda_self_distillation
        # Its trainer skips terms that weigh nothing; that for CIFAR computes them.
        self.for_imagenet = model in IMAGENET

        networks = {f"student{i}": build(model, num_classes) for i in range(students)}
        leader = build(model, num_classes)
        channels = tuple(leader.feature_channels)
        leader.trans_fusion = TransFusion(channels[-1], students)
        networks["leader"] = leader
        networks["fusion"] = FusionModule(channels[-1], students, num_classes)
        networks |= {f"transform{i}": Transform(channels) for i in range(1, students)}
        networks["transform_leader"] = Transform(channels)
        form = torch.channels_last if amp else torch.preserve_format
        self.networks = {
            name: network.to(device=device, dtype=dtype, memory_format=form) for name, network in networks.items()
        }
        self.amp = amp
        self.device_type = next(leader.parameters()).device.type

        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, network in self.networks.items():
            if name.startswith("transform"):
                optimizer = torch.optim.Adam(network.parameters(), TRANSFORM_LR, weight_decay=TRANSFORM_WEIGHT_DECAY)
            else:
                decay = FUSION_WEIGHT_DECAY if name == "fusion" else weight_decay
                optimizer = torch.optim.SGD(network.parameters(), lr, momentum, weight_decay=decay, nesterov=True)
            self.optimizers[name] = optimizer

    def load(self, arrays: Mapping[str, Any]) -> None:
        """Copy `init/<network>/<key>` arrays (a recording's) into the networks; every key must be there.

        Raises:
            RuntimeError: a key is missing, or too many, or of another shape.
        """
        for name, network in self.networks.items():
            prefix = f"init/{name}/"
            state = {key.removeprefix(prefix): torch.as_tensor(arrays[key]) for key in arrays if key.startswith(prefix)}
            network.load_state_dict(state, strict=True)

    def step(self, images: Tensor, labels: Tensor, *, epoch: int) -> dict[str, float | list[float]]:
        """Train every network on one batch.

        Args:
            images: [B, 3, H, W] in the networks' dtype, on their device.
            labels: [B] class indices, int64.
            epoch: 1-based; it sets the warm-up of the lambdas and nothing else.

        Returns:
            Every term before the update, as it enters its sum; one entry per student (or transform 1..) in a list.
        """
        for network in self.networks.values():
            network.train()
        with self._autocast(True):
            return self._train(images, labels, warmup(epoch))

    def _train(self, images: Tensor, labels: Tensor, factor: float) -> dict[str, float | list[float]]:
        stale = self._forward(images)
        terms: dict[str, float | list[float]] = {}
        for i in range(self.students):
            for name, value in self._train_student(i, stale, labels, factor).items():
                terms.setdefault(name, []).append(value)
        terms |= self._train_fusion(stale, labels)
        terms |= self._train_leader(stale, labels, factor)
        for i in range(1, self.students):
            for name, value in self._train_transform(f"transform{i}", stale.maps[i], factor).items():
                terms.setdefault(f"transform_{name}", []).append(value)
        for name, value in self._train_transform("transform_leader", stale.leader_maps, factor).items():
            terms[f"transform_leader_{name}"] = value
        return terms

    def _forward(self, images: Tensor) -> Activations:
        leader_logits, leader_maps = self.networks["leader"](images)
        trans_fused = self.networks["leader"].trans_fusion(leader_maps[-1])
        logits, maps = [], []
        for i in range(self.students):
            output = self.networks[f"student{i}"](images)
            logits.append(output.logits)
            maps.append(output.features)
        concatenated = torch.cat([student_maps[-1].detach() for student_maps in maps], dim=1)
        fused_logits, fused = self.networks["fusion"](concatenated)
        return Activations(leader_logits, leader_maps, trans_fused, logits, maps, concatenated, fused_logits, fused)

    def _train_student(self, i: int, stale: Activations, labels: Tensor, factor: float) -> dict[str, float]:
        logits, maps = stale.logits, stale.maps
        ce = F.cross_entropy(logits[i], labels)
        dml = sum(cross_network_kl(logits[i], logits[j], self.temperature) for j in range(self.students) if j != i)
        dml = dml / (self.students - 1)
        terms = {"student_ce": ce, "student_dml": dml}
        total = ce + dml
        if i > 0 and (self.lambda_diversity > 0 or not self.for_imagenet):
            # The reference is the previous student, and both terms carry the diversity weight: as published.
            weight = self.lambda_diversity * factor
            reference = maps[i - 1][-1]
            diversity = weight * diversity_loss(maps[i][-1], reference)
            targets = self._targets(f"transform{i}", diversity_target(reference))
            self_distillation = weight * sum(map(attention_distance, maps[i][:-1], targets))
            terms |= {"student_diversity": diversity, "student_self_distillation": self_distillation}
            total = total + diversity + self_distillation
        terms["student_total"] = total
        values = self._update(f"student{i}", total, terms)
        return {"student_diversity": 0.0, "student_self_distillation": 0.0} | values

    def _train_fusion(self, stale: Activations, labels: Tensor) -> dict[str, float]:
        ensemble = sum(stale.logits) / self.students
        ce = F.cross_entropy(stale.fused_logits, labels)
        kl = cross_network_kl(stale.fused_logits, ensemble, self.temperature)
        total = ce + kl
        return self._update("fusion", total, {"fusion_ce": ce, "fusion_kl": kl, "fusion_total": total})

    def _train_leader(self, stale: Activations, labels: Tensor, factor: float) -> dict[str, float]:
        weight = self.lambda_fusion * factor
        ce = F.cross_entropy(stale.leader_logits, labels)
        kl = cross_network_kl(stale.leader_logits, stale.fused_logits, self.temperature)
        fusion = weight * attention_distance(stale.leader_maps[-1], stale.fused.detach())
        trans_fusion = weight * attention_distance(stale.trans_fused, stale.concatenated)
        targets = self._targets("transform_leader", stale.fused.detach())
        self_distillation = weight * sum(map(attention_distance, stale.leader_maps[:-1], targets))
        total = ce + kl + fusion + trans_fusion + self_distillation
        terms = {
            "leader_ce": ce,
            "leader_kl": kl,
            "leader_fusion": fusion,
            "leader_trans_fusion": trans_fusion,
            "leader_self_distillation": self_distillation,
            "leader_total": total,
        }
        return self._update("leader", total, terms)

    def _train_transform(self, name: str, maps: tuple[Tensor, ...], factor: float) -> dict[str, float]:
        self.networks[name].train()
        weight = self.lambda_self_distillation * factor
        made = self.networks[name](maps[-1].detach())
        wanted = [feature.detach() for feature in maps[:-1]]
        feature_term = weight * sum(map(distance, made, wanted))
        attention_term = weight * sum(map(attention_distance, made, wanted))
        return self._update(name, feature_term + attention_term, {"feature": feature_term, "attention": attention_term})

    def _targets(self, name: str, deep: Tensor) -> list[Tensor]:
        # Published: running statistics, and a graph that is recorded only to be thrown away.
        self.networks[name].eval()
        return [feature.detach() for feature in self.networks[name](deep)]

    def _update(self, name: str, total: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
        with self._autocast(False):
            self.optimizers[name].zero_grad()
            total.backward()
            self.optimizers[name].step()
        return {term: value.item() for term, value in terms.items()}

    def _autocast(self, enabled: bool) -> AbstractContextManager:
        if not self.amp:
            return nullcontext()
        return torch.autocast(self.device_type, torch.bfloat16, enabled=enabled)
