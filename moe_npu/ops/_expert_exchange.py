"""What the distributed operators share on CPU: where experts live, which rows go where, and exchanges in a named group.

A *place* is one expert on one rank: place v below S is the replica of a shared expert that rank v hosts, place S + e is
MoE expert e (spec: routing 5.1). Ranks host consecutive places, so pairs that are sorted by place are sorted by rank.

Ranks compare what they are about to do before any of them sends a row: a rank that disagrees, or refuses its own
arguments, becomes an error on every rank instead of one that waits for the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moe_npu.ops._errors import OperatorError, dtype_name, reject, require_device, require_dim, require_dtype
from moe_npu.ops._numerics import dense

MAX_TOP_K = 16

_Group = Any  # torch.distributed.ProcessGroup, which a PyTorch without distributed does not have
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32)
_HEADER_LENGTH = 16


class Topology(NamedTuple):
    """The attributes that dispatch and combine have in common."""

    group_ep: str
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    group_tp: str
    tp_world_size: int
    tp_rank_id: int
    shared_expert_num: int
    shared_expert_rank_num: int
    global_bs: int
    num_special: int  # zero, copy and constant experts: ids from moe_expert_num on, which live nowhere

    @property
    def num_lanes(self) -> int:
        """Expert-parallel groups that work side by side."""
        return 2 if self.tp_world_size == 2 else 1

    @property
    def num_places(self) -> int:
        """Experts of all ranks, replicas of shared ones included."""
        return self.shared_expert_rank_num + self.moe_expert_num

    @property
    def num_shared(self) -> int:
        """Shared experts that any rank hosts."""
        return self.shared_expert_num if self.shared_expert_rank_num else 0

    @property
    def replica_ranks(self) -> int:
        """Ranks for each shared expert; only where there are shared ranks."""
        return self.shared_expert_rank_num // self.shared_expert_num

    @property
    def experts_per_rank(self) -> int:
        """MoE experts on each rank that has any."""
        return self.moe_expert_num // (self.ep_world_size - self.shared_expert_rank_num)

    def num_local(self, rank: int) -> int:
        """Experts on ``rank``."""
        return 1 if rank < self.shared_expert_rank_num else self.experts_per_rank

    def places_on(self, rank: int) -> slice:
        """The places on ``rank``."""
        shared = self.shared_expert_rank_num
        if rank < shared:
            return slice(rank, rank + 1)
        first = shared + (rank - shared) * self.experts_per_rank
        return slice(first, first + self.experts_per_rank)

    def shared_places(self) -> torch.Tensor:
        """The replica of each shared expert that the tokens of this rank visit."""
        if self.num_shared == 0:
            return torch.zeros(0, dtype=torch.int64)
        return self.ep_rank_id % self.replica_ranks + torch.arange(self.num_shared) * self.replica_ranks


def check_topology(
    op: str, x: torch.Tensor, expert_ids: torch.Tensor, x_active_mask: torch.Tensor | None, topology: Topology
) -> None:
    """The rules that dispatch and combine have in common; ``x`` is the first argument."""
    require_device(op, "expert_ids", expert_ids, x)
    require_device(op, "x_active_mask", x_active_mask, x)
    require_dim(op, "expert_ids", expert_ids, (2,))
    require_dtype(op, "expert_ids", expert_ids, (torch.int32,))
    world, rank, shared = topology.ep_world_size, topology.ep_rank_id, topology.shared_expert_rank_num
    if not 0 <= rank < world:
        reject(f"{op}: ep_rank_id should be in [0, ep_world_size), but got ep_world_size={world}, ep_rank_id={rank}")
    if not 0 <= shared < world:
        reject(
            f"{op}: shared_expert_rank_num should be in [0, ep_world_size), but got ep_world_size={world}, "
            f"shared_expert_rank_num={shared}"
        )
    experts = topology.shared_expert_num
    if shared and not (experts >= 1 and shared % experts == 0):
        reject(
            f"{op}: shared expert setting invalid, got shared_expert_num={experts}, shared_expert_rank_num={shared}; "
            "each shared expert has the same number of ranks"
        )
    if topology.moe_expert_num < 1 or topology.moe_expert_num % (world - shared):
        reject(
            f"{op}: moe_expert_num must be a positive multiple of the {world - shared} ranks with MoE experts, "
            f"but is {topology.moe_expert_num}"
        )
    top_k, num_experts = expert_ids.size(1), topology.moe_expert_num + topology.num_special
    if not 1 <= top_k <= min(MAX_TOP_K, num_experts):
        reject(
            f"{op}: expert_ids must have 1 to {min(MAX_TOP_K, num_experts)} columns for {num_experts} experts, "
            f"but has {top_k}"
        )
    if topology.tp_world_size not in (0, 1, 2):
        reject(f"{op}: tp_world_size must be 0, 1 or 2, but is {topology.tp_world_size}")
    if topology.tp_world_size == 2 and topology.tp_rank_id not in (0, 1):
        reject(f"{op}: tp_rank_id must be 0 or 1 with tp_world_size 2, but is {topology.tp_rank_id}")
    if topology.global_bs < 0 or 0 < topology.global_bs < expert_ids.size(0) * world:
        reject(
            f"{op}: global_bs must be 0 or the largest number of tokens of a rank times {world} ranks, but is "
            f"{topology.global_bs} with {expert_ids.size(0)} tokens here"
        )
    if x_active_mask is not None:
        require_dtype(op, "x_active_mask", x_active_mask, (torch.bool,))
        if x_active_mask.shape not in (expert_ids.shape[:1], expert_ids.shape):
            reject(
                f"{op}: x_active_mask must have one flag per token or one per entry of expert_ids "
                f"{tuple(expert_ids.shape)}, but has shape {tuple(x_active_mask.shape)}"
            )


def active_tokens(tensor: torch.Tensor, x_active_mask: torch.Tensor | None) -> torch.Tensor:
    """``tensor`` with zeros in the rows of tokens that take no part."""
    if x_active_mask is None:
        return tensor
    active = x_active_mask if x_active_mask.dim() == 1 else x_active_mask.any(1)
    return torch.where(active.unsqueeze(1), tensor, 0)


# ---------------------------------------------------------------- groups


def named_group(
    op: str, argument: str, name: str, sizes: tuple[str, int], ranks: tuple[str, int] | None = None
) -> tuple[_Group, str | None]:
    """The process group of that name, and a problem if ``sizes`` or ``ranks``, arguments and values, do not fit it.

    Raises:
        OperatorError: no such group here.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        reject(f"{op}: {argument} {name!r} names a process group, but torch.distributed is not initialized")
    try:
        group = distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    except RuntimeError as error:
        raise OperatorError(
            f"{op}: {argument} {name!r} is not the name of a process group here; the name of a group is its group_name"
        ) from error
    problem = None
    if group.size() != sizes[1]:
        problem = f"{op}: {sizes[0]} must be the size of {argument}, which is {group.size()}, but is {sizes[1]}"
    elif ranks is not None and group.rank() != ranks[1]:
        problem = f"{op}: {ranks[0]} must be the rank in {argument}, which is {group.rank()}, but is {ranks[1]}"
    return group, problem


