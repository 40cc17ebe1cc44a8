"""The equations of FFSD and FFL once more, network by network and in the order of the published programs.

Plain formulas, nothing of the package: what the drop-in loss and the methods are held against. `state` maps the keys of
`FusionLoss.state_dict()` to tensors; batch norms in training mode replace their running statistics in it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Terms = dict[str, dict[str, Tensor]]


def attention(feature: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H W]."""
    return (feature * feature).sum(1).flatten(1) / feature.shape[1]


def unit(x: Tensor) -> Tensor:
    flat = x.reshape(len(x), -1)
    return flat / (flat * flat).sum(1, keepdim=True).sqrt().clamp_min(1e-12)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """D2: mean over samples and elements."""
    return ((unit(x) - unit(y)) ** 2).sum() / x.numel()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    picked = logits[torch.arange(len(labels)), labels]
    return (torch.logsumexp(logits, 1) - picked).sum() / len(labels)


def kl(logits: Tensor, target: Tensor, temperature: float, epsilon: float = 0.0) -> Tensor:
    """T^2 KL(target || logits), batch mean; the target is constant."""
    q = torch.exp(target / temperature)
    q = (q / q.sum(1, keepdim=True)).detach() + epsilon
    log_p = logits / temperature - torch.logsumexp(logits / temperature, 1, keepdim=True)
    return temperature**2 * (q * (q.log() - log_p)).sum() / len(logits)


