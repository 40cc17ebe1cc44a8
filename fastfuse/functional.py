"""The public stateless operators. Each is documented where it is defined, in `fastfuse/kernels/<op>/op.py`."""

from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.attention_mse.op import attention_map, attention_mse
from fastfuse.kernels.augment.op import augment, normalize
from fastfuse.kernels.concat_fuse.op import ConcatFuse, concat_conv1x1, concat_fuse
from fastfuse.kernels.deep_to_shallow.op import Stage, deep_to_shallow
from fastfuse.kernels.diversity_target.op import diversity_loss, diversity_target
from fastfuse.kernels.feature_kl.op import feature_kl
from fastfuse.kernels.feature_mse.op import feature_mse
from fastfuse.kernels.normalized_lp.op import normalized_lp
from fastfuse.kernels.peer_kl_ce.op import ENSEMBLE, PeerKlCe, peer_kl, peer_kl_ce

__all__ = [
    "ENSEMBLE",
    "BatchNorm",
    "ConcatFuse",
    "PeerKlCe",
    "Stage",
    "attention_map",
    "attention_mse",
    "augment",
    "concat_conv1x1",
    "concat_fuse",
    "deep_to_shallow",
    "diversity_loss",
    "diversity_target",
    "feature_kl",
    "feature_mse",
    "normalize",
    "normalized_lp",
    "peer_kl",
    "peer_kl_ce",
]
