"""Rules of the distributed operators in a world of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from moe_npu.ops import _combine_kernel, distribute_combine
from tests.helpers.gloo import single_rank_group
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F64, I8, I32, I64, Rule, ints, zeros

Call = Callable[[], Any]

IDS = torch.tensor([[0, 2], [3, 1]], dtype=I32)
COUNTS = ints(1, 2, 3, 4)
GROUP = {"group_ep": None, "ep_world_size": 1, "ep_rank_id": 0, "moe_expert_num": 4}
SPECIAL = {"copy_expert_num": 1, "const_expert_num": 2}
TABLES = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")


def wants_grad(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def call(operator: Any, defaults: dict[str, Any], changes: dict[str, Any]) -> Call:
    def run() -> Any:
        arguments = {**defaults, **changes}
        for name in ("group_ep", "hcom", "group"):
            if name in arguments and arguments[name] is None:
                arguments[name] = single_rank_group()
        return operator(**arguments)

    return run


def dispatch(**changes: Any) -> Call:
    return call(ops.npu_moe_distribute_dispatch, {"x": zeros(2, 3), "expert_ids": IDS, **GROUP}, changes)


def dispatch_v2(**changes: Any) -> Call:
    return call(ops.npu_moe_distribute_dispatch_v2, {"x": zeros(2, 3), "expert_ids": IDS, **GROUP}, changes)


COMBINE = {
    "expand_x": zeros(4, 3),
    "expert_ids": IDS,
    "ep_send_counts": COUNTS,
    "expert_scales": torch.ones(2, 2),
    **GROUP,
}


def combine(**changes: Any) -> Call:
    return call(ops.npu_moe_distribute_combine, {**COMBINE, "expand_idx": ints(0, 0, 0, 0)}, changes)


def combine_v2(**changes: Any) -> Call:
    return call(
        ops.npu_moe_distribute_combine_v2, {**COMBINE, "assist_info_for_combine": zeros(512, dtype=I32)}, changes
    )


def norm(**changes: Any) -> Call:
    defaults = {"expand_idx": zeros(512, dtype=I32), "residual_x": zeros(2, 1, 3), "gamma": zeros(3)}
    return call(ops.npu_moe_distribute_combine_add_rms_norm, {**COMBINE, **defaults}, changes)


EXCHANGE = {
    "gmm_x": zeros(3, 4),
    "gmm_weight": zeros(2, 4, 5),
    "hcom": None,
    "ep_world_size": 1,
    "send_counts": [1, 2],
    "recv_counts": [1, 2],
}
BESIDE = {"mm_x": zeros(2, 3), "mm_weight": zeros(3, 6)}


def to_experts(**changes: Any) -> Call:
    return call(ops.npu_alltoallv_gmm, EXCHANGE, changes)


def to_tokens(**changes: Any) -> Call:
    return call(ops.npu_gmm_alltoallv, EXCHANGE, changes)


def barrier(**changes: Any) -> Call:
    return call(ops._npu_distribute_barrier, {"x_ref": zeros(2), "group": None, "world_size": 1}, changes)


def without_process_groups() -> Any:
    available = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        return dispatch(group_ep="0")()
    finally:
        torch.distributed.is_initialized = available


def on_a_device() -> Any:
    """The gradient that only a CPU computes, as a device would be asked for it."""
    return _combine_kernel._grad_npu()


def shared_rows_on_a_device() -> Any:
    """The argument that torch_npu leaves out of the sum."""
    args = dict.fromkeys(distribute_combine._V1_FIELDS)
    return distribute_combine._v1_npu(*{**args, "shared_expert_x": zeros(2, 3)}.values())


constants = {name: zeros(2, 3) for name in TABLES}
special = {**SPECIAL, "expert_ids": torch.tensor([[0, 4], [5, 1]], dtype=I32), "ep_send_counts": ints(1, 2, 2, 2)}
tokens = {"ori_x": zeros(2, 3)}

RULES: list[Rule] = [
    # what dispatch and combine have in common
    ("dispatch-ids-elsewhere", dispatch(expert_ids=IDS.to(ELSEWHERE)), "expert_ids must be on cpu"),
    ("dispatch-mask-elsewhere", dispatch_v2(x_active_mask=zeros(2).bool().to(ELSEWHERE)), "x_active_mask must be on"),
    ("dispatch-1d-ids", dispatch(expert_ids=IDS[0]), "expert_ids must have 2 dimensions, but has shape (2,)"),
    ("dispatch-int64-ids", dispatch(expert_ids=IDS.long()), "expert_ids must have dtype int32, but has int64"),
    ("dispatch-rank", dispatch(ep_rank_id=1), "ep_rank_id should be in [0, ep_world_size), but got ep_world_size=1"),
    ("dispatch-negative-rank", dispatch_v2(ep_rank_id=-1), "ep_rank_id should be in [0, ep_world_size)"),
    (
        "dispatch-all-ranks-shared",
        dispatch(shared_expert_rank_num=1),
        "shared_expert_rank_num should be in [0, ep_world_size)",
    ),
    (
        "dispatch-uneven-shared",
        dispatch(ep_world_size=6, shared_expert_num=2, shared_expert_rank_num=3),
        "shared expert setting invalid, got shared_expert_num=2, shared_expert_rank_num=3",
    ),
    (
        "dispatch-uneven-experts",
        dispatch(ep_world_size=3),
        "moe_expert_num must be a positive multiple of the 3 ranks with MoE experts, but is 4",
    ),
    ("dispatch-no-experts", dispatch(moe_expert_num=0), "moe_expert_num must be a positive multiple"),
    ("dispatch-17-ids", dispatch_v2(expert_ids=zeros(2, 17, dtype=I32), moe_expert_num=32), "1 to 16 columns"),
    ("dispatch-more-ids-than-experts", dispatch(moe_expert_num=1), "must have 1 to 1 columns for 1 experts, but has 2"),
    ("dispatch-no-ids", dispatch(expert_ids=zeros(2, 0, dtype=I32)), "expert_ids must have 1 to 4 columns"),
    ("dispatch-three-lanes", dispatch(tp_world_size=3), "tp_world_size must be 0, 1 or 2, but is 3"),
    ("dispatch-third-lane", dispatch(tp_world_size=2, tp_rank_id=2), "tp_rank_id must be 0 or 1 with tp_world_size 2"),
    (
        "dispatch-small-global-bs",
        dispatch(global_bs=1),
        "global_bs must be 0 or the largest number of tokens of a rank",
    ),
    ("dispatch-negative-global-bs", combine_v2(global_bs=-1), "global_bs must be 0 or the largest number of tokens"),
    ("dispatch-float-mask", dispatch_v2(x_active_mask=zeros(2)), "x_active_mask must have dtype bool"),
    ("combine-other-mask", combine_v2(x_active_mask=zeros(3).bool()), "x_active_mask must have one flag per token or"),
    ("dispatch-mask-with-holes", dispatch_v2(x_active_mask=torch.tensor([False, True])), "must be True first and then"),
    ("dispatch-large-id", dispatch(expert_ids=IDS + 1), "expert_ids must be 0 to 3, but are 1 to 4"),
    ("dispatch-negative-id", dispatch_v2(expert_ids=IDS - 1), "expert_ids must be 0 to 3, but are -1 to 2"),
    (
        "dispatch-no-such-group",
        dispatch(group_ep="nobody"),
        "group_ep 'nobody' is not the name of a process group here",
    ),
    ("dispatch-no-groups", without_process_groups, "group_ep '0' names a process group, but torch.distributed is not"),
    (
        "dispatch-other-world",
        dispatch_v2(ep_world_size=2),
        "ep_world_size must be the size of group_ep, which is 1, but is 2",
    ),
    (
        "dispatch-no-lane-group",
        dispatch_v2(tp_world_size=2, group_tp="nobody"),
        "group_tp 'nobody' is not the name of a process group here",
    ),
    # dispatch
    ("dispatch-1d", dispatch(x=zeros(6)), "x must have 2 dimensions, but has shape (6,)"),
    ("dispatch-int8", dispatch(x=zeros(2, 3, dtype=I8)), "x must have dtype float16, bfloat16, float32, but has int8"),
    ("dispatch-int32", dispatch(x=zeros(2, 3, dtype=I32)), "x must have dtype float16, bfloat16, float32"),
    ("dispatch-other-tokens", dispatch(x=zeros(3, 3)), "expert_ids must have one row per token, but has 2 for 3"),
    (
        "dispatch-shared-experts-nowhere",
        dispatch_v2(shared_expert_num=2),
        "shared expert setting invalid, got shared_expert_num=2, shared_expert_rank_num=0",
    ),
    ("dispatch-nums", dispatch(expert_token_nums_type=2), "the expert_token_nums_type should be 0 or 1, but is 2"),
    ("dispatch-quant-mode", dispatch_v2(quant_mode=1), "quant_mode must be 0 (none) or 2 (dynamic int8), but is 1"),
    (
        "dispatch-int4-quantized",
        dispatch_v2(x=zeros(2, 3, dtype=I32), quant_mode=2),
        "quant_mode must be 0 for int32 x, which is int4 already",
    ),
    (
        "dispatch-scales-elsewhere",
        dispatch(quant_mode=2, scales=zeros(4, 3).to(ELSEWHERE)),
        "scales must be on cpu",
    ),
    ("dispatch-weights-elsewhere", dispatch(expert_scales=zeros(2, 2).to(ELSEWHERE)), "expert_scales must be on cpu"),
    ("dispatch-half-weights", dispatch(expert_scales=zeros(2, 2, dtype=F16)), "expert_scales must have dtype float32"),
    ("dispatch-other-weights", dispatch(expert_scales=zeros(2, 3)), "expert_scales must have the shape of expert_ids"),
    (
        "dispatch-half-scales",
        dispatch_v2(quant_mode=2, scales=zeros(4, 3, dtype=BF16)),
        "scales must have dtype float32, but has bfloat16",
    ),
    (
        "dispatch-other-scales",
        dispatch(quant_mode=2, scales=zeros(5, 3)),
        "scales must have shape (4, 3), but has (5, 3)",
    ),
    ("dispatch-static-scales", dispatch(scales=zeros(4, 3)), "scales must be None with quant_mode 0"),
    ("dispatch-1d-scales", dispatch_v2(scales=zeros(4)), "scales must have 2 dimensions"),
    (
        "dispatch-int4-scales",
        dispatch_v2(x=zeros(2, 3, dtype=I32), scales=zeros(3)),
        "scales must have one entry per token of int32 x, but has shape (3,)",
    ),
    ("dispatch-mask", dispatch(x_active_mask=torch.ones(2).bool()), "x_active_mask must be None, it is reserved"),
    ("dispatch-shard-type", dispatch(expert_shard_type=1), "expert_shard_type must be 0"),
    ("dispatch-v2-shard-type", dispatch_v2(expert_shard_type=1), "expert_shard_type must be 0"),
    ("dispatch-elastic", dispatch_v2(elastic_info=zeros(6, dtype=I32)), "elastic_info must be None"),
    ("dispatch-negative-experts", dispatch_v2(zero_expert_num=-1), "zero_expert_num must not be negative, but is -1"),
    (
        "dispatch-waits-elsewhere",
        dispatch_v2(performance_info=zeros(1, dtype=I64).to(ELSEWHERE)),
        "performance_info must be on cpu",
    ),
    ("dispatch-float-waits", dispatch_v2(performance_info=zeros(1)), "performance_info must have dtype int64"),
    (
        "dispatch-other-waits",
        dispatch_v2(performance_info=zeros(2, dtype=I64)),
        "performance_info must have shape (1,), but has (2,)",
    ),
    ("dispatch-y-dtype", dispatch_v2(quant_mode=2, y_dtype=15), "y_dtype must be None or name int8, but is 15"),
    (
        "dispatch-weights-grad",
        dispatch(expert_scales=wants_grad(2, 2)),
        "expert_scales requires a gradient, but has none",
    ),
    (
        "dispatch-scales-grad",
        dispatch_v2(x=zeros(2, 3, dtype=I32), scales=wants_grad(2)),
        "scales requires a gradient, but has none",
    ),
    # combine
    ("combine-activation", combine(activation_scale=zeros(1)), "activation_scale must be None, it is reserved"),
    ("combine-out-dtype", norm(out_dtype=1), "out_dtype must be 0, other values are reserved, but is 1"),
    ("combine-1d", combine(expand_x=zeros(4)), "expand_x must have 2 dimensions, but has shape (4,)"),
    ("combine-int8", combine(expand_x=zeros(4, 3, dtype=I8)), "expand_x must have dtype float16, bfloat16, float32"),
    (
        "combine-shared-elsewhere",
        combine(shared_expert_x=zeros(2, 3).to(ELSEWHERE)),
        "shared_expert_x must be on cpu",
    ),
    (
        "combine-handle-elsewhere",
        combine(expand_idx=ints(0, 0, 0, 0).to(ELSEWHERE)),
        "expand_idx or assist_info_for_combine must be on cpu",
    ),
    ("combine-int64-counts", combine(ep_send_counts=COUNTS.long()), "ep_send_counts must have dtype int32"),
    ("combine-2d-counts", combine_v2(ep_send_counts=COUNTS.view(1, 4)), "ep_send_counts must have 1 dimensions"),
    ("combine-few-counts", combine(ep_send_counts=ints(1, 2, 4)), "ep_send_counts must have 4 entries, but has 3"),
    (
        "combine-weights-elsewhere",
        combine(expert_scales=zeros(2, 2).to(ELSEWHERE)),
        "expert_scales must be on cpu",
    ),
    ("combine-half-weights", combine(expert_scales=zeros(2, 2, dtype=BF16)), "expert_scales must have dtype float32"),
    ("combine-other-weights", combine(expert_scales=zeros(2, 1)), "expert_scales must have the shape of expert_ids"),
    (
        "combine-no-lane-counts",
        combine(tp_world_size=2),
        "tp_send_counts must be given with tp_world_size 2, but is None",
    ),
    (
        "combine-lane-counts-elsewhere",
        combine(tp_world_size=2, tp_send_counts=ints(1, 1).to(ELSEWHERE)),
        "tp_send_counts must be on cpu",
    ),
    (
        "combine-int64-lane-counts",
        combine(tp_world_size=2, tp_send_counts=zeros(2, dtype=I64)),
        "tp_send_counts must have dtype int32",
    ),
    (
        "combine-one-lane-count",
        combine(tp_world_size=2, tp_send_counts=ints(1)),
        "tp_send_counts must have one entry per lane, but has shape (1,)",
    ),
    ("combine-quant-mode", combine(comm_quant_mode=1), "comm_quant_mode must be 0 (none) or 2"),
    ("combine-expand-elsewhere", combine(expand_scales=torch.ones(4, device="meta")), "expand_scales must be on cpu"),
    (
        "combine-v2-performance",
        combine_v2(performance_info=torch.ones(3)),
        "performance_info must have dtype int64, but has float32",
    ),
    ("combine-expand-grad", combine(expand_scales=wants_grad(4)), "expand_scales requires a gradient, but has none"),
    (
        "combine-shared-twice",
        combine(ep_world_size=3, shared_expert_rank_num=1, ep_rank_id=0, shared_expert_x=zeros(2, 3)),
        "shared_expert_x must be None where ranks host shared experts",
    ),
    ("combine-1d-shared", combine(shared_expert_x=zeros(6)), "shared_expert_x must have 2 or 3 dimensions"),
    ("combine-half-shared", combine(shared_expert_x=zeros(2, 3, dtype=F16)), "shared_expert_x must have dtype float32"),
    (
        "combine-other-shared",
        combine(shared_expert_x=zeros(3, 3)),
        "shared_expert_x must have one row of 3 columns for",
    ),
    ("combine-negative-experts", combine_v2(copy_expert_num=-1), "copy_expert_num must not be negative, but is -1"),
    ("combine-no-tokens", combine_v2(**special, **constants), "ori_x must be given for copy and constant experts"),
    (
        "combine-half-tokens",
        combine_v2(**special, **constants, ori_x=zeros(2, 3, dtype=F16)),
        "ori_x must have dtype float32, but has float16",
    ),
    (
        "combine-other-tokens",
        combine_v2(**special, **constants, ori_x=zeros(3, 3)),
        "ori_x must have shape (2, 3), but has (3, 3)",
    ),
    ("combine-mask", combine(x_active_mask=torch.ones(2).bool()), "x_active_mask must be None, it is reserved"),
    ("combine-other-handle", combine(expand_idx=ints(0, 0)), "expand_idx must have one entry per entry of expert_ids"),
    (
        "combine-falling-counts",
        combine(ep_send_counts=ints(1, 2, 1, 4)),
        "ep_send_counts must be running totals, but is [1, 2, 1, 4]",
    ),
    (
        "combine-other-counts",
        combine(ep_send_counts=ints(0, 2, 3, 4)),
        "ep_send_counts of rank 0 does not belong to these expert_ids and masks",
    ),
    ("combine-few-rows", combine(expand_x=zeros(3, 3)), "expand_x must have the 4 rows of ep_send_counts, but has 3"),
    ("combine-grad-on-a-device", on_a_device, "expand_x and expert_scales have a gradient on CPU only"),
    ("combine-shared-rows-on-a-device", shared_rows_on_a_device, "shared_expert_x must be None on a device"),
    # combine, add, normalize
    ("norm-residual-elsewhere", norm(residual_x=zeros(2, 1, 3).to(ELSEWHERE)), "residual_x must be on cpu"),
    ("norm-half-gamma", norm(gamma=zeros(3, dtype=F16)), "gamma must have dtype float32, but has float16"),
    ("norm-2d-residual", norm(residual_x=zeros(2, 3)), "residual_x must have shape (2, 1, 3), but has (2, 3)"),
    # all-to-all with the grouped matmul
    ("exchange-1d", to_experts(gmm_x=zeros(3)), "gmm_x must have 2 dimensions, but has shape (3,)"),
    ("exchange-int8", to_tokens(gmm_x=zeros(3, 4, dtype=I8)), "gmm_x must have dtype float16, bfloat16, float32"),
    ("exchange-2d-weight", to_experts(gmm_weight=zeros(4, 5)), "gmm_weight must have 3 dimensions"),
    (
        "exchange-count-tensor",
        to_experts(send_counts_tensor=zeros(2)),
        "send_counts_tensor must be None, the lists say",
    ),
    ("exchange-half-beside", to_tokens(mm_x=zeros(2, 3)), "mm_x and mm_weight must be given both or neither"),
    ("exchange-weight-elsewhere", to_experts(gmm_weight=zeros(2, 4, 5).to(ELSEWHERE)), "gmm_weight must be on cpu"),
    (
        "exchange-float64-weight",
        to_experts(gmm_weight=zeros(2, 4, 5, dtype=F64)),
        "gmm_weight must have the dtype of gmm_x, float32, but has float64",
    ),
    (
        "exchange-other-weight",
        to_tokens(trans_gmm_weight=True),
        "gmm_x has 4 columns but each expert of gmm_weight has 5 rows",
    ),
    (
        "exchange-no-ranks",
        to_experts(ep_world_size=0),
        "ep_world_size and the experts of gmm_weight must be at least 1",
    ),
    ("exchange-few-counts", to_experts(recv_counts=[3]), "recv_counts must have 2 entries, for 2 experts on each of 1"),
    ("exchange-negative-counts", to_tokens(send_counts=[4, -1]), "send_counts must not be negative, but are [4, -1]"),
    (
        "exchange-other-rows",
        to_experts(send_counts=[1, 1]),
        "send_counts must add up to the 3 rows of gmm_x, but add up to 2",
    ),
    ("exchange-1d-mm-x", to_experts(mm_x=zeros(3), mm_weight=zeros(3, 6)), "mm_x must have 2 dimensions"),
    ("exchange-1d-mm-weight", to_experts(mm_x=zeros(2, 3), mm_weight=zeros(3)), "mm_weight must have 2 dimensions"),
    ("exchange-other-mm", to_tokens(**BESIDE, trans_mm_weight=True), "mm_x has 3 columns but mm_weight has 6 rows"),
    (
        "exchange-disagreement",
        to_experts(recv_counts=[2, 1]),
        "rank 0 has send_counts [1, 2] for rank 0, which has recv_counts [2, 1] for it",
    ),
    ("exchange-no-such-group", to_tokens(hcom="nobody"), "hcom 'nobody' is not the name of a process group here"),
    ("barrier-no-such-group", barrier(group="nobody"), "group 'nobody' is not the name of a process group here"),
    ("barrier-other-world", barrier(world_size=2), "world_size must be the size of group, which is 1, but is 2"),
    *[
        (f"combine-no-{name}", combine_v2(**special, **tokens, **{**constants, name: None}), f"{name} must be given")
        for name in TABLES
    ],
]

LEGAL: list[Call] = [
    dispatch(),
    dispatch_v2(),
    dispatch(shared_expert_num=2),
    dispatch(tp_world_size=1, tp_rank_id=7, group_tp="nobody"),
    # a token that takes no part may have any ids
    dispatch_v2(x_active_mask=torch.tensor([True, False]), expert_ids=torch.tensor([[0, 1], [-7, 99]], dtype=I32)),
    combine(),
    combine(expand_idx=zeros(2, 2, dtype=I32), tp_send_counts=zeros(9)),
    combine_v2(),
    combine_v2(**special, **constants, **tokens),
    norm(),
    to_experts(),
    to_experts(**BESIDE, send_counts=(1, 2)),
    to_tokens(),
    to_tokens(**BESIDE),
    barrier(),
]
