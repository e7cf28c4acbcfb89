"""Operators that communicate by themselves: dispatch, combine, all-to-all with grouped matmul, barrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel


def _in_group(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, with names of communicators in place of names of process groups."""

    def compute(**arguments: Any) -> Any:
        from moe_npu.sim.distributed import process_group  # which needs this package

        for name in ("group_ep", "hcom", "group"):
            if name in arguments:
                arguments[name] = process_group(arguments[name], name)
        if arguments.get("tp_world_size") == 2:
            arguments["group_tp"] = process_group(arguments["group_tp"], "group_tp")
        return operator(**arguments)

    return compute


_RANKS = (
    "group_ep:s ep_world_size:i ep_rank_id:i moe_expert_num:i group_tp:s tp_world_size:i tp_rank_id:i "
    "expert_shard_type:i shared_expert_num:i shared_expert_rank_num:i"
)
_SPECIAL_NUMBERS = "zero_expert_num:i copy_expert_num:i const_expert_num:i"
_RECEIVED = (
    ">expand_x:T >dynamic_scales:T >handle:T >expert_token_nums:T >ep_recv_counts:T >tp_recv_counts:T >expand_scales:T"
)
_DISPATCH = "quant_mode:i global_bs:i expert_token_nums_type:i"
_COMBINE = "global_bs:i out_dtype:i comm_quant_mode:i group_list_type:i"
_RESERVED = "activation_scale:T weight_scale:T group_list:T"
_SPECIAL = "shared_expert_x:T elastic_info:T ori_x:T const_expert_alpha_1:T const_expert_alpha_2:T const_expert_v:T"


def _dispatch_v2(**arguments: Any) -> Any:
    if arguments["x"].dtype == torch.float32:  # our operator computes it on CPU, and the adapter does not check
        raise ValueError("x must be float16, bfloat16 or int32, but is torch.float32")
    return ops.npu_moe_distribute_dispatch_v2(**arguments)


def _combine_v2(
    activation_scale: None, weight_scale: None, group_list: None, out_dtype: int, group_list_type: int, **arguments: Any
) -> Tensor:
    if (activation_scale, weight_scale, group_list, out_dtype, group_list_type) != (None, None, None, 0, 0):
        raise NotImplementedError("activation_scale, weight_scale, group_list, out_dtype and group_list_type")
    return ops.npu_moe_distribute_combine_v2(**arguments)


kernel(
    "aclnnMoeDistributeDispatch",
    f"x:T expert_ids:T scales:T x_active_mask:T expert_scales:T {_RANKS} {_DISPATCH} {_RECEIVED}",
    _in_group(ops.npu_moe_distribute_dispatch),
)
# torch_npu takes the latest version that there is
kernel(
    "aclnnMoeDistributeDispatchV4",
    "x:T expert_ids:T scales:T x_active_mask:T expert_scales:T elastic_info:T performance_info:T "
    f"{_RANKS} {_DISPATCH} comm_alg:s {_SPECIAL_NUMBERS} {_RECEIVED}",
    _in_group(_dispatch_v2),
)
kernel(
    "aclnnMoeDistributeCombine",
    "expand_x:T expert_ids:T expand_idx:T ep_send_counts:T expert_scales:T tp_send_counts:T x_active_mask:T "
    f"{_RESERVED} expand_scales:T {_RANKS} {_COMBINE} >x:T",
    _in_group(ops.npu_moe_distribute_combine),
)
kernel(
    "aclnnMoeDistributeCombineV4",
    "expand_x:T expert_ids:T assist_info_for_combine:T ep_send_counts:T expert_scales:T tp_send_counts:T "
    f"x_active_mask:T {_RESERVED} expand_scales:T {_SPECIAL} performance_info:T {_RANKS} {_COMBINE} comm_alg:s "
    f"{_SPECIAL_NUMBERS} >x:T",
    _in_group(_combine_v2),
)
kernel(
    "aclnnMoeDistributeCombineAddRmsNormV2",
    "expand_x:T expert_ids:T expand_idx:T ep_send_counts:T expert_scales:T residual_x:T gamma:T tp_send_counts:T "
    f"x_active_mask:T {_RESERVED} expand_scales:T {_SPECIAL} {_RANKS} {_COMBINE} comm_alg:s norm_eps:f "
    f"{_SPECIAL_NUMBERS} >y:T >rstd:T >x:T",
    _in_group(ops.npu_moe_distribute_combine_add_rms_norm),
)
for _name, _operator, _flags, _outputs in (
    ("AlltoAllvGroupedMatMul", ops.npu_alltoallv_gmm, " permute_out_flag:b", ">gmm_y:T >mm_y:T >permute_out:T"),
    ("GroupedMatMulAlltoAllv", ops.npu_gmm_alltoallv, "", ">y:T >mm_y:T"),
):
    for _version, _comm_mode in (("", ""), ("V2", " comm_mode:s")):
        kernel(
            f"aclnn{_name}{_version}",
            "gmm_x:T gmm_weight:T send_counts_tensor:T recv_counts_tensor:T mm_x:T mm_weight:T "
            f"hcom:s{_comm_mode} ep_world_size:i send_counts:A recv_counts:A trans_gmm_weight:b trans_mm_weight:b"
            f"{_flags} {_outputs}",
            _in_group(_operator),
        )


def _barrier(**arguments: Any) -> None:
    ops._npu_distribute_barrier(**arguments)


kernel(
    "aclnnDistributeBarrierV2",
    "=x_ref:T time_out:T elastic_info:T group:s world_size:i",
    _in_group(_barrier),
)


def _pad(x: Tensor, pad: list[int], value: float) -> Tensor:
    return torch.constant_pad_nd(x, pad, value)


# with which torch_npu pads what a group gathers
kernel("aclnnConstantPadNd", "x:T pad:A value:S >out:T", _pad)