def shifted(reference: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Diversity target, normalised attention (both [B, N]) and norm [B, 1], position by position."""
    flat = attention(reference.detach())
    norm = (flat * flat).sum(1, keepdim=True).sqrt()
    normalised = unit(flat)
    target = torch.empty_like(flat)
    for b, row in enumerate(normalised.tolist()):
        scale = norm[b].item() if mode == "published" else 1.0
        threshold = sorted(row)[len(row) // 3 - 1]
        for n, value in enumerate(row):
            above = scale - value
            target[b, n] = above if value > threshold else value if value < threshold else scale / 2
    return target, normalised, norm


def diversity(feature: Tensor, reference: Tensor, mode: str) -> Tensor:
    target, _, _ = shifted(reference, mode)
    return ((unit(attention(feature)) - target) ** 2).sum() / target.numel()


def diversity_target(reference: Tensor, mode: str) -> Tensor:
    reference = reference.detach()
    target, normalised, norm = shifted(reference, mode)
    shift = (target - normalised) * norm / reference.shape[1]
    return reference + shift.reshape(len(reference), 1, *reference.shape[2:])


def batch_norm(x: Tensor, state: dict[str, Tensor], prefix: str, training: bool) -> Tensor:
    """Over [B, C, H, W]; in training mode moves the running statistics by a tenth, with the unbiased variance."""
    mean, variance = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
    if training:
        count = x.numel() // x.shape[1]
        old = mean, variance
        mean = x.sum((0, 2, 3)) / count
        variance = ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / count
        state[f"{prefix}.running_mean"] = 0.9 * old[0] + 0.1 * mean.detach()
        state[f"{prefix}.running_var"] = 0.9 * old[1] + 0.1 * variance.detach() * count / (count - 1)
    scaled = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return scaled * state[f"{prefix}.weight"][:, None, None] + state[f"{prefix}.bias"][:, None, None]


def fuse(features: Sequence[Tensor], state: dict[str, Tensor], prefix: str) -> Tensor:
    """The fused map of the fusion head, or trans-fusion's widened one."""
    x = torch.cat(list(features), 1)
    x = F.conv2d(x, state[f"{prefix}.depthwise.weight"], padding=1, groups=x.shape[1])
    x = batch_norm(x, state, f"{prefix}.norm1", True).clamp_min(0)
    x = torch.einsum("oc,bchw->bohw", state[f"{prefix}.pointwise.weight"][:, :, 0, 0], x)
    return batch_norm(x, state, f"{prefix}.norm2", True).clamp_min(0)


def classify(fused: Tensor, state: Mapping[str, Tensor], prefix: str = "fusion") -> Tensor:
    pooled = fused.sum((2, 3)) / (fused.shape[2] * fused.shape[3])
    return pooled @ state[f"{prefix}.classifier.weight"].T + state[f"{prefix}.classifier.bias"]


def connect(feature: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    """Through a 1x1 connector, where there is one of that name."""
    if f"{prefix}.conv.weight" not in state:
        return feature
    widened = torch.einsum("oc,bchw->bohw", state[f"{prefix}.conv.weight"][:, :, 0, 0], feature)
    return batch_norm(widened, state, f"{prefix}.norm", True)


def regress(maps: Sequence[Tensor], state: dict[str, Tensor], depth: int = 1) -> list[Tensor]:
    """Larger maps of one stage, `depth` from the last, at the smallest height and width: windows written out."""
    goal, found = [min(m.shape[d] for m in maps) for d in (2, 3)], []
    for i, x in enumerate(maps):
        prefix = f"regressors.student{i}" + ("" if depth == 1 else f"_{depth}")
        if [*x.shape[2:]] != goal:
            for d, side in zip((2, 3), goal, strict=True):
                step = x.shape[d] // side
                x = x.unfold(d, maps[i].shape[d] - (side - 1) * step, step)
            x = torch.einsum("ocij,bchwij->bohw", state[f"{prefix}.conv.weight"], x)
            x = batch_norm(x, state, f"{prefix}.norm", True)
        found.append(x)
    return found


def transform(
    deep: Tensor, state: dict[str, Tensor], name: str, like: Sequence[Tensor], training: bool
) -> list[Tensor]:
    """Maps of the resolutions of `like` without its last, shallow to deep."""
    maps = []
    x = deep
    for stage, goal in enumerate(reversed(like[:-1])):
        prefix = f"transforms.{name}.stages.{stage}"
        padding = tuple(goal.shape[d] - (2 * x.shape[d] - 1) for d in (2, 3))
        x = F.conv_transpose2d(x, state[f"{prefix}.deconv.weight"], stride=2, padding=1, output_padding=padding)
        x = batch_norm(x, state, f"{prefix}.norm", training).clamp_min(0)
        maps.insert(0, x)
    return maps


def train_transform(maps: Sequence[Tensor], state: dict[str, Tensor], name: str, weight: float) -> dict[str, Tensor]:
    """The two losses of one transform on its own network's maps."""
    own = [m.detach() for m in maps]
    made = transform(own[-1], state, name, own, training=True)
    pairs = list(zip(made, own[:-1], strict=True))
    return {
        "feature": weight * sum(distance(x, y) for x, y in pairs),
        "attention": weight * sum(distance(attention(x), attention(y)) for x, y in pairs),
    }


def ffsd(
    state: dict[str, Tensor],
    hyper: Mapping[str, float | str],
    features: Sequence[Sequence[Tensor]],
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    leader_features: Sequence[Tensor] | None = None,
    leader_logits: Tensor | None = None,
    factor: float = 1.0,
    trained_on: Mapping[int, int] | None = None,
    together: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
    like: Callable[[Tensor, Tensor], Tensor] = lambda target, other: target,
) -> Terms:
    """Each network's own terms; everything of other networks is constant in them.

    Args:
        hyper: temperature, the three lambdas and diversity_mode.
        factor: the warm-up's, on all three lambdas.
        trained_on: which student's maps the transform of student i learns from; i itself, as published, if None.
        together: what brings the students' last maps to the size at which they are fused.
        like: gives the map of one student the size of another's.
    """
    count, last = len(features), [maps[-1].detach() for maps in features]
    temperature, mode = hyper["temperature"], hyper["diversity_mode"]
    lam_div, lam_fus, lam_sd = (
        factor * hyper[f"lambda_{name}"] for name in ("diversity", "fusion", "self_distillation")
    )
    staged = len(features[0]) > 1
    constant = [row.detach() for row in logits]
    joined = together(last)
    fused = fuse(joined, state, "fusion")
    fused_logits = classify(fused, state)
    found: Terms = {}
    for i in range(count):
        reference = like(last[i - 1], last[i])
        own = found[f"student{i}"] = {"ce": cross_entropy(logits[i], labels)}
        peers = [kl(logits[i], constant[j], temperature) for j in range(count) if j != i]
        own["dml"] = sum(peers) / (count - 1)
        if i:
            own["diversity"] = lam_div * diversity(features[i][-1], reference, mode)
        if i and staged:
            made = transform(diversity_target(reference, mode), state, f"student{i}", features[i], training=False)
            pairs = zip(features[i][:-1], made, strict=True)
            own["self_distillation"] = lam_div * sum(distance(attention(x), attention(y.detach())) for x, y in pairs)
    found["fusion"] = {
        "ce": cross_entropy(fused_logits, labels),
        "kl": kl(fused_logits, sum(constant) / count, temperature),
    }
    if leader_features is not None:
        target = attention(fused.detach())
        widened = fuse([leader_features[-1]], state, "trans_fusion")
        found["leader"] = own = {
            "ce": cross_entropy(leader_logits, labels),
            "kl": kl(leader_logits, fused_logits.detach(), temperature),
            "fusion": lam_fus * distance(attention(leader_features[-1]), target),
            "trans_fusion": lam_fus * distance(attention(widened), attention(torch.cat(joined, 1).detach())),
        }
        if staged:
            made = transform(fused.detach(), state, "leader", leader_features, training=False)
            pairs = zip(leader_features[:-1], made, strict=True)
            own["self_distillation"] = lam_fus * sum(distance(attention(x), attention(y.detach())) for x, y in pairs)
    if staged:
        for i in range(1, count):
            source = (trained_on or {}).get(i, i)
            found[f"transform{i}"] = train_transform(features[source], state, f"student{i}", lam_sd)
        if leader_features is not None:
            found["transform_leader"] = train_transform(leader_features, state, "leader", lam_sd)
    return found


def ffl(
    state: dict[str, Tensor],
    hyper: Mapping[str, float],
    features: Sequence[Tensor],
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    factor: float = 1.0,
) -> Terms:
    """Each head's terms; the fusion head's reach the sub-networks, since its input is not constant."""
    temperature, epsilon = hyper["temperature"], hyper["kl_target_epsilon"]
    fused_logits = classify(fuse(features, state, "fusion"), state)
    found: Terms = {
        f"student{i}": {
            "ce": cross_entropy(row, labels),
            "kl": factor * kl(row, fused_logits.detach(), temperature, epsilon),
        }
        for i, row in enumerate(logits)
    }
    ensemble = sum(row.detach() for row in logits) / len(logits)
    found["fusion"] = {
        "ce": cross_entropy(fused_logits, labels),
        "kl": factor * kl(fused_logits, ensemble, temperature, epsilon),
    }
    return found


def flat(terms: Terms) -> dict[str, Tensor]:
    """Terms under the names of `FusionLossOutput.terms`."""
    return {f"{network}_{name}": term for network, own in terms.items() for name, term in own.items()}


def trainable_copy(module: nn.Module) -> dict[str, Tensor]:
    """A module's state apart from it: parameters as leaves that require a gradient, buffers as they are."""
    parameters = {name for name, _ in module.named_parameters()}
    return {
        name: tensor.detach().clone().requires_grad_(name in parameters)
        for name, tensor in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def scramble(module: nn.Module) -> nn.Module:
    """Batch norms with weights, biases and running statistics that differ from their start, so that each one counts."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.3, 0.3)
                norm.running_mean.uniform_(-0.3, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
    return module
