"""The way back of a permutation by a routing map, weighted (spec: routing 3.5).

    out[t] = sum of w[i] * permuted[row i] over the pairs i of token t

Without drop_and_pad pair i = t*K + k is the k-th expert of token t in ascending order, row i = sorted_indices[i] and w
the ones of the map in probs, row by row. With it pair i is row i, of token sorted_indices[i] and expert i // C, and w
their entry in probs. Without probs w is 1.

The sum is float32 (float64 for float64), rounded once. The gradient is an operator of its own, in
unpermute_routing_map_grad.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops.permute import check_rows
from moe_npu.ops.routing_map import as_mask, check_map, check_range

_Internal = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Pairs(NamedTuple):
    """The pairs: their row, their token, and if there are probs where in these their weight is."""

    row: torch.Tensor
    token: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor] | None


def check_shape(op: str, restore_shape: Sequence[int]) -> None:
    """The rules of the shape of the result."""
    if len(restore_shape) != 2 or restore_shape[0] < 0 or restore_shape[1] < 0:
        reject(f"{op}: restore_shape must be the shape [T, H] of the result, but is {list(restore_shape)}")


def check_index(op: str, argument: str, index: torch.Tensor, x: torch.Tensor, num_rows: int) -> None:
    """The rules of an index with an entry per row, on the device of ``x``."""
    require_device(op, argument, index, x)
    require_dtype(op, argument, index, (torch.int32,))
    if index.shape != (num_rows,):
        reject(f"{op}: {argument} must have shape ({num_rows},), one entry per row, but has {tuple(index.shape)}")


def check_weights(
    op: str,
    x: torch.Tensor,
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
    num_tokens: int,
    num_rows: int,
) -> None:
    """The rules of probs and map, on the device of ``x``."""
    if routing_map is not None:
        check_map(op, routing_map, x)
    if probs is None:
        return
    require_device(op, "probs", probs, x)
    require_dim(op, "probs", probs, (2,))
    require_dtype(op, "probs", probs, (torch.float16, torch.bfloat16, torch.float32))
    if probs.size(0) != num_tokens:
        reject(f"{op}: probs must have restore_shape[0] = {num_tokens} rows, but has shape {tuple(probs.shape)}")
    num_experts = probs.size(1)
    if drop_and_pad:
        if num_rows % num_experts != 0 if num_experts > 0 else num_rows > 0:
            reject(f"{op}: there must be as many rows for each of {num_experts} experts of probs, but are {num_rows}")
        return
    require(routing_map is not None, f"{op}: routing_map must be given with probs unless drop_and_pad is set")
    if routing_map is not None and routing_map.shape != probs.shape:
        reject(
            f"{op}: routing_map must have the shape of probs {tuple(probs.shape)}, but has {tuple(routing_map.shape)}"
        )


def find_pairs(
    op: str,
    argument: str,
    row: torch.Tensor,
    token: torch.Tensor,
    num_tokens: int,
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> Pairs:
    """The pairs of the rows in ``argument``; ``token`` are their tokens with drop_and_pad, and unused without."""
    num_rows = row.size(0)
    if drop_and_pad:
        row, token = check_range(op, argument, row, num_rows, "rows"), token.long()
        if probs is None:
            return Pairs(row, token, None)
        capacity = num_rows // max(probs.size(1), 1)
        return Pairs(row, token, (token, row.div(max(capacity, 1), rounding_mode="floor")))
    top_k = 0 if num_tokens == 0 else num_rows // num_tokens
    row = check_range(op, argument, row[: num_tokens * top_k], num_rows, "rows")
    token = torch.arange(num_tokens).repeat_interleave(top_k)
    if probs is None or routing_map is None:
        return Pairs(row, token, None)
    expert = as_mask(op, routing_map).nonzero(as_tuple=True)
    if expert[0].numel() != row.numel():
        reject(f"{op}: routing_map must have {top_k} ones for each of {num_tokens} tokens, but has {len(expert[0])}")
    return Pairs(row, token, (expert[0], expert[1]))


# ---------------------------------------------------------------- unpermute


def _check(
    op: str,
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> None:
    check_rows(op, "permuted_tokens", permuted_tokens)
    num_rows, width = permuted_tokens.shape
    check_index(op, "sorted_indices", sorted_indices, permuted_tokens, num_rows)
    check_shape(op, restore_shape)
    if restore_shape[1] != width:
        reject(f"{op}: restore_shape must end with {width}, the columns of permuted_tokens, but is {[*restore_shape]}")
    check_weights(op, permuted_tokens, probs, routing_map, drop_and_pad, restore_shape[0], num_rows)


def _unpermute(
    op: str,
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result and the weights of the pairs."""
    num_tokens, num_rows = restore_shape[0], sorted_indices.size(0)
    if drop_and_pad:
        check_range(op, "sorted_indices", sorted_indices, num_tokens, "tokens")
    row = torch.arange(num_rows) if drop_and_pad else sorted_indices
    pairs = find_pairs(op, "sorted_indices", row, sorted_indices, num_tokens, probs, routing_map, drop_and_pad)
    weight = None if probs is None or pairs.places is None else probs[pairs.places]
    compute_dtype = torch.promote_types(permuted_tokens.dtype, torch.float32)
    terms = permuted_tokens.index_select(0, pairs.row).to(compute_dtype)
    if weight is not None:
        terms.mul_(weight[:, None].to(compute_dtype))
    out = torch.zeros(num_tokens, restore_shape[1], dtype=compute_dtype)
    return out.index_add_(0, pairs.token, terms).to(permuted_tokens.dtype), weight


