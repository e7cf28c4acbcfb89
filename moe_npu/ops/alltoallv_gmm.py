"""All-to-all with the grouped matmul after or before it (spec: routing 5.7).

    alltoallv_gmm   rows by destination and its expert -> ranks -> by local expert and source -> @ gmm_weight
    gmm_alltoallv   rows by local expert and destination -> @ gmm_weight -> ranks -> by owner and its expert

and beside it the product mm_x @ mm_weight of a shared expert. Each is the gradient of the other: counts swapped, weight
transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_npu.ops._errors import OperatorError, dtype_name, reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._expert_exchange import agree, all_to_all, dtype_fact, gather, named_group, swap_blocks
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import matmul_into
from moe_npu.ops._signature import typed
from moe_npu.ops.grouped_mm import grouped_mm, grouped_mm_weight_grad

_TO_EXPERTS, _TO_TOKENS = "npu_alltoallv_gmm", "npu_gmm_alltoallv"


class _Call(NamedTuple):
    """The arguments of one call, checked; the order is that of both operators' schemas."""

    gmm_x: torch.Tensor
    gmm_weight: torch.Tensor
    hcom: str
    ep_world_size: int
    send_counts: list[int]
    recv_counts: list[int]
    mm_x: torch.Tensor | None
    mm_weight: torch.Tensor | None
    trans_gmm_weight: bool
    trans_mm_weight: bool
    comm_mode: str | None
    permute_out_flag: bool = False  # of the way to the experts only

    @property
    def weight(self) -> torch.Tensor:
        """``[q, H, N]``, possibly a transposed view."""
        return self.gmm_weight.mT if self.trans_gmm_weight else self.gmm_weight


# ---------------------------------------------------------------- rules


def _check(
    op: str, call: _Call, send_counts_tensor: torch.Tensor | None, recv_counts_tensor: torch.Tensor | None
) -> None:
    gmm_x, gmm_weight, mm_x, mm_weight = call.gmm_x, call.gmm_weight, call.mm_x, call.mm_weight
    floats = (torch.float16, torch.bfloat16) + ((torch.float32,) if gmm_x.device.type in ("cpu", "meta") else ())
    require_dim(op, "gmm_x", gmm_x, (2,))
    require_dtype(op, "gmm_x", gmm_x, floats)
    require_dim(op, "gmm_weight", gmm_weight, (3,))
    for name, counts in (("send_counts_tensor", send_counts_tensor), ("recv_counts_tensor", recv_counts_tensor)):
        require(counts is None, f"{op}: {name} must be None, the lists say everything")
    require((mm_x is None) == (mm_weight is None), f"{op}: mm_x and mm_weight must be given both or neither")
    for name, tensor in (("gmm_weight", gmm_weight), ("mm_x", mm_x), ("mm_weight", mm_weight)):
        require_device(op, name, tensor, gmm_x)
        if tensor is not None and tensor.dtype != gmm_x.dtype:
            reject(
                f"{op}: {name} must have the dtype of gmm_x, {dtype_name(gmm_x.dtype)}, "
                f"but has {dtype_name(tensor.dtype)}"
            )
    if gmm_x.size(1) != call.weight.size(1):
        reject(f"{op}: gmm_x has {gmm_x.size(1)} columns but each expert of gmm_weight has {call.weight.size(1)} rows")
    _check_counts(op, call)
    if mm_x is not None and mm_weight is not None:
        require_dim(op, "mm_x", mm_x, (2,))
        require_dim(op, "mm_weight", mm_weight, (2,))
        rows = mm_weight.size(1 if call.trans_mm_weight else 0)
        if mm_x.size(1) != rows:
            reject(f"{op}: mm_x has {mm_x.size(1)} columns but mm_weight has {rows} rows")


