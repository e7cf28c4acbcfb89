"""Permutation of token rows into expert order and back, weighted (spec: routing 3.1 to 3.3).

With f = t*K + k the index of (token t, slot k) and the pairs stably sorted by expert:

    permute    permuted[sorted_indices[f]] = tokens[t]
    unpermute  out[t] = sum over k of probs[t, k] * permuted[sorted_indices[f]]

Their gradients are operators of their own, in permute_grad.py and unpermute_grad.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_npu.ops._errors import (
    as_dtype,
    dtype_name,
    reject,
    require,
    require_device,
    require_dim,
    require_dtype,
)
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MAX_PAIRS = 2**24
_MAX_ID = 2**24 - 1
_MAX_TOP_K = 512


def top_k_of(indices: torch.Tensor) -> int:
    """K of expert ids ``[T, K]`` or ``[T]``."""
    return 1 if indices.dim() == 1 else indices.size(1)


# ---------------------------------------------------------------- permute


def check_permute(op: str, tokens: torch.Tensor, indices: torch.Tensor, padded_mode: bool) -> None:
    """The rules of tokens, expert ids and mode."""
    require_device(op, "indices", indices, tokens)
    require_dim(op, "tokens", tokens, (2,))
    require_dtype(op, "tokens", tokens, FLOATS)
    require_dim(op, "indices", indices, (1, 2))
    require_dtype(op, "indices", indices, (torch.int32, torch.int64))
    if indices.size(0) != tokens.size(0):
        reject(f"{op}: indices must have one row per token, but has {indices.size(0)} for {tokens.size(0)} tokens")
    require(
        indices.dim() == 1 or 1 <= indices.size(1) <= _MAX_TOP_K,
        f"{op}: indices must have 1 to {_MAX_TOP_K} columns, but has shape {tuple(indices.shape)}",
    )
    if indices.numel() >= _MAX_PAIRS:
        reject(f"{op}: indices must have fewer than 2**24 elements, but has {indices.numel()}")
    check_padded_mode(op, padded_mode)


def check_padded_mode(op: str, padded_mode: bool) -> None:
    """The padded form exists on no device."""
    require(not padded_mode, f"{op}: padded_mode must be False; no device has the padded form")


def _num_rows(num_pairs: int, num_out_tokens: int | None) -> int:
    if not num_out_tokens:
        return num_pairs
    if num_out_tokens > 0:
        return min(num_out_tokens, num_pairs)
    return max(num_pairs + num_out_tokens, 0)


def _permute_cpu(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = (int(bound) for bound in indices.aminmax()) if indices.numel() else (0, 0)
    if low < 0 or high >= _MAX_ID:
        reject(f"npu_moe_token_permute: indices must be expert ids of 0 to 2**24 - 2, but are {low} to {high}")
    order = torch.argsort(indices.reshape(-1), stable=True)
    sorted_indices = torch.empty_like(order, dtype=torch.int32)
    sorted_indices[order] = torch.arange(order.numel(), dtype=torch.int32)
    rows = order[: _num_rows(order.numel(), num_out_tokens)]
    return tokens.index_select(0, rows.div(top_k_of(indices), rounding_mode="floor")), sorted_indices


def _permute_npu(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if indices.numel() == 0:
        return tokens.new_empty(0, tokens.size(1)), indices.new_empty(0, dtype=torch.int32)
    return torch.ops.npu.npu_moe_token_permute(tokens, indices, num_out_tokens, padded_mode)


def _permute_fake(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = tokens.new_empty(_num_rows(indices.numel(), num_out_tokens), tokens.size(1))
    return rows, indices.new_empty(indices.numel(), dtype=torch.int32)


def _permute_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, indices = inputs[:2]
    ctx.num_tokens, ctx.dtype, ctx.top_k = tokens.size(0), tokens.dtype, top_k_of(indices)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _permute_backward(ctx: Any, dpermuted: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (sorted_indices,) = ctx.saved_tensors
    dtokens = torch.ops.moe_npu.npu_moe_token_permute_grad_v2.default(
        dpermuted.contiguous(), sorted_indices, ctx.num_tokens, ctx.dtype, ctx.top_k, False
    )
    return dtokens, None, None, None


# ---------------------------------------------------------------- unpermute


def check_unpermute(
    op: str, rows: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None, padded_mode: bool
) -> None:
    """The rules of what names the pairs, all on the device of ``rows``."""
    require_device(op, "sorted_indices", sorted_indices, rows)
    require_device(op, "probs", probs, rows)
    require_dim(op, "sorted_indices", sorted_indices, (1,))
    require_dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    if probs is not None:
        require_dim(op, "probs", probs, (2,))
        require_dtype(op, "probs", probs, FLOATS)
        require(probs.size(1) > 0, f"{op}: probs must have at least one column, but has shape {tuple(probs.shape)}")
        if probs.numel() != sorted_indices.size(0):
            reject(
                f"{op}: probs must have one weight per entry of sorted_indices, but has shape {tuple(probs.shape)} "
                f"for {sorted_indices.size(0)} entries"
            )
    check_padded_mode(op, padded_mode)


def check_rows(op: str, argument: str, rows: torch.Tensor) -> None:
    """The rules of a matrix of token rows."""
    require_dim(op, argument, rows, (2,))
    require_dtype(op, argument, rows, FLOATS)


def as_float_dtype(op: str, argument: str, value: torch.dtype | int) -> torch.dtype:
    """The dtype of token rows that ``value`` names."""
    dtype = as_dtype(op, argument, value)
    if dtype not in (*FLOATS, torch.float64):
        reject(f"{op}: {argument} must be float16, bfloat16, float32, but is {dtype_name(dtype)}")
    assert dtype is not None
    return dtype


def pairs(op: str, sorted_indices: torch.Tensor, probs: torch.Tensor | None) -> torch.Tensor:
    """Row of each pair, ``[T, K]`` int64; a negative one is refused unless its weight is zero."""
    index = sorted_indices.view(-1, 1 if probs is None else probs.size(1)).long()
    is_negative = index < 0
    if bool(is_negative.any()):
        wrong = is_negative if probs is None else is_negative & (probs != 0)
        if bool(wrong.any()):
            where = "" if probs is None else " where the weight is not zero"
            reject(f"{op}: sorted_indices must not be negative{where}, but has {int(index[wrong][0])}")
    return index


def _unpermute_cpu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> torch.Tensor:
    index = pairs("npu_moe_token_unpermute", sorted_indices, probs)
    compute_dtype = torch.promote_types(permuted_tokens.dtype, torch.float32)
    out = torch.zeros(index.size(0), permuted_tokens.size(1), dtype=compute_dtype)
    if permuted_tokens.numel() == 0:
        return out.to(permuted_tokens.dtype)
    num_rows = permuted_tokens.size(0)
    skipped = index >= num_rows
    if probs is not None:
        skipped |= probs == 0
    index = index.clamp(0, num_rows - 1)
    any_skipped = bool(skipped.any())
    for slot in range(index.size(1)):  # ascending, as the device sums
        rows = permuted_tokens.index_select(0, index[:, slot]).to(compute_dtype)
        if any_skipped:
            # a skipped row may hold NaN or never have been written: 0 * NaN must not be formed
            rows.masked_fill_(skipped[:, slot, None], 0)
        if probs is None:
            return rows.to(permuted_tokens.dtype)
        out.addcmul_(rows, probs[:, slot, None].to(compute_dtype))
    return out.to(permuted_tokens.dtype)


def _unpermute_npu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> torch.Tensor:
    if permuted_tokens.size(0) == 0:  # no kernel takes an empty tensor
        return _unpermute_fake(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape).zero_()
    if sorted_indices.size(0) == 0:
        return _unpermute_fake(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return torch.ops.npu.npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)


def _internal_unpermute_npu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> torch.Tensor:
    arguments = (permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    if permuted_tokens.size(0) == 0 or sorted_indices.size(0) == 0:
        return _unpermute_npu(*arguments)
    return torch.ops.npu._npu_moe_token_unpermute(*arguments)[0]


def _unpermute_fake(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> torch.Tensor:
    num_tokens = sorted_indices.size(0) if probs is None else probs.size(0)
    return permuted_tokens.new_empty(num_tokens, permuted_tokens.size(1))


def _unpermute_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    permuted_tokens, sorted_indices, probs = inputs[:3]
    # the rows are needed for the gradient of probs only; without probs they must not be kept alive
    ctx.save_for_backward(sorted_indices, probs, None if probs is None else permuted_tokens)
    ctx.num_rows, ctx.dtype = permuted_tokens.size(0), permuted_tokens.dtype


def _unpermute_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    sorted_indices, probs, permuted_tokens = ctx.saved_tensors
    dpermuted, dprobs = torch.ops.moe_npu.npu_moe_token_unpermute_grad_v2.default(
        dout.contiguous(), sorted_indices, ctx.num_rows, ctx.dtype, probs, False, None, permuted_tokens
    )
    return dpermuted, None, None if probs is None else dprobs, None, None


_permute_op = register_op(
    "npu_moe_token_permute(Tensor tokens, Tensor indices, SymInt? num_out_tokens, bool padded_mode)"
    " -> (Tensor, Tensor)",
    cpu=_permute_cpu,
    npu=_permute_npu,
    fake=_permute_fake,
    setup_context=_permute_setup_context,
    backward=_permute_backward,
    differentiable=("tokens",),
)
_unpermute_op = register_op(
    "npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs, bool padded_mode,"
    " SymInt[]? restore_shape) -> Tensor",
    cpu=_unpermute_cpu,
    npu=_unpermute_npu,
    fake=_unpermute_fake,
    setup_context=_unpermute_setup_context,
    backward=_unpermute_backward,
    differentiable=("permuted_tokens", "probs"),
)
# without torch_npu's second result, which is the first argument: no result of an operator may alias an argument
_internal_unpermute_op = register_op(
    "_npu_moe_token_unpermute(Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs, bool padded_mode,"
    " SymInt[]? restore_shape) -> Tensor",
    cpu=_unpermute_cpu,
    npu=_internal_unpermute_npu,
    fake=_unpermute_fake,
    setup_context=_unpermute_setup_context,
    backward=_unpermute_backward,
    differentiable=("permuted_tokens", "probs"),
)


@typed
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows in the order of their experts, each token once per expert it was routed to.

    Args:
        tokens: ``[T, H]``, float16, bfloat16 or float32 (on CPU also float64).
        indices: ``[T, K]`` or ``[T]``, expert ids, int32 or int64; K at most 512, fewer than 2**24 ids in all.
        num_out_tokens: keep only so many rows: None or 0 all ``T*K``; positive at most that many; negative all but
            that many.
        padded_mode: must be False.

    Returns:
        ``(permuted_tokens, sorted_indices)``: ``[M, H]``, the dtype of tokens, differentiable; and int32 ``[T*K]``,
        always whole, with ``permuted_tokens[sorted_indices[t*K + k]] == tokens[t]`` for indices below M.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``; on CPU also a negative expert id.

    Example:
        >>> rows, sorted_indices = npu_moe_token_permute(
        ...     torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1, 0], [2, 1], [0, 1]])
        ... )
        >>> rows.flatten(), sorted_indices
        (tensor([1., 3., 1., 2., 3., 2.]), tensor([2, 0, 5, 3, 1, 4], dtype=torch.int32))
    """
    check_permute("npu_moe_token_permute", tokens, indices, padded_mode)
    return _permute_op(tokens, indices, num_out_tokens, padded_mode)


