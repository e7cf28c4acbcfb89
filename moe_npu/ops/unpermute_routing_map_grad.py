"""Gradient of the way back of a permutation by a routing map, an operator of its own (spec: routing 3.6).

    dpermuted[row i] = w[i] * dout[t]
    dprobs[t, e] = sum over h of dout[t, h] * permuted[row i, h]    where pair i is (t, e), else 0

with the pairs i, their tokens t, rows and weights w of unpermute_routing_map.py, in float32 (float64 for float64),
rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops.permute import check_rows
from moe_npu.ops.routing_map import check_range
from moe_npu.ops.unpermute_routing_map import check_index, check_shape, check_weights, find_pairs

_Gradients = tuple[torch.Tensor, torch.Tensor]


def _check(
    unpermuted_tokens_grad: torch.Tensor,
    out_index: torch.Tensor,
    permuted_token_id: torch.Tensor,
    routing_map: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    probs: torch.Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> None:
    op = "npu_moe_token_unpermute_with_routing_map_grad"
    check_rows(op, "unpermuted_tokens_grad", unpermuted_tokens_grad)
    require_dim(op, "out_index", out_index, (1,))
    num_rows = out_index.size(0)
    check_index(op, "out_index", out_index, unpermuted_tokens_grad, num_rows)
    check_index(op, "permuted_token_id", permuted_token_id, unpermuted_tokens_grad, num_rows)
    check_shape(op, restore_shape)
    if list(unpermuted_tokens_grad.shape) != list(restore_shape):
        reject(
            f"{op}: unpermuted_tokens_grad must have the shape restore_shape {[*restore_shape]}, "
            f"but has {tuple(unpermuted_tokens_grad.shape)}"
        )
    check_weights(op, unpermuted_tokens_grad, probs, routing_map, drop_and_pad, restore_shape[0], num_rows)
    if probs is None:
        return
    require(permuted_tokens is not None, f"{op}: permuted_tokens must be given with probs")
    if permuted_tokens is not None:
        require_device(op, "permuted_tokens", permuted_tokens, unpermuted_tokens_grad)
        check_rows(op, "permuted_tokens", permuted_tokens)
        if permuted_tokens.size(0) != num_rows or permuted_tokens.size(1) != restore_shape[1]:
            reject(
                f"{op}: permuted_tokens must have shape ({num_rows}, {restore_shape[1]}), "
                f"but has {tuple(permuted_tokens.shape)}"
            )


def _cpu(
    unpermuted_tokens_grad: torch.Tensor,
    out_index: torch.Tensor,
    permuted_token_id: torch.Tensor,
    routing_map: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    probs: torch.Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> _Gradients:
    op, dtype, num_tokens = (
        "npu_moe_token_unpermute_with_routing_map_grad",
        unpermuted_tokens_grad.dtype,
        restore_shape[0],
    )
    if drop_and_pad:
        check_range(op, "permuted_token_id", permuted_token_id, num_tokens, "tokens")
    pairs = find_pairs(op, "out_index", out_index, permuted_token_id, num_tokens, probs, routing_map, drop_and_pad)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    grad = unpermuted_tokens_grad.index_select(0, pairs.token).to(compute_dtype)
    dprobs = torch.zeros((0, 0) if probs is None else probs.shape, dtype=compute_dtype)
    if probs is not None and permuted_tokens is not None and pairs.places is not None:
        rows = permuted_tokens.index_select(0, pairs.row).to(compute_dtype)
        dprobs.index_put_(pairs.places, (grad * rows).sum(-1), accumulate=True)
        grad.mul_(probs[pairs.places][:, None].to(compute_dtype))
    dpermuted = torch.zeros(out_index.size(0), restore_shape[1], dtype=compute_dtype).index_add_(0, pairs.row, grad)
    return dpermuted.to(dtype), dprobs.to(dtype)


def _npu(
    unpermuted_tokens_grad: torch.Tensor,
    out_index: torch.Tensor,
    permuted_token_id: torch.Tensor,
    routing_map: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    probs: torch.Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> _Gradients:
    arguments = (
        unpermuted_tokens_grad,
        out_index,
        permuted_token_id,
        routing_map,
        permuted_tokens,
        probs,
        drop_and_pad,
        restore_shape,
    )
    if out_index.size(0) == 0 or restore_shape[0] == 0:
        dpermuted, dprobs = _fake(*arguments)
        return dpermuted.zero_(), dprobs.zero_()
    dpermuted, dprobs = torch.ops.npu.npu_moe_token_unpermute_with_routing_map_grad(*arguments)
    return dpermuted, unpermuted_tokens_grad.new_empty(0, 0) if probs is None else dprobs


def _fake(
    unpermuted_tokens_grad: torch.Tensor,
    out_index: torch.Tensor,
    permuted_token_id: torch.Tensor,
    routing_map: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    probs: torch.Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> _Gradients:
    dprobs = unpermuted_tokens_grad.new_empty((0, 0) if probs is None else probs.shape)
    return unpermuted_tokens_grad.new_empty(out_index.size(0), restore_shape[1]), dprobs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
    dout, out_index, token, routing_map, permuted_tokens, probs, ctx.drop_and_pad, ctx.restore_shape = inputs
    if probs is None:  # linear: the gradient needs the indices alone
        ctx.mark_non_differentiable(output[1])
        dout = permuted_tokens = None
    ctx.save_for_backward(dout, out_index, token, routing_map, permuted_tokens, probs)


def _backward(ctx: Any, ddpermuted: torch.Tensor, ddprobs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dout, out_index, token, routing_map, permuted_tokens, probs = ctx.saved_tensors
    unpermute = torch.ops.moe_npu.npu_moe_token_unpermute_with_routing_map.default
    ddpermuted, dpermuted, dprobs = ddpermuted.contiguous(), None, None
    sorted_indices = torch.zeros_like(token).scatter(0, out_index.long(), token) if ctx.drop_and_pad else out_index
    ddout = unpermute(ddpermuted, sorted_indices, ctx.restore_shape, probs, routing_map, ctx.drop_and_pad)
    if probs is not None:
        ddprobs = ddprobs.to(probs.dtype).contiguous()
        arguments = (sorted_indices, ctx.restore_shape, ddprobs, routing_map, ctx.drop_and_pad)
        ddout = ddout + unpermute(permuted_tokens, *arguments)
        modes, index = (ctx.drop_and_pad, ctx.restore_shape), (out_index, token)
        dpermuted = _op(dout, *index, routing_map, permuted_tokens, ddprobs, *modes)[0].to(permuted_tokens.dtype)
        dprobs = _op(dout, *index, routing_map, ddpermuted, probs, *modes)[1].to(probs.dtype)
    return ddout, None, None, None, dpermuted, dprobs, None, None


_op = register_op(
    "npu_moe_token_unpermute_with_routing_map_grad(Tensor unpermuted_tokens_grad, Tensor out_index,"
    " Tensor permuted_token_id, Tensor? routing_map, Tensor? permuted_tokens, Tensor? probs, bool drop_and_pad,"
    " SymInt[] restore_shape) -> (Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("unpermuted_tokens_grad", "permuted_tokens", "probs"),
)


@typed
def npu_moe_token_unpermute_with_routing_map_grad(
    unpermuted_tokens_grad: torch.Tensor,
    out_index: torch.Tensor,
    permuted_token_id: torch.Tensor,
    routing_map: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    probs: torch.Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of :func:`npu_moe_token_unpermute_with_routing_map` for its ``permuted_tokens`` and ``probs``.

    Args:
        unpermuted_tokens_grad: ``[T, H]``, gradient of the result, float16, bfloat16 or float32 (on CPU also float64).
        out_index: int32 ``[R]``: with ``drop_and_pad`` as :func:`_npu_moe_token_unpermute_with_routing_map` returns
            it; without, the ``sorted_indices`` of the forward call.
        permuted_token_id: likewise, without ``drop_and_pad`` the ``sorted_indices`` again.
        routing_map: as in the forward call.
        permuted_tokens: ``[R, H]`` as in the forward call; required with ``probs``, without them not looked at.
        probs: as in the forward call.
        drop_and_pad: as in the forward call.
        restore_shape: ``[T, H]``.

    Returns:
        ``(grad_permuted_tokens, grad_probs)``: ``[R, H]``; and ``[T, E]``, zero outside the pairs, or None without
        ``probs``. Both have the dtype of ``unpermuted_tokens_grad``, whatever that of ``probs``. Differentiable with
        respect to all float arguments.

    Raises:
        OperatorError: as :func:`npu_moe_token_unpermute_with_routing_map`, or ``probs`` without ``permuted_tokens``.

    Example:
        >>> grad, order = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 2, 1, 3]).int()
        >>> npu_moe_token_unpermute_with_routing_map_grad(grad, order, order, None, None, None, False, [2, 1])
        (tensor([[1.],
                [2.],
                [1.],
                [2.]]), None)
    """
    if probs is None:
        permuted_tokens = None  # no value of it has an effect
    arguments = (
        unpermuted_tokens_grad,
        out_index,
        permuted_token_id,
        routing_map,
        permuted_tokens,
        probs,
        drop_and_pad,
        restore_shape,
    )
    _check(*arguments)
    dpermuted, dprobs = _op(*arguments)
    return dpermuted, None if probs is None else dprobs