def _check_counts(op: str, call: _Call) -> None:
    experts, world = call.gmm_weight.size(0), call.ep_world_size
    if experts < 1 or world < 1:
        reject(f"{op}: ep_world_size and the experts of gmm_weight must be at least 1, but are {world} and {experts}")
    for name, counts in (("send_counts", call.send_counts), ("recv_counts", call.recv_counts)):
        if len(counts) != experts * world:
            reject(
                f"{op}: {name} must have {experts * world} entries, for {experts} experts on each of {world} ranks, "
                f"but has {len(counts)}"
            )
        if any(count < 0 for count in counts):
            reject(f"{op}: {name} must not be negative, but are {counts}")
    if sum(call.send_counts) != call.gmm_x.size(0):
        reject(
            f"{op}: send_counts must add up to the {call.gmm_x.size(0)} rows of gmm_x, "
            f"but add up to {sum(call.send_counts)}"
        )


# ---------------------------------------------------------------- CPU


class _Route:
    """The agreed counts of one call."""

    def __init__(self, op: str, call: _Call, columns: int) -> None:
        world = call.ep_world_size
        self.group, problem = named_group(op, "hcom", call.hcom, ("ep_world_size", world))
        facts = {"experts per rank": call.gmm_weight.size(0), "columns of the rows that travel": columns}
        _, problem = agree(op, self.group, {**facts, **dtype_fact(call.gmm_x)}, problem=problem)
        counts = torch.tensor([call.send_counts, call.recv_counts], dtype=torch.int64).view(2, world, -1)
        if problem is None:
            # [W, 2, W, q]: what each rank sends to and receives from each rank, for each expert there
            everyone = gather(counts, self.group)
            sends, receives = everyone[:, 0], everyone[:, 1].transpose(0, 1)
            if not torch.equal(sends, receives):
                source, target, _ = (sends != receives).nonzero()[0].tolist()
                problem = (
                    f"{op}: rank {source} has send_counts {sends[source, target].tolist()} for rank {target}, "
                    f"which has recv_counts {receives[source, target].tolist()} for it"
                )
        if problem is not None:
            raise OperatorError(problem)
        self.send, self.receive = counts  # [W, q]

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        return all_to_all(rows, self.send.sum(1).tolist(), self.receive.sum(1).tolist(), self.group)


def _product_beside(call: _Call) -> torch.Tensor:
    """``mm_x @ mm_weight``, or an empty tensor."""
    mm_y = _product_beside_fake(call)
    if call.mm_x is not None and call.mm_weight is not None:
        matmul_into(mm_y, call.mm_x, call.mm_weight.t() if call.trans_mm_weight else call.mm_weight)
    return mm_y


