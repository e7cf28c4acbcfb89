"""Permutation of token rows by a map of tokens and experts instead of expert ids (spec: routing 3.4).

Without drop_and_pad the rows are the ones of the map in the order of the experts, within an expert in that of the
tokens; K ones per token make T*K rows:

    permuted[r] = tokens[t], permuted_probs[r] = probs[t, e]       r-th one of the map at (t, e)
    sorted_indices[t*K + k] = r                                    k-th expert of token t, ascending

With it every expert has C rows, of its first C tokens, and if it has fewer of others:

    permuted[e*C + c] = tokens[t], permuted_probs[e*C + c] = probs[t, e], sorted_indices[e*C + c] = t

The gradient is an operator of its own, and its gradient the permutation.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import dtype_name, reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops.permute import check_rows

_MAX_TOP_K = 512
_Permuted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_Gradients = tuple[torch.Tensor, torch.Tensor]


def check_map(op: str, routing_map: torch.Tensor, x: torch.Tensor) -> None:
    """The rules of the map alone, on the device of ``x``."""
    require_device(op, "routing_map", routing_map, x)
    require_dim(op, "routing_map", routing_map, (2,))
    require_dtype(op, "routing_map", routing_map, (torch.bool, torch.int8))


def as_mask(op: str, routing_map: torch.Tensor) -> torch.Tensor:
    """The map as bool."""
    if routing_map.dtype == torch.bool:
        return routing_map
    mask = routing_map != 0
    if not torch.equal(routing_map, mask.to(routing_map.dtype)):
        reject(f"{op}: routing_map must be of 0 and 1, but is {int(routing_map.min())} to {int(routing_map.max())}")
    return mask


def check_range(op: str, argument: str, index: torch.Tensor, size: int, what: str) -> torch.Tensor:
    """The values of an index into ``size`` items, as int64."""
    low, high = (int(bound) for bound in index.aminmax()) if index.numel() else (0, -1)
    if low < 0 or high >= size:
        reject(f"{op}: {argument} must be of 0 to {size - 1}, the {what}, but is {low} to {high}")
    return index.long()


# ---------------------------------------------------------------- permute


def _check(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_out_tokens: int | None,
    drop_and_pad: bool,
) -> None:
    op = "npu_moe_token_permute_with_routing_map"
    check_rows(op, "tokens", tokens)
    check_map(op, routing_map, tokens)
    num_tokens, num_experts = routing_map.shape
    if num_tokens != tokens.size(0):
        reject(f"{op}: routing_map must have one row per token, but has {num_tokens} for {tokens.size(0)} tokens")
    require_device(op, "probs", probs, tokens)
    if probs is not None:
        if probs.shape != routing_map.shape:
            reject(
                f"{op}: probs must have the shape of routing_map {tuple(routing_map.shape)}, "
                f"but has {tuple(probs.shape)}"
            )
        is_wide = tokens.dtype == torch.bfloat16 and probs.dtype == torch.float32
        require(
            is_wide or probs.dtype == tokens.dtype,
            f"{op}: probs must have the dtype of tokens {dtype_name(tokens.dtype)}, or float32 with bfloat16 tokens, "
            f"but has {dtype_name(probs.dtype)}",
        )
    if num_out_tokens is not None and not 0 <= num_out_tokens <= num_tokens * num_experts:
        reject(
            f"{op}: num_out_tokens must be 0 to {num_tokens * num_experts}, the number of tokens times that of "
            f"experts, but is {num_out_tokens}"
        )
    if not drop_and_pad and num_out_tokens is not None and num_out_tokens >= (_MAX_TOP_K + 1) * max(num_tokens, 1):
        reject(
            f"{op}: num_out_tokens must be at most {_MAX_TOP_K} for each of {num_tokens} tokens, "
            f"but is {num_out_tokens}"
        )


def _num_rows(routing_map: torch.Tensor, num_out_tokens: int | None, drop_and_pad: bool) -> int:
    """A multiple of the number of experts, each with its capacity, or of the number of tokens, each with K experts."""
    wanted = routing_map.size(0) if num_out_tokens is None else num_out_tokens
    parts = routing_map.size(1 if drop_and_pad else 0)
    return 0 if parts == 0 else wanted // parts * parts


def _cpu(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_out_tokens: int | None,
    drop_and_pad: bool,
) -> _Permuted:
    op = "npu_moe_token_permute_with_routing_map"
    mask = as_mask(op, routing_map)
    num_rows, num_experts = _num_rows(routing_map, num_out_tokens, drop_and_pad), mask.size(1)
    if drop_and_pad:
        capacity = num_rows // max(num_experts, 1)
        # routed tokens first, each kind in the order of the tokens
        token = torch.sort(mask.t(), dim=1, descending=True, stable=True).indices[:, :capacity].reshape(-1)
        expert = torch.arange(num_experts).repeat_interleave(capacity)
        sorted_indices = token.to(torch.int32)
    else:
        expert, token = mask.t().nonzero(as_tuple=True)
        if token.numel() != num_rows:
            reject(
                f"{op}: routing_map must have {num_rows} ones, num_out_tokens // {mask.size(0)} for each token, "
                f"but has {token.numel()}"
            )
        sorted_indices = torch.argsort(token, stable=True).to(torch.int32)
    permuted_probs = tokens.new_zeros(0) if probs is None else probs[token, expert]
    return tokens.index_select(0, token), permuted_probs, sorted_indices


def _npu(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_out_tokens: int | None,
    drop_and_pad: bool,
) -> _Permuted:
    if _num_rows(routing_map, num_out_tokens, drop_and_pad) == 0:
        return _fake(tokens, routing_map, probs, num_out_tokens, drop_and_pad)
    permuted, permuted_probs, sorted_indices = torch.ops.npu.npu_moe_token_permute_with_routing_map(
        tokens, routing_map, probs=probs, num_out_tokens=num_out_tokens, drop_and_pad=drop_and_pad
    )
    return permuted, tokens.new_empty(0) if probs is None else permuted_probs, sorted_indices


def _fake(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None,
    num_out_tokens: int | None,
    drop_and_pad: bool,
) -> _Permuted:
    num_rows = _num_rows(routing_map, num_out_tokens, drop_and_pad)
    permuted_probs = tokens.new_empty(0) if probs is None else probs.new_empty(num_rows)
    return (
        tokens.new_empty(num_rows, tokens.size(1)),
        permuted_probs,
        tokens.new_empty(num_rows, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Permuted) -> None:
    _, routing_map, probs, _, ctx.drop_and_pad = inputs
    ctx.has_probs = probs is not None
    ctx.save_for_backward(output[2], routing_map)
    ctx.mark_non_differentiable(*output[2 if ctx.has_probs else 1 :])


def _backward(
    ctx: Any, dpermuted: torch.Tensor, dpermuted_probs: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    sorted_indices, routing_map = ctx.saved_tensors
    dtokens, dprobs = _grad_op(
        dpermuted.contiguous(),
        dpermuted_probs.contiguous() if ctx.has_probs else None,
        sorted_indices,
        routing_map,
        routing_map.size(1),
        routing_map.size(0),
        ctx.drop_and_pad,
    )
    return dtokens, None, dprobs if ctx.has_probs else None, None, None


# ---------------------------------------------------------------- gradient of permute


def _check_grad(
    permuted_token_out_grad: torch.Tensor,
    probs_grad: torch.Tensor | None,
    sorted_indices: torch.Tensor,
    routing_map: torch.Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> None:
    op = "npu_moe_token_permute_with_routing_map_grad"
    check_rows(op, "permuted_token_out_grad", permuted_token_out_grad)
    num_rows = permuted_token_out_grad.size(0)
    require_device(op, "probs_grad", probs_grad, permuted_token_out_grad)
    if probs_grad is not None:
        require_dtype(op, "probs_grad", probs_grad, (torch.float16, torch.bfloat16, torch.float32))
        if probs_grad.shape != (num_rows,):
            reject(f"{op}: probs_grad must have shape ({num_rows},), but has {tuple(probs_grad.shape)}")
    require_device(op, "sorted_indices", sorted_indices, permuted_token_out_grad)
    require_dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    if sorted_indices.shape != (num_rows,):
        reject(f"{op}: sorted_indices must have shape ({num_rows},), but has {tuple(sorted_indices.shape)}")
    check_map(op, routing_map, permuted_token_out_grad)
    if routing_map.shape != (tokens_num, experts_num):
        reject(
            f"{op}: routing_map must have shape (tokens_num, experts_num) = ({tokens_num}, {experts_num}), "
            f"but has {tuple(routing_map.shape)}"
        )
    parts = experts_num if drop_and_pad else tokens_num
    if num_rows % parts != 0 if parts > 0 else num_rows > 0:
        reject(
            f"{op}: permuted_token_out_grad must have as many rows for each of {parts} "
            f"{'experts' if drop_and_pad else 'tokens'}, but has {num_rows}"
        )


def _grad_cpu(
    permuted_token_out_grad: torch.Tensor,
    probs_grad: torch.Tensor | None,
    sorted_indices: torch.Tensor,
    routing_map: torch.Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> _Gradients:
    op = "npu_moe_token_permute_with_routing_map_grad"
    num_rows, width = permuted_token_out_grad.shape
    compute_dtype = torch.promote_types(permuted_token_out_grad.dtype, torch.float32)
    dtokens = torch.zeros(tokens_num, width, dtype=compute_dtype)
    grad = permuted_token_out_grad.to(compute_dtype)
    if drop_and_pad:
        token = check_range(op, "sorted_indices", sorted_indices, tokens_num, "tokens")
        dtokens.index_add_(0, token, grad)
        expert = torch.arange(experts_num).repeat_interleave(num_rows // max(experts_num, 1))
    else:
        mask = as_mask(op, routing_map)
        row = check_range(op, "sorted_indices", sorted_indices, num_rows, "rows")
        by_token = mask.nonzero(as_tuple=True)[0]
        if by_token.numel() != num_rows:
            reject(f"{op}: routing_map must have one of its ones per row, {num_rows}, but has {by_token.numel()}")
        dtokens.index_add_(0, by_token, grad.index_select(0, row))
        expert, token = mask.t().nonzero(as_tuple=True)
    if probs_grad is None:
        return dtokens.to(permuted_token_out_grad.dtype), grad.new_zeros((0, 0), dtype=permuted_token_out_grad.dtype)
    dprobs = torch.zeros(tokens_num, experts_num, dtype=probs_grad.dtype)
    dprobs[token, expert] = probs_grad
    return dtokens.to(permuted_token_out_grad.dtype), dprobs


def _grad_npu(
    permuted_token_out_grad: torch.Tensor,
    probs_grad: torch.Tensor | None,
    sorted_indices: torch.Tensor,
    routing_map: torch.Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> _Gradients:
    arguments = (
        permuted_token_out_grad,
        probs_grad,
        sorted_indices,
        routing_map,
        experts_num,
        tokens_num,
        drop_and_pad,
    )
    if permuted_token_out_grad.size(0) == 0:
        dtokens, dprobs = _grad_fake(*arguments)
        return dtokens.zero_(), dprobs.zero_()
    dtokens, dprobs = torch.ops.npu.npu_moe_token_permute_with_routing_map_grad(*arguments)
    return dtokens, permuted_token_out_grad.new_empty(0, 0) if probs_grad is None else dprobs


def _grad_fake(
    permuted_token_out_grad: torch.Tensor,
    probs_grad: torch.Tensor | None,
    sorted_indices: torch.Tensor,
    routing_map: torch.Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> _Gradients:
    grad = permuted_token_out_grad
    dprobs = grad.new_empty(0, 0) if probs_grad is None else probs_grad.new_empty(tokens_num, experts_num)
    return grad.new_empty(tokens_num, grad.size(1)), dprobs


def _grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
    permuted_token_out_grad, probs_grad, _, routing_map, _, _, ctx.drop_and_pad = inputs
    ctx.num_rows, ctx.has_probs = permuted_token_out_grad.size(0), probs_grad is not None
    ctx.save_for_backward(routing_map)
    if not ctx.has_probs:
        ctx.mark_non_differentiable(output[1])


def _grad_backward(ctx: Any, ddtokens: torch.Tensor, ddprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (routing_map,) = ctx.saved_tensors
    drows, dprobs_grad, _ = _op(
        ddtokens.contiguous(),
        routing_map,
        ddprobs.contiguous() if ctx.has_probs else None,
        ctx.num_rows,
        ctx.drop_and_pad,
    )
    return drows, dprobs_grad if ctx.has_probs else None, None, None, None, None, None


_op = register_op(
    "npu_moe_token_permute_with_routing_map(Tensor tokens, Tensor routing_map, Tensor? probs, SymInt? num_out_tokens,"
    " bool drop_and_pad) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("tokens", "probs"),
)
_grad_op = register_op(
    "npu_moe_token_permute_with_routing_map_grad(Tensor permuted_token_out_grad, Tensor? probs_grad,"
    " Tensor sorted_indices, Tensor routing_map, SymInt experts_num, SymInt tokens_num, bool drop_and_pad)"
    " -> (Tensor, Tensor)",
    cpu=_grad_cpu,
    npu=_grad_npu,
    fake=_grad_fake,
    setup_context=_grad_setup_context,
    backward=_grad_backward,
    differentiable=("permuted_token_out_grad", "probs_grad"),
)


@typed
def npu_moe_token_permute_with_routing_map(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    *,
    probs: torch.Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Token rows in the order of the experts that a map routes them to, with the probabilities of these pairs.

    Args:
        tokens: ``[T, H]``, float16, bfloat16 or float32 (on CPU also float64).
        routing_map: ``[T, E]``, bool, or int8 of 0 and 1: which experts a token goes to.
        probs: ``[T, E]``, the dtype of ``tokens``, or float32 with bfloat16 tokens.
        num_out_tokens: ``T*K``, where every row of the map has K ones, or ``E*C`` for capacity C; rounded down to such
            a multiple. None: T, that is K = 1. A tensor of one integer, such as ``routing_map.sum()``, is read on the
            host.
        drop_and_pad: give every expert exactly C rows: the first C of its tokens; if it has fewer, other tokens in
            their order pad it, with their own probabilities.

    Returns:
        ``(permuted_tokens, permuted_probs, sorted_indices)``. R rows ``[R, H]`` and their probabilities ``[R]``, None
        without ``probs``, both in the dtype of the argument and differentiable; and int32 ``[R]``: without
        ``drop_and_pad`` the row of each pair ``t*K + k``, with it the token of each row.

    Raises:
        OperatorError: wrong rank, dtype or size; on CPU also other numbers in the map, or without ``drop_and_pad``
            more or fewer ones than rows.

    Example:
        >>> tokens, routing_map = torch.tensor([[1.0], [2.0], [3.0]]), torch.eye(3).roll(1, 1).bool()
        >>> rows, _, sorted_indices = npu_moe_token_permute_with_routing_map(tokens, routing_map)
        >>> rows.flatten(), sorted_indices
        (tensor([3., 1., 2.]), tensor([1, 2, 0], dtype=torch.int32))
    """
    _check(tokens, routing_map, probs, num_out_tokens, drop_and_pad)
    permuted, permuted_probs, sorted_indices = _op(tokens, routing_map, probs, num_out_tokens, drop_and_pad)
    return permuted, None if probs is None else permuted_probs, sorted_indices


