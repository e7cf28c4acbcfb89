"""References of the distributed operators: all ranks of a group at once, as plain loops over tokens and slots.

The functions of many ranks take one dict of arguments per rank. The battery uses them in a world of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.reference.common import Codes, Float

Calls = Sequence[dict[str, Any]]

DEFAULTS: dict[str, Any] = {
    "scales": None,
    "x_active_mask": None,
    "expert_scales": None,
    "tp_world_size": 0,
    "shared_expert_num": 1,
    "shared_expert_rank_num": 0,
    "quant_mode": 0,
    "global_bs": 0,
    "expert_token_nums_type": 1,
    "zero_expert_num": 0,
    "copy_expert_num": 0,
    "const_expert_num": 0,
    "shared_expert_x": None,
}


def _complete(calls: Calls) -> list[dict[str, Any]]:
    return [{**DEFAULTS, **call} for call in calls]


def _is_active(call: dict[str, Any], token: int, slot: int) -> bool:
    mask = call["x_active_mask"]
    if mask is None:
        return True
    return token < int(mask.sum()) if mask.dim() == 1 else bool(mask[token, slot])


def _visits(call: dict[str, Any], rank: int, world: int) -> list[tuple[int, int, int, int]]:
    """spec: routing 5.1 and 5.3 step 1. (destination rank, its local expert, token, slot) of each row that is sent."""
    ids, shared = call["expert_ids"], call["shared_expert_rank_num"]
    top_k, per_rank = ids.shape[1], call["moe_expert_num"] // (world - shared)
    visits = []
    for token in range(ids.shape[0]):
        for slot in range(top_k):
            expert = int(ids[token, slot])
            if _is_active(call, token, slot) and expert < call["moe_expert_num"]:
                visits.append((shared + expert // per_rank, expert % per_rank, token, slot))
        if shared and any(_is_active(call, token, slot) for slot in range(top_k)):
            replicas = shared // call["shared_expert_num"]
            numbers = range(call["shared_expert_num"])
            visits += [(rank % replicas + number * replicas, 0, token, top_k + number) for number in numbers]
    return visits


def received(calls: Calls) -> list[list[tuple[int, int, int, int]]]:
    """spec: routing 5.3 step 2. For each rank (local expert, source rank, token, slot) of its rows, in order."""
    calls = _complete(calls)
    rows: list[list[tuple[int, int, int, int]]] = [[] for _ in calls]
    for source, call in enumerate(calls):
        for target, expert, token, slot in _visits(call, source, len(calls)):
            rows[target].append((expert, source, token, slot))
    return [sorted(row) for row in rows]


def num_local(call: dict[str, Any], rank: int, world: int) -> int:
    """Experts on a rank."""
    call = {**DEFAULTS, **call}
    shared = call["shared_expert_rank_num"]
    return 1 if rank < shared else call["moe_expert_num"] // (world - shared)


def _room(version: int, call: dict[str, Any], rank: int, world: int) -> int:
    """spec: routing 5.2, the length A."""
    shared, top_k = call["shared_expert_rank_num"], call["expert_ids"].shape[1]
    tokens = call["global_bs"] or call["x"].shape[0] * world
    if rank >= shared:
        return tokens * min(num_local(call, rank, world), top_k)
    if version == 1:
        return tokens // shared
    replicas = shared // call["shared_expert_num"]
    return (tokens // world) * ((world + replicas - 1) // replicas)


def _padded(rows: list[Tensor], length: int, like: Tensor) -> Tensor:
    """Rows and behind them zeros."""
    return (
        torch.stack([*rows, *[torch.zeros_like(like)] * (length - len(rows))])
        if length
        else like.new_zeros(0, *like.shape)
    )


def _quantized(call: dict[str, Any], token: int, slot: int) -> tuple[Tensor, Tensor]:
    """spec: routing 5.3 step 6. The codes before rounding and the scale."""
    values, top_k = call["x"][token].double(), call["expert_ids"].shape[1]
    if call["scales"] is not None:
        shared = call["shared_expert_num"] if call["shared_expert_rank_num"] else 0
        row = slot - top_k if slot >= top_k else shared + int(call["expert_ids"][token, slot])
        values = values * call["scales"][row].double()
    largest = values.abs().max() if values.numel() else torch.zeros((), dtype=torch.float64)
    return (values * (127.0 / largest) if largest > 0 else torch.zeros_like(values)), largest / 127.0


def dispatch(version: int, calls: Calls) -> list[tuple[Any, ...]]:
    """spec: routing 5.2, 5.3. The seven results of each rank; quantized rows as float64 codes, in one lane."""
    calls, everyone = _complete(calls), received(calls)
    world, results = len(calls), []
    for rank, (call, rows) in enumerate(zip(calls, everyone, strict=True)):
        local, top_k = num_local(call, rank, world), call["expert_ids"].shape[1]
        room, x = _room(version, call, rank, world), call["x"]
        if call["quant_mode"] == 2:
            pairs = [_quantized(calls[source], token, slot) for _, source, token, slot in rows]
            expand_x: Any = Codes(_padded([codes for codes, _ in pairs], room, x.new_zeros(x.shape[1]).double()))
            scale_rows = [scale for _, scale in pairs]
            dynamic_scales: Any = Float(_padded(scale_rows, room, torch.zeros((), dtype=torch.float64)), torch.float32)
        else:
            expand_x = _padded(
                [calls[source]["x"][token] for _, source, token, _ in rows], room, x.new_zeros(x.shape[1])
            )
            dynamic_scales = torch.zeros(room)
            if call["scales"] is not None and x.dtype == torch.int32:
                scale_rows = [calls[source]["scales"][token] for _, source, token, _ in rows]
                dynamic_scales = _padded(scale_rows, room, torch.zeros(()))
            elif call["scales"] is not None:
                dynamic_scales = torch.zeros(room, call["scales"].shape[1])

        if version == 1:
            ids = call["expert_ids"].flatten().tolist()
            handle = torch.tensor([ids[:index].count(expert) for index, expert in enumerate(ids)], dtype=torch.int32)
        else:
            handle = torch.zeros(max(len(call["expert_ids"]) * top_k, 128 * room), dtype=torch.int32)
            for index, (_, source, token, slot) in enumerate(rows):
                handle[3 * index : 3 * index + 3] = torch.tensor([source, token, slot])
        nums = [sum(row[0] == expert for row in rows) for expert in range(local)]
        if call["expert_token_nums_type"] == 0:
            nums = [sum(nums[: index + 1]) for index in range(local)]
        length = world * local
        expand_scales = torch.zeros(room)
        if call["expert_scales"] is not None:
            tokens = call["global_bs"] or x.shape[0] * world
            length += 2 * tokens * top_k * (world // 8)
            for index, (_, source, token, slot) in enumerate(rows):
                expand_scales[index] = calls[source]["expert_scales"][token, slot] if slot < top_k else 1.0
        counts, total = torch.zeros(length, dtype=torch.int32), 0
        for expert in range(local):
            for source in range(world):
                total += sum(row[:2] == (expert, source) for row in rows)
                counts[expert * world + source] = total
        tp_counts = torch.zeros(call["tp_world_size"], dtype=torch.int32)
        token_nums = torch.tensor(nums, dtype=torch.int64)
        results.append((expand_x, dynamic_scales, handle, token_nums, counts, tp_counts, expand_scales))
    return results


def combine(calls: Calls) -> list[Tensor]:
    """spec: routing 5.5, in one lane. Float64 values of each rank; inactive tokens are zero."""
    calls, everyone = _complete(calls), received(calls)
    returned: dict[tuple[int, int, int], Tensor] = {}
    for call, rows in zip(calls, everyone, strict=True):
        for index, (_, source, token, slot) in enumerate(rows):
            returned[source, token, slot] = call["expand_x"][index].double()
    results = []
    for rank, call in enumerate(calls):
        ids, columns = call["expert_ids"], call["expand_x"].shape[1]
        tokens, top_k = ids.shape
        shared_x = (
            None if call["shared_expert_x"] is None else call["shared_expert_x"].double().reshape(tokens, columns)
        )
        out = []
        for token in range(tokens):
            total = torch.zeros(columns, dtype=torch.float64)
            for slot in range(top_k):
                if _is_active(call, token, slot):
                    term = _term(call, returned, rank, token, slot)
                    total = total + call["expert_scales"][token, slot].double() * term
            if any(_is_active(call, token, slot) for slot in range(top_k)):
                for number in range(call["shared_expert_num"] if call["shared_expert_rank_num"] else 0):
                    total = total + returned[rank, token, top_k + number]
                if shared_x is not None:
                    total = total + shared_x[token]
            out.append(total)
        results.append(torch.stack(out) if out else torch.zeros(0, columns, dtype=torch.float64))
    return results


def _term(
    call: dict[str, Any], returned: dict[tuple[int, int, int], Tensor], rank: int, token: int, slot: int
) -> Tensor:
    """What one expert gives for a token, before its weight."""
    expert = int(call["expert_ids"][token, slot])
    if expert < call["moe_expert_num"]:
        return returned[rank, token, slot]
    expert -= call["moe_expert_num"] + call["zero_expert_num"]
    if expert < 0:
        return torch.zeros(call["expand_x"].shape[1], dtype=torch.float64)
    ori_x = call["ori_x"][token].double()
    if expert < call["copy_expert_num"]:
        return ori_x
    expert -= call["copy_expert_num"]
    alpha_1, alpha_2, v = (
        call[name][expert].double() for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    )
    return alpha_1 * ori_x + alpha_2 * v


def to_experts(calls: Calls) -> list[Tensor]:
    """spec: routing 5.7. The rows of each rank by local expert and source, from those by destination and expert."""
    world = len(calls)
    experts = len(calls[0]["send_counts"]) // world
    blocks = [list(torch.split(call["gmm_x"], list(call["send_counts"]))) for call in calls]
    return [
        torch.cat([blocks[source][rank * experts + expert] for expert in range(experts) for source in range(world)])
        for rank in range(world)
    ]


def to_tokens(calls: Calls, rows: Sequence[Tensor]) -> list[Tensor]:
    """spec: routing 5.7. The way back of `rows`, which are by local expert and destination."""
    world = len(calls)
    experts = len(calls[0]["send_counts"]) // world
    blocks: list[dict[tuple[int, int], Tensor]] = []
    for call, own in zip(calls, rows, strict=True):
        lengths = [call["send_counts"][target * experts + e] for e in range(experts) for target in range(world)]
        parts = iter(torch.split(own, lengths))
        blocks.append({(e, target): next(parts) for e in range(experts) for target in range(world)})
    return [
        torch.cat([blocks[owner][e, rank] for owner in range(world) for e in range(experts)]) for rank in range(world)
    ]


def _times_experts(call: dict[str, Any], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Each row times the weight of its expert; `counts` by peer and expert."""
    weight = call["gmm_weight"].double()
    weight = weight.mT if call.get("trans_gmm_weight") else weight
    experts = weight.shape[0]
    lengths = [sum(counts[expert::experts]) for expert in range(experts)]
    parts = torch.split(rows.double(), lengths)
    return torch.cat([part @ weight[expert] for expert, part in enumerate(parts)])