def gather(values: torch.Tensor, group: _Group) -> torch.Tensor:
    """``[W, ...]``: the values of all ranks, of one shape."""
    gathered = [torch.zeros_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, values, group=group)
    return torch.stack(gathered)


def agree(
    op: str, group: _Group, facts: dict[str, int], own: int = 0, problem: str | None = None
) -> tuple[list[int], str | None]:
    """Compare ``facts`` among the ranks and spread every ``problem``; returns all the ``own`` values, and a problem.

    The caller raises the problem, once nobody else depends on it. What is sent has one length, whatever the operator.
    """
    header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64)
    values = [zlib.crc32(op.encode()), int(problem is not None), own, *facts.values()]
    header[: len(values)] = torch.tensor(values)
    headers: list[list[int]] = gather(header, group).tolist()
    if problem is None:
        problem = _difference(op, facts, headers)
    return [row[2] for row in headers], problem


def _difference(op: str, facts: dict[str, int], headers: list[list[int]]) -> str | None:
    code = zlib.crc32(op.encode())
    for rank, row in enumerate(headers):
        if row[0] != code:
            return f"{op}: rank {rank} calls another operator"
    for rank, row in enumerate(headers):
        if row[1]:
            return f"{op}: rank {rank} refused its arguments"
    for index, name in enumerate(facts):
        by_rank = [row[3 + index] for row in headers]
        if len(set(by_rank)) > 1:
            shown = [dtype_name(_DTYPES[value]) for value in by_rank] if name == "dtype" else by_rank
            return f"{op}: all ranks must have the same {name}, but in the order of their ranks they have {shown}"
    return None


