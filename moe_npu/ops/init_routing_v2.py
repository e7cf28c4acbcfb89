"""Expansion of token rows in the order of their experts, second generation (spec: routing 2.2).

The pairs of the experts in ``active_expert_range`` get rows as `_expert_sort` says: as many as there are (dropless),
or `expert_capacity` per expert (drop/pad). Rows may be quantized to int8:

    static    q = clamp(rint(x * scale + offset), -128, 127)
    dynamic   v = x * scale[expert],   expanded_scale = max |v| / 127,   q = rint(v / expanded_scale)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_npu.ops._expert_sort import (
    num_expanded_rows,
    place,
    quantize_dynamic,
    quantize_static,
    spread,
    sum_over_slots,
)
from moe_npu.ops._groups import CUMSUM, PAIRS
from moe_npu.ops._init_routing_rules import DYNAMIC, NO_QUANT, STATIC, check_v2, resolve_range
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _encode_counts(counts: torch.Tensor, start: int, expert_num: int, type: int) -> torch.Tensor:
    if type == CUMSUM:
        return counts.cumsum(0)
    if type != PAIRS:
        return counts
    used = counts.nonzero().squeeze(1)
    pairs = counts.new_zeros(expert_num, 2)
    pairs[: used.numel()] = torch.stack((used + start, counts[used]), 1)
    return pairs


def _cpu(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
) -> _Routed:
    start, end = active_expert_range
    capacity = expert_capacity if drop_pad_mode == 1 else None
    num_rows = num_expanded_rows(expert_idx.numel(), active_num) if capacity is None else expert_num * capacity
    placement = place(expert_idx, start, end, num_rows, capacity)
    if x.size(0) == 0:
        scale = offset = None
    expanded_scale = torch.zeros(num_rows, dtype=_scale_dtype(scale))
    token = placement.pair.div(max(expert_idx.size(1), 1), rounding_mode="floor")
    if quant_mode == DYNAMIC:
        values, row_scale = quantize_dynamic(x, token, scale, placement.expert)
        expanded_scale = spread(row_scale, placement, num_rows)
    elif quant_mode == STATIC and scale is not None and offset is not None:
        values = quantize_static(x, token, scale, offset)
    else:
        # quantized without scale: there are no rows
        values = x.index_select(0, token).to(x.dtype if quant_mode == NO_QUANT else torch.int8)
        if scale is not None:
            expanded_scale = spread(scale.index_select(0, token), placement, num_rows)
    expanded_x = spread(values, placement, num_rows)
    if expert_tokens_num_flag:
        counts = _encode_counts(placement.counts, start, expert_num, expert_tokens_num_type)
    else:
        counts = torch.zeros(_counts_shape(expert_num, expert_tokens_num_type, start, end), dtype=torch.int64)
    return (
        expanded_x if capacity is None else expanded_x.view(expert_num, capacity, x.size(1)),
        placement.row_of_pair if row_idx_type == 0 else placement.order.to(torch.int32),
        counts,
        expanded_scale,
    )


def _scale_dtype(scale: torch.Tensor | None) -> torch.dtype:
    """float32, unless a check of gradients computes in float64."""
    return torch.float64 if scale is not None and scale.dtype == torch.float64 else torch.float32


def _counts_shape(expert_num: int, expert_tokens_num_type: int, start: int, end: int) -> tuple[int, ...]:
    """What a device allocates, with or without ``expert_tokens_num_flag``; its shape function has no dims without."""
    return (expert_num, 2) if expert_tokens_num_type == PAIRS else (end - start,)


def _npu(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
) -> _Routed:
    if expert_idx.numel() == 0:  # the checks of torch_npu look at the shape of a scale that nothing reads
        outputs = _fake(
            x,
            expert_idx,
            scale,
            offset,
            active_num,
            expert_capacity,
            expert_num,
            drop_pad_mode,
            expert_tokens_num_type,
            expert_tokens_num_flag,
            quant_mode,
            active_expert_range,
            row_idx_type,
        )
        for output in outputs:
            output.zero_()
        return outputs
    # every number of rows from N * K on is the same: a compiler need not make a constant of N
    everything = drop_pad_mode == 1 or active_num <= 0 or active_num >= expert_idx.numel()
    expanded_x, expanded_row_idx, counts, expanded_scale = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        expert_idx,
        scale=scale,
        offset=offset,
        active_num=-1 if everything else active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        quant_mode=quant_mode,
        # never left out: torch_npu keeps the range of the first call of a process for all others
        active_expert_range=active_expert_range,
        row_idx_type=row_idx_type,
    )
    if quant_mode == STATIC:
        # not an output: never written, and without dimensions in a traced graph
        expanded_scale = expanded_x.new_zeros(expanded_x.flatten(0, -2).size(0), dtype=torch.float32)
    return expanded_x, expanded_row_idx, counts, expanded_scale


def _fake(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
) -> _Routed:
    pairs, hidden = expert_idx.numel(), x.size(1)
    dtype = x.dtype if quant_mode == NO_QUANT else torch.int8
    if drop_pad_mode == 1:
        num_rows = expert_num * expert_capacity
        expanded_x = x.new_empty(expert_num, expert_capacity, hidden, dtype=dtype)
    else:
        num_rows = num_expanded_rows(pairs, active_num)
        expanded_x = x.new_empty(num_rows, hidden, dtype=dtype)
    counts = _counts_shape(expert_num, expert_tokens_num_type, *active_expert_range)
    # not the dtype of a scale that is not looked at
    scale_dtype = _scale_dtype(scale) if quant_mode == NO_QUANT and x.size(0) != 0 else torch.float32
    return (
        expanded_x,
        expert_idx.new_empty(pairs),
        expert_idx.new_empty(counts, dtype=torch.int64),
        x.new_empty(num_rows, dtype=scale_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Routed) -> None:
    x, expert_idx, scale, *_, quant_mode, (ctx.start, ctx.end), row_idx_type = inputs
    ctx.is_scatter = row_idx_type == 1
    ctx.has_scale = scale is not None and scale.shape == (x.size(0),)
    ctx.shape = tuple(expert_idx.shape)
    ctx.save_for_backward(output[1], expert_idx if ctx.is_scatter else None)
    undifferentiable = [output[1], output[2]]
    if quant_mode != NO_QUANT or x.dtype == torch.int8:
        undifferentiable.append(output[0])
    if quant_mode != NO_QUANT or not ctx.has_scale:
        undifferentiable.append(output[3])
    ctx.mark_non_differentiable(*undifferentiable)
    ctx.set_materialize_grads(False)  # zeros for results without a gradient would be launches on a device


def _gather_index(order: torch.Tensor, expert_idx: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The gather index of a scatter index, whose tail behind the active pairs is undefined on a device."""
    available = ((expert_idx >= start) & (expert_idx < end)).sum()
    position = torch.arange(order.size(0), dtype=order.dtype, device=order.device)
    # the tail goes to one more entry in front, which is cut off
    pair = torch.where(position < available, order + 1, 0).long()
    return order.new_full((order.size(0) + 1,), -1).scatter(0, pair, position)[1:]


