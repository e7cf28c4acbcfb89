"""Combine, add a residual, normalize (spec: routing 5.6).

    x_out = combine(...) + residual_x
    rstd = 1 / sqrt(mean(x_out ** 2) + norm_eps)
    y = x_out * rstd * gamma

in float32, of the rounded combination and the rounded x_out.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops import _combine_kernel as kernel
from moe_npu.ops._combine_kernel import Call
from moe_npu.ops._errors import dtype_name, reject, require_device
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "npu_moe_distribute_combine_add_rms_norm"
_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check(call: Call, residual_x: torch.Tensor, gamma: torch.Tensor) -> None:
    kernel.check(_OP, call)
    tokens, columns = call.expert_ids.size(0), call.expand_x.size(1)
    for name, tensor, shape in (
        ("residual_x", residual_x, (tokens, 1, columns)),
        ("gamma", gamma, (columns,)),
    ):
        require_device(_OP, name, tensor, call.expand_x)
        if tensor.dtype != call.out_dtype:
            reject(f"{_OP}: {name} must have dtype {dtype_name(call.out_dtype)}, but has {dtype_name(tensor.dtype)}")
        if tensor.shape != shape:
            reject(f"{_OP}: {name} must have shape {tuple(shape)}, but has {tuple(tensor.shape)}")


def _rstd(x_out: torch.Tensor, norm_eps: float) -> torch.Tensor:
    wide = x_out.to(torch.promote_types(x_out.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)


def _cpu(residual_x: torch.Tensor, gamma: torch.Tensor, norm_eps: float, *args: Any) -> _Results:
    call = Call(*args)
    combined = kernel.combine_cpu(_OP, call).unsqueeze(1)
    compute_dtype = torch.promote_types(combined.dtype, torch.float32)
    x_out = (combined.to(compute_dtype) + residual_x.to(compute_dtype)).to(combined.dtype)
    rstd = _rstd(x_out, norm_eps)
    y = x_out.to(compute_dtype) * rstd * gamma.to(compute_dtype)
    return y.to(combined.dtype), rstd, x_out


def _npu(residual_x: torch.Tensor, gamma: torch.Tensor, norm_eps: float, *args: Any) -> _Results:
    call = Call(*args)
    return torch.ops.npu.npu_moe_distribute_combine_add_rms_norm(
        call.expand_x,
        call.expert_ids,
        call.handle,
        call.ep_send_counts,
        call.expert_scales,
        residual_x,
        gamma,
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
        group_tp=call.group_tp,
        tp_world_size=call.tp_world_size,
        tp_rank_id=call.tp_rank_id,
        shared_expert_num=call.shared_expert_num,
        shared_expert_rank_num=call.shared_expert_rank_num,
        global_bs=call.global_bs,
        comm_quant_mode=call.comm_quant_mode,
        comm_alg=call.comm_alg,
        norm_eps=norm_eps,
        zero_expert_num=call.zero_expert_num,
        copy_expert_num=call.copy_expert_num,
        const_expert_num=call.const_expert_num,
    )


def _fake(residual_x: torch.Tensor, gamma: torch.Tensor, norm_eps: float, *args: Any) -> _Results:
    call = Call(*args)
    y = kernel.combine_fake(call).unsqueeze(1)
    rstd_dtype = torch.promote_types(y.dtype, torch.float32)
    return y, y.new_empty(y.size(0), 1, 1, dtype=rstd_dtype), torch.empty_like(y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    _, gamma, ctx.norm_eps, *args = inputs
    kernel.save(ctx, Call(*args), gamma, output[2])


def _backward(ctx: Any, dy: torch.Tensor, drstd: torch.Tensor, dx_out: torch.Tensor) -> tuple[Any, ...]:
    *tensors, gamma, x_out = ctx.saved_tensors
    call = Call(*tensors, *ctx.attributes)
    dtype = drstd.dtype
    x, dnormed = x_out.to(dtype), dy.to(dtype) * gamma.to(dtype)
    rstd = _rstd(x, ctx.norm_eps)
    # y and rstd as functions of x_out: the mean links the columns
    dmean = (dnormed * x).sum(-1, keepdim=True) + drstd
    dx = dx_out.to(dtype) + dnormed * rstd - x * dmean * rstd**3 / x.size(-1)
    needs_residual, needs_gamma, _, *needs_input = ctx.needs_input_grad
    needs = dict(zip(Call._fields, needs_input, strict=True))
    grads = kernel.gradients(ctx, call, dx.squeeze(1), needs)
    dgamma = (dy.to(dtype) * x * rstd).sum((0, 1)).to(gamma.dtype) if needs_gamma else None
    dresidual = dx.to(x_out.dtype) if needs_residual else None
    return dresidual, dgamma, None, *[grads.get(name) for name in Call._fields]


_op = register_op(
    "npu_moe_distribute_combine_add_rms_norm(Tensor residual_x, Tensor gamma, float norm_eps, Tensor expand_x,"
    " Tensor expert_ids, Tensor expand_idx, Tensor ep_send_counts, Tensor expert_scales, Tensor? tp_send_counts,"
    " Tensor? x_active_mask, Tensor? expand_scales, Tensor? shared_expert_x, Tensor? performance_info, Tensor? ori_x,"
    " Tensor? const_expert_alpha_1, Tensor? const_expert_alpha_2, Tensor? const_expert_v, str group_ep,"
    " int ep_world_size, int ep_rank_id, int moe_expert_num, str group_tp, int tp_world_size, int tp_rank_id,"
    " int shared_expert_num, int shared_expert_rank_num, SymInt global_bs, int comm_quant_mode, str comm_alg,"
    " int zero_expert_num, int copy_expert_num, int const_expert_num) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cpu_gradient=("expand_x", "expert_scales"),
    differentiable=(
        "expand_x",
        "expert_scales",
        "residual_x",
        "gamma",
        "shared_expert_x",
        "ori_x",
        "const_expert_alpha_1",
        "const_expert_alpha_2",
        "const_expert_v",
    ),
)


@typed
def npu_moe_distribute_combine_add_rms_norm(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    residual_x: torch.Tensor,
    gamma: torch.Tensor,
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
    elastic_info: torch.Tensor | None = None,
    ori_x: torch.Tensor | None = None,
    const_expert_alpha_1: torch.Tensor | None = None,
    const_expert_alpha_2: torch.Tensor | None = None,
    const_expert_v: torch.Tensor | None = None,
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
    comm_alg: str = "",
    norm_eps: float = 1e-6,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> _Results:
    """:func:`npu_moe_distribute_combine_v2`, added to a residual and normalized.

    Differentiable in ``residual_x``, ``gamma`` and, as combine is, in its arguments.

    Args:
        expand_x: as in combine, like all that are not mentioned here.
        expert_ids: as in combine.
        expand_idx: in spite of its name the ``assist_info_for_combine`` of :func:`npu_moe_distribute_dispatch_v2`.
        ep_send_counts: as in combine.
        expert_scales: as in combine.
        residual_x: ``[BS, 1, H]``, dtype of the result.
        gamma: ``[H]``, dtype of the result.
        group_ep: as in combine.
        ep_world_size: as in combine.
        ep_rank_id: as in combine.
        moe_expert_num: as in combine.
        tp_send_counts: as in combine.
        x_active_mask: as in combine; on CPU the combination of an inactive token is zero.
        activation_scale: must be None.
        weight_scale: must be None.
        group_list: must be None.
        expand_scales: as in combine.
        shared_expert_x: as in combine.
        elastic_info: must be None.
        ori_x: as in combine.
        const_expert_alpha_1: as in combine.
        const_expert_alpha_2: as in combine.
        const_expert_v: as in combine.
        group_tp: as in combine.
        tp_world_size: as in combine.
        tp_rank_id: as in combine.
        expert_shard_type: must be 0.
        shared_expert_num: as in combine.
        shared_expert_rank_num: as in combine.
        global_bs: as in combine.
        out_dtype: must be 0.
        comm_quant_mode: as in combine.
        group_list_type: must be 0.
        comm_alg: a hint.
        norm_eps: added to the mean square.
        zero_expert_num: as in combine.
        copy_expert_num: as in combine.
        const_expert_num: as in combine.

    Returns:
        ``(y, rstd, x_out)``: ``[BS, 1, H]``, ``[BS, 1, 1]`` float32, ``[BS, 1, H]``.

    Raises:
        OperatorError: as in combine, and a residual or gamma that does not fit.
    """
    kernel.check_reserved(
        _OP,
        activation_scale,
        weight_scale,
        group_list,
        out_dtype,
        group_list_type,
        elastic_info=elastic_info,
        expert_shard_type=expert_shard_type,
    )
    call = Call(
        expand_x,
        expert_ids,
        expand_idx,
        ep_send_counts,
        expert_scales,
        tp_send_counts,
        x_active_mask,
        expand_scales,
        shared_expert_x,
        None,
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
    _check(call, residual_x, gamma)
    return _op(residual_x, gamma, norm_eps, *call)
