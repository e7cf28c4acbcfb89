"""The rules and the CPU kernel of both dispatch operators (spec: routing 5.1 to 5.3).

rows of a rank: by local expert, then source rank, then pair t*K + j of the source
ep_recv_counts[l*W + p] = running total over [local expert][source rank]
quant_mode 2: v = x * scales[expert], dynamic_scales = max|v| / 127, expand_x = round(v * 127 / max|v|)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype, require_no_gradient
from moe_npu.ops._expert_exchange import Topology, check_topology, dtype_fact, open_exchange
from moe_npu.ops._numerics import round_to_int

V1, V2 = "npu_moe_distribute_dispatch", "npu_moe_distribute_dispatch_v2"
_DYNAMIC_INT8 = 2
# rows per expert that a device reserves for the triples of one row
_TRIPLE_ROOM = 128
Results = tuple[torch.Tensor, ...]


class Call(NamedTuple):
    """The arguments of one call, checked; the order is that of the v2 operator's schema."""

    x: torch.Tensor
    expert_ids: torch.Tensor
    scales: torch.Tensor | None
    x_active_mask: torch.Tensor | None
    expert_scales: torch.Tensor | None
    performance_info: torch.Tensor | None
    group_ep: str
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    group_tp: str
    tp_world_size: int
    tp_rank_id: int
    shared_expert_num: int
    shared_expert_rank_num: int
    quant_mode: int
    global_bs: int
    expert_token_nums_type: int
    comm_alg: str = ""
    zero_expert_num: int = 0
    copy_expert_num: int = 0
    const_expert_num: int = 0

    @property
    def num_special(self) -> int:
        """Experts that live nowhere."""
        return self.zero_expert_num + self.copy_expert_num + self.const_expert_num

    @property
    def topology(self) -> Topology:
        """What dispatch and combine have in common."""
        return Topology(**{name: getattr(self, name) for name in Topology._fields})


def v1_call(*args: Any) -> Call:
    """The call of the arguments of the first version."""
    x, expert_ids, scales, expert_scales, *attributes = args
    return Call(x, expert_ids, scales, None, expert_scales, None, *attributes)


# ---------------------------------------------------------------- rules and shapes


def check(op: str, call: Call) -> None:
    """Every rule of dispatch."""
    x, expert_ids = call.x, call.expert_ids
    is_v2 = op == V2
    require_dim(op, "x", x, (2,))
    floats = (torch.float16, torch.bfloat16) + ((torch.float32,) if x.device.type in ("cpu", "meta") else ())
    require_dtype(op, "x", x, (*floats, torch.int32) if is_v2 else floats)
    check_topology(op, x, expert_ids, call.x_active_mask, call.topology)
    if expert_ids.size(0) != x.size(0):
        reject(f"{op}: expert_ids must have one row per token, but has {expert_ids.size(0)} for {x.size(0)} tokens")
    if is_v2:
        experts, ranks = call.shared_expert_num, call.shared_expert_rank_num
        if not ((ranks == 0 and experts in (0, 1)) or (experts > 0 and ranks >= experts)):
            reject(
                f"{op}: shared expert setting invalid, got shared_expert_num={experts}, "
                f"shared_expert_rank_num={ranks}; without shared ranks shared_expert_num is 0 or 1"
            )
    if call.expert_token_nums_type not in (0, 1):
        reject(f"{op}: the expert_token_nums_type should be 0 or 1, but is {call.expert_token_nums_type}")
    if call.quant_mode not in (0, _DYNAMIC_INT8):
        reject(f"{op}: quant_mode must be 0 (none) or 2 (dynamic int8), but is {call.quant_mode}")
    require(
        call.quant_mode == 0 or x.is_floating_point(), f"{op}: quant_mode must be 0 for int32 x, which is int4 already"
    )
    require_device(op, "scales", call.scales, x)
    require_device(op, "expert_scales", call.expert_scales, x)
    if call.scales is not None:
        _check_scales(op, call, call.scales)
    if call.expert_scales is not None:
        require_dtype(op, "expert_scales", call.expert_scales, (torch.float32,))
        if call.expert_scales.shape != expert_ids.shape:
            reject(
                f"{op}: expert_scales must have the shape of expert_ids {tuple(expert_ids.shape)}, "
                f"but has {tuple(call.expert_scales.shape)}"
            )


def _check_scales(op: str, call: Call, scales: torch.Tensor) -> None:
    require_dtype(op, "scales", scales, (torch.float32,))
    if call.quant_mode == _DYNAMIC_INT8:
        rows = call.moe_expert_num + call.topology.num_shared
        if scales.shape != (rows, call.x.size(1)):
            reject(f"{op}: scales must have shape {(rows, call.x.size(1))}, but has {tuple(scales.shape)}")
        return
    require(op == V2, f"{op}: scales must be None with quant_mode 0")
    if call.x.dtype != torch.int32:
        require_dim(op, "scales", scales, (2,))
    elif scales.shape != call.x.shape[:1]:
        reject(f"{op}: scales must have one entry per token of int32 x, but has shape {tuple(scales.shape)}")


def _capacity(op: str, call: Call, rank: int) -> int:
    """Rows that ``rank`` has room for (spec: routing 5.2)."""
    world, topology = call.ep_world_size, call.topology
    tokens = call.global_bs or call.x.size(0) * world
    if rank >= call.shared_expert_rank_num:
        return tokens * torch.sym_min(topology.experts_per_rank, call.expert_ids.size(1))
    if op == V1:
        return tokens // call.shared_expert_rank_num
    return tokens // world * -(-world // topology.replica_ranks)