def _backward(ctx: Any, dexpanded: torch.Tensor | None, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    index, expert_idx = ctx.saved_tensors
    if ctx.is_scatter:
        index = _gather_index(index, expert_idx, ctx.start, ctx.end)
    index = index.view(ctx.shape)
    dx = dscale = None
    if dexpanded is not None and ctx.needs_input_grad[0]:
        dx = sum_over_slots(dexpanded.flatten(0, -2), index)
    dexpanded_scale = grads[-1]
    if dexpanded_scale is not None and ctx.needs_input_grad[2] and ctx.has_scale:
        dscale = sum_over_slots(dexpanded_scale.unsqueeze(1), index).squeeze(1)
    return dx, None, dscale, *[None] * 10


_op = register_op(
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, Tensor? scale, Tensor? offset, SymInt active_num,"
    " SymInt expert_capacity, int expert_num, int drop_pad_mode, int expert_tokens_num_type,"
    " bool expert_tokens_num_flag, int quant_mode, int[] active_expert_range, int row_idx_type)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "scale"),
)


@typed
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: torch.dtype | int | None = None,
) -> _Routed:
    """Token rows in the order of their experts, for all experts or a range of them, optionally quantized to int8.

    Args:
        x: ``[N, H]``, float16, bfloat16, float32 (on CPU also float64), or int8 if ``quant_mode`` is -1.
        expert_idx: ``[N, K]`` int32, the experts of each token. Pairs of experts outside the range get no row.
        scale: float32. Without quantization ``[N]``, copied along with the rows; static ``[1]``; dynamic ``[R, H]``
            for the R experts of the range, or ``[1, H]``, multiplied in first. With N = 0 of any shape.
        offset: float32 ``[1]``, with static quantization only.
        active_num: in expanded rows: keep at most so many; 0 and less keeps all. Ignored in drop/pad mode.
        expert_capacity: rows per expert in drop/pad mode, 1 to N.
        expert_num: the number of experts; if missing, the end of the range.
        drop_pad_mode: 0 dropless, 1 drop/pad.
        expert_tokens_num_type: 0 cumulative sums, 1 counts, 2 pairs (expert, count) of the experts that have any.
        expert_tokens_num_flag: whether to count.
        quant_mode: -1 none, 0 static int8, 1 dynamic int8.
        active_expert_range: ``[first, end)`` of the experts that get rows; empty for all.
        row_idx_type: 0 ``idx[pair] = row`` with -1 for pairs without a row; 1 ``idx[row] = pair``, dropless only.
        x_dtype: None, or the number of the dtype of x.

    Returns:
        ``(expanded_x, expanded_row_idx, counts, expanded_scale)``. ``expanded_x``: ``[rows, H]`` with
        ``rows = N*K`` or ``active_num``, dtype of x or int8, zero past the last pair; in drop/pad mode
        ``[expert_num, C, H]``, zero where an expert has fewer rows. ``expanded_row_idx``: int32 ``[N*K]``, row-major,
        not cut by ``active_num``. ``counts``: int64 ``[R]`` or ``[expert_num, 2]``, before rows are cut or dropped;
        zero unless asked for. ``expanded_scale``: ``[rows]`` float32, the scales of the rows, zeros
        if there are none. Differentiable without quantization: x through the rows and scale through its rows.

    Raises:
        OperatorError: wrong rank, dtype, size or mode, a range that does not fit, or a quantization mode of the 950
            generation.

    Example:
        >>> x = torch.tensor([[10.0], [20.0], [30.0]])
        >>> expert_idx = torch.tensor([[2, 0], [1, 2], [0, 2]], dtype=torch.int32)
        >>> rows, index, counts, _ = npu_moe_init_routing_v2(
        ...     x, expert_idx, expert_num=3, active_expert_range=[0, 2], expert_tokens_num_type=1,
        ...     expert_tokens_num_flag=True
        ... )
        >>> rows.flatten(), index
        (tensor([10., 30., 20.,  0.,  0.,  0.]), tensor([-1,  0,  2, -1,  1, -1], dtype=torch.int32))
        >>> counts
        tensor([2, 1])
    """
    experts, start, end = resolve_range(expert_num, active_expert_range)
    check_v2(
        x,
        expert_idx,
        scale,
        offset,
        expert_capacity=expert_capacity,
        expert_num=experts,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        quant_mode=quant_mode,
        active_expert_range=(start, end),
        row_idx_type=row_idx_type,
        x_dtype=x_dtype,
    )
    if quant_mode != NO_QUANT:
        x = x.detach()
        scale, offset = (None if tensor is None else tensor.detach() for tensor in (scale, offset))
    return _op(
        x,
        expert_idx,
        scale,
        offset,
        active_num,
        expert_capacity,
        experts,
        drop_pad_mode,
        expert_tokens_num_type,
        expert_tokens_num_flag,
        quant_mode,
        [start, end],
        row_idx_type,
    )
