"""Rules of gating by groups, its gradient, and replica choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F32, F64, I32, I64, Rule, int64, ints, zeros

BOOL = torch.bool
TABLE = torch.tensor([[1, 5, -1, -1], [2, 6, 7, -1], [3, 8, 9, 10]], dtype=I32)


def gating(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_gating_top_k(**{"x": zeros(3, 8), "k": 2, "bias": zeros(8), **changes})


def hashed(**changes: Any) -> Callable[[], Any]:
    return gating(**{"input_ids": zeros(3, dtype=I64), "tid2eid": zeros(4, 2, dtype=I32), **changes})


def backward(**changes: Any) -> Callable[[], Any]:
    legal = {"x_norm": zeros(3, 8), "grad_y": zeros(3, 2), "expertIdx": zeros(3, 2, dtype=I32)}
    return lambda: ops.npu_moe_gating_top_k_backward(**{**legal, **changes})


def update(**changes: Any) -> Callable[[], Any]:
    legal = {"expert_ids": int64([[0, 1], [2, 1]]), "eplb_table": TABLE, "local_rank_id": 1, "world_size": 4}
    return lambda: ops.npu_moe_update_expert(**{**legal, **changes})


def pruned(**changes: Any) -> Callable[[], Any]:
    legal = {"expert_scales": zeros(2, 2), "pruning_threshold": zeros(2), "active_mask": zeros(2, dtype=BOOL)}
    return update(**{**legal, **changes})


def counts(*values: int) -> torch.Tensor:
    return torch.cat([ints(*values).unsqueeze(1), TABLE[:, 1:]], 1)


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(ELSEWHERE)


GATING: list[Rule] = [
    ("bias-elsewhere", gating(bias=_moved(zeros(8))), "bias must be on cpu"),
    ("keys-elsewhere", hashed(input_ids=_moved(zeros(3, dtype=I64))), "input_ids must be on cpu"),
    ("table-elsewhere", hashed(tid2eid=_moved(zeros(4, 2, dtype=I32))), "tid2eid must be on cpu"),
    ("3d", gating(x=zeros(1, 3, 8)), "npu_moe_gating_top_k: x must have 2 dimensions, but has shape (1, 3, 8)"),
    ("integers", gating(x=zeros(3, 8, dtype=I32)), "x must have dtype float16, bfloat16, float32, but has int32"),
    ("many-experts", gating(x=zeros(1, 2049), bias=None), "x must have at most 2048 experts, but has 2049"),
    ("bias-dtype", gating(bias=zeros(8, dtype=BF16)), "bias must have the dtype of x, float32, but has bfloat16"),
    ("float32-bias", gating(x=zeros(3, 8, dtype=F16)), "bias must have the dtype of x, float16, but has float32"),
    ("float64-bias", gating(bias=zeros(8, dtype=F64)), "bias must have the dtype of x, float32, but has float64"),
    ("2d-bias", gating(bias=zeros(1, 8)), "bias must have 1 dimensions, but has shape (1, 8)"),
    ("short-bias", gating(bias=zeros(7)), "bias must have one element for each of 8 experts, but has 7"),
    ("renorm", gating(renorm=2), "npu_moe_gating_top_k: renorm must be 0 or 1, but is 2"),
    ("norm-type", gating(norm_type=3), "npu_moe_gating_top_k: norm_type must be 0, 1 or 2, but is 3"),
    ("group-mode", gating(group_select_mode=2), "group_select_mode must be 0 or 1, but is 2"),
    ("groups", gating(group_count=3), "group_count must divide the number of experts 8, but is 3"),
    ("no-groups", gating(group_count=0), "group_count must divide the number of experts 8, but is 0"),
    ("k-group", gating(group_count=4, k_group=5), "k_group must be between 1 and group_count 4, but is 5"),
    ("no-k-group", gating(k_group=0), "k_group must be between 1 and group_count 1, but is 0"),
    (
        "group-of-one-by-two-best",
        gating(group_count=8, k_group=8, group_select_mode=1),
        "a group must have at least 2 experts with group_select_mode 1, but has 1",
    ),
    (
        "no-experts",
        gating(x=zeros(3, 0), bias=None, k=0),
        "a group must have at least 1 experts with group_select_mode 0, but has 0",
    ),
    (
        "padded-groups",
        gating(x=zeros(1, 130), bias=None, group_count=65, k_group=65),
        "each padded to a multiple of 32, must have at most 2048 experts, but there are 65 groups of 2",
    ),
    ("no-k", gating(k=0), "k must be between 1 and the 8 experts of 1 groups of 8, but is 0"),
    ("k-of-all", gating(k=9), "k must be between 1 and the 8 experts of 1 groups of 8, but is 9"),
    ("k-of-groups", gating(k=5, group_count=4, k_group=2), "the 4 experts of 2 groups of 2, but is 5"),
    ("only-keys", hashed(tid2eid=None), "input_ids and tid2eid must be given together"),
    ("only-table", hashed(input_ids=None), "input_ids and tid2eid must be given together"),
    ("2d-keys", hashed(input_ids=zeros(3, 1, dtype=I64)), "input_ids must have 1 dimensions, but has shape (3, 1)"),
    ("float-keys", hashed(input_ids=zeros(3)), "input_ids must have dtype int32, int64, but has float32"),
    ("1d-table", hashed(tid2eid=zeros(2, dtype=I32)), "tid2eid must have 2 dimensions, but has shape (2,)"),
    ("float-table", hashed(tid2eid=zeros(4, 2)), "tid2eid must have dtype int32, int64, but has float32"),
    ("few-keys", hashed(input_ids=zeros(2, dtype=I64)), "input_ids must have one key for each of 3 rows, but has 2"),
    ("wide-table", hashed(tid2eid=zeros(4, 3, dtype=I32)), "tid2eid must have k = 2 columns, but has 3"),
    (
        "hash-of-many",
        hashed(x=zeros(3, 80), bias=None, k=65, tid2eid=zeros(4, 65, dtype=I32)),
        "k must be at most 64 with tid2eid, but is 65",
    ),
    ("hash-of-groups", hashed(group_count=4, k_group=2), "tid2eid excludes groups, but k_group is 2 of 4"),
    ("key", hashed(input_ids=int64([0, 4, 1])), "input_ids must be between 0 and 3, but is 0 to 4"),
    ("negative-key", hashed(input_ids=int64([0, -1, 1])), "input_ids must be between 0 and 3, but is -1 to 1"),
    ("expert-of-key", hashed(tid2eid=zeros(4, 2, dtype=I32) + 8), "tid2eid must be between 0 and 7, but is 8 to 8"),
]

BACKWARD: list[Rule] = [
    ("grad-elsewhere", backward(grad_y=_moved(zeros(3, 2))), "grad_y must be on cpu"),
    ("ids-elsewhere", backward(expertIdx=_moved(zeros(3, 2, dtype=I32))), "expertIdx must be on cpu"),
    ("1d", backward(x_norm=zeros(8)), "npu_moe_gating_top_k_backward: x_norm must have 2 dimensions"),
    ("half", backward(x_norm=zeros(3, 8, dtype=F16)), "x_norm must have dtype float32, but has float16"),
    ("1d-grad", backward(grad_y=zeros(3)), "grad_y must have 2 dimensions, but has shape (3,)"),
    ("integer-grad", backward(grad_y=zeros(3, 2, dtype=I32)), "grad_y must have dtype float16, bfloat16, float32"),
    ("int64-ids", backward(expertIdx=zeros(3, 2, dtype=I64)), "expertIdx must have dtype int32, but has int64"),
    ("rows", backward(grad_y=zeros(2, 2)), "grad_y must have the 3 rows of x_norm, but has 2"),
    (
        "ids-shape",
        backward(expertIdx=zeros(3, 3, dtype=I32)),
        "expertIdx must have the shape of grad_y (3, 2), but has (3, 3)",
    ),
    ("renorm", backward(renorm=-1), "npu_moe_gating_top_k_backward: renorm must be 0 or 1, but is -1"),
    ("norm-type", backward(norm_type=-1), "norm_type must be 0, 1 or 2, but is -1"),
    (
        "expert",
        backward(expertIdx=ints(0, 8, 1, 2, 3, 4).view(3, 2)),
        "npu_moe_gating_top_k_backward: expertIdx must be between 0 and 7, but is 0 to 8",
    ),
]

UPDATE: list[Rule] = [
    ("table-elsewhere", update(eplb_table=_moved(TABLE)), "eplb_table must be on cpu"),
    ("scales-elsewhere", pruned(expert_scales=_moved(zeros(2, 2))), "expert_scales must be on cpu"),
    ("1d", update(expert_ids=int64([0, 1])), "npu_moe_update_expert: expert_ids must have 2 dimensions"),
    ("float-ids", update(expert_ids=zeros(2, 2)), "expert_ids must have dtype int32, int64, but has float32"),
    ("1d-table", update(eplb_table=TABLE[0]), "eplb_table must have 2 dimensions, but has shape (4,)"),
    ("int64-table", update(eplb_table=TABLE.long()), "eplb_table must have dtype int32, but has int64"),
    ("table-of-counts", update(eplb_table=TABLE[:, :1]), "a count and at least one replica, but has 1 columns"),
    ("only-scales", pruned(pruning_threshold=None), "expert_scales and pruning_threshold must be given together"),
    ("only-threshold", pruned(expert_scales=None), "expert_scales and pruning_threshold must be given together"),
    (
        "only-mask",
        update(active_mask=zeros(2, dtype=BOOL)),
        "active_mask requires expert_scales and pruning_threshold",
    ),
    ("integer-scales", pruned(expert_scales=zeros(2, 2, dtype=I32)), "expert_scales must have dtype float16, bfloat16"),
    (
        "other-scales",
        pruned(expert_scales=zeros(2, 3)),
        "expert_scales must have the shape of expert_ids (2, 2), but has (2, 3)",
    ),
    ("3d-threshold", pruned(pruning_threshold=zeros(1, 1, 2)), "pruning_threshold must have 1 or 2 dimensions"),
    (
        "half-threshold",
        pruned(pruning_threshold=zeros(2, dtype=F16)),
        "pruning_threshold must have dtype float32, but has float16",
    ),
    (
        "long-threshold",
        pruned(pruning_threshold=zeros(3)),
        "pruning_threshold must have shape (2,) or (1, 2), but has (3,)",
    ),
    (
        "threshold-per-token",
        pruned(pruning_threshold=zeros(2, 2)),
        "pruning_threshold must have shape (2,) or (1, 2), but has (2, 2)",
    ),
    ("2d-mask", pruned(active_mask=zeros(2, 2, dtype=BOOL)), "active_mask must have 1 dimensions"),
    ("float-mask", pruned(active_mask=zeros(2, dtype=F32)), "active_mask must have dtype bool, but has float32"),
    (
        "long-mask",
        pruned(active_mask=zeros(3, dtype=BOOL)),
        "active_mask must have one element for each of 2 tokens, but has 3",
    ),
    ("mode", update(balance_mode=2), "balance_mode must be 0 or 1, but is 2"),
    ("no-world", update(world_size=-1), "world_size must be given and positive with balance_mode 0, but is -1"),
    ("no-rank", update(local_rank_id=-1), "local_rank_id must be between 0 and 3 with balance_mode 0, but is -1"),
    ("rank", update(local_rank_id=4), "local_rank_id must be between 0 and 3 with balance_mode 0, but is 4"),
    ("id", update(expert_ids=int64([[0, 3]])), "expert_ids must be between 0 and 2, but is 0 to 3"),
    ("negative-id", update(expert_ids=int64([[0, -1]])), "expert_ids must be between 0 and 2, but is -1 to 0"),
    (
        "no-replica",
        update(eplb_table=counts(1, 0, 3)),
        "eplb_table's count of replicas must be between 1 and 2147483647, but is 0 to 3",
    ),
    (
        "more-replicas-than-columns",
        update(eplb_table=counts(1, 2, 4), local_rank_id=3),
        "the chosen column of eplb_table must be between 1 and 3, but is 1 to 4",
    ),
]

RULES: list[Rule] = [
    *((f"gating-top-k-{name}", call, words) for name, call, words in GATING),
    *((f"gating-backward-{name}", call, words) for name, call, words in BACKWARD),
    *((f"update-expert-{name}", call, words) for name, call, words in UPDATE),
]

LEGAL: list[Callable[[], Any]] = [
    gating(),
    gating(x=zeros(3, 8, dtype=F64)),
    gating(group_count=4, k_group=2, k=4, group_select_mode=1),
    gating(x=zeros(1, 2048), bias=None, group_count=64, k_group=64),
    hashed(),
    hashed(group_count=4, k_group=4),
    backward(),
    update(),
    update(balance_mode=1, local_rank_id=-1, world_size=-1),
    pruned(),
    pruned(active_mask=None),
    # what no id names is not looked at
    update(eplb_table=counts(1, 2, 0), expert_ids=int64([[0, 1]])),
]