def _beside(call: dict[str, Any]) -> Tensor | None:
    if call.get("mm_x") is None:
        return None
    weight = call["mm_weight"].double()
    return call["mm_x"].double() @ (weight.T if call.get("trans_mm_weight") else weight)


def alltoallv_gmm_ranks(calls: Calls) -> list[tuple[Any, ...]]:
    """spec: routing 5.7."""
    return [
        (_times_experts(call, rows, call["recv_counts"]), _beside(call), rows if call.get("permute_out_flag") else None)
        for call, rows in zip(calls, to_experts(calls), strict=True)
    ]


def gmm_alltoallv_ranks(calls: Calls) -> list[tuple[Any, ...]]:
    """spec: routing 5.7."""
    products = [_times_experts(call, call["gmm_x"], call["send_counts"]) for call in calls]
    return [(y, _beside(call)) for call, y in zip(calls, to_tokens(calls, products), strict=True)]


def out_dtype(expand_x: Tensor) -> torch.dtype:
    """spec: routing 7, number 20."""
    return torch.bfloat16 if expand_x.dtype == torch.int32 else expand_x.dtype


def add_rms_norm(combined: Tensor, dtype: torch.dtype, residual_x: Tensor, gamma: Tensor, norm_eps: float) -> Any:
    """spec: routing 5.6. The combination and x_out are rounded, as identities for a gradient."""

    def rounded(values: Tensor) -> Tensor:
        return values + (values.float().to(dtype).double() - values).detach() if dtype != torch.float64 else values

    x_out = rounded(rounded(combined).unsqueeze(1) + residual_x.double())
    rstd = 1.0 / torch.sqrt((x_out**2).mean(-1, keepdim=True) + norm_eps)
    y = x_out * rstd * gamma.double()
    rstd_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Float(y, dtype), Float(rstd, rstd_dtype), Float(x_out, dtype)