@typed
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Rows back in token order, the K rows of a token summed with the weights ``probs``.

    Args:
        permuted_tokens: ``[M, H]``, float16, bfloat16 or float32 (on CPU also float64).
        sorted_indices: ``[T*K]`` int32 as :func:`npu_moe_token_permute` returns it. Indices of M and more contribute
            nothing.
        probs: ``[T, K]`` of any of the float dtypes. A pair with weight 0 is left out entirely: its row may be NaN,
            its index negative. None: no sum, K is 1.
        padded_mode: must be False.
        restore_shape: ignored, as on the device.

    Returns:
        ``[T, H]``, dtype of ``permuted_tokens``, summed in float32 in the order of k and rounded once. Differentiable
        with respect to ``permuted_tokens`` and ``probs``; only what the gradients need is kept for backward, without
        ``probs`` nothing of ``permuted_tokens``.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``; on CPU also a negative index whose weight is not 0.

    Example:
        >>> rows = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
        >>> sorted_indices = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
        >>> npu_moe_token_unpermute(rows, sorted_indices, torch.tensor([[0.75, 0.25], [0.5, 0.5]])).flatten()
        tensor([25., 30.])
    """
    op = "npu_moe_token_unpermute"
    check_rows(op, "permuted_tokens", permuted_tokens)
    check_unpermute(op, permuted_tokens, sorted_indices, probs, padded_mode)
    return _unpermute_op(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)


@typed
def _npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`npu_moe_token_unpermute` with the rows that a backward would need as a second result.

    Args:
        permuted_tokens: as there, like all arguments.
        sorted_indices: as there.
        probs: as there.
        padded_mode: must be False.
        restore_shape: ignored.

    Returns:
        ``(unpermuted_tokens, permuted_tokens_for_backward)``: the result of :func:`npu_moe_token_unpermute`,
        differentiable; and ``permuted_tokens`` itself, the same memory if it is contiguous, without a gradient.

    Raises:
        OperatorError: as :func:`npu_moe_token_unpermute`.

    Example:
        >>> rows, sorted_indices = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0], dtype=torch.int32)
        >>> out, for_backward = _npu_moe_token_unpermute(rows, sorted_indices)
        >>> out.flatten(), for_backward.flatten()
        (tensor([2., 1.]), tensor([1., 2.]))
    """
    op = "_npu_moe_token_unpermute"
    check_rows(op, "permuted_tokens", permuted_tokens)
    check_unpermute(op, permuted_tokens, sorted_indices, probs, padded_mode)
    out = _internal_unpermute_op(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return out, permuted_tokens.detach().contiguous()
