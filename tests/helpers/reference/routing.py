"""References of routing on one device: init, re-routing, finalize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import Codes, Float


def _stack(rows: list[Tensor], columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, columns, dtype=dtype)


# --- init_routing ----------------------------------------------------------------------------------------------------


def moe_init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, Tensor, Tensor]:
    """spec: npu_moe_init_routing 2.1."""
    num_tokens, top_k = expert_idx.shape
    experts, sources = expert_idx.flatten().tolist(), row_idx.flatten().tolist()
    order = sorted(range(len(experts)), key=experts.__getitem__)
    expanded_row_idx = [0] * len(experts)
    rows = []
    for position, pair in enumerate(order):
        expanded_row_idx[sources[pair]] = position
        if position < min(num_tokens, active_num) * top_k:
            rows.append(x[sources[pair] % num_tokens].double())
    return (
        _stack(rows, x.shape[1]),
        torch.tensor(expanded_row_idx, dtype=torch.int32),
        torch.tensor([experts[pair] for pair in order], dtype=torch.int32),
    )


class _Expansion(NamedTuple):
    pairs: list[int | None]  # of each row; None is a row without one
    gather: list[int]
    scatter: list[int]
    counts: list[int]


def _expand(expert_idx: Tensor, start: int, end: int, active_num: int, capacity: int | None) -> _Expansion:
    """spec: 2.2.1 to 2.2.3."""
    ids = expert_idx.flatten().tolist()
    order = sorted(range(len(ids)), key=lambda pair: 2**31 - 1 if ids[pair] < start else ids[pair])
    gather = [-1] * len(ids)
    counts = [0] * (end - start)
    if capacity is not None:
        num_rows = (end - start) * capacity
    elif active_num <= 0:
        num_rows = len(ids)
    else:
        num_rows = min(active_num, len(ids))
    pairs: list[int | None] = [None] * num_rows
    active = 0
    for pair in order:
        if not start <= ids[pair] < end:
            continue
        expert = ids[pair] - start
        slot = counts[expert]
        counts[expert] += 1
        if capacity is None:
            row = active
            active += 1
        elif slot < capacity:
            row = expert * capacity + slot
        else:
            continue
        gather[pair] = row
        if row < num_rows:
            pairs[row] = pair
    return _Expansion(pairs, gather, order, counts)


def _static(row: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """spec: 2.2.4, the golden: float16 all through."""
    scale_half, offset_half = (tensor.float().numpy().astype(np.float16) for tensor in (scale, offset))
    with np.errstate(over="ignore", invalid="ignore"):
        value = row.float().numpy().astype(np.float16) * scale_half + offset_half
    value = np.where(np.isnan(value), np.float16(0), value)
    return torch.from_numpy(np.clip(np.rint(value), -128, 127).astype(np.int8))


def _quantized(
    x: Tensor,
    expert_idx: Tensor,
    expansion: _Expansion,
    scale: Tensor | None,
    offset: Tensor | None,
    start: int,
    mode: int,
) -> tuple[Any, Tensor]:
    """The int8 rows and, if dynamic, their scales."""
    top_k, ids = expert_idx.shape[1], expert_idx.flatten().tolist()
    values = torch.zeros(len(expansion.pairs), x.shape[1], dtype=torch.float64)
    scales = torch.zeros(len(expansion.pairs), dtype=torch.float32)
    for row, pair in enumerate(expansion.pairs):
        if pair is None:
            continue
        if mode == 0:
            assert scale is not None
            assert offset is not None
            values[row] = _static(x[pair // top_k], scale, offset)
            continue
        value = x[pair // top_k].float().numpy()
        if scale is not None:
            value = value * scale[0 if scale.shape[0] == 1 else ids[pair] - start].float().numpy()
        amax = np.abs(value).max() if value.size else np.float32(0)
        if amax != 0:
            step = amax / np.float32(127)
            values[row] = torch.from_numpy(value.astype(np.float64) / np.float64(step))
            scales[row] = float(step)
    return values.to(torch.int8) if mode == 0 else Codes(values), scales


def _key_value(counts: list[int], start: int, expert_num: int) -> list[list[int]]:
    used = [[start + expert, count] for expert, count in enumerate(counts) if count > 0]
    return used + [[0, 0]] * (expert_num - len(used))


def _cumulative(counts: list[int]) -> list[int]:
    return [sum(counts[: expert + 1]) for expert in range(len(counts))]


def moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
) -> tuple[Any, Tensor, Tensor, Any]:
    """spec: npu_moe_init_routing_v2 2.2."""
    start, end = active_expert_range or (0, expert_num)
    if expert_num == -1:
        expert_num = end
    if x.shape[0] == 0:
        scale = None
    capacity = expert_capacity if drop_pad_mode == 1 else None
    expansion = _expand(expert_idx, start, end, active_num, capacity)
    expanded_x: Any
    expanded_scale: Any = torch.zeros(len(expansion.pairs), dtype=torch.float32)
    if quant_mode != -1:
        expanded_x, scales = _quantized(x, expert_idx, expansion, scale, offset, start, quant_mode)
        expanded_scale = scales if quant_mode == 1 else expanded_scale
    else:
        wide = x.double() if x.is_floating_point() else x
        tokens = [None if pair is None else pair // expert_idx.shape[1] for pair in expansion.pairs]
        none = torch.zeros(x.shape[1], dtype=wide.dtype)
        expanded_x = _stack([none if token is None else wide[token] for token in tokens], x.shape[1], wide.dtype)
        if scale is not None:
            none = torch.zeros((), dtype=torch.float64)
            values = [none if token is None else scale[token].double() for token in tokens]
            expanded_scale = Float(torch.stack(values) if values else none.new_zeros(0), scale.dtype)
    if capacity is not None:
        shape = (expert_num, capacity, x.shape[1])
        is_codes = isinstance(expanded_x, Codes)
        expanded_x = Codes(expanded_x.values.view(shape)) if is_codes else expanded_x.view(shape)
    counts: Any = [[0, 0]] * expert_num if expert_tokens_num_type == 2 else [0] * (end - start)
    if expert_tokens_num_flag:
        encodings = (
            _cumulative(expansion.counts),
            expansion.counts,
            _key_value(expansion.counts, start, expert_num),
        )
        counts = encodings[expert_tokens_num_type]
    return (
        expanded_x,
        torch.tensor(expansion.gather if row_idx_type == 0 else expansion.scatter, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int64),
        expanded_scale,
    )


def moe_init_routing_quant(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = 1024,
    expert_capacity: int = 0,
    expert_num: int = 256,
    drop_pad_mode: int = 0,
    expert_tokens_num_mode: int = 0,
    expert_tokens_before_capacity_flag: bool = False,
    quant_mode: int = 1,
) -> tuple[Any, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """spec: npu_moe_init_routing_quant 2.3."""
    if x.shape[0] == 0:
        scale = None
    capacity = expert_capacity if drop_pad_mode == 1 else None
    expansion = _expand(expert_idx, 0, expert_num, active_num, capacity)
    expanded_x, scales = _quantized(x, expert_idx, expansion, scale, offset, 0, quant_mode)
    if capacity is not None:
        shape = (expert_num, capacity, x.shape[1])
        is_codes = isinstance(expanded_x, Codes)
        expanded_x = Codes(expanded_x.values.view(shape)) if is_codes else expanded_x.view(shape)
    counts = before = None
    if capacity is None and expert_tokens_num_mode != 0:
        encoded = _cumulative(expansion.counts) if expert_tokens_num_mode == 1 else expansion.counts
        counts = torch.tensor(encoded, dtype=torch.int32)
    if capacity is not None and expert_tokens_before_capacity_flag:
        before = torch.tensor(expansion.counts, dtype=torch.int32)
    index = torch.tensor(expansion.gather, dtype=torch.int32)
    return expanded_x, index, counts, before, scales if quant_mode == 1 else None


# --- counts and re-routing -------------------------------------------------------------------------------------------


def moe_compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """spec: npu_moe_compute_expert_tokens 2.4."""
    ids = sorted_expert_for_source_row.tolist()
    return torch.tensor([sum(id <= expert for id in ids) for expert in range(num_expert)], dtype=torch.int32)


def moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    per_token_scales: Tensor | None = None,
    idx_type: int = 0,
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """spec: npu_moe_re_routing 2.5."""
    counts = expert_token_num_per_rank.tolist()
    num_ranks, num_experts = expert_token_num_per_rank.shape
    blocks: dict[tuple[int, int], list[int]] = {}
    row = 0
    for rank in range(num_ranks):
        for expert in range(num_experts):
            blocks[rank, expert] = list(range(row, row + counts[rank][expert]))
            row += counts[rank][expert]
    sources = [r for expert in range(num_experts) for rank in range(num_ranks) for r in blocks[rank, expert]]
    destinations = sorted(range(len(sources)), key=sources.__getitem__)
    index = torch.tensor(sources, dtype=torch.int64)
    scales: Any = torch.zeros(len(tokens), dtype=torch.float32)
    if per_token_scales is not None:
        scales = Float(per_token_scales.double()[index], per_token_scales.dtype)
    return (
        tokens.double()[index] if tokens.is_floating_point() else tokens[index],
        scales,
        torch.tensor(sources if idx_type == 0 else destinations, dtype=torch.int32),
        torch.tensor(
            [sum(counts[rank][expert] for rank in range(num_ranks)) for expert in range(num_experts)],
            dtype=expert_token_num_per_rank.dtype,
        ),
    )


# --- finalize_routing ------------------------------------------------------------------------------------------------


def moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """spec: npu_moe_finalize_routing 4. An index of -1 is a row of zeros in every mode."""
    hidden = expanded_permuted_rows.shape[-1]
    rows = expanded_permuted_rows.flatten(0, -2).double()
    index = expanded_src_to_dst_row.tolist()
    top_k = scales.shape[1] if scales is not None else 1 if k is None else k
    num_tokens = len(index) // top_k
    out = []
    for token in range(num_tokens):
        total = torch.zeros(hidden, dtype=torch.float64)
        for slot in range(top_k):
            column_major = drop_pad_mode is None or drop_pad_mode in (0, 1)
            position = slot * num_tokens + token if column_major else token * top_k + slot
            term = torch.zeros(hidden, dtype=torch.float64) if index[position] == -1 else rows[index[position]]
            if bias is not None:
                assert export_for_source_row is not None
                term = term + bias[int(export_for_source_row[token, slot])].double()
            total = total + (term if scales is None else scales[token, slot].double() * term)
        for skip in (skip1, skip2):
            if skip is not None:
                total = total + skip[token].double()
        out.append(total)
    return _stack(out, hidden)