@typed
def npu_moe_token_permute_with_routing_map_grad(
    permuted_token_out_grad: torch.Tensor,
    probs_grad: torch.Tensor | None,
    sorted_indices: torch.Tensor,
    routing_map: torch.Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of :func:`npu_moe_token_permute_with_routing_map` with respect to its ``tokens`` and ``probs``.

    Args:
        permuted_token_out_grad: ``[R, H]``, gradient of the first result, float16, bfloat16 or float32 (on CPU also
            float64).
        probs_grad: ``[R]``, gradient of the second, of any of these dtypes.
        sorted_indices: int32 ``[R]``, the third result.
        routing_map: ``[T, E]``, the argument of the forward call.
        experts_num: E.
        tokens_num: T.
        drop_and_pad: as in the forward call.

    Returns:
        ``(grad_tokens, grad_probs)``: ``[T, H]`` in the dtype of the first argument, summed in float32 and rounded
        once; ``[T, E]`` in the dtype of ``probs_grad``, zero where the map chose nothing, or None without it.

    Raises:
        OperatorError: wrong rank, dtype or size; on CPU also indices out of range, other numbers in the map, or
            without ``drop_and_pad`` more or fewer ones than rows.

    Example:
        >>> routing_map, sorted_indices = torch.eye(2).flip(0).bool(), torch.tensor([1, 0], dtype=torch.int32)
        >>> rows = torch.tensor([[1.0], [2.0]])
        >>> npu_moe_token_permute_with_routing_map_grad(rows, None, sorted_indices, routing_map, 2, 2, False)
        (tensor([[2.],
                [1.]]), None)
    """
    arguments = (
        permuted_token_out_grad,
        probs_grad,
        sorted_indices,
        routing_map,
        experts_num,
        tokens_num,
        drop_and_pad,
    )
    _check_grad(*arguments)
    dtokens, dprobs = _grad_op(*arguments)
    return dtokens, None if probs_grad is None else dprobs
