"""References of permute and unpermute."""

from __future__ import annotations

import torch
from torch import Tensor


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
        kept = min(num_out_tokens, pairs)
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
    for pair, position in enumerate(sorted_indices.tolist()):
        weight = 1.0 if probs is None else float(probs[pair // top_k, pair % top_k])
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
    for pair, position in enumerate(sorted_indices.tolist()):
        token, slot = pair // top_k, pair % top_k
        if not 0 <= position < available:
            continue
        grad = grad_unpermuted_tokens[token].double()
        weight = 1.0 if probs is None else float(probs[token, slot])
        if weight != 0:
            grad_permuted[position] += weight * grad
        if grad_probs is not None:
            grad_probs[token, slot] = torch.sum(grad * permuted_tokens[position].double())
    return grad_permuted, grad_probs
