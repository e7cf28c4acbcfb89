"""Permutation of token rows into expert order and back, weighted (spec: routing 3.1 to 3.3).

With f = t*K + k the index of (token t, slot k) and the pairs stably sorted by expert:

    permute    permuted[sorted_indices[f]] = tokens[t]
    unpermute  out[t] = sum over k of probs[t, k] * permuted[sorted_indices[f]]

Each is the gradient of the other, so every derivative is one of these operators or `_unpermute_grad`.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MAX_PAIRS = 2**24
_MAX_ID = 2**24 - 1
_MAX_TOP_K = 512


# ---------------------------------------------------------------- permute


def _check_permute(tokens: torch.Tensor, indices: torch.Tensor, padded_mode: bool) -> None:
    op = "npu_moe_token_permute"
    require_device(op, "indices", indices, tokens)
    require_dim(op, "tokens", tokens, (2,))
    require_dtype(op, "tokens", tokens, _FLOATS)
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
    pairs = indices.reshape(-1)
    top_k = 1 if indices.dim() == 1 else indices.size(1)
    order = torch.argsort(pairs, stable=True)
    sorted_indices = torch.empty_like(order, dtype=torch.int32)
    sorted_indices[order] = torch.arange(order.numel(), dtype=torch.int32)
    rows = order[: _num_rows(order.numel(), num_out_tokens)]
    return tokens.index_select(0, rows.div(top_k, rounding_mode="floor")), sorted_indices


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
    indices = inputs[1]
    ctx.pairs_shape = (indices.size(0), 1 if indices.dim() == 1 else indices.size(1))
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _permute_backward(ctx: Any, dpermuted: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (sorted_indices,) = ctx.saved_tensors
    ones = torch.ones(ctx.pairs_shape, dtype=dpermuted.dtype, device=dpermuted.device)
    return _unpermute_op(dpermuted.contiguous(), sorted_indices, ones, False, None), None, None, None


# ---------------------------------------------------------------- unpermute


def _check_unpermute(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None, padded_mode: bool
) -> None:
    op = "npu_moe_token_unpermute"
    require_device(op, "sorted_indices", sorted_indices, permuted_tokens)
    require_device(op, "probs", probs, permuted_tokens)
    require_dim(op, "permuted_tokens", permuted_tokens, (2,))
    require_dtype(op, "permuted_tokens", permuted_tokens, _FLOATS)
    require_dim(op, "sorted_indices", sorted_indices, (1,))
    require_dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    if probs is not None:
        require_dim(op, "probs", probs, (2,))
        require_dtype(op, "probs", probs, _FLOATS)
        require(probs.size(1) > 0, f"{op}: probs must have at least one column, but has shape {tuple(probs.shape)}")
        if probs.numel() != sorted_indices.size(0):
            reject(
                f"{op}: probs must have one weight per entry of sorted_indices, but has shape {tuple(probs.shape)} "
                f"for {sorted_indices.size(0)} entries"
            )
    require(not padded_mode, f"{op}: padded_mode must be False; no device has the padded form")


def _pairs(
    sorted_indices: torch.Tensor, probs: torch.Tensor | None, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row index ``[T, K]`` clamped into the rows, its weight or one, and which pairs to leave out."""
    index = sorted_indices.view(-1, 1 if probs is None else probs.size(1)).long()
    weight = torch.ones((), dtype=torch.float32).expand(index.shape) if probs is None else probs
    skipped = (index >= num_rows) | (weight == 0)
    negative = (index < 0) & ~skipped
    if bool(negative.any()):
        reject(f"npu_moe_token_unpermute: sorted_indices has {int(index[negative][0])} with a weight that is not zero")
    return index.clamp(0, max(num_rows - 1, 0)), weight, skipped


def _unpermute_cpu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: list[int] | None,
) -> torch.Tensor:
    index, weight, skipped = _pairs(sorted_indices, probs, permuted_tokens.size(0))
    compute_dtype = torch.promote_types(permuted_tokens.dtype, torch.float32)
    out = torch.zeros(index.size(0), permuted_tokens.size(1), dtype=compute_dtype)
    if permuted_tokens.numel() == 0:
        return out.to(permuted_tokens.dtype)
    any_skipped = bool(skipped.any())
    for slot in range(index.size(1)):  # ascending, as the device sums
        rows = permuted_tokens.index_select(0, index[:, slot]).to(compute_dtype)
        if any_skipped:
            # a skipped row may hold NaN or never have been written: 0 * NaN must not be formed
            rows.masked_fill_(skipped[:, slot, None], 0)
        out.addcmul_(rows, weight[:, slot, None].to(compute_dtype))
    return out.to(permuted_tokens.dtype)


def _unpermute_npu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: list[int] | None,
) -> torch.Tensor:
    if permuted_tokens.size(0) == 0:  # no kernel takes an empty tensor
        return _unpermute_fake(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape).zero_()
    if sorted_indices.size(0) == 0:
        return _unpermute_fake(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return torch.ops.npu.npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)


