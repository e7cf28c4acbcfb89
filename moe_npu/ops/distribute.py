"""Dispatch: token rows to the ranks of their experts (spec: routing 5.1 to 5.3).

The order of the rows, the rules and the CPU kernel are in `_dispatch_kernel.py`. On CPU the exchange runs over the
torch.distributed group that group_ep names. The gradient of x is the combination of the incoming rows with weights of
one.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops import _dispatch_kernel as kernel
from moe_npu.ops._dispatch_kernel import Call, Results, v1_call
from moe_npu.ops._errors import as_dtype, dtype_name, reject, require, require_device
from moe_npu.ops._expert_exchange import active_tokens, check_performance_info
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

# ---------------------------------------------------------------- v1


def _v1_cpu(*args: Any) -> Results:
    return kernel.dispatch_cpu(kernel.V1, v1_call(*args))


def _v1_npu(*args: Any) -> Results:
    call = v1_call(*args)
    return torch.ops.npu.npu_moe_distribute_dispatch(
        call.x,
        call.expert_ids,
        call.group_ep,
        call.ep_world_size,
        call.ep_rank_id,
        call.moe_expert_num,
        scales=call.scales,
        expert_scales=call.expert_scales,
        group_tp=call.group_tp,
        tp_world_size=call.tp_world_size,
        tp_rank_id=call.tp_rank_id,
        shared_expert_num=call.shared_expert_num,
        shared_expert_rank_num=call.shared_expert_rank_num,
        quant_mode=call.quant_mode,
        global_bs=call.global_bs,
        expert_token_nums_type=call.expert_token_nums_type,
    )


def _v1_fake(*args: Any) -> Results:
    call = v1_call(*args)
    return kernel.allocate(kernel.V1, call, call.x.new_empty)


def _setup_context(ctx: Any, call: Call, output: Results) -> None:
    _, _, handle, _, ep_recv_counts, tp_recv_counts, _ = output
    ctx.save_for_backward(call.expert_ids, call.x_active_mask, handle, ep_recv_counts, tp_recv_counts)
    ctx.topology, ctx.comm_alg = call.topology, call.comm_alg
    ctx.mark_non_differentiable(*output[1:])


def _v1_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _setup_context(ctx, v1_call(*inputs), output)


def _ones(expert_ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.ones(expert_ids.shape, dtype=dtype, device=grad.device)


def _v1_backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    expert_ids, _, handle, ep_recv_counts, tp_recv_counts = ctx.saved_tensors
    *attributes, global_bs, _ = ctx.topology
    handles = (handle, ep_recv_counts, _ones(expert_ids, grad), tp_recv_counts, None, None)
    dx = torch.ops.moe_npu.npu_moe_distribute_combine.default(
        grad.contiguous(), expert_ids, *handles, *attributes, global_bs, 0
    )
    return dx, *[None] * 15


_v1_op = register_op(
    "npu_moe_distribute_dispatch(Tensor x, Tensor expert_ids, Tensor? scales, Tensor? expert_scales, str group_ep,"
    " int ep_world_size, int ep_rank_id, int moe_expert_num, str group_tp, int tp_world_size, int tp_rank_id,"
    " int shared_expert_num, int shared_expert_rank_num, int quant_mode, SymInt global_bs, int expert_token_nums_type)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_v1_cpu,
    npu=_v1_npu,
    fake=_v1_fake,
    setup_context=_v1_setup_context,
    backward=_v1_backward,
    differentiable=("x",),
)


# ---------------------------------------------------------------- v2


def _v2_cpu(*args: Any) -> Results:
    return kernel.dispatch_cpu(kernel.V2, Call(*args))


def _v2_npu(*args: Any) -> Results:
    call = Call(*args)
    return torch.ops.npu.npu_moe_distribute_dispatch_v2(
        call.x,
        call.expert_ids,
        call.group_ep,
        call.ep_world_size,
        call.ep_rank_id,
        call.moe_expert_num,
        scales=call.scales,
        x_active_mask=call.x_active_mask,
        expert_scales=call.expert_scales,
        performance_info=call.performance_info,
        group_tp=call.group_tp,
        tp_world_size=call.tp_world_size,
        tp_rank_id=call.tp_rank_id,
        shared_expert_num=call.shared_expert_num,
        shared_expert_rank_num=call.shared_expert_rank_num,
        quant_mode=call.quant_mode,
        global_bs=call.global_bs,
        expert_token_nums_type=call.expert_token_nums_type,
        comm_alg=call.comm_alg,
        zero_expert_num=call.zero_expert_num,
        copy_expert_num=call.copy_expert_num,
        const_expert_num=call.const_expert_num,
    )


def _v2_fake(*args: Any) -> Results:
    call = Call(*args)
    return kernel.allocate(kernel.V2, call, call.x.new_empty)


def _v2_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _setup_context(ctx, Call(*inputs), output)


def _v2_backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    expert_ids, mask, handle, ep_recv_counts, tp_recv_counts = ctx.saved_tensors
    *attributes, global_bs, num_special = ctx.topology
    handles = (handle, ep_recv_counts, _ones(expert_ids, grad), tp_recv_counts, mask, *[None] * 7)
    # experts that live nowhere pass no row on, whatever they are: as zero experts they add nothing
    dx = torch.ops.moe_npu.npu_moe_distribute_combine_v2.default(
        grad.contiguous(), expert_ids, *handles, *attributes, global_bs, 0, ctx.comm_alg, num_special, 0, 0
    )
    return active_tokens(dx, mask), *[None] * 21


_v2_op = register_op(
    "npu_moe_distribute_dispatch_v2(Tensor x, Tensor expert_ids, Tensor? scales, Tensor? x_active_mask,"
    " Tensor? expert_scales, Tensor? performance_info, str group_ep, int ep_world_size, int ep_rank_id,"
    " int moe_expert_num, str group_tp, int tp_world_size, int tp_rank_id, int shared_expert_num,"
    " int shared_expert_rank_num, int quant_mode, SymInt global_bs, int expert_token_nums_type, str comm_alg,"
    " int zero_expert_num, int copy_expert_num, int const_expert_num)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_v2_cpu,
    npu=_v2_npu,
    fake=_v2_fake,
    setup_context=_v2_setup_context,
    backward=_v2_backward,
    differentiable=("x",),
)


# ---------------------------------------------------------------- public


@typed
def npu_moe_distribute_dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> Results:
    """Send each token to the ranks of its experts: the first version, without masks.

    As :func:`npu_moe_distribute_dispatch_v2` but for these: ``x_active_mask`` must be None; ``scales`` needs
    ``quant_mode`` 2; no int32 x; no zero, copy and constant experts; a rank with a shared expert has room for
    ``G // shared_expert_rank_num`` rows; the third result is ``expand_idx``, int32 ``[BS*K]``: for each pair of *this*
    rank the number of earlier pairs with the same expert. For :func:`npu_moe_distribute_combine`.
    """
    op = kernel.V1
    require(x_active_mask is None, f"{op}: x_active_mask must be None, it is reserved; v2 takes one")
    if expert_shard_type != 0:
        reject(f"{op}: expert_shard_type must be 0 (shared experts on the first ranks), but is {expert_shard_type}")
    call = v1_call(
        x,
        expert_ids,
        scales,
        expert_scales,
        group_ep,
        ep_world_size,
        ep_rank_id,
        moe_expert_num,
        group_tp,
        tp_world_size,
        tp_rank_id,
        shared_expert_num,
        shared_expert_rank_num,
        quant_mode,
        global_bs,
        expert_token_nums_type,
    )
    kernel.check(op, call)
    call = kernel.without_gradients(op, call)
    return _v1_op(call.x, expert_ids, call.scales, expert_scales, *call[6:18])


@typed
def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: torch.dtype | int | None = None,
    x_dtype: torch.dtype | int | None = None,
    scales_dtype: torch.dtype | int | None = None,
) -> Results:
    """Send each token to the ranks of its experts.

    Every rank of the group calls it with the same attributes. Of W ranks the first S = ``shared_expert_rank_num`` host
    the shared experts, ``S / shared_expert_num`` ranks each; the others host ``L = moe_expert_num / (W - S)`` MoE
    experts each. Results have room for the worst case, A rows: ``G * min(L, K)``, or ``G / W * ceil(W / ranks per
    shared expert)`` on a rank with a shared expert, with ``G = global_bs or BS * W``. The rest is zero on CPU and
    undefined on a device.

    Differentiable with respect to ``x`` with ``quant_mode`` 0.

    Args:
        x: ``[BS, H]``, float16 or bfloat16 (on CPU also float32 and float64); or int32 of eight int4 values each.
        expert_ids: ``[BS, K]`` int32, K at most 16, distinct in a row; ids from ``moe_expert_num`` on are zero, copy
            and constant experts, in this order, to which nothing is sent.
        group_ep: name of the process group, on CPU the ``group_name`` of a torch.distributed group.
        ep_world_size: size of the group.
        ep_rank_id: rank in the group.
        moe_expert_num: MoE experts of all ranks.
        scales: float32. With ``quant_mode`` 2 ``[moe_expert_num, H]``, multiplied in first; with shared ranks
            ``[shared_expert_num + moe_expert_num, H]``. With int32 x ``[BS]``, travels with the rows. Else ``[R, C]``
            without an effect but on the shape of ``dynamic_scales``.
        x_active_mask: bool, ``[BS]``, True first and then False; or ``[BS, K]``, pair by pair.
        expert_scales: ``[BS, K]`` float32, travels with the rows.
        elastic_info: must be None.
        performance_info: int64 ``[W]`` or None; no effect on CPU.
        group_tp: name of the group that joins the two lanes; ignored unless ``tp_world_size`` is 2.
        tp_world_size: 0 or 1, or 2 for two groups side by side.
        tp_rank_id: the own lane.
        expert_shard_type: must be 0.
        shared_expert_num: number of shared experts.
        shared_expert_rank_num: number of ranks for them.
        quant_mode: 0 none, 2 int8 rows with a scale each.
        global_bs: 0 if all ranks have the same BS, otherwise the largest times W.
        expert_token_nums_type: 0 cumulative sums, 1 counts.
        comm_alg: a hint.
        zero_expert_num: number of experts that give zero.
        copy_expert_num: number of experts that give the token itself.
        const_expert_num: number of experts that give a combination of the token and a constant.
        y_dtype: None or the dtype that ``expand_x`` has anyway.
        x_dtype: None or the dtype of x.
        scales_dtype: None or float32.

    Returns:
        ``(expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums, ep_recv_counts, tp_recv_counts,
        expand_scales)``:

        * ``[A, H]``, dtype of x or int8: the rows received, by local expert, then source rank, then ``t*K + j``;
        * ``[A]`` float32: the scale of each row;
        * int32, (source rank, token, slot) of each row;
        * ``[L]`` int64: rows of each local expert (``[1]`` on a rank with a shared expert);
        * ``[W*L]`` int32 (``[W]``): running total over [local expert][source rank], more words with ``expert_scales``;
        * ``[tp_world_size]`` int32: with two lanes the rows of each;
        * ``[A]`` float32: the ``expert_scales`` that travelled.

        With two lanes the first two have ``2 * A`` rows: those of the own lane, then at once those of the other.

    Raises:
        OperatorError: a rule above is broken; on CPU also ids and masks out of range, another group or rank than
            stated, and ranks that disagree, on every rank.
    """
    op = kernel.V2
    require(elastic_info is None, f"{op}: elastic_info must be None")
    if expert_shard_type != 0:
        reject(f"{op}: expert_shard_type must be 0 (shared experts on the first ranks), but is {expert_shard_type}")
    for name, value in (
        ("zero_expert_num", zero_expert_num),
        ("copy_expert_num", copy_expert_num),
        ("const_expert_num", const_expert_num),
    ):
        if value < 0:
            reject(f"{op}: {name} must not be negative, but is {value}")
    require_device(op, "performance_info", performance_info, x)
    check_performance_info(op, performance_info, ep_world_size)
    call = Call(
        x,
        expert_ids,
        scales,
        x_active_mask,
        expert_scales,
        performance_info,
        group_ep,
        ep_world_size,
        ep_rank_id,
        moe_expert_num,
        group_tp,
        tp_world_size,
        tp_rank_id,
        shared_expert_num,
        shared_expert_rank_num,
        quant_mode,
        global_bs,
        expert_token_nums_type,
        comm_alg,
        zero_expert_num,
        copy_expert_num,
        const_expert_num,
    )
    kernel.check(op, call)
    for name, code, dtype in (
        ("y_dtype", y_dtype, torch.int8 if quant_mode else x.dtype),
        ("x_dtype", x_dtype, x.dtype),
        ("scales_dtype", scales_dtype, torch.float32),
    ):
        if as_dtype(op, name, code) not in (None, dtype):
            reject(f"{op}: {name} must be None or name {dtype_name(dtype)}, but is {code}")
    return _v2_op(*kernel.without_gradients(op, call))
