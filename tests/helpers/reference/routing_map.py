"""References of permute and unpermute by a routing map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers.reference.common import Float


def _ones(routing_map: Tensor) -> list[tuple[int, int]]:
    """(token, expert) of the ones, token by token with ascending experts."""
    return [
        (token, expert)
        for token, row in enumerate(routing_map.tolist())
        for expert, is_chosen in enumerate(row)
        if is_chosen
    ]


def _stack(rows: Sequence[Tensor], *, like: Tensor) -> Tensor:
    return torch.stack(list(rows)) if rows else like.new_zeros((0, *like.shape[1:]))


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """spec: npu_moe_token_permute_with_routing_map 3.4. Copies, in their final dtypes."""
    num_tokens, num_experts = routing_map.shape
    wanted = num_tokens if num_out_tokens is None else int(num_out_tokens)
    if drop_and_pad:
        capacity = wanted // num_experts if num_experts else 0
        pairs = []
        for expert in range(num_experts):
            column = routing_map[:, expert].tolist()
            chosen = [token for token in range(num_tokens) if column[token]]
            others = [token for token in range(num_tokens) if not column[token]]
            pairs += [(token, expert) for token in (chosen + others)[:capacity]]
        sorted_indices = [token for token, _ in pairs]
    else:
        pairs = sorted(_ones(routing_map), key=lambda pair: (pair[1], pair[0]))
        assert len(pairs) == (wanted // num_tokens * num_tokens if num_tokens else 0)
        sorted_indices = sorted(range(len(pairs)), key=lambda row: pairs[row][0])
    permuted = _stack([tokens[token] for token, _ in pairs], like=tokens)
    permuted_probs = None
    if probs is not None:
        permuted_probs = _stack([probs[token, expert] for token, expert in pairs], like=probs.flatten())
    return permuted, permuted_probs, torch.tensor(sorted_indices, dtype=torch.int32)


def permute_grad(
    permuted_token_out_grad: Tensor,
    probs_grad: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Float | None]:
    """spec: npu_moe_token_permute_with_routing_map_grad 3.4."""
    num_rows, width = permuted_token_out_grad.shape
    grad = torch.zeros(tokens_num, width, dtype=torch.float64)
    grad_probs = torch.zeros(tokens_num, experts_num, dtype=torch.float64)
    if drop_and_pad:
        places = [(token, row // (num_rows // experts_num)) for row, token in enumerate(sorted_indices.tolist())]
        for row, (token, _) in enumerate(places):
            grad[token] += permuted_token_out_grad[row].double()
    else:
        places = sorted(_ones(routing_map), key=lambda pair: (pair[1], pair[0]))
        for (token, _), row in zip(_ones(routing_map), sorted_indices.tolist(), strict=True):
            grad[token] += permuted_token_out_grad[row].double()
    if probs_grad is None:
        return grad, None
    for row, place in enumerate(places):
        grad_probs[place] = probs_grad[row].double()
    return grad, Float(grad_probs, probs_grad.dtype)


def _pairs(
    row_of: Sequence[int],
    token_of: Sequence[int],
    num_tokens: int,
    probs: Tensor | None,
    routing_map: Tensor | None,
    drop_and_pad: bool,
) -> list[tuple[int, int, tuple[int, int] | None]]:
    """Row, token and place in probs of every pair."""
    num_rows = len(row_of)
    if drop_and_pad:
        return [
            (row, token, None if probs is None else (token, row // (num_rows // probs.shape[1])))
            for row, token in zip(row_of, token_of, strict=True)
        ]
    top_k = num_rows // num_tokens if num_tokens else 0
    places: Sequence[tuple[int, int] | None] = [None] * (num_tokens * top_k)
    if probs is not None:
        assert routing_map is not None
        places = _ones(routing_map)
    assert len(places) == num_tokens * top_k
    return [(row_of[pair], pair // top_k, place) for pair, place in enumerate(places)]


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> Tensor:
    """spec: npu_moe_token_unpermute_with_routing_map 3.5."""
    indices = sorted_indices.tolist()
    out = torch.zeros(list(restore_shape), dtype=torch.float64)
    rows = range(len(indices)) if drop_and_pad else indices
    for row, token, place in _pairs(rows, indices, restore_shape[0], probs, routing_map, drop_and_pad):
        weight = torch.ones(()) if probs is None or place is None else probs[place]
        out[token] += permuted_tokens[row].double() * weight.double()
    return out


def internal_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | Float | None]:
    """spec: _npu_moe_token_unpermute_with_routing_map 3.5. Both indices are zero without drop_and_pad."""
    out = unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)
    indices = sorted_indices.tolist()
    order = sorted(range(len(indices)), key=lambda row: indices[row]) if drop_and_pad else [0] * len(indices)
    tokens = sorted(indices) if drop_and_pad else [0] * len(indices)
    weights = None
    if probs is not None:
        weights = torch.zeros(len(indices), dtype=probs.dtype)
        rows = range(len(indices)) if drop_and_pad else indices
        pairs = _pairs(rows, indices, restore_shape[0], probs, routing_map, drop_and_pad)
        for number, (_, _, place) in enumerate(pairs):
            assert place is not None
            weights[number] = probs[place]
    # float64 would be taken for a result that is yet to be rounded
    exact = Float(weights, weights.dtype) if weights is not None and weights.dtype == torch.float64 else weights
    return out, torch.tensor(order, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32), exact


def unpermute_grad(
    unpermuted_tokens_grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted_tokens: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """spec: npu_moe_token_unpermute_with_routing_map_grad 3.6."""
    grad = torch.zeros(out_index.shape[0], restore_shape[1], dtype=torch.float64)
    grad_probs = None if probs is None else torch.zeros(probs.shape, dtype=torch.float64)
    indices = (out_index.tolist(), permuted_token_id.tolist())
    for row, token, place in _pairs(*indices, restore_shape[0], probs, routing_map, drop_and_pad):
        incoming = unpermuted_tokens_grad[token].double()
        weight = torch.ones(()) if probs is None or place is None else probs[place]
        grad[row] += incoming * weight.double()
        if grad_probs is not None and place is not None:
            assert permuted_tokens is not None
            grad_probs[place] += torch.sum(incoming * permuted_tokens[row].double())
    return grad, grad_probs