def allocate(op: str, call: Call, new: Callable[..., torch.Tensor]) -> Results:
    """The seven results (spec: routing 5.2)."""
    topology = call.topology
    room = _capacity(op, call, call.ep_rank_id)
    lanes = topology.num_lanes
    num_pairs = call.expert_ids.numel()
    num_local = topology.num_local(call.ep_rank_id)
    scales: tuple[int, ...] = (lanes * room,)
    if call.quant_mode == 0 and call.scales is not None and call.x.is_floating_point() and lanes == 1:
        scales = (room, call.scales.size(1))
    num_counts = call.ep_world_size * num_local * lanes
    if call.expert_scales is not None:  # room for the hierarchical algorithm, which runs on groups of eight
        tokens = call.global_bs or call.x.size(0) * call.ep_world_size
        num_counts = call.ep_world_size * num_local
        num_counts += 2 * tokens * call.expert_ids.size(1) * (call.ep_world_size // 8)
    return (
        new((lanes * room, call.x.size(1)), dtype=torch.int8 if call.quant_mode else call.x.dtype),
        new(scales, dtype=torch.float32),
        new((num_pairs if op == V1 else torch.sym_max(num_pairs, _TRIPLE_ROOM * room),), dtype=torch.int32),
        new((num_local,), dtype=torch.int64),
        new((num_counts,), dtype=torch.int32),
        new((call.tp_world_size,), dtype=torch.int32),
        new((room,), dtype=torch.float32),
    )


# ---------------------------------------------------------------- CPU


def _quantized(call: Call, tokens: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 rows of the pairs and their scales; shared experts have the first rows of ``scales``."""
    values = call.x.index_select(0, tokens).float()
    if call.scales is not None:
        top_k = call.expert_ids.size(1)
        experts = call.expert_ids[tokens, slots.clamp(max=top_k - 1)].long()
        if call.topology.num_shared:
            experts = torch.where(slots < top_k, experts + call.topology.num_shared, slots - top_k)
        values *= call.scales.float().index_select(0, experts)
    largest = values.abs().amax(1, keepdim=True) if values.size(1) else values.new_zeros(values.size(0), 1)
    # the quotient first: 127 / largest overflows for the smallest rows
    return round_to_int(values / largest * 127.0, -128, 127), largest / 127.0


def _earlier_pairs(expert_ids: torch.Tensor) -> torch.Tensor:
    """For each pair the number of earlier pairs with the same expert."""
    experts = expert_ids.contiguous().view(-1)
    order = torch.argsort(experts, stable=True)
    ranked = torch.empty_like(order)
    ranked[order] = torch.arange(order.numel())
    first = torch.searchsorted(experts[order], experts)
    return ranked - first


def dispatch_cpu(op: str, call: Call) -> Results:
    """The definition."""
    x, topology = call.x, call.topology
    facts = {
        "columns of x": x.size(1),
        **dtype_fact(x),
        "quant_mode": call.quant_mode,
        "use of scales": int(call.scales is not None),
        "use of expert_scales": int(call.expert_scales is not None),
    }
    exchange = open_exchange(
        op,
        topology,
        call.expert_ids,
        call.x_active_mask,
        facts,
        capacity=lambda rank: _capacity(op, call, rank),
    )
    tokens, slots, _ = exchange.pairs
    results = allocate(op, call, x.new_zeros)
    expand_x, dynamic_scales, handle, expert_token_nums, ep_recv_counts, tp_recv_counts, expand_scales = results

    row_scales = None
    if call.quant_mode == _DYNAMIC_INT8:
        rows, row_scales = _quantized(call, tokens, slots)
    else:
        rows = x.index_select(0, tokens)
        if call.scales is not None and not x.is_floating_point():
            row_scales = call.scales.float()[tokens].unsqueeze(1)
    rows = exchange.join_lanes(exchange.to_experts(rows))
    expand_x[: rows.size(0)] = rows
    if row_scales is not None:
        row_scales = exchange.join_lanes(exchange.to_experts(row_scales))
        dynamic_scales[: row_scales.size(0)] = row_scales.squeeze(1)

    if op == V1:
        handle.copy_(_earlier_pairs(call.expert_ids))
    else:
        triples = torch.stack([torch.full_like(tokens, call.ep_rank_id), tokens, slots], 1).to(torch.int32)
        triples = exchange.to_experts(triples)
        handle[: triples.numel()] = triples.flatten()
    if call.expert_scales is not None:
        # the rows of shared experts are added as they are
        ones = call.expert_scales.new_ones(x.size(0), topology.num_shared)
        weights = torch.cat([call.expert_scales, ones], 1)[tokens, slots].float()
        expand_scales[: exchange.num_received] = exchange.to_experts(weights.unsqueeze(1)).squeeze(1)

    arriving = exchange.arriving
    per_expert = arriving.sum(0)
    expert_token_nums.copy_(per_expert if call.expert_token_nums_type else per_expert.cumsum(0))
    ep_recv_counts[: arriving.numel()] = arriving.t().flatten().cumsum(0)
    if topology.num_lanes == 2:
        tp_recv_counts.copy_(torch.tensor(exchange.lane_rows))
    return results


def without_gradients(op: str, call: Call) -> Call:
    """Codes have no gradient, and nothing but x has one."""
    require_no_gradient(op, "expert_scales", call.expert_scales)
    if call.quant_mode == 0:
        require_no_gradient(op, "scales", call.scales)
        return call
    return call._replace(x=call.x.detach(), scales=None if call.scales is None else call.scales.detach())
