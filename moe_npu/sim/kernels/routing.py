"""Rows into the order of their experts and back, and replicas of experts."""

from __future__ import annotations

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel

kernel(
    "aclnnMoeInitRouting",
    "x:T row_idx:T expert_idx:T active_num:i >expanded_x:T >expanded_row_idx:T >expanded_expert_idx:T",
    ops.npu_moe_init_routing,
)
# aclnnMoeInitRoutingV2 is left out: torch_npu takes it with CANN before 8.5 only
kernel(
    "aclnnMoeInitRoutingV3",
    "x:T expert_idx:T scale:T offset:T active_num:i expert_capacity:i expert_num:i drop_pad_mode:i "
    "expert_tokens_num_type:i expert_tokens_num_flag:b quant_mode:i active_expert_range:A row_idx_type:i "
    ">expanded_x:T >expanded_row_idx:T >expert_tokens_count_or_cumsum:T >expanded_scale:T",
    ops.npu_moe_init_routing_v2,
)
kernel(
    "aclnnMoeInitRoutingQuantV2",
    "x:T expert_idx:T scale:T offset:T active_num:i expert_capacity:i expert_num:i drop_pad_mode:i "
    "expert_tokens_num_mode:i expert_tokens_before_capacity_flag:b quant_mode:i "
    ">expanded_x:T >expanded_row_idx:T >expert_tokens_count_or_cumsum:T >expert_tokens_before_capacity:T "
    ">dynamic_scale:T",
    ops.npu_moe_init_routing_quant,
)
kernel(
    "aclnnMoeComputeExpertTokens",
    "sorted_expert_for_source_row:T num_expert:i >out:T",
    ops.npu_moe_compute_expert_tokens,
)
kernel(
    "aclnnMoeReRouting",
    "tokens:T expert_token_num_per_rank:T per_token_scales:T expert_token_num_type:i idx_type:i "
    ">permute_tokens:T >permute_per_token_scales:T >permute_token_idx:T >expert_token_num:T",
    ops.npu_moe_re_routing,
)
kernel(
    "aclnnMoeFinalizeRoutingV4",
    "expanded_permuted_rows:T expanded_src_to_dst_row:T skip1:T skip2:T bias:T scales:T export_for_source_row:T "
    # experts that are zero, a copy or a constant: torch_npu passes none
    "_x:T _alpha1:T _alpha2:T _v:T drop_pad_mode:i _zero_expert_range:A _copy_expert_range:A _constant_expert_range:A "
    "k:i >out:T",
    ops.npu_moe_finalize_routing,
)
kernel(
    "aclnnMoeUpdateExpert",
    "expert_ids:T eplb_table:T expert_scales:T pruning_threshold:T active_mask:T local_rank_id:i world_size:i "
    "balance_mode:i >balanced_expert_ids:T >balanced_active_mask:T",
    ops.npu_moe_update_expert,
)
