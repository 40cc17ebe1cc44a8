"""The operators, one folder each; importing this package imports every op.py and so registers every op.

The contract of an op: `op.py` checks shapes, dtypes and devices once, resolves the backend by name and calls it;
`reference.py` is plain traceable eager PyTorch, the truth in tests and the path on a CPU; kernels live beside it in
`triton_kernels.py` and `cuda.py` and are imported when first executed. Every backend equals the reference within the
error budget, forward and every gradient. Nothing waits for the device, nothing copies a channels-last tensor silently.
"""

# ruff: noqa: F401 - the imports register the ops.
import fastfuse.kernels.aggregate_distance.op
import fastfuse.kernels.attention_mse.op
import fastfuse.kernels.augment.op
import fastfuse.kernels.batch_norm_act.op
import fastfuse.kernels.concat_fuse.op
import fastfuse.kernels.deep_to_shallow.op
import fastfuse.kernels.diversity_target.op
import fastfuse.kernels.feature_kl.op
import fastfuse.kernels.feature_mse.op
import fastfuse.kernels.grouped_conv.op
import fastfuse.kernels.normalized_lp.op
import fastfuse.kernels.peer_kl_ce.op
