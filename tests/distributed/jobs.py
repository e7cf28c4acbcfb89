"""What the workers run: functions of a place in the world and picklable arguments."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from moe_npu import ops
from tests.helpers.gloo import World

Options = dict[str, Any]


def ep_group(world: World, name: str, size: int) -> Options:
    return {"group_ep": world.groups[name], "ep_world_size": size, "ep_rank_id": world.rank}


def call(world: World, operator: str, group: str, size: int, options: Options) -> Any:
    """One operator of the dispatch family, or the words of its error."""
    try:
        return getattr(ops, operator)(**options, **ep_group(world, group, size))
    except ops.OperatorError as error:
        return str(error)


def call_in_lanes(world: World, operator: str, options: Options) -> Any:
    try:
        return getattr(ops, operator)(**options, **world.lane_groups())
    except ops.OperatorError as error:
        return str(error)


def call_by_group(world: World, operator: str, group: str, argument: str, options: Options) -> Any:
    """One operator whose group is named by `argument`."""
    try:
        return getattr(ops, operator)(**options, **{argument: world.groups[group]})
    except ops.OperatorError as error:
        return str(error)


def _experts_multiply(rows: Tensor, counts: Tensor, first: int) -> Tensor:
    """Expert e multiplies by e + 1; `first` is the first expert here."""
    factors = torch.arange(first, first + counts.numel(), device=counts.device).repeat_interleave(counts) + 1
    out = torch.full_like(rows, float("nan"))
    out[: factors.numel()] = rows[: factors.numel()] * factors.unsqueeze(1).to(rows.dtype)
    return out


def round_trip(world: World, version: int, group: str, size: int, options: Options, weights: Tensor) -> Any:
    """Dispatch, experts that multiply by their number plus one (shared ones copy), combine; rows beyond are NaN."""
    place = ep_group(world, group, size)
    shared = options.get("shared_expert_rank_num", 0)
    dispatch, combine = (
        (ops.npu_moe_distribute_dispatch, ops.npu_moe_distribute_combine)
        if version == 1
        else (ops.npu_moe_distribute_dispatch_v2, ops.npu_moe_distribute_combine_v2)
    )
    rows, _, handle, nums, counts, *_ = dispatch(**options, **place)
    # a shared expert changes nothing
    first = max(world.rank - shared, 0) * nums.numel()
    results = _experts_multiply(rows, nums, first)
    kept = {name: value for name, value in options.items() if name not in ("x", "expert_token_nums_type")}
    ids = kept.pop("expert_ids")
    return combine(results, ids, handle, counts, weights, **kept, **place)


def by_all_to_all(world: World, group: str, size: int, x: Tensor, ids: Tensor, experts: int, weights: Tensor) -> Any:
    """The same layer as operators of one device around plain exchanges of rows."""
    process_group = torch.distributed.distributed_c10d._resolve_process_group(world.groups[group])
    per_rank = experts // size

    def exchange(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        torch.distributed.all_to_all_single(out, rows.contiguous(), receive, send, group=process_group)
        return out

    permuted, back = ops.npu_moe_token_permute(x, ids)
    histogram = torch.bincount(ids.flatten(), minlength=experts).view(size, per_rank)
    counts = exchange(histogram, [1] * size, [1] * size)  # [source, local expert]
    send, receive = histogram.sum(1).tolist(), counts.sum(1).tolist()
    arrived = exchange(permuted, send, receive)
    rows, _, index, _ = ops.npu_moe_re_routing(arrived, counts)
    results = _experts_multiply(rows, counts.sum(0), world.rank * per_rank)
    undone = torch.empty_like(results)
    undone[index.long()] = results
    return ops.npu_moe_token_unpermute(exchange(undone, receive, send), back, weights)


def layer_gradients(
    world: World, version: int, group: str, size: int, options: Options, weights: Tensor, weight: Tensor, extra: Options
) -> list[Tensor]:
    """Output, and the gradients of x, routing weights, expert weights and what `extra` adds to combine."""
    place = ep_group(world, group, size)
    shared = options.get("shared_expert_rank_num", 0)
    leaves = {name: value.clone().requires_grad_() for name, value in extra.items() if value.is_floating_point()}
    x, weights, weight = (tensor.clone().requires_grad_() for tensor in (options["x"], weights, weight))
    options = {**options, "x": x}
    dispatch, combine = (
        (ops.npu_moe_distribute_dispatch, ops.npu_moe_distribute_combine)
        if version == 1
        else (ops.npu_moe_distribute_dispatch_v2, ops.npu_moe_distribute_combine_v2)
    )
    rows, _, handle, nums, counts, *_ = dispatch(**options, **place)
    results = ops.grouped_mm(rows, weight, nums) if world.rank >= shared else rows.square()
    kept = {name: value for name, value in options.items() if name != "x"}
    ids = kept.pop("expert_ids")
    y = combine(results, ids, handle, counts, weights, **kept, **leaves, **place)
    wrt = [x, weights, weight, *leaves.values()]
    loss = (y.square() * torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)).sum()
    grads = torch.autograd.grad(loss, wrt, create_graph=True, allow_unused=True, materialize_grads=True)
    # and once more, of a function of all the gradients
    again = sum((grad.square()).sum() for grad in grads)
    second = torch.autograd.grad(again, wrt, allow_unused=True, materialize_grads=True)
    return [tensor.detach() for tensor in (y, *grads, *second)]


def exchange_gradients(world: World, group: str, size: int, options: Options, back: Options) -> list[Tensor]:
    """To the experts and back, with the gradients of rows and weights, once and twice."""
    place = {"hcom": world.groups[group], "ep_world_size": size}
    wrt = [options["gmm_x"].clone().requires_grad_(), options["gmm_weight"].clone().requires_grad_()]
    wrt += [back["gmm_weight"].clone().requires_grad_()]
    options = {**options, "gmm_x": wrt[0], "gmm_weight": wrt[1]}
    hidden, _, rows = ops.npu_alltoallv_gmm(**options, permute_out_flag=True, **place)
    counts = {"send_counts": options["recv_counts"], "recv_counts": options["send_counts"]}
    y, _ = ops.npu_gmm_alltoallv(hidden.square(), wrt[2], **counts, **place, trans_gmm_weight=back["trans_gmm_weight"])
    loss = (y.square() * torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)).sum() + rows.pow(3).sum()
    grads = torch.autograd.grad(loss, wrt, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), wrt)
    return [tensor.detach() for tensor in (y, rows, *grads, *second)]


def other_operator(world: World, group: str, size: int, options: Options) -> str:
    """Rank 0 dispatches while the others wait at a barrier."""
    try:
        if world.rank == 0:
            ops.npu_moe_distribute_dispatch_v2(**options, **ep_group(world, group, size))
        else:
            ops._npu_distribute_barrier(torch.ones(1), world.groups[group], size)
    except ops.OperatorError as error:
        return str(error)
    return "no error"


def late(world: World, group: str, size: int) -> tuple[float, float]:
    """When this rank reached the barrier and when it passed: the ranks come one after the other."""
    time.sleep(0.1 * world.rank)
    arrived = time.monotonic()
    ops._npu_distribute_barrier(torch.ones(1), world.groups[group], size)
    return arrived, time.monotonic()


def fail(world: World, rank: int, how: str) -> None:
    """One rank fails while the others wait for it."""
    if world.rank == rank:
        if how == "dies":
            os._exit(1)
        if how == "raises":
            raise ValueError("as told")
        time.sleep(60)
    torch.distributed.barrier()


def echo(world: World, value: Any) -> tuple[int, Any]:
    return world.rank, value
