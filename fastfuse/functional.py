"""The public stateless operators. Each is documented where it is defined, in `fastfuse/kernels/<op>/op.py`."""

from fastfuse.kernels._across import Across, in_step
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.aggregate_distance.op import aggregate_distance
from fastfuse.kernels.attention_mse.op import attention_map, attention_mse
from fastfuse.kernels.augment.op import augment, normalize
from fastfuse.kernels.batch_norm_act.op import BatchNormAct, batch_norm_act
from fastfuse.kernels.concat_fuse.op import (
    ConcatConv1x1,
    ConcatFuse,
    Fusion,
    concat_conv1x1,
    concat_fuse,
    concat_fuse_all,
)
from fastfuse.kernels.deep_to_shallow.op import Stage, deep_to_shallow
from fastfuse.kernels.diversity_target.op import diversity, diversity_loss, diversity_target
from fastfuse.kernels.feature_kl.op import feature_kl
from fastfuse.kernels.feature_mse.op import feature_mse
from fastfuse.kernels.grouped_conv.op import grouped_conv
from fastfuse.kernels.normalized_lp.op import FeatureAttention, normalized_lp, normalized_lp_joint
from fastfuse.kernels.peer_kl_ce.op import ENSEMBLE, PeerKlCe, peer_kl, peer_kl_ce

__all__ = [
    "ENSEMBLE",
    "Across",
    "BatchNorm",
    "BatchNormAct",
    "ConcatConv1x1",
    "ConcatFuse",
    "FeatureAttention",
    "Fusion",
    "PeerKlCe",
    "Stage",
    "aggregate_distance",
    "attention_map",
    "attention_mse",
    "augment",
    "batch_norm_act",
    "concat_conv1x1",
    "concat_fuse",
    "concat_fuse_all",
    "deep_to_shallow",
    "diversity",
    "diversity_loss",
    "diversity_target",
    "feature_kl",
    "feature_mse",
    "grouped_conv",
    "in_step",
    "normalize",
    "normalized_lp",
    "normalized_lp_joint",
    "peer_kl",
    "peer_kl_ce",
]