def _cpu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> torch.Tensor:
    op = "npu_moe_token_unpermute_with_routing_map"
    return _unpermute(op, permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)[0]


def _npu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> torch.Tensor:
    if permuted_tokens.size(0) == 0 or restore_shape[0] == 0:  # no kernel takes an empty tensor
        return permuted_tokens.new_zeros(restore_shape)
    return torch.ops.npu.npu_moe_token_unpermute_with_routing_map(
        permuted_tokens, sorted_indices, restore_shape, probs=probs, routing_map=routing_map, drop_and_pad=drop_and_pad
    )


def _fake(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> torch.Tensor:
    return permuted_tokens.new_empty(restore_shape)


def _save(ctx: Any, inputs: tuple[Any, ...], by_row: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    permuted_tokens, sorted_indices, ctx.restore_shape, probs, routing_map, ctx.drop_and_pad = inputs
    # the rows are needed for the gradient of probs only
    rows = None if probs is None else permuted_tokens
    ctx.save_for_backward(sorted_indices, probs, routing_map, rows, *(by_row or ()))


def _backward(ctx: Any, dout: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    sorted_indices, probs, routing_map, permuted_tokens, *by_row = ctx.saved_tensors
    if not ctx.drop_and_pad:
        by_row = [sorted_indices, sorted_indices]
    elif not by_row:
        by_row = list(_by_token(sorted_indices))
    dpermuted, dprobs = torch.ops.moe_npu.npu_moe_token_unpermute_with_routing_map_grad.default(
        dout.contiguous(), *by_row, routing_map, permuted_tokens, probs, ctx.drop_and_pad, ctx.restore_shape
    )
    return dpermuted, None, None, None if probs is None else dprobs.to(probs.dtype), None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _save(ctx, inputs, None)


def _by_token(sorted_indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in the order of their tokens, and these tokens."""
    token, order = torch.sort(sorted_indices, stable=True)
    return order.to(torch.int32), token


# ---------------------------------------------------------------- unpermute with what its gradient needs


def _internal_cpu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> _Internal:
    op = "_npu_moe_token_unpermute_with_routing_map"
    arguments = (permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)
    out, weight = _unpermute(op, *arguments)
    if drop_and_pad:
        out_index, token = _by_token(sorted_indices)
    else:
        # undefined on the device
        out_index, token = (torch.zeros(sorted_indices.shape, dtype=torch.int32) for _ in range(2))
    permuted_probs = permuted_tokens.new_zeros(0) if probs is None else probs.new_zeros(sorted_indices.shape)
    if weight is not None:
        permuted_probs[: weight.size(0)] = weight
    return out, out_index, token, permuted_probs


def _internal_npu(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> _Internal:
    if permuted_tokens.size(0) == 0 or restore_shape[0] == 0:
        results = _internal_fake(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)
        return results[0].zero_(), results[1].zero_(), results[2].zero_(), results[3].zero_()
    out, out_index, token, permuted_probs = torch.ops.npu._npu_moe_token_unpermute_with_routing_map(
        permuted_tokens, sorted_indices, restore_shape, probs=probs, routing_map=routing_map, drop_and_pad=drop_and_pad
    )
    return out, out_index, token, permuted_tokens.new_empty(0) if probs is None else permuted_probs


def _internal_fake(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    probs: torch.Tensor | None,
    routing_map: torch.Tensor | None,
    drop_and_pad: bool,
) -> _Internal:
    permuted_probs = permuted_tokens.new_empty(0) if probs is None else probs.new_empty(sorted_indices.shape)
    out_index, token = (sorted_indices.new_empty(sorted_indices.shape) for _ in range(2))
    return permuted_tokens.new_empty(restore_shape), out_index, token, permuted_probs


def _internal_setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Internal) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, (output[1], output[2]) if inputs[-1] else None)


_SCHEMA = (
    "(Tensor permuted_tokens, Tensor sorted_indices, SymInt[] restore_shape, Tensor? probs, Tensor? routing_map,"
    " bool drop_and_pad) -> "
)
_op = register_op(
    f"npu_moe_token_unpermute_with_routing_map{_SCHEMA}Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("permuted_tokens", "probs"),
)
_internal_op = register_op(
    f"_npu_moe_token_unpermute_with_routing_map{_SCHEMA}(Tensor, Tensor, Tensor, Tensor)",
    cpu=_internal_cpu,
    npu=_internal_npu,
    fake=_internal_fake,
    setup_context=_internal_setup_context,
    backward=_backward,
    differentiable=("permuted_tokens", "probs"),
)


@typed
def npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    *,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    drop_and_pad: bool = False,
) -> torch.Tensor:
    """Rows back in token order, the rows of a token summed with the weights in ``probs``.

    Args:
        permuted_tokens: ``[R, H]``, float16, bfloat16 or float32 (on CPU also float64).
        sorted_indices: int32 ``[R]`` as :func:`npu_moe_token_permute_with_routing_map` returns it in the same mode.
        restore_shape: ``[T, H]``, the shape of the result.
        probs: ``[T, E]``, any of these dtypes. None: every weight is 1.
        routing_map: ``[T, E]``, bool, or int8 of 0 and 1, with ``R // T`` ones per row. Required with ``probs``
            unless ``drop_and_pad`` is set.
        drop_and_pad: every expert has ``R // E`` rows; also rows that pad it count with the weight that they have.

    Returns:
        ``[T, H]``, dtype of ``permuted_tokens``, summed in float32 and rounded once. Differentiable with respect to
        ``permuted_tokens`` and ``probs``.

    Raises:
        OperatorError: wrong rank, dtype or size, ``probs`` without a map; on CPU also indices out of range, or other
            numbers in the map, or more or fewer ones than pairs.

    Example:
        >>> rows, order = torch.tensor([[10.0], [20.0], [30.0], [40.0]]), torch.tensor([0, 2, 1, 3]).int()
        >>> npu_moe_token_unpermute_with_routing_map(rows, order, [2, 1])
        tensor([[40.],
                [60.]])
        >>> npu_moe_token_unpermute_with_routing_map(
        ...     rows, order, [2, 1], probs=torch.full((2, 2), 0.5), routing_map=torch.ones(2, 2, dtype=torch.bool)
        ... )
        tensor([[20.],
                [30.]])
    """
    arguments = (permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)
    _check("npu_moe_token_unpermute_with_routing_map", *arguments)
    return _op(*arguments)


@typed
def _npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: Sequence[int],
    *,
    probs: torch.Tensor | None = None,
    routing_map: torch.Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """:func:`npu_moe_token_unpermute_with_routing_map` and what its gradient is computed from.

    Args:
        permuted_tokens: as there, like all arguments.
        sorted_indices: as there.
        restore_shape: as there.
        probs: as there.
        routing_map: as there.
        drop_and_pad: as there.

    Returns:
        ``(unpermuted_tokens, out_index, permuted_token_id, permute_probs)``. The result of
        :func:`npu_moe_token_unpermute_with_routing_map`, which carries the gradients; int32 ``[R]``, with
        ``drop_and_pad`` the rows in the order of their tokens and these tokens, without it zero here and undefined on
        the device; and ``[R]`` in the dtype of ``probs``, the weight of every pair, None without ``probs``.

    Raises:
        OperatorError: as :func:`npu_moe_token_unpermute_with_routing_map`.

    Example:
        >>> rows, token = torch.tensor([[10.0], [20.0], [30.0], [40.0]]), torch.tensor([1, 0, 0, 1]).int()
        >>> out, out_index, permuted_token_id, permute_probs = _npu_moe_token_unpermute_with_routing_map(
        ...     rows, token, [2, 1], probs=torch.tensor([[0.5, 1.0], [0.25, 0.0]]), drop_and_pad=True
        ... )
        >>> out.flatten(), out_index.tolist(), permuted_token_id.tolist(), permute_probs
        (tensor([40.0000,  2.5000]), [1, 2, 0, 3], [0, 0, 1, 1], tensor([0.2500, 0.5000, 1.0000, 0.0000]))
    """
    arguments = (permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad)
    _check("_npu_moe_token_unpermute_with_routing_map", *arguments)
    out, out_index, permuted_token_id, permute_probs = _internal_op(*arguments)
    return out, out_index, permuted_token_id, None if probs is None else permute_probs
