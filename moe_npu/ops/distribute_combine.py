"""Combine: the results of the experts back to their tokens, weighted and summed (spec: routing 5.4, 5.5).

The formula, the rules and the CPU kernel are in `_combine_kernel.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops import _combine_kernel as kernel
from moe_npu.ops._combine_kernel import Call
from moe_npu.ops._errors import reject, require
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_V1, _V2 = "npu_moe_distribute_combine", "npu_moe_distribute_combine_v2"
# the arguments that the first version has
_V1_FIELDS = (*Call._fields[:6], "expand_scales", "shared_expert_x", *Call._fields[kernel.NUM_TENSORS : -4])


# ---------------------------------------------------------------- v1


def _v1_call(args: tuple[Any, ...]) -> Call:
    tensors: dict[str, Any] = dict.fromkeys(Call._fields[: kernel.NUM_TENSORS])
    return Call(**{**tensors, **dict(zip(_V1_FIELDS, args, strict=True))})


def _v1_cpu(*args: Any) -> torch.Tensor:
    return kernel.combine_cpu(_V1, _v1_call(args))


def _v1_npu(*args: Any) -> torch.Tensor:
    call = _v1_call(args)
    if call.shared_expert_x is not None:
        # torch_npu takes it and leaves it out of the sum
        reject(f"{_V1}: shared_expert_x must be None on a device; {_V2} adds it")
    return torch.ops.npu.npu_moe_distribute_combine(
        call.expand_x,
        call.expert_ids,
        call.handle,
        call.ep_send_counts,
        call.expert_scales,
        call.group_ep,
        call.ep_world_size,
        call.ep_rank_id,
        call.moe_expert_num,
        tp_send_counts=call.tp_send_counts,
        expand_scales=call.expand_scales,
        group_tp=call.group_tp,
        tp_world_size=call.tp_world_size,
        tp_rank_id=call.tp_rank_id,
        shared_expert_num=call.shared_expert_num,
        shared_expert_rank_num=call.shared_expert_rank_num,
        global_bs=call.global_bs,
        comm_quant_mode=call.comm_quant_mode,
    )


def _v1_fake(*args: Any) -> torch.Tensor:
    return kernel.combine_fake(_v1_call(args))


def _v1_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    kernel.save(ctx, _v1_call(inputs))


def _v1_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = dict(zip(_V1_FIELDS, ctx.needs_input_grad, strict=True))
    grads = kernel.gradients(ctx, Call(*ctx.saved_tensors, *ctx.attributes), dout, needs)
    return tuple(grads.get(name) for name in _V1_FIELDS)


_v1_op = register_op(
    "npu_moe_distribute_combine(Tensor expand_x, Tensor expert_ids, Tensor expand_idx, Tensor ep_send_counts,"
    " Tensor expert_scales, Tensor? tp_send_counts, Tensor? expand_scales, Tensor? shared_expert_x, str group_ep,"
    " int ep_world_size, int ep_rank_id, int moe_expert_num, str group_tp, int tp_world_size, int tp_rank_id,"
    " int shared_expert_num, int shared_expert_rank_num, SymInt global_bs, int comm_quant_mode) -> Tensor",
    cpu=_v1_cpu,
    npu=_v1_npu,
    fake=_v1_fake,
    setup_context=_v1_setup_context,
    backward=_v1_backward,
    differentiable=("expand_x", "expert_scales", "shared_expert_x"),
    cpu_gradient=("expand_x", "expert_scales", "shared_expert_x"),
)


# ---------------------------------------------------------------- v2


def _v2_cpu(*args: Any) -> torch.Tensor:
    return kernel.combine_cpu(_V2, Call(*args))


def _v2_npu(*args: Any) -> torch.Tensor:
    call = Call(*args)
    return torch.ops.npu.npu_moe_distribute_combine_v2(
        call.expand_x,
        call.expert_ids,
        call.handle,
        call.ep_send_counts,
        call.expert_scales,
        call.group_ep,
        call.ep_world_size,
        call.ep_rank_id,
        call.moe_expert_num,
        tp_send_counts=call.tp_send_counts,
        x_active_mask=call.x_active_mask,
        expand_scales=call.expand_scales,
        shared_expert_x=call.shared_expert_x,
        ori_x=call.ori_x,
        const_expert_alpha_1=call.const_expert_alpha_1,
        const_expert_alpha_2=call.const_expert_alpha_2,
        const_expert_v=call.const_expert_v,
        performance_info=call.performance_info,
        group_tp=call.group_tp,
        tp_world_size=call.tp_world_size,
        tp_rank_id=call.tp_rank_id,
        shared_expert_num=call.shared_expert_num,
        shared_expert_rank_num=call.shared_expert_rank_num,
        global_bs=call.global_bs,
        comm_quant_mode=call.comm_quant_mode,
        comm_alg=call.comm_alg,
        zero_expert_num=call.zero_expert_num,
        copy_expert_num=call.copy_expert_num,
        const_expert_num=call.const_expert_num,
    )


def _v2_fake(*args: Any) -> torch.Tensor:
    return kernel.combine_fake(Call(*args))


def _v2_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    kernel.save(ctx, Call(*inputs))


def _v2_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = dict(zip(Call._fields, ctx.needs_input_grad, strict=True))
    grads = kernel.gradients(ctx, Call(*ctx.saved_tensors, *ctx.attributes), dout, needs)
    return tuple(grads.get(name) for name in Call._fields)


_v2_op = register_op(
    "npu_moe_distribute_combine_v2(Tensor expand_x, Tensor expert_ids, Tensor assist_info_for_combine,"
    " Tensor ep_send_counts, Tensor expert_scales, Tensor? tp_send_counts, Tensor? x_active_mask,"
    " Tensor? expand_scales, Tensor? shared_expert_x, Tensor? performance_info, Tensor? ori_x,"
    " Tensor? const_expert_alpha_1, Tensor? const_expert_alpha_2, Tensor? const_expert_v, str group_ep,"
    " int ep_world_size, int ep_rank_id, int moe_expert_num, str group_tp, int tp_world_size, int tp_rank_id,"
    " int shared_expert_num, int shared_expert_rank_num, SymInt global_bs, int comm_quant_mode, str comm_alg,"
    " int zero_expert_num, int copy_expert_num, int const_expert_num) -> Tensor",
    cpu=_v2_cpu,
    npu=_v2_npu,
    fake=_v2_fake,
    setup_context=_v2_setup_context,
    backward=_v2_backward,
    cpu_gradient=("expand_x", "expert_scales"),
    differentiable=(
        "expand_x",
        "expert_scales",
        "shared_expert_x",
        "ori_x",
        "const_expert_alpha_1",
        "const_expert_alpha_2",
        "const_expert_v",
    ),
)


# ---------------------------------------------------------------- public


@typed
def npu_moe_distribute_combine(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    group_list: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
) -> torch.Tensor:
    """The results of the experts, weighted and summed for each token: the partner of the first dispatch.

    As :func:`npu_moe_distribute_combine_v2`, without masks and without zero, copy and constant experts. The third
    argument is ``expand_idx`` of :func:`npu_moe_distribute_dispatch`, int32 ``[BS*K]`` or ``[BS, K]``.
    ``x_active_mask``, ``activation_scale``, ``weight_scale`` and ``group_list`` must be None, ``out_dtype`` and
    ``group_list_type`` 0: they are reserved. On a device ``shared_expert_x`` must be None.
    """
    op = _V1
    kernel.check_reserved(
        op, activation_scale, weight_scale, group_list, out_dtype, group_list_type, expert_shard_type=expert_shard_type
    )
    require(x_active_mask is None, f"{op}: x_active_mask must be None, it is reserved; v2 takes one")
    if expand_idx.numel() != expert_ids.numel():
        reject(
            f"{op}: expand_idx must have one entry per entry of expert_ids {tuple(expert_ids.shape)}, "
            f"but has shape {tuple(expand_idx.shape)}"
        )
    args = (
        expand_x,
        expert_ids,
        expand_idx,
        ep_send_counts,
        expert_scales,
        tp_send_counts,
        expand_scales,
        shared_expert_x,
        group_ep,
        ep_world_size,
        ep_rank_id,
        moe_expert_num,
        group_tp,
        tp_world_size,
        tp_rank_id,
        shared_expert_num,
        shared_expert_rank_num,
        global_bs,
        comm_quant_mode,
    )
    kernel.check(op, _v1_call(args))
    return _v1_op(*args)


@typed
def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    ori_x: torch.Tensor | None = None,
    const_expert_alpha_1: torch.Tensor | None = None,
    const_expert_alpha_2: torch.Tensor | None = None,
    const_expert_v: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> torch.Tensor:
    """The results of the experts, weighted and summed for each token.

    For each active token, in float32 and rounded once: the rows of its MoE experts times their weights, a copy expert
    as ``weight * ori_x``, a constant expert as ``weight * (alpha_1 * ori_x + alpha_2 * v)``; plus, without a weight,
    the rows of shared experts and ``shared_expert_x``. Rows of inactive tokens are zero on CPU, undefined on a device.

    Differentiable with respect to ``shared_expert_x``, ``ori_x`` and the parameters of constant experts, and on CPU
    only with respect to ``expand_x`` and ``expert_scales``. Every rank must take part in the backward pass.

    Args:
        expand_x: ``[A, H]``, float16 or bfloat16 (on CPU also float32 and float64), the rows in the order in which
            :func:`npu_moe_distribute_dispatch_v2` gave them; int32 gives bfloat16. Rows beyond the received ones are
            not read.
        expert_ids: ``[BS, K]`` as in dispatch.
        assist_info_for_combine: third result of dispatch.
        ep_send_counts: fifth result of dispatch, ``ep_recv_counts``.
        expert_scales: ``[BS, K]`` float32, the weights of the tokens of this rank.
        group_ep: as in dispatch, like all that are not mentioned here.
        ep_world_size: as in dispatch.
        ep_rank_id: as in dispatch.
        moe_expert_num: as in dispatch.
        tp_send_counts: sixth result of dispatch, needed with two lanes, where each expert's row is the sum of what
            both partners have of it.
        x_active_mask: as in dispatch.
        expand_scales: seventh result of dispatch, or None; no effect on CPU.
        shared_expert_x: ``[BS, H]`` or ``[B, T, H]``, dtype of the result, where no rank hosts shared experts.
        elastic_info: must be None.
        ori_x: ``[BS, H]``, the tokens, needed with copy or constant experts.
        const_expert_alpha_1: ``[const_expert_num, H]``, needed with constant experts.
        const_expert_alpha_2: ``[const_expert_num, H]``, needed with constant experts.
        const_expert_v: ``[const_expert_num, H]``, needed with constant experts.
        performance_info: int64 ``[W]`` or None; no effect on CPU.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch.
        tp_rank_id: as in dispatch.
        expert_shard_type: must be 0.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        comm_quant_mode: 0, or 2 for rows that return as int8, which loses precision on a device and not on CPU.
        comm_alg: a hint.
        zero_expert_num: as in dispatch.
        copy_expert_num: as in dispatch.
        const_expert_num: as in dispatch.

    Returns:
        ``[BS, H]``, dtype of ``expand_x``.

    Raises:
        OperatorError: a rule above is broken; on CPU also counts that do not belong to these ids, and ranks that
            disagree, on every rank.
    """
    op = _V2
    kernel.check_reserved(op, elastic_info=elastic_info, expert_shard_type=expert_shard_type)
    call = Call(
        expand_x,
        expert_ids,
        assist_info_for_combine,
        ep_send_counts,
        expert_scales,
        tp_send_counts,
        x_active_mask,
        expand_scales,
        shared_expert_x,
        performance_info,
        ori_x,
        const_expert_alpha_1,
        const_expert_alpha_2,
        const_expert_v,
        group_ep,
        ep_world_size,
        ep_rank_id,
        moe_expert_num,
        group_tp,
        tp_world_size,
        tp_rank_id,
        shared_expert_num,
        shared_expert_rank_num,
        global_bs,
        comm_quant_mode,
        comm_alg,
        zero_expert_num,
        copy_expert_num,
        const_expert_num,
    )
    kernel.check(op, call)
    return _v2_op(*call)
