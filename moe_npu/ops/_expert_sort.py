"""Pairs of (token, slot) sorted by expert, and the rows that they get (spec: routing 2.2.1 to 2.2.4).

Pair ``f = n * K + j`` is slot j of token n. Pairs whose expert is in ``start <= id < end`` are active; they are sorted
by expert and, within an expert, stay in the order of f.

    dropless   the active pair at position i of the order gets row i, if there are so many rows
    drop/pad   the pair at place s among those of its expert e gets row e * C + s if s < C; other pairs are dropped
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_npu.ops._numerics import quantize_rows, round_to_int

_BLOCK = 1024  # rows that are widened to float32 at a time

_INT32_MAX = 2**31 - 1


class Placement(NamedTuple):
    """Where the pairs go: int64 indices and counts, int32 rows."""

    order: torch.Tensor  # [N*K], all pairs in sorted order, the active ones first
    row_of_pair: torch.Tensor  # [N*K], the row of each active pair, -1 for the others and the dropped ones
    counts: torch.Tensor  # [R], active pairs of each expert, whether or not they get a row
    pair: torch.Tensor  # [V], the pairs that get a row, in the order of their rows
    row: torch.Tensor  # [V], ascending
    ids: torch.Tensor  # [N*K], the expert of each pair
    start: int

    @property
    def expert(self) -> torch.Tensor:
        """``[V]``, the expert of the pairs that get a row, counted from start."""
        return self.ids[self.pair].long() - self.start


def num_expanded_rows(num_pairs: int, active_num: int) -> int:
    """Rows of the dropless form: ``active_num`` counts expanded rows, and nothing positive means all."""
    return num_pairs if active_num <= 0 else min(active_num, num_pairs)


def place(expert_idx: torch.Tensor, start: int, end: int, num_rows: int, capacity: int | None = None) -> Placement:
    """Sort the pairs of ``expert_idx [N, K]`` and give them rows: ``num_rows`` in all, or ``capacity`` per expert."""
    ids = expert_idx.reshape(-1)
    low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (start, start)
    # ids below the range go behind everything; those past its end are behind the active ones already
    order = torch.argsort(ids if low >= start else ids.masked_fill(ids < start, _INT32_MAX), stable=True)
    active = ids if low >= start and high < end else ids[(ids >= start) & (ids < end)]
    counts = torch.bincount(active if start == 0 else active - start, minlength=end - start)
    pair, row = order[: active.numel()], torch.arange(active.numel(), dtype=torch.int32)
    if capacity is None:
        # not cut at num_rows: the device lets the indices point past the last row
        row_of_pair = _scatter(pair, row, ids.numel())
        return Placement(order, row_of_pair, counts, pair[:num_rows], row[:num_rows], ids, start)
    expert = ids[pair].long() - start
    slot = row - (counts.cumsum(0) - counts)[expert]
    kept = slot < capacity
    pair, row = pair[kept], (expert * capacity + slot)[kept].to(torch.int32)
    return Placement(order, _scatter(pair, row, ids.numel()), counts, pair, row, ids, start)


def _scatter(pair: torch.Tensor, row: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """The row of each pair, -1 for those that are not in ``pair``."""
    return torch.full((num_pairs,), -1, dtype=torch.int32).scatter_(0, pair, row)


def spread(values: torch.Tensor, placement: Placement, num_rows: int) -> torch.Tensor:
    """``values[v]`` at row ``placement.row[v]`` of ``num_rows`` rows that are zero elsewhere."""
    if values.size(0) == num_rows:  # rows ascend, so that each value is in its place
        return values
    rows = values.new_zeros(num_rows, *values.shape[1:])
    rows[placement.row.long()] = values
    return rows


def quantize_static(x: torch.Tensor, token: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Int8 of ``x[token] * scale + offset``, rounded half to even.

    In float16, each step rounded, as Huawei's reference computes. The kernel of the device computes in float32 and
    passes through float16 after rounding: its codes differ by one at most, for values in the range of float16.
    """
    half = torch.float16
    codes = round_to_int(x.to(half) * scale.to(half) + offset.to(half), -128, 127)
    return codes.index_select(0, token)


def quantize_dynamic(
    x: torch.Tensor, token: torch.Tensor, scale: torch.Tensor | None, expert: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 of the rows ``x[token]``, smoothed by the row of ``scale`` for their expert, and their ``max|v| / 127``."""
    if scale is not None and scale.size(0) != 1:
        codes = x.new_empty(token.size(0), x.size(1), dtype=torch.int8)
        row_scale = x.new_empty(token.size(0), dtype=torch.float32)
        for start in range(0, token.size(0), _BLOCK):
            rows = slice(start, start + _BLOCK)
            smooth = scale.index_select(0, expert[rows]).float()
            smoothed = x.index_select(0, token[rows]).float().mul_(smooth)
            codes[rows], row_scale[rows] = quantize_rows(smoothed)
        return codes, row_scale
    # the same for every expert: each token once
    codes, row_scale = quantize_rows(x.float() if scale is None else x.float() * scale.float())
    return codes.index_select(0, token), row_scale.index_select(0, token)


def sum_over_slots(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The gradient of the gather: for each token of ``index [N, K]`` the sum of its rows ``[M, H]``.

    Rows that are not there (-1, or past the end) count as nothing, and no row is read that no pair points to: such
    rows may never have been written. The order of the additions is fixed.
    """
    if index.size(1) == 0:
        return rows.new_zeros(index.size(0), rows.size(1))
    # -1 becomes the largest number, and an index past the last row is skipped
    sorted_indices = index.bitwise_and(_INT32_MAX).reshape(-1)
    return torch.ops.moe_npu.npu_moe_token_permute_grad_v2.default(
        rows.contiguous(), sorted_indices, index.size(0), rows.dtype, index.size(1), False
    )