def _to_experts_cpu(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = _Call(*args)
    route = _Route(_TO_EXPERTS, call, call.gmm_x.size(1))
    rows = swap_blocks(route.exchange(call.gmm_x), route.receive)
    gmm_y = grouped_mm(rows, call.weight, route.receive.sum(0))
    return gmm_y, _product_beside(call), rows if call.permute_out_flag else rows.new_empty(0)


def _to_tokens_cpu(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(*args)
    route = _Route(_TO_TOKENS, call, call.weight.size(2))
    rows = grouped_mm(call.gmm_x, call.weight, route.send.sum(0))
    return route.exchange(swap_blocks(rows, route.send.t())), _product_beside(call)


# ---------------------------------------------------------------- NPU and fake


def _options(call: _Call) -> dict[str, Any]:
    names = ("mm_x", "mm_weight", "trans_gmm_weight", "trans_mm_weight", "comm_mode")
    return {name: getattr(call, name) for name in names}


def _to_experts_npu(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = _Call(*args)
    gmm_y, mm_y, permute_out = torch.ops.npu.npu_alltoallv_gmm(
        *call[:6], **_options(call), permute_out_flag=call.permute_out_flag
    )
    nothing = call.gmm_x.new_empty(0)
    return gmm_y, nothing if call.mm_x is None else mm_y, permute_out if call.permute_out_flag else gmm_y.new_empty(0)


def _to_tokens_npu(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(*args)
    y, mm_y = torch.ops.npu.npu_gmm_alltoallv(*call[:6], **_options(call))
    return y, call.gmm_x.new_empty(0) if call.mm_x is None else mm_y


def _product_beside_fake(call: _Call) -> torch.Tensor:
    if call.mm_x is None or call.mm_weight is None:
        return call.gmm_x.new_empty(0)
    return call.mm_x.new_empty(call.mm_x.size(0), call.mm_weight.size(0 if call.trans_mm_weight else 1))


def _to_experts_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = _Call(*args)
    num_rows = sum(call.recv_counts)
    rows = call.gmm_x.new_empty((num_rows, call.gmm_x.size(1)) if call.permute_out_flag else (0,))
    return call.gmm_x.new_empty(num_rows, call.weight.size(2)), _product_beside_fake(call), rows


def _to_tokens_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(*args)
    return call.gmm_x.new_empty(sum(call.recv_counts), call.weight.size(2)), _product_beside_fake(call)


# ---------------------------------------------------------------- gradients


def _setup_context(ctx: Any, call: _Call, rows: torch.Tensor | None) -> None:
    """``rows``: those that the experts multiplied."""
    ctx.save_for_backward(rows, call.gmm_weight, call.mm_x, call.mm_weight)
    ctx.hcom, ctx.world, ctx.send_counts, ctx.recv_counts = call[2:6]
    ctx.trans_gmm_weight, ctx.trans_mm_weight = call.trans_gmm_weight, call.trans_mm_weight


def _to_experts_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call = _Call(*inputs)
    _setup_context(ctx, call, output[2] if call.permute_out_flag else None)
    # an unused permute_out would otherwise send columns of zeros
    ctx.set_materialize_grads(False)


def _to_tokens_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    call = _Call(*inputs)
    _setup_context(ctx, call, call.gmm_x)


def _weight_gradient(ctx: Any, rows: torch.Tensor, dproducts: torch.Tensor, counts: list[int]) -> torch.Tensor:
    by_peer = torch.tensor(counts, dtype=torch.int64, device=rows.device).view(ctx.world, -1)
    first, second = (dproducts, rows) if ctx.trans_gmm_weight else (rows, dproducts)
    return grouped_mm_weight_grad(first, second, by_peer.sum(0))


def _gradients_beside(ctx: Any, dmm_y: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    _, _, mm_x, mm_weight = ctx.saved_tensors
    dx = dweight = None
    if dmm_y is not None and ctx.needs_input_grad[6]:
        dx = dmm_y @ (mm_weight if ctx.trans_mm_weight else mm_weight.t())
    if dmm_y is not None and ctx.needs_input_grad[7]:
        dweight = dmm_y.t() @ mm_x if ctx.trans_mm_weight else mm_x.t() @ dmm_y
    return dx, dweight


def _to_experts_backward(
    ctx: Any, dgmm_y: torch.Tensor | None, dmm_y: torch.Tensor | None, drows: torch.Tensor | None
) -> tuple[Any, ...]:
    rows, gmm_weight, *_ = ctx.saved_tensors
    dx = dweight = None
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    if needs_dx or needs_dweight:
        if dgmm_y is None:
            # the other ranks may have a gradient, and either all exchange or none
            columns = gmm_weight.size(1 if ctx.trans_gmm_weight else 2)
            dgmm_y = gmm_weight.new_zeros(sum(ctx.recv_counts), columns)
        dproducts = dgmm_y = dgmm_y.contiguous()
        weight, trans = gmm_weight, not ctx.trans_gmm_weight
        if drows is not None:
            # the gradient of permute_out returns along with the other: its expert changes nothing
            dproducts = torch.cat([dgmm_y, drows], 1)
            one = torch.eye(drows.size(1), dtype=weight.dtype, device=weight.device).expand(weight.size(0), -1, -1)
            weight, trans = torch.cat([weight if ctx.trans_gmm_weight else weight.mT, one], 1), False
        # also where only the weight has a gradient here: on another rank x may have one
        modes = (None, None, trans, False, None)
        dx, _ = _to_tokens_op(dproducts, weight, ctx.hcom, ctx.world, ctx.recv_counts, ctx.send_counts, *modes)
        if needs_dweight:
            dweight = _weight_gradient(ctx, rows, dgmm_y, ctx.recv_counts)
    return dx if needs_dx else None, dweight, *[None] * 4, *_gradients_beside(ctx, dmm_y), *[None] * 4


def _to_tokens_backward(ctx: Any, dy: torch.Tensor, dmm_y: torch.Tensor) -> tuple[Any, ...]:
    rows, gmm_weight, *_ = ctx.saved_tensors
    dx = dweight = None
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    if needs_dx or needs_dweight:
        modes = (None, None, not ctx.trans_gmm_weight, False, None, needs_dweight)
        dx, _, dproducts = _to_experts_op(
            dy.contiguous(), gmm_weight, ctx.hcom, ctx.world, ctx.recv_counts, ctx.send_counts, *modes
        )
        if needs_dweight:
            dweight = _weight_gradient(ctx, rows, dproducts, ctx.send_counts)
    return dx if needs_dx else None, dweight, *[None] * 4, *_gradients_beside(ctx, dmm_y), *[None] * 3


_to_experts_op = register_op(
    "npu_alltoallv_gmm(Tensor gmm_x, Tensor gmm_weight, str hcom, int ep_world_size, SymInt[] send_counts,"
    " SymInt[] recv_counts, Tensor? mm_x, Tensor? mm_weight, bool trans_gmm_weight, bool trans_mm_weight,"
    " str? comm_mode, bool permute_out_flag) -> (Tensor, Tensor, Tensor)",
    cpu=_to_experts_cpu,
    npu=_to_experts_npu,
    fake=_to_experts_fake,
    setup_context=_to_experts_setup_context,
    backward=_to_experts_backward,
    differentiable=("gmm_x", "gmm_weight", "mm_x", "mm_weight"),
)
_to_tokens_op = register_op(
    "npu_gmm_alltoallv(Tensor gmm_x, Tensor gmm_weight, str hcom, int ep_world_size, SymInt[] send_counts,"
    " SymInt[] recv_counts, Tensor? mm_x, Tensor? mm_weight, bool trans_gmm_weight, bool trans_mm_weight,"
    " str? comm_mode) -> (Tensor, Tensor)",
    cpu=_to_tokens_cpu,
    npu=_to_tokens_npu,
    fake=_to_tokens_fake,
    setup_context=_to_tokens_setup_context,
    backward=_to_tokens_backward,
    differentiable=("gmm_x", "gmm_weight", "mm_x", "mm_weight"),
)


# ---------------------------------------------------------------- public


@typed
def npu_alltoallv_gmm(
    gmm_x: torch.Tensor,
    gmm_weight: torch.Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    send_counts_tensor: torch.Tensor | None = None,
    recv_counts_tensor: torch.Tensor | None = None,
    mm_x: torch.Tensor | None = None,
    mm_weight: torch.Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    comm_mode: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Send rows to the ranks of their experts and multiply them by the weights of these.

    With q experts on each of W ranks, entry ``r*q + l`` of the counts is about expert l of the rank that receives, and
    the peer r. Differentiable any number of times with respect to the tensors; every rank must take part in backward.

    Args:
        gmm_x: ``[sum(send_counts), H]``, float16 or bfloat16 (on CPU also float32 and float64), ordered by destination
            rank and then by its expert.
        gmm_weight: ``[q, H, N]``, or ``[q, N, H]`` with ``trans_gmm_weight``; dtype of gmm_x.
        hcom: name of the process group, on CPU the ``group_name`` of a torch.distributed group.
        ep_world_size: its size.
        send_counts: entry ``r*q + l``: rows for expert l of rank r.
        recv_counts: entry ``r*q + l``: rows of rank r for expert l here.
        send_counts_tensor: must be None.
        recv_counts_tensor: must be None.
        mm_x: ``[M, H2]`` or None, dtype of gmm_x.
        mm_weight: ``[H2, N2]``, or ``[N2, H2]`` with ``trans_mm_weight``; given if mm_x is.
        trans_gmm_weight: see gmm_weight.
        trans_mm_weight: see mm_weight.
        permute_out_flag: return the third result.
        comm_mode: a hint.

    Returns:
        ``(gmm_y, mm_y, permute_out)``: ``[sum(recv_counts), N]`` ordered by expert and then by source rank;
        ``mm_x @ mm_weight`` or None; and the rows that were multiplied, ``[sum(recv_counts), H]``, or None.

    Raises:
        OperatorError: shapes, dtypes or devices disagree, counts that do not fit; on CPU also ranks that disagree, on
            every rank.
    """
    call = _Call(
        gmm_x,
        gmm_weight,
        hcom,
        ep_world_size,
        list(send_counts),
        list(recv_counts),
        mm_x,
        mm_weight,
        trans_gmm_weight,
        trans_mm_weight,
        comm_mode,
    )
    _check(_TO_EXPERTS, call, send_counts_tensor, recv_counts_tensor)
    needs_rows = permute_out_flag or (gmm_weight.requires_grad and torch.is_grad_enabled())
    gmm_y, mm_y, rows = _to_experts_op(*call[:-1], needs_rows)
    return gmm_y, None if mm_x is None else mm_y, rows if permute_out_flag else None


@typed
def npu_gmm_alltoallv(
    gmm_x: torch.Tensor,
    gmm_weight: torch.Tensor,
    hcom: str,
    ep_world_size: int,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    send_counts_tensor: torch.Tensor | None = None,
    recv_counts_tensor: torch.Tensor | None = None,
    mm_x: torch.Tensor | None = None,
    mm_weight: torch.Tensor | None = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    comm_mode: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply the rows of the local experts by their weights and send them to where they came from.

    The way back of :func:`npu_alltoallv_gmm`, whose counts it takes swapped. Differentiable any number of times with
    respect to the tensors; every rank must take part in backward.

    Args:
        gmm_x: ``[sum(send_counts), H]``, float16 or bfloat16 (on CPU also float32 and float64), ordered by local
            expert and then by destination rank.
        gmm_weight: ``[q, H, N]``, or ``[q, N, H]`` with ``trans_gmm_weight``; dtype of gmm_x.
        hcom: name of the process group, on CPU the ``group_name`` of a torch.distributed group.
        ep_world_size: its size.
        send_counts: entry ``r*q + l``: rows of expert l here for rank r.
        recv_counts: entry ``r*q + l``: rows of expert l of rank r for this rank.
        send_counts_tensor: must be None.
        recv_counts_tensor: must be None.
        mm_x: ``[M, H2]`` or None, dtype of gmm_x.
        mm_weight: ``[H2, N2]``, or ``[N2, H2]`` with ``trans_mm_weight``; given if mm_x is.
        trans_gmm_weight: see gmm_weight.
        trans_mm_weight: see mm_weight.
        comm_mode: a hint.

    Returns:
        ``(y, mm_y)``: ``[sum(recv_counts), N]`` ordered by rank and then by its expert; ``mm_x @ mm_weight`` or None.

    Raises:
        OperatorError: as for :func:`npu_alltoallv_gmm`.
    """
    call = _Call(
        gmm_x,
        gmm_weight,
        hcom,
        ep_world_size,
        list(send_counts),
        list(recv_counts),
        mm_x,
        mm_weight,
        trans_gmm_weight,
        trans_mm_weight,
        comm_mode,
    )
    _check(_TO_TOKENS, call, send_counts_tensor, recv_counts_tensor)
    y, mm_y = _to_tokens_op(*call[:-1])
    return y, None if mm_x is None else mm_y
