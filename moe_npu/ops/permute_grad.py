"""Gradient of permute, an operator of its own in two forms (spec: routing 3.3).

    dtokens[t] = sum over k of dpermuted[row]    with row = sorted_indices[t*K + k], where row < M

for M rows, in float32 (float64 for float64), rounded once. The first form takes the tensors of the forward call, the
second (v2) only the sizes and the dtype that it needs of them.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import reject, require_device
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops.permute import as_float_dtype, check_permute, check_rows, check_unpermute, pairs, top_k_of


def _check(
    op: str,
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    num_tokens: int,
    top_k: int,
    padded_mode: bool,
) -> None:
    check_rows(op, "grad_permuted_tokens", grad_permuted_tokens)
    check_unpermute(op, grad_permuted_tokens, sorted_indices, None, padded_mode)
    if sorted_indices.size(0) != num_tokens * top_k:
        reject(
            f"{op}: sorted_indices must have one entry for each of {top_k} experts of {num_tokens} tokens, "
            f"but has {sorted_indices.size(0)}"
        )


def _sum_of_slots(
    op: str, rows: torch.Tensor, sorted_indices: torch.Tensor, num_tokens: int, dtype: torch.dtype, top_k: int
) -> torch.Tensor:
    index = pairs(op, sorted_indices, None).view(-1, top_k)
    num_rows, width = rows.shape
    compute_dtype = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(num_tokens, width, dtype=compute_dtype)
    if num_rows > 0:
        is_missing = index >= num_rows
        index = index.clamp(max=num_rows - 1)
        for slot in range(top_k):
            terms = rows.index_select(0, index[:, slot]).to(compute_dtype)
            total += terms.masked_fill_(is_missing[:, slot, None], 0)
    return total.to(dtype)


def _permute_grad_v2_cpu(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,  # noqa: N803
    padded_mode: bool,
) -> torch.Tensor:
    op = "npu_moe_token_permute_grad_v2"
    return _sum_of_slots(op, grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, num_topK)


def _permute_grad_v2_npu(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,  # noqa: N803
    padded_mode: bool,
) -> torch.Tensor:
    arguments = (grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, num_topK, padded_mode)
    if grad_permuted_tokens.size(0) == 0 or tokens_size_0 == 0:  # no kernel takes an empty tensor
        return _permute_grad_v2_fake(*arguments).zero_()
    return torch.ops.npu.npu_moe_token_permute_grad_v2(*arguments)


def _permute_grad_v2_fake(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,  # noqa: N803
    padded_mode: bool,
) -> torch.Tensor:
    return grad_permuted_tokens.new_empty(tokens_size_0, grad_permuted_tokens.size(1), dtype=tokens_dtype)


def _permute_grad_v2_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad_permuted_tokens, sorted_indices, _, _, ctx.top_k, _ = inputs
    ctx.num_rows, ctx.dtype = grad_permuted_tokens.size(0), grad_permuted_tokens.dtype
    ctx.save_for_backward(sorted_indices)


def _grad_of_rows(ctx: Any, ddtokens: torch.Tensor) -> torch.Tensor:
    """The tokens once per slot, in the order of the rows: what the sum over the slots is the transpose of."""
    (sorted_indices,) = ctx.saved_tensors
    repeated = ddtokens.unsqueeze(1).expand(-1, ctx.top_k, -1).reshape(sorted_indices.size(0), ddtokens.size(1))
    return torch.ops.moe_npu.npu_moe_token_unpermute_grad_v2.default(
        repeated, sorted_indices, ctx.num_rows, ctx.dtype, None, False, None, None
    )[0]


def _permute_grad_v2_backward(ctx: Any, ddtokens: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _grad_of_rows(ctx, ddtokens), None, None, None, None, None


def _permute_grad_cpu(
    tokens: torch.Tensor,
    grad_permuted_tokens: torch.Tensor,
    indices: torch.Tensor,
    sorted_indices: torch.Tensor,
    padded_mode: bool,
) -> torch.Tensor:
    op = "npu_moe_token_permute_grad"
    return _sum_of_slots(op, grad_permuted_tokens, sorted_indices, tokens.size(0), tokens.dtype, top_k_of(indices))


def _permute_grad_npu(
    tokens: torch.Tensor,
    grad_permuted_tokens: torch.Tensor,
    indices: torch.Tensor,
    sorted_indices: torch.Tensor,
    padded_mode: bool,
) -> torch.Tensor:
    arguments = (tokens, grad_permuted_tokens, indices, sorted_indices, padded_mode)
    if grad_permuted_tokens.size(0) == 0 or tokens.size(0) == 0:
        return _permute_grad_fake(*arguments).zero_()
    return torch.ops.npu.npu_moe_token_permute_grad(*arguments)


def _permute_grad_fake(
    tokens: torch.Tensor,
    grad_permuted_tokens: torch.Tensor,
    indices: torch.Tensor,
    sorted_indices: torch.Tensor,
    padded_mode: bool,
) -> torch.Tensor:
    return tokens.new_empty(tokens.shape)


def _permute_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, grad_permuted_tokens, indices, sorted_indices, _ = inputs
    ctx.num_rows, ctx.dtype, ctx.top_k = grad_permuted_tokens.size(0), grad_permuted_tokens.dtype, top_k_of(indices)
    ctx.save_for_backward(sorted_indices)


def _permute_grad_backward(ctx: Any, ddtokens: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return None, _grad_of_rows(ctx, ddtokens), None, None, None


_permute_grad_op = register_op(
    "npu_moe_token_permute_grad(Tensor tokens, Tensor grad_permuted_tokens, Tensor indices, Tensor sorted_indices,"
    " bool padded_mode) -> Tensor",
    cpu=_permute_grad_cpu,
    npu=_permute_grad_npu,
    fake=_permute_grad_fake,
    setup_context=_permute_grad_setup_context,
    backward=_permute_grad_backward,
    differentiable=("grad_permuted_tokens",),
)
_permute_grad_v2_op = register_op(
    "npu_moe_token_permute_grad_v2(Tensor grad_permuted_tokens, Tensor sorted_indices, SymInt tokens_size_0,"
    " ScalarType tokens_dtype, SymInt num_topK, bool padded_mode) -> Tensor",
    cpu=_permute_grad_v2_cpu,
    npu=_permute_grad_v2_npu,
    fake=_permute_grad_v2_fake,
    setup_context=_permute_grad_v2_setup_context,
    backward=_permute_grad_v2_backward,
    differentiable=("grad_permuted_tokens",),
)


@typed
def npu_moe_token_permute_grad(
    tokens: torch.Tensor,
    grad_permuted_tokens: torch.Tensor,
    indices: torch.Tensor,
    sorted_indices: torch.Tensor,
    padded_mode: bool = False,
) -> torch.Tensor:
    """The gradient of :func:`npu_moe_token_permute` with respect to its ``tokens``.

    Args:
        tokens: ``[T, H]``, the argument of the forward call; only its shape and dtype matter.
        grad_permuted_tokens: ``[M, H]``, gradient of the first result, float16, bfloat16 or float32 (on CPU also
            float64).
        indices: ``[T, K]`` or ``[T]``, the argument of the forward call; only its shape matters.
        sorted_indices: int32 ``[T*K]``, the second result. Entries of M and more contribute nothing.
        padded_mode: must be False.

    Returns:
        ``[T, H]``, the dtype of ``tokens``: the sum over the K rows of each token, in float32, rounded once.
        Differentiable with respect to ``grad_permuted_tokens``.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``; on CPU also a negative entry of ``sorted_indices``.

    Example:
        >>> tokens, indices = torch.zeros(2, 1), torch.tensor([[1, 0], [0, 2]])
        >>> rows, sorted_indices = torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.tensor([2, 0, 1, 3]).int()
        >>> npu_moe_token_permute_grad(tokens, rows, indices, sorted_indices)
        tensor([[ 5.],
                [10.]])
    """
    op = "npu_moe_token_permute_grad"
    check_permute(op, tokens, indices, padded_mode)
    require_device(op, "grad_permuted_tokens", grad_permuted_tokens, tokens)
    _check(op, grad_permuted_tokens, sorted_indices, tokens.size(0), top_k_of(indices), padded_mode)
    if grad_permuted_tokens.size(1) != tokens.size(1):
        reject(
            f"{op}: grad_permuted_tokens must have {tokens.size(1)} columns like tokens, "
            f"but has shape {tuple(grad_permuted_tokens.shape)}"
        )
    # no value of tokens has an effect
    return _permute_grad_op(tokens.detach(), grad_permuted_tokens, indices, sorted_indices, padded_mode)


@typed
def npu_moe_token_permute_grad_v2(
    grad_permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype | int,
    num_topK: int,  # noqa: N803
    padded_mode: bool = False,
) -> torch.Tensor:
    """:func:`npu_moe_token_permute_grad` without the tensors of the forward call.

    Args:
        grad_permuted_tokens: ``[M, H]``, gradient of the first result, float16, bfloat16 or float32 (on CPU also
            float64).
        sorted_indices: int32 ``[T*K]``, the second result. Entries of M and more contribute nothing.
        tokens_size_0: T.
        tokens_dtype: the dtype of the result.
        num_topK: K.
        padded_mode: must be False.

    Returns:
        ``[T, H]`` of ``tokens_dtype``. Differentiable with respect to ``grad_permuted_tokens``.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``; on CPU also a negative entry of ``sorted_indices``.

    Example:
        >>> rows, sorted_indices = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 1, 3], dtype=torch.int32)
        >>> npu_moe_token_permute_grad_v2(rows, sorted_indices, 2, torch.float16, 2)
        tensor([[5.],
                [2.]], dtype=torch.float16)
    """
    op = "npu_moe_token_permute_grad_v2"
    dtype = as_float_dtype(op, "tokens_dtype", tokens_dtype)
    if num_topK < 1:
        reject(f"{op}: num_topK must be 1 or more, but is {num_topK}")
    _check(op, grad_permuted_tokens, sorted_indices, tokens_size_0, num_topK, padded_mode)
    return _permute_grad_v2_op(grad_permuted_tokens, sorted_indices, tokens_size_0, dtype, num_topK, padded_mode)