# --- one rank, by the names of the public arguments ------------------------------------------------------------------


def moe_distribute_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    expert_scales: Tensor | None = None,
    tp_world_size: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> Any:
    return dispatch(1, [{name: value for name, value in locals().items() if "group" not in name}])[0]


def moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    tp_world_size: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Any:
    return dispatch(2, [{name: value for name, value in locals().items() if "group" not in name}])[0]


def moe_distribute_combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    shared_expert_x: Tensor | None = None,
) -> Any:
    return Float(combine([dict(locals())])[0], out_dtype(expand_x))


def moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Any:
    return Float(combine([dict(locals())])[0], out_dtype(expand_x))


def moe_distribute_combine_add_rms_norm(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    residual_x: Tensor,
    gamma: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    norm_eps: float = 1e-6,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Any:
    combined = combine([dict(locals())])[0]
    return add_rms_norm(combined, out_dtype(expand_x), residual_x, gamma, norm_eps)


def alltoallv_gmm(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
) -> Any:
    return alltoallv_gmm_ranks([dict(locals())])[0]


def gmm_alltoallv(
    gmm_x: Tensor,
    gmm_weight: Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
) -> Any:
    return gmm_alltoallv_ranks([dict(locals())])[0]


def distribute_barrier(x_ref: Tensor, group: str, world_size: int) -> Tensor:
    return x_ref
