"""Gating of routers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel

_SIGMOID = 1


def _gating_top_k_backward(x_norm: Tensor, norm_type: int, **arguments: Any) -> Tensor:
    if norm_type != _SIGMOID:
        raise NotImplementedError(f"the device has this gradient for norm_type 1 (sigmoid) only, not {norm_type}")
    if x_norm.numel() and not x_norm.any():
        # a device leaves the scores unwritten there, and computes from what its memory holds
        raise ValueError("x_norm must be the scores of the forward call, which needs out_flag=True, but is all zero")
    return ops.npu_moe_gating_top_k_backward(x_norm, norm_type=norm_type, **arguments)


kernel(
    "aclnnMoeGatingTopKSoftmax",
    "x:T finished:T k:i >y:T >expert_idx:T >row_idx:T",
    ops.npu_moe_gating_top_k_softmax,
)
kernel(
    "aclnnMoeGatingTopKSoftmaxV2",
    "x:T finished:T k:i renorm:i output_softmax:b >y:T >expert_idx:T >softmax_result:T",
    ops.npu_moe_gating_top_k_softmax_v2,
)
_TOP_K = (
    "k:i k_group:i group_count:i group_select_mode:i renorm:i norm_type:i out_flag:b routed_scaling_factor:d eps:d "
    ">y:T >expert_idx:T >norm_out:T"
)
kernel("aclnnMoeGatingTopK", f"x:T bias:T {_TOP_K}", ops.npu_moe_gating_top_k)
kernel("aclnnMoeGatingTopKV2", f"x:T bias:T input_ids:T tid2eid:T {_TOP_K}", ops.npu_moe_gating_top_k)
kernel(
    "aclnnMoeGatingTopKBackward",
    "x_norm:T grad_y:T expertIdx:T renorm:i norm_type:i routed_scaling_factor:d eps:d >grad_x:T",
    _gating_top_k_backward,
)