def dtype_fact(tensor: torch.Tensor) -> dict[str, int]:
    """The dtype as a fact for :func:`agree`."""
    return {"dtype": _DTYPES.index(tensor.dtype)}


def all_to_all(rows: torch.Tensor, send: list[int], receive: list[int], group: _Group) -> torch.Tensor:
    """Rows ``[sum(send), C]``, grouped by destination, to rows ``[sum(receive), C]``, grouped by source."""
    received = rows.new_empty(sum(receive), rows.size(1))
    row_bytes = rows.size(1) * rows.element_size()
    if row_bytes:  # as bytes: gloo does not know every dtype
        torch.distributed.all_to_all_single(
            received.view(-1).view(torch.uint8),
            dense(rows).view(-1).view(torch.uint8),
            [row_bytes * count for count in receive],
            [row_bytes * count for count in send],
            group=group,
        )
    return received


def swap_blocks(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows in blocks ordered ``[A][B]``, of ``counts[a, b]`` rows each, to the order ``[B][A]``."""
    first = (counts.flatten().cumsum(0) - counts.flatten()).view(counts.shape)
    lengths = counts.t().flatten()
    shift = first.t().flatten() - (lengths.cumsum(0) - lengths)
    return rows.index_select(0, torch.arange(rows.size(0)) + shift.repeat_interleave(lengths))


# ---------------------------------------------------------------- pairs


class Outgoing(NamedTuple):
    """The pairs of this rank that visit experts, sorted by place and then by pair."""

    tokens: torch.Tensor  # [n]
    slots: torch.Tensor  # [n], K + s for shared expert s
    counts: torch.Tensor  # [places]

    def positions(self, num_tokens: int, width: int) -> torch.Tensor:
        """``[T, width]``: where among the pairs each (token, slot) is, or -1."""
        positions = torch.full((num_tokens, width), -1)
        positions[self.tokens, self.slots] = torch.arange(self.tokens.size(0))
        return positions


def active_pairs(expert_ids: torch.Tensor, x_active_mask: torch.Tensor | None) -> torch.Tensor:
    """``[T, K]`` bool."""
    if x_active_mask is None:
        return torch.ones_like(expert_ids, dtype=torch.bool)
    return x_active_mask if x_active_mask.dim() == 2 else x_active_mask.unsqueeze(1).expand(expert_ids.shape)


def outgoing(expert_ids: torch.Tensor, x_active_mask: torch.Tensor | None, topology: Topology) -> Outgoing:
    """Which pairs of this rank go to which place (spec: routing 5.3, steps 1 and 2)."""
    active = active_pairs(expert_ids, x_active_mask)
    shared = topology.shared_places().expand(expert_ids.size(0), -1)
    visits = torch.cat(
        [active & (expert_ids < topology.moe_expert_num), active.any(1, keepdim=True).expand(shared.shape)], 1
    )
    places = torch.cat([expert_ids.long() + topology.shared_expert_rank_num, shared], 1).flatten()
    pairs = visits.flatten().nonzero().squeeze(1)
    pairs = pairs[torch.argsort(places[pairs], stable=True)]
    counts = torch.bincount(places[pairs], minlength=topology.num_places)
    return Outgoing(pairs // visits.size(1), pairs % visits.size(1), counts)


def value_problem(op: str, expert_ids: torch.Tensor, mask: torch.Tensor | None, topology: Topology) -> str | None:
    """What is wrong with the values of this rank."""
    if mask is not None and mask.dim() == 1 and bool((mask[1:] & ~mask[:-1]).any()):
        return f"{op}: x_active_mask of one flag per token must be True first and then False, but is {mask.tolist()}"
    ids = expert_ids[active_pairs(expert_ids, mask)]
    num_experts = topology.moe_expert_num + topology.num_special
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_experts:
            return f"{op}: expert_ids must be 0 to {num_experts - 1}, but are {low} to {high}"
    return None


# ---------------------------------------------------------------- exchange


@dataclass(frozen=True)
class Exchange:
    """One agreed exchange between the tokens of all ranks and the experts of all ranks."""

    topology: Topology
    group: _Group
    lane_group: _Group | None
    pairs: Outgoing
    sent: torch.Tensor  # [W, places] rows from each rank to each place
    lane_rows: list[int]  # rows that the experts of this rank receive, in each lane

    @property
    def arriving(self) -> torch.Tensor:
        """``[W, local experts]`` rows from each rank to each expert here."""
        return self.sent[:, self.topology.places_on(self.topology.ep_rank_id)]

    @property
    def num_received(self) -> int:
        """Rows that the experts here receive, those of the other lane not counted."""
        return self.lane_rows[self._lane]

    @property
    def num_others(self) -> int:
        """Rows that the experts of the partner in the other lane receive."""
        return self.lane_rows[1 - self._lane] if self.lane_group is not None else 0

    @property
    def _lane(self) -> int:
        return self.topology.tp_rank_id if self.lane_group is not None else 0

    @property
    def _splits(self) -> tuple[list[int], list[int]]:
        ranks = range(self.topology.ep_world_size)
        send = [int(self.pairs.counts[self.topology.places_on(rank)].sum()) for rank in ranks]
        return send, self.arriving.sum(1).tolist()

    def to_experts(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the outgoing pairs to the rows of the local experts: by expert, then source, then pair."""
        send, receive = self._splits
        return swap_blocks(all_to_all(rows, send, receive, self.group), self.arriving)

    def to_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_experts`."""
        send, receive = self._splits
        return all_to_all(swap_blocks(rows, self.arriving.t()), receive, send, self.group)

    def from_other_lane(self, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Give ``rows`` to the partner in the other lane for ``num_rows`` of theirs."""
        send, receive = [0, 0], [0, 0]
        send[1 - self._lane], receive[1 - self._lane] = rows.size(0), num_rows
        return all_to_all(rows, send, receive, self.lane_group)

    def add_lanes(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the local experts, which in two lanes are the sum of what both partners have of them."""
        own = rows[: self.num_received]
        if self.lane_group is None:
            return own
        theirs = rows[self.num_received : self.num_received + self.num_others]
        return own + self.from_other_lane(theirs, self.num_received)

    def join_lanes(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the local experts, in two lanes followed by those of the partner."""
        if self.lane_group is None:
            return rows
        return torch.cat([rows, self.from_other_lane(rows, self.num_others)])


def check_performance_info(op: str, performance_info: torch.Tensor | None, world: int) -> None:
    """What a device may write waiting times to."""
    if performance_info is None:
        return
    require_dtype(op, "performance_info", performance_info, (torch.int64,))
    if performance_info.shape != (world,):
        reject(f"{op}: performance_info must have shape ({world},), but has {tuple(performance_info.shape)}")


def open_exchange(
    op: str,
    topology: Topology,
    expert_ids: torch.Tensor,
    x_active_mask: torch.Tensor | None,
    facts: dict[str, int],
    *,
    capacity: Callable[[int], int] | None = None,
    received: torch.Tensor | None = None,
    lane_rows: list[int] | None = None,
    num_rows: int = 0,
) -> Exchange:
    """Agree with the other ranks on who sends what.

    Args:
        op: name of the operator.
        topology: attributes of the call.
        expert_ids: ``[T, K]``.
        x_active_mask: None, ``[T]`` or ``[T, K]``.
        facts: what else must be the same on all ranks.
        capacity: rows that a rank has room for, where rows are about to be received.
        received: the cumulative counts by which rows were received, where they are about to go back.
        lane_rows: rows of the two lanes by which they were received.
        num_rows: rows at hand to go back.

    Raises:
        OperatorError: the ranks disagree, or one has wrong values; on every rank.
    """
    world, lanes = topology.ep_world_size, topology.num_lanes
    group, problem = named_group(
        op, "group_ep", topology.group_ep, ("ep_world_size", world), ("ep_rank_id", topology.ep_rank_id)
    )
    lane_group = None
    if lanes == 2:
        rank = ("tp_rank_id", topology.tp_rank_id)
        lane_group, lane_problem = named_group(op, "group_tp", topology.group_tp, ("tp_world_size", 2), rank)
        problem = problem or lane_problem
    facts = {
        "columns of expert_ids": expert_ids.size(1),
        "moe_expert_num": topology.moe_expert_num,
        "shared_expert_num": topology.shared_expert_num,
        "shared_expert_rank_num": topology.shared_expert_rank_num,
        "global_bs": topology.global_bs,
        "number of zero, copy and constant experts": topology.num_special,
        "tp_world_size": lanes,
        **facts,
    }
    problem = problem or value_problem(op, expert_ids, x_active_mask, topology)
    counts = torch.zeros(world, topology.num_local(topology.ep_rank_id), dtype=torch.int64)
    if problem is None and received is not None:
        counts, problem = _counts_of(op, received, *counts.shape)
        needed = int(counts.sum()) if lane_rows is None else sum(lane_rows)
        if problem is None and needed > num_rows:
            problem = f"{op}: expand_x must have the {needed} rows of ep_send_counts, but has {num_rows}"
    if lane_group is not None:
        tokens = {} if topology.global_bs else {"number of tokens, with global_bs 0": expert_ids.size(0)}
        by_lane, problem = agree(op, lane_group, {**facts, **tokens}, int(counts.sum()), problem)
        if problem is None and lane_rows not in (None, by_lane):
            problem = f"{op}: tp_send_counts must be {by_lane} by the ep_send_counts of both lanes, but is {lane_rows}"
    batches, problem = agree(op, group, facts, expert_ids.size(0), problem)
    if problem is None and topology.global_bs == 0 and len(set(batches)) > 1:
        problem = f"{op}: global_bs must not be 0 where ranks have different numbers of tokens, here {batches}"
    pairs, sent = None, None
    if problem is None:
        pairs = outgoing(expert_ids, x_active_mask, topology)
        sent = gather(pairs.counts, group)
        if received is not None:
            problem = _mismatch(op, topology, sent, counts, group)
        elif capacity is not None:
            problem = _overflow(op, topology, sent, capacity)
    here = topology.places_on(topology.ep_rank_id)
    by_lane = [0 if sent is None else int(sent[:, here].sum())]
    if lane_group is not None:
        by_lane, problem = agree(op, lane_group, facts, by_lane[0], problem)
    if problem is not None or pairs is None or sent is None:
        raise OperatorError(problem)
    return Exchange(topology, group, lane_group, pairs, sent, by_lane)


def _counts_of(op: str, received: torch.Tensor, world: int, num_local: int) -> tuple[torch.Tensor, str | None]:
    """``[W, local experts]`` of the running totals over [local expert][rank]."""
    totals = received[: world * num_local].long()
    counts = torch.diff(totals, prepend=totals.new_zeros(1)).view(num_local, world).t()
    if bool((counts < 0).any()):
        return counts, f"{op}: ep_send_counts must be running totals, but is {totals.tolist()}"
    return counts, None


def _mismatch(op: str, topology: Topology, sent: torch.Tensor, counts: torch.Tensor, group: _Group) -> str | None:
    """Where the counts of a receiver are not what the senders say: found by every rank alike."""
    padded = torch.zeros(counts.size(0), max(topology.experts_per_rank, 1), dtype=torch.int64)
    padded[:, : counts.size(1)] = counts
    for rank, claimed in enumerate(gather(padded, group)):
        expected = sent[:, topology.places_on(rank)]
        if not torch.equal(claimed[:, : expected.size(1)], expected):
            return (
                f"{op}: ep_send_counts of rank {rank} does not belong to these expert_ids and masks: it has "
                f"{claimed.sum(1).tolist()} rows for the ranks, which sent {expected.sum(1).tolist()}"
            )
    return None


def _overflow(op: str, topology: Topology, sent: torch.Tensor, capacity: Callable[[int], int]) -> str | None:
    for rank in range(topology.ep_world_size):
        rows, room = int(sent[:, topology.places_on(rank)].sum()), capacity(rank)
        if rows > room and rank < topology.shared_expert_rank_num:
            return (
                f"{op}: shared rank {rank} would receive {rows} rows but has room for {room}; the first version takes "
                "one shared expert, on a number of ranks that divides ep_world_size"
            )
        if rows > room:
            return (
                f"{op}: rank {rank} would receive {rows} rows but has room for {room}; "
                "the expert_ids of a token must be distinct"
            )
    return None
