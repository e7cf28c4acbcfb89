"""References of permute and unpermute."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.reference.common import Float

_DTYPE_NUMBERS = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """spec: npu_moe_token_permute 3.1. Rows in stable expert order (float64) and the int32 inverse permutation."""
    experts = indices.reshape(-1).tolist()
    if padded_mode:
        rows = [tokens[index].double() for index in experts]
        return torch.stack(rows), torch.tensor(experts, dtype=torch.int32)
    pairs = len(experts)
    top_k = 1 if indices.dim() == 1 else indices.shape[1]
    order = sorted(range(pairs), key=lambda pair: experts[pair])
    sorted_indices = torch.zeros(pairs, dtype=torch.int32)
    for position, pair in enumerate(order):
        sorted_indices[pair] = position
    if num_out_tokens is None or num_out_tokens == 0:
        kept = pairs
    elif num_out_tokens > 0:
        kept = min(int(num_out_tokens), pairs)
    else:
        kept = max(pairs + num_out_tokens, 0)
    permuted = torch.zeros(kept, tokens.shape[1], dtype=torch.float64)
    for position in range(kept):
        permuted[position] = tokens[order[position] // top_k].double()
    return permuted, sorted_indices


def moe_token_permute_grad(grad_permuted_tokens: Tensor, sorted_indices: Tensor, num_tokens: int) -> Tensor:
    """spec: gradients of permute 3.3. Sum over the slots of a token, truncated rows skipped."""
    top_k = sorted_indices.numel() // num_tokens if num_tokens else 1
    grad = torch.zeros(num_tokens, grad_permuted_tokens.shape[1], dtype=torch.float64)
    for pair, position in enumerate(sorted_indices.tolist()):
        if position < grad_permuted_tokens.shape[0]:
            grad[pair // top_k] += grad_permuted_tokens[position].double()
    return grad


def moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    """spec: npu_moe_token_unpermute 3.2. Truncated pairs and pairs of weight zero are skipped entirely."""
    top_k = 1 if probs is None else probs.shape[1]
    available = permuted_tokens.shape[0]
    out = torch.zeros(sorted_indices.numel() // top_k, permuted_tokens.shape[1], dtype=torch.float64)
    weights = torch.ones(sorted_indices.shape) if probs is None else probs.reshape(-1)
    for pair, position in enumerate(sorted_indices.tolist()):
        weight = weights[pair].double()
        if weight == 0 or position >= available:
            continue
        if position < 0:
            raise IndexError(f"sorted_indices[{pair}] = {position} has a non-zero weight")
        out[pair // top_k] += weight * permuted_tokens[position].double()
    return out


def moe_token_unpermute_grad(
    permuted_tokens: Tensor, grad_unpermuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """spec: gradients of unpermute 3.3. grad_probs is computed where the weight is zero, and 0 for truncated pairs."""
    top_k = 1 if probs is None else probs.shape[1]
    available = permuted_tokens.shape[0]
    grad_permuted = torch.zeros(permuted_tokens.shape, dtype=torch.float64)
    grad_probs = None if probs is None else torch.zeros(probs.shape, dtype=torch.float64)
    weights = torch.ones(sorted_indices.shape) if probs is None else probs.reshape(-1)
    for pair, position in enumerate(sorted_indices.tolist()):
        token, slot = pair // top_k, pair % top_k
        if not 0 <= position < available:
            continue
        grad = grad_unpermuted_tokens[token].double()
        weight = weights[pair].double()
        if weight != 0:
            grad_permuted[position] += weight * grad
        if grad_probs is not None:
            grad_probs[token, slot] = torch.sum(grad * permuted_tokens[position].double())
    return grad_permuted, grad_probs


# --- under the arguments of the public operators ---------------------------------------------------------------------


def internal_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """spec: _npu_moe_token_unpermute 3.2. The second result is the first argument."""
    return moe_token_unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens


def permute_grad(tokens: Tensor, grad_permuted_tokens: Tensor, indices: Tensor, sorted_indices: Tensor) -> Tensor:
    """spec: npu_moe_token_permute_grad 3.3."""
    return moe_token_permute_grad(grad_permuted_tokens, sorted_indices, indices.shape[0])


def permute_grad_v2(
    grad_permuted_tokens: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype | int,
    num_topK: int,  # noqa: N803
) -> Float:
    """spec: npu_moe_token_permute_grad_v2 3.3."""
    assert sorted_indices.numel() == tokens_size_0 * num_topK
    grad = moe_token_permute_grad(grad_permuted_tokens, sorted_indices, tokens_size_0)
    return Float(grad, _DTYPE_NUMBERS[tokens_dtype] if isinstance(tokens_dtype, int) else tokens_dtype)


def unpermute_grad(
    permuted_tokens: Tensor, grad_unpermuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Float | None]:
    """spec: npu_moe_token_unpermute_grad 3.3."""
    grad, grad_probs = moe_token_unpermute_grad(permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs)
    return grad, None if probs is None or grad_probs is None else Float(grad_probs, probs.dtype)


def unpermute_grad_v2(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype | int,
    probs: Tensor | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Float, Float | None]:
    """spec: npu_moe_token_unpermute_grad_v2 3.3."""
    if permuted_tokens is None or probs is None:
        permuted_tokens = torch.zeros(permuted_tokens_size_0, grad_unpermuted_tokens.shape[1])
    number = permuted_tokens_dtype
    dtype = _DTYPE_NUMBERS[number] if isinstance(number, int) else number
    grad, grad_probs = unpermute_grad(permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs)
    return Float(grad, dtype), grad_probs
