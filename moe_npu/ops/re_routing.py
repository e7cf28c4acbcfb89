"""Received rows from the order of their source ranks into the order of the local experts (spec: routing 2.5).

``counts[p, q]`` rows of rank p for expert q follow each other, p outside and q inside. In the result q is outside and p
inside; the order within a block is kept.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import as_dtype, reject, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "npu_moe_re_routing"
_GATHER = 0
_Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _check(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    per_token_scales: torch.Tensor | None,
    expert_token_num_type: int,
    idx_type: int,
    tokens_dtype: torch.dtype | int | None,
) -> None:
    require_device(_OP, "expert_token_num_per_rank", counts, tokens)
    require_device(_OP, "per_token_scales", per_token_scales, tokens)
    if tokens.dim() < 2:
        reject(f"{_OP}: tokens must have at least 2 dimensions, but has shape {tuple(tokens.shape)}")
    require_dtype(_OP, "tokens", tokens, (torch.float16, torch.bfloat16, torch.int8))
    require_dim(_OP, "expert_token_num_per_rank", counts, (2,))
    require_dtype(_OP, "expert_token_num_per_rank", counts, (torch.int32, torch.int64))
    if per_token_scales is not None:
        require_dim(_OP, "per_token_scales", per_token_scales, (1, 2))
        require_dtype(_OP, "per_token_scales", per_token_scales, (torch.float32,))
        if per_token_scales.size(0) != tokens.size(0):
            reject(
                f"{_OP}: per_token_scales must have one row per row of tokens, "
                f"but has {per_token_scales.size(0)} for {tokens.size(0)}"
            )
    if expert_token_num_type != 1:
        reject(f"{_OP}: expert_token_num_type must be 1 (counts), but is {expert_token_num_type}")
    if idx_type not in (0, 1):
        reject(f"{_OP}: idx_type must be 0 or 1, but is {idx_type}")
    if tokens_dtype is not None and as_dtype(_OP, "tokens_dtype", tokens_dtype) != tokens.dtype:
        reject(f"{_OP}: tokens_dtype must be None or the number of the dtype of tokens, but is {tokens_dtype}")


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(permutation.size(0), device=permutation.device)
    return torch.zeros_like(positions).scatter(0, permutation.long(), positions)


def _cpu(
    tokens: torch.Tensor, expert_token_num_per_rank: torch.Tensor, per_token_scales: torch.Tensor | None, idx_type: int
) -> _Routed:
    counts = expert_token_num_per_rank.long()
    if bool((counts < 0).any()):
        reject(f"{_OP}: expert_token_num_per_rank must not be negative, but has {int(counts.min())}")
    num_ranks, num_experts = counts.shape
    if int(counts.sum()) != tokens.size(0):
        # a device does not look, and returns whatever the offsets point at
        reject(
            f"{_OP}: expert_token_num_per_rank must add up to the rows of tokens, {tokens.size(0)}, "
            f"but adds up to {int(counts.sum())}"
        )
    block = torch.searchsorted(counts.flatten().cumsum(0), torch.arange(tokens.size(0)), right=True)
    # of each block among all blocks of the result
    place = torch.arange(num_ranks * num_experts).view(num_experts, num_ranks).t().flatten()
    index = torch.argsort(place[block], stable=True)
    scales = torch.zeros(tokens.size(0)) if per_token_scales is None else per_token_scales.index_select(0, index)
    return (
        tokens.index_select(0, index),
        scales,
        (index if idx_type == _GATHER else _inverse(index)).to(torch.int32),
        counts.sum(0).to(expert_token_num_per_rank.dtype),
    )


def _npu(
    tokens: torch.Tensor, expert_token_num_per_rank: torch.Tensor, per_token_scales: torch.Tensor | None, idx_type: int
) -> _Routed:
    if tokens.size(0) == 0:
        routed = _fake(tokens, expert_token_num_per_rank, per_token_scales, idx_type)
        return (*routed[:3], routed[3].zero_())
    return torch.ops.npu.npu_moe_re_routing(
        tokens,
        expert_token_num_per_rank,
        per_token_scales=per_token_scales,
        expert_token_num_type=1,
        idx_type=idx_type,
    )


def _fake(
    tokens: torch.Tensor, expert_token_num_per_rank: torch.Tensor, per_token_scales: torch.Tensor | None, idx_type: int
) -> _Routed:
    num_rows = tokens.size(0)
    return (
        tokens.new_empty(tokens.shape),
        tokens.new_empty(num_rows, dtype=torch.float32)
        if per_token_scales is None
        else per_token_scales.new_empty(per_token_scales.shape),
        tokens.new_empty(num_rows, dtype=torch.int32),
        expert_token_num_per_rank.new_empty(expert_token_num_per_rank.size(1)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Routed) -> None:
    tokens, _, per_token_scales, ctx.idx_type = inputs
    ctx.save_for_backward(output[2])
    undifferentiable = [output[2], output[3]]
    if not tokens.is_floating_point():
        undifferentiable.append(output[0])
    if per_token_scales is None:
        undifferentiable.append(output[1])
    ctx.mark_non_differentiable(*undifferentiable)


def _backward(ctx: Any, drows: torch.Tensor, dscales: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    position = _inverse(index) if ctx.idx_type == _GATHER else index
    return (
        drows.index_select(0, position) if ctx.needs_input_grad[0] else None,
        None,
        dscales.index_select(0, position) if ctx.needs_input_grad[2] else None,
        None,
    )


_op = register_op(
    "npu_moe_re_routing(Tensor tokens, Tensor expert_token_num_per_rank, Tensor? per_token_scales, int idx_type)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("tokens", "per_token_scales"),
)


@typed
def npu_moe_re_routing(
    tokens: torch.Tensor,
    expert_token_num_per_rank: torch.Tensor,
    *,
    per_token_scales: torch.Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: torch.dtype | int | None = None,
) -> _Routed:
    """Rows received from several ranks, sorted by local expert and, within an expert, by source rank.

    Args:
        tokens: ``[A, ...]`` of at least two dimensions, float16, bfloat16 or int8, ordered by source rank and within a
            rank by local expert.
        expert_token_num_per_rank: ``[P, Q]`` int32 or int64, rows of each of P ranks for each of Q experts, zeros
            included. They must add up to A.
        per_token_scales: ``[A]`` or ``[A, n]`` float32, permuted along with the rows.
        expert_token_num_type: must be 1, counts.
        idx_type: 0 ``idx[destination] = source``, so that the result is ``tokens[idx]``; 1 ``idx[source] =
            destination``, which devices before the 950 generation do not have.
        tokens_dtype: None, or the number of the dtype of tokens.

    Returns:
        ``(permute_tokens, permute_per_token_scales, permute_token_idx, expert_token_num)``: as tokens; as
        ``per_token_scales``, or float32 zeros ``[A]``; int32 ``[A]``; the rows of each expert, ``[Q]`` in the dtype of
        the counts. Differentiable with respect to tokens and ``per_token_scales``.

    Raises:
        OperatorError: wrong rank, dtype or size, or another mode; on CPU also negative counts.

    Example:
        >>> counts = torch.tensor([[2, 1], [0, 3], [1, 2]])
        >>> rows, _, idx, per_expert = npu_moe_re_routing(torch.arange(9).view(9, 1).half(), counts)
        >>> idx, per_expert
        (tensor([0, 1, 6, 2, 3, 4, 5, 7, 8], dtype=torch.int32), tensor([3, 6]))
    """
    _check(tokens, expert_token_num_per_rank, per_token_scales, expert_token_num_type, idx_type, tokens_dtype)
    return _op(tokens, expert_token_num_per_rank, per_token_scales, idx_type)
