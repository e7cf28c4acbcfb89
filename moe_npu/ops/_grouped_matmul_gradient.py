"""Gradients of `npu_grouped_matmul` with float weights, each a composition of our own differentiable operators.

    dx = dy @ weight.T,   dweight = x.T @ dy,   dbias = the sum of the rows of dy          for each group

(Spec: grouped matmul 4.) Every function takes contiguous gradients ``dy`` and returns those of x, weight and bias as
lists, None where not asked for; the one of bias is asked for by its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_npu.ops._grouped_matmul_call import K_SPLIT_TYPE, Call, TensorList, dequantize
from moe_npu.ops._grouped_matmul_rows import PARAMETERS
from moe_npu.ops._groups import COUNTS, counts_from
from moe_npu.ops._numerics import is_transposed
from moe_npu.ops.grouped_mm import bias_gradient, grouped_mm, grouped_mm_gradients, grouped_mm_weight_grad

_Tensors = Sequence[torch.Tensor]
_Gradients = tuple[_Tensors | None, _Tensors | None, _Tensors | None]


def _times_transposed(dy: _Tensors, weight: _Tensors, counts: torch.Tensor | None) -> list[torch.Tensor]:
    """Each ``dy[i] @ weight[i].T``; with ``counts`` the rows of one dy in groups."""
    # a device wants all weights transposed or none: views with gaps among contiguous weights are copied
    transposed = [(tensor if is_transposed(tensor) else tensor.contiguous()).mT for tensor in weight]
    split_item, group_type = (0, -1) if counts is None else (3, 0)
    modes = (split_item, group_type, COUNTS, 0, None, None)
    return torch.ops.moe_npu.npu_grouped_matmul.default(
        list(dy), transposed, *[None] * len(PARAMETERS), counts, None, *modes
    )


def _k_split_gradients(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, dy: torch.Tensor, needs_dx: bool, needs_dweight: bool
) -> _Gradients:
    """Group type 2: ``y[g] = x[:, g] @ weight[g]``, the weight gradient of a `grouped_mm` whose rows are K here."""
    dx = [grouped_mm(weight, dy.mT, counts).t()] if needs_dx else None
    dweight = [grouped_mm(x.t().contiguous(), dy, counts)] if needs_dweight else None
    return dx, dweight, None


def _row_gradients(
    x: torch.Tensor,
    weight: _Tensors,
    counts: torch.Tensor,
    dy: torch.Tensor,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    """The rows of one x in groups, one result."""
    if weight[0].dim() == 3:
        gradients = grouped_mm_gradients(x, weight[0], counts, dy, needs_dx, needs_dweight, bias_dtype)
        dx, dweight, dbias = (None if gradient is None else [gradient] for gradient in gradients)
        return dx, dweight, dbias
    rows = weights = biases = None
    if needs_dx:
        rows = _times_transposed([dy], weight, counts)
    if needs_dweight:
        weights = grouped_mm_weight_grad(x, dy, counts).unbind()
    if bias_dtype is not None:
        biases = bias_gradient(dy, counts, bias_dtype).unbind()
    return rows, weights, biases


def _pair_gradients(
    x: _Tensors,
    weight: _Tensors,
    dy: _Tensors,
    bounds: list[tuple[int, int]] | None,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    """Each weight with an x of its own, or with the rows ``bounds`` of the one x; one result each or in all."""
    rows = x if bounds is None else [x[0][start:end] for start, end in bounds]
    if len(dy) < len(rows):
        dy = dy[0].split([tensor.size(0) for tensor in rows])
    dx: _Tensors | None = None
    if needs_dx:
        dx = _times_transposed(dy, weight, None)
        if bounds is not None:
            rest = x[0].new_zeros(x[0].size(0) - bounds[-1][1], x[0].size(1))
            dx = [torch.cat([*dx, rest])]
    pairs = [(a.reshape(-1, a.size(-1)), b.reshape(-1, b.size(-1))) for a, b in zip(rows, dy, strict=True)]
    dweight = dbias = None
    if needs_dweight:
        dweight = [
            grouped_mm_weight_grad(a, b, torch.full((1,), a.size(0), dtype=torch.int64, device=a.device)).squeeze(0)
            for a, b in pairs
        ]
    if bias_dtype is not None:
        sum_dtype = torch.promote_types(bias_dtype, torch.float32)
        dbias = [grad.sum(0, dtype=sum_dtype).to(bias_dtype) for _, grad in pairs]
    return dx, dweight, dbias


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: TensorList) -> None:
    """Keep x, weight and what the weight is dequantized with."""
    call = Call(*inputs)
    antiquant = (
        [*call.antiquant_scale, *call.antiquant_offset] if call.antiquant_scale and call.antiquant_offset else []
    )
    ctx.save_for_backward(call.group_list, *call.x, *call.weight, *antiquant)
    ctx.lengths = [
        None if tensors is None else len(tensors) for tensors in (call.x, call.weight, *call.parameters.values())
    ]
    ctx.bias_dtype = None if call.bias is None else call.bias[0].dtype
    ctx.group_type, ctx.group_list_type, ctx.group_sizes = call.group_type, call.group_list_type, call.group_sizes
    ctx.bounds = None if call.group_sizes is None else call.host_bounds
    ctx.is_pairs, ctx.is_joint = call.is_pairs, call.is_joint


def backward(ctx: Any, grads: TensorList) -> tuple[Any, ...]:
    """The gradients of all arguments of the operator, those of x, weight and bias where needed."""
    group_list, *saved = ctx.saved_tensors
    num_x, num_weights = ctx.lengths[:2]
    x, weight, antiquant = saved[:num_x], saved[num_x : num_x + num_weights], saved[num_x + num_weights :]
    if antiquant:
        scales, offsets = antiquant[:num_weights], antiquant[num_weights:]
        weight = [dequantize(*parts) for parts in zip(weight, scales, offsets, strict=True)]
    needs_dx, needs_dweight, needs_dbias = (
        isinstance(needs, list) and any(needs) for needs in ctx.needs_input_grad[:3]
    )
    grads = [grad.contiguous() for grad in grads]
    if ctx.group_type == K_SPLIT_TYPE:
        counts = counts_from(group_list, ctx.group_list_type)
        gradients = _k_split_gradients(x[0], weight[0], counts, grads[0], needs_dx, needs_dweight)
    elif ctx.is_pairs or not ctx.is_joint:
        bounds = None if ctx.is_pairs else ctx.bounds
        gradients = _pair_gradients(
            x, weight, grads, bounds, needs_dx, needs_dweight, ctx.bias_dtype if needs_dbias else None
        )
    else:
        if group_list is None:
            group_list = torch.tensor(ctx.group_sizes, dtype=torch.int64, device=x[0].device)
        counts = counts_from(group_list, ctx.group_list_type)
        gradients = _row_gradients(
            x[0], weight, counts, grads[0], needs_dx, needs_dweight, ctx.bias_dtype if needs_dbias else None
        )
    # the structure that was passed: a list for each list, None for everything else
    passed: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            passed[index] = list(gradient)
    return (*passed, *[None] * (len(Call._fields) - len(passed)))
