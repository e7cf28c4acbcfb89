"""Expansion of token rows in the order of their experts, always quantized to int8 (spec: routing 2.3).

The sort, the rows and the arithmetic of `npu_moe_init_routing_v2` with the range of all experts; the encodings of the
counts are numbered otherwise, and what an argument switches off is None.
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import reject
from moe_npu.ops._expert_sort import num_expanded_rows, place, quantize_dynamic, quantize_static, spread
from moe_npu.ops._init_routing_rules import DYNAMIC, STATIC, check_capacity, check_scale, check_tensors
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "npu_moe_init_routing_quant"
_NO_COUNTS, _CUMSUM, _COUNTS = 0, 1, 2
_Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _check(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_mode: int,
    quant_mode: int,
) -> None:
    check_tensors(_OP, x, expert_idx)
    if drop_pad_mode not in (0, 1):
        reject(f"{_OP}: drop_pad_mode must be 0 or 1, but is {drop_pad_mode}")
    if expert_tokens_num_mode not in (_NO_COUNTS, _CUMSUM, _COUNTS):
        reject(f"{_OP}: expert_tokens_num_mode must be 0, 1 or 2, but is {expert_tokens_num_mode}")
    if quant_mode not in (STATIC, DYNAMIC):
        reject(f"{_OP}: quant_mode must be 0 or 1, but is {quant_mode}")
    if expert_num <= 0:
        reject(f"{_OP}: expert_num must be positive, but is {expert_num}")
    check_scale(_OP, x, scale, offset, quant_mode, expert_num)
    if drop_pad_mode == 1:
        check_capacity(_OP, expert_capacity, x.size(0))


def _has_counts(drop_pad_mode: int, expert_tokens_num_mode: int) -> bool:
    return drop_pad_mode == 0 and expert_tokens_num_mode != _NO_COUNTS


def _has_counts_before_capacity(drop_pad_mode: int, expert_tokens_before_capacity_flag: bool) -> bool:
    return drop_pad_mode == 1 and expert_tokens_before_capacity_flag


def _cpu(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_mode: int,
    expert_tokens_before_capacity_flag: bool,
    quant_mode: int,
) -> _Five:
    capacity = expert_capacity if drop_pad_mode == 1 else None
    num_rows = num_expanded_rows(expert_idx.numel(), active_num) if capacity is None else expert_num * capacity
    placement = place(expert_idx, 0, expert_num, num_rows, capacity)
    token = placement.pair.div(max(expert_idx.size(1), 1), rounding_mode="floor")
    if x.size(0) == 0:
        scale = None
    expanded_scale = torch.empty(0)
    if quant_mode == DYNAMIC:
        codes, row_scale = quantize_dynamic(x, token, scale, placement.expert)
        expanded_scale = spread(row_scale, placement, num_rows)
    elif scale is None or offset is None:
        codes = x.index_select(0, token).to(torch.int8)  # there are no rows
    else:
        codes = quantize_static(x, token, scale, offset)
    expanded_x = spread(codes, placement, num_rows)
    none = torch.empty(0, dtype=torch.int32)
    counts = placement.counts.cumsum(0) if expert_tokens_num_mode == _CUMSUM else placement.counts
    is_before = _has_counts_before_capacity(drop_pad_mode, expert_tokens_before_capacity_flag)
    return (
        expanded_x if capacity is None else expanded_x.view(expert_num, capacity, x.size(1)),
        placement.row_of_pair,
        counts.to(torch.int32) if _has_counts(drop_pad_mode, expert_tokens_num_mode) else none,
        placement.counts.to(torch.int32) if is_before else torch.empty_like(none),
        expanded_scale,
    )


def _npu(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_mode: int,
    expert_tokens_before_capacity_flag: bool,
    quant_mode: int,
) -> _Five:
    outputs = _fake(
        x,
        expert_idx,
        scale,
        offset,
        active_num,
        expert_capacity,
        expert_num,
        drop_pad_mode,
        expert_tokens_num_mode,
        expert_tokens_before_capacity_flag,
        quant_mode,
    )
    if expert_idx.numel() == 0:
        for output in outputs:
            output.zero_()
        return outputs
    results = torch.ops.npu.npu_moe_init_routing_quant(
        x,
        expert_idx,
        scale=scale,
        offset=offset,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_mode=expert_tokens_num_mode,
        expert_tokens_before_capacity_flag=expert_tokens_before_capacity_flag,
        quant_mode=quant_mode,
    )
    # what is switched off comes undefined
    is_on = (
        True,
        True,
        _has_counts(drop_pad_mode, expert_tokens_num_mode),
        _has_counts_before_capacity(drop_pad_mode, expert_tokens_before_capacity_flag),
        quant_mode == DYNAMIC,
    )
    a, b, c, d, e = (result if on else output for on, result, output in zip(is_on, results, outputs, strict=True))
    return a, b, c, d, e


def _fake(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_mode: int,
    expert_tokens_before_capacity_flag: bool,
    quant_mode: int,
) -> _Five:
    if drop_pad_mode == 1:
        num_rows = expert_num * expert_capacity
        expanded_x = x.new_empty(expert_num, expert_capacity, x.size(1), dtype=torch.int8)
    else:
        num_rows = num_expanded_rows(expert_idx.numel(), active_num)
        expanded_x = x.new_empty(num_rows, x.size(1), dtype=torch.int8)
    is_before = _has_counts_before_capacity(drop_pad_mode, expert_tokens_before_capacity_flag)
    return (
        expanded_x,
        expert_idx.new_empty(expert_idx.numel()),
        expert_idx.new_empty(expert_num if _has_counts(drop_pad_mode, expert_tokens_num_mode) else 0),
        expert_idx.new_empty(expert_num if is_before else 0),
        x.new_empty(num_rows if quant_mode == DYNAMIC else 0, dtype=torch.float32),
    )


_op = register_op(
    "npu_moe_init_routing_quant(Tensor x, Tensor expert_idx, Tensor? scale, Tensor? offset, SymInt active_num,"
    " SymInt expert_capacity, int expert_num, int drop_pad_mode, int expert_tokens_num_mode,"
    " bool expert_tokens_before_capacity_flag, int quant_mode) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    is_lowered=False,
)


@typed
def npu_moe_init_routing_quant(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = 1024,
    expert_capacity: int = 0,
    expert_num: int = 256,
    drop_pad_mode: int = 0,
    expert_tokens_num_mode: int = 0,
    expert_tokens_before_capacity_flag: bool = False,
    quant_mode: int = 1,
) -> _Routed:
    """Token rows in the order of their experts, quantized to int8.

    Args:
        x: ``[N, H]``, float16, bfloat16 or float32.
        expert_idx: ``[N, K]`` int32, the experts of each token.
        scale: float32. Static ``[1]``; dynamic ``[expert_num, H]`` or ``[1, H]``, multiplied in first, or None.
        offset: float32 ``[1]``, with static quantization only.
        active_num: in expanded rows: keep at most so many; 0 and less keeps all. The default of 1024 cuts larger
            batches without a word. Ignored in drop/pad mode.
        expert_capacity: rows per expert in drop/pad mode, 1 to N.
        expert_num: the number of experts.
        drop_pad_mode: 0 dropless, 1 drop/pad.
        expert_tokens_num_mode: 0 none, 1 cumulative sums, 2 counts, in the dropless mode.
        expert_tokens_before_capacity_flag: whether to count in drop/pad mode.
        quant_mode: 0 static, 1 dynamic.

    Returns:
        ``(expanded_x, expanded_row_idx, counts, counts_before_capacity, expanded_scale)``: int8 ``[rows, H]``, or
        ``[expert_num, C, H]`` with zeros where an expert has fewer rows; int32 ``[N*K]``, the row of each pair, -1 for
        dropped ones; int32 ``[expert_num]`` or None; the same in drop/pad mode, before rows are dropped; float32
        ``[rows]`` or None with static quantization. No gradient. The counts must be cast to int64 for a group list.

    Raises:
        OperatorError: wrong rank, dtype, size or mode.

    Example:
        >>> x = torch.tensor([[1.0, -4.0], [127.0, 50.0]])
        >>> expert_idx = torch.tensor([[1], [0]], dtype=torch.int32)
        >>> rows, index, counts, _, scale = npu_moe_init_routing_quant(
        ...     x, expert_idx, expert_num=2, expert_tokens_num_mode=2
        ... )
        >>> rows, counts, scale
        (tensor([[ 127,   50],
                [  32, -127]], dtype=torch.int8), tensor([1, 1], dtype=torch.int32), tensor([1.0000, 0.0315]))
    """
    _check(
        x,
        expert_idx,
        scale,
        offset,
        expert_capacity,
        expert_num,
        drop_pad_mode,
        expert_tokens_num_mode,
        quant_mode,
    )
    expanded_x, expanded_row_idx, counts, before_capacity, expanded_scale = _op(
        x.detach(),
        expert_idx,
        None if scale is None else scale.detach(),
        None if offset is None else offset.detach(),
        active_num,
        expert_capacity,
        expert_num,
        drop_pad_mode,
        expert_tokens_num_mode,
        expert_tokens_before_capacity_flag,
        quant_mode,
    )
    return (
        expanded_x,
        expanded_row_idx,
        counts if _has_counts(drop_pad_mode, expert_tokens_num_mode) else None,
        before_capacity if _has_counts_before_capacity(drop_pad_mode, expert_tokens_before_capacity_flag) else None,
        expanded_scale if quant_mode == DYNAMIC else None,
    )