def _unpermute_fake(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: list[int] | None,
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
    dpermuted, dprobs = _unpermute_grad_op(
        dout.contiguous(), sorted_indices, probs, permuted_tokens, ctx.num_rows, ctx.dtype
    )
    return dpermuted, None, None if probs is None else dprobs, None, None


# ---------------------------------------------------------------- gradient of unpermute


def _unpermute_grad_cpu(
    dout: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    index = sorted_indices.view(-1, 1 if probs is None else probs.size(1)).long()
    present = (index >= 0) & (index < num_rows)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    drows = dout.to(compute_dtype)
    dpermuted = torch.zeros(num_rows, dout.size(1), dtype=compute_dtype)
    dprobs = dout.new_zeros((0, 0) if probs is None else probs.shape, dtype=dtype if probs is None else probs.dtype)
    for slot in range(index.size(1)):
        token = present[:, slot].nonzero().squeeze(1)
        row = index[token, slot]
        grad = drows.index_select(0, token)
        if probs is not None and permuted_tokens is not None:
            rows = permuted_tokens.index_select(0, row).to(compute_dtype)
            dprobs[token, slot] = (grad * rows).sum(-1).to(probs.dtype)
            grad.mul_(probs[token, slot, None].to(compute_dtype))
        dpermuted.index_add_(0, row, grad)  # callers may point several pairs of weight 0 at one row
    return dpermuted.to(dtype), dprobs


def _unpermute_grad_npu(
    dout: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if sorted_indices.size(0) == 0 or num_rows == 0:
        dpermuted, dprobs = _unpermute_grad_fake(dout, sorted_indices, probs, permuted_tokens, num_rows, dtype)
        return dpermuted.zero_(), dprobs.zero_()
    if probs is not None:
        probs = probs.contiguous()  # the shape function of torch_npu repeats its strides
    if permuted_tokens is None:
        # never read, but only CANN 9.1 and later take None
        is_same = dout.size(0) == num_rows and dout.dtype == dtype
        permuted_tokens = dout if is_same else dout.new_empty(num_rows, dout.size(1), dtype=dtype)
    dpermuted, dprobs = torch.ops.npu.npu_moe_token_unpermute_grad_v2(
        dout, sorted_indices, num_rows, dtype, probs, False, None, permuted_tokens
    )
    return dpermuted, dout.new_empty(0, 0, dtype=dtype) if probs is None else dprobs


def _unpermute_grad_fake(
    dout: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    dpermuted = dout.new_empty(num_rows, dout.size(1), dtype=dtype)
    return dpermuted, dout.new_empty(0, 0, dtype=dtype) if probs is None else probs.new_empty(probs.shape)


def _unpermute_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    dout, sorted_indices, probs, permuted_tokens, ctx.num_rows, ctx.dtype = inputs
    ctx.save_for_backward(dout, sorted_indices, probs, permuted_tokens)
    if probs is None:
        ctx.mark_non_differentiable(output[1])


def _unpermute_grad_backward(
    ctx: Any, ddpermuted: torch.Tensor, ddprobs: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    dout, sorted_indices, probs, permuted_tokens = ctx.saved_tensors
    ddpermuted = ddpermuted.contiguous()
    ddout = _unpermute_op(ddpermuted, sorted_indices, probs, False, None)
    if probs is None:
        return ddout, None, None, None, None, None
    # dprobs is computed where probs is zero too, so its derivative must not skip those rows: no weight is zero here
    # except where ddprobs is, and there the product is zero
    ddout = ddout + _unpermute_op(permuted_tokens, sorted_indices, ddprobs.contiguous(), False, None)
    dpermuted, _ = _unpermute_grad_op(dout, sorted_indices, ddprobs, permuted_tokens, ctx.num_rows, ctx.dtype)
    _, dprobs = _unpermute_grad_op(dout, sorted_indices, probs, ddpermuted, ctx.num_rows, ctx.dtype)
    return ddout, None, dprobs, dpermuted, None, None


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
_unpermute_grad_op = register_op(
    "npu_moe_token_unpermute_grad(Tensor dout, Tensor sorted_indices, Tensor? probs, Tensor? permuted_tokens,"
    " SymInt num_rows, ScalarType dtype) -> (Tensor, Tensor)",
    cpu=_unpermute_grad_cpu,
    npu=_unpermute_grad_npu,
    fake=_unpermute_grad_fake,
    setup_context=_unpermute_grad_setup_context,
    backward=_unpermute_grad_backward,
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
    _check_permute(tokens, indices, padded_mode)
    return _permute_op(tokens, indices, num_out_tokens, padded_mode)


@typed
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> torch.Tensor:
    """Rows back in token order, the K rows of a token summed with the weights ``probs``.

    Args:
        permuted_tokens: ``[M, H]``, float16, bfloat16 or float32 (on CPU also float64).
        sorted_indices: ``[T*K]`` int32 as :func:`npu_moe_token_permute` returns it. Indices of M and more contribute
            nothing.
        probs: ``[T, K]`` of any of the float dtypes. A pair with weight 0 is left out entirely: its row may be NaN.
            None: no sum, K is 1.
        padded_mode: must be False.
        restore_shape: ignored, as on the device.

    Returns:
        ``[T, H]``, dtype of ``permuted_tokens``, summed in float32 in the order of k and rounded once. Differentiable
        with respect to ``permuted_tokens`` and ``probs``.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``; on CPU also a negative index whose weight is not 0.

    Example:
        >>> rows = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
        >>> sorted_indices = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
        >>> npu_moe_token_unpermute(rows, sorted_indices, torch.tensor([[0.75, 0.25], [0.5, 0.5]])).flatten()
        tensor([25., 30.])
    """
    _check_unpermute(permuted_tokens, sorted_indices, probs, padded_mode)
    return _unpermute_op(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
