"""Gradients of unpermute, an operator of its own in two forms (spec: routing 3.3).

    dpermuted[row] = probs[t, k] * dout[t]                          with row = sorted_indices[t*K + k], where row < M
    dprobs[t, k] = sum over h of dout[t, h] * permuted[row, h]      also where probs is 0; 0 where row >= M

for M rows, in float32 (float64 for float64), rounded once. The first form takes the tensors of the forward call, the
second (v2) needs those for dprobs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moe_npu.ops._errors import reject, require, require_device
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops.permute import as_float_dtype, check_rows, check_unpermute, pairs

_Gradients = tuple[torch.Tensor, torch.Tensor]


def _check(
    op: str,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
) -> None:
    check_rows(op, "grad_unpermuted_tokens", grad_unpermuted_tokens)
    check_unpermute(op, grad_unpermuted_tokens, sorted_indices, probs, padded_mode)
    num_tokens = sorted_indices.size(0) if probs is None else probs.size(0)
    if grad_unpermuted_tokens.size(0) != num_tokens:
        reject(
            f"{op}: grad_unpermuted_tokens must have one row for each of {num_tokens} tokens, "
            f"but has shape {tuple(grad_unpermuted_tokens.shape)}"
        )


def _gradients(
    op: str,
    dout: torch.Tensor,
    sorted_indices: torch.Tensor,
    num_rows: int,
    dtype: torch.dtype,
    probs: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
) -> _Gradients:
    index = pairs(op, sorted_indices, probs)
    is_present = (index >= 0) & (index < num_rows)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    if probs is not None:
        compute_dtype = torch.promote_types(compute_dtype, probs.dtype)
    dout = dout.to(compute_dtype)
    dpermuted = torch.zeros(num_rows, dout.size(1), dtype=compute_dtype)
    dprobs = torch.zeros(0, 0, dtype=dtype) if probs is None else torch.zeros(probs.shape, dtype=probs.dtype)
    for slot in range(index.size(1)):
        token = is_present[:, slot].nonzero().squeeze(1)
        row = index[token, slot]
        grad = dout.index_select(0, token)
        if probs is not None and permuted_tokens is not None:
            rows = permuted_tokens.index_select(0, row).to(compute_dtype)
            dprobs[token, slot] = (grad * rows).sum(-1).to(probs.dtype)
            grad.mul_(probs[token, slot, None].to(compute_dtype))
        dpermuted.index_add_(0, row, grad)  # callers may point several pairs of weight 0 at one row
    return dpermuted.to(dtype), dprobs


def _unpermute_grad_v2_cpu(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
    permuted_tokens: torch.Tensor | None,
) -> _Gradients:
    op, sizes = "npu_moe_token_unpermute_grad_v2", (permuted_tokens_size_0, permuted_tokens_dtype)
    return _gradients(op, grad_unpermuted_tokens, sorted_indices, *sizes, probs, permuted_tokens)


def _whole(rows: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """``rows`` with a row for every index: the kernel writes those beyond the end too."""
    missing = num_pairs - rows.size(0)
    return F.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows.contiguous()


# Left to the caller on NPU, since nothing but the indices would tell: the kernel assigns where the CPU adds, so with
# gradients every row may have one pair at most, and no index may be negative. A permutation, truncated or not, is fine.
def _unpermute_grad_v2_npu(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
    permuted_tokens: torch.Tensor | None,
) -> _Gradients:
    dout, num_rows, num_pairs = grad_unpermuted_tokens, permuted_tokens_size_0, sorted_indices.size(0)
    if num_pairs == 0 or num_rows == 0:
        return _zeros(dout, num_rows, permuted_tokens_dtype, probs)
    whole = max(num_rows, num_pairs)
    if probs is not None:
        probs = probs.contiguous()  # the shape function of torch_npu repeats its strides
        assert permuted_tokens is not None
        permuted_tokens = _whole(permuted_tokens, num_pairs)
    else:
        # never read, but only CANN 9.1 and later take None
        is_same = dout.size(0) == whole and dout.dtype == permuted_tokens_dtype
        permuted_tokens = dout if is_same else dout.new_empty(whole, dout.size(1), dtype=permuted_tokens_dtype)
    dpermuted, dprobs = torch.ops.npu.npu_moe_token_unpermute_grad_v2(
        dout, sorted_indices, whole, permuted_tokens_dtype, probs, padded_mode, restore_shape, permuted_tokens
    )
    return dpermuted[:num_rows], dout.new_empty(0, 0, dtype=permuted_tokens_dtype) if probs is None else dprobs


def _empty(dout: torch.Tensor, num_rows: int, dtype: torch.dtype, probs: torch.Tensor | None) -> _Gradients:
    dpermuted = dout.new_empty(num_rows, dout.size(1), dtype=dtype)
    return dpermuted, dout.new_empty(0, 0, dtype=dtype) if probs is None else probs.new_empty(probs.shape)


def _zeros(dout: torch.Tensor, num_rows: int, dtype: torch.dtype, probs: torch.Tensor | None) -> _Gradients:
    dpermuted, dprobs = _empty(dout, num_rows, dtype, probs)
    return dpermuted.zero_(), dprobs.zero_()


def _unpermute_grad_v2_fake(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
    permuted_tokens: torch.Tensor | None,
) -> _Gradients:
    return _empty(grad_unpermuted_tokens, permuted_tokens_size_0, permuted_tokens_dtype, probs)


def _save(
    ctx: Any,
    dout: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    permuted_tokens: torch.Tensor | None,
    output: _Gradients,
) -> None:
    ctx.dout_dtype, ctx.num_rows, ctx.dtype = dout.dtype, output[0].size(0), output[0].dtype
    if probs is None:  # linear: the gradient needs the indices alone
        ctx.save_for_backward(sorted_indices)
        ctx.mark_non_differentiable(output[1])
    else:
        ctx.save_for_backward(sorted_indices, dout, probs, permuted_tokens)


def _second_gradients(
    ctx: Any, ddpermuted: torch.Tensor, ddprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """With respect to dout, probs and permuted."""
    unpermute = torch.ops.moe_npu.npu_moe_token_unpermute.default
    sorted_indices, *rest = ctx.saved_tensors
    ddpermuted = ddpermuted.contiguous()
    if not rest:
        return unpermute(ddpermuted, sorted_indices, None, False, None).to(ctx.dout_dtype), None, None
    dout, probs, permuted_tokens = rest
    # dprobs is computed where probs is zero too, so its derivative must not skip those rows: no weight is zero here
    # except where ddprobs is, and there the product is zero. A pair without a row has no dprobs.
    ddprobs = ddprobs.masked_fill(sorted_indices.view(ddprobs.shape) < 0, 0)
    ddout = unpermute(ddpermuted, sorted_indices, probs, False, None)
    ddout = ddout + unpermute(permuted_tokens, sorted_indices, ddprobs, False, None)
    sizes = (ctx.num_rows, ctx.dtype)
    dpermuted = _unpermute_grad_v2_op(dout, sorted_indices, *sizes, ddprobs, False, None, permuted_tokens)[0]
    dprobs = _unpermute_grad_v2_op(dout, sorted_indices, *sizes, probs, False, None, ddpermuted)[1]
    return ddout.to(ctx.dout_dtype), dprobs, dpermuted


def _unpermute_grad_v2_setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
    dout, sorted_indices, _, _, probs, _, _, permuted_tokens = inputs
    _save(ctx, dout, sorted_indices, probs, permuted_tokens, output)


def _unpermute_grad_v2_backward(
    ctx: Any, ddpermuted: torch.Tensor, ddprobs: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    ddout, dprobs, dpermuted = _second_gradients(ctx, ddpermuted, ddprobs)
    return ddout, None, None, None, dprobs, None, None, dpermuted


def _unpermute_grad_cpu(
    permuted_tokens: torch.Tensor,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> _Gradients:
    op, sizes = "npu_moe_token_unpermute_grad", (permuted_tokens.size(0), permuted_tokens.dtype)
    return _gradients(op, grad_unpermuted_tokens, sorted_indices, *sizes, probs, permuted_tokens)


def _unpermute_grad_npu(
    permuted_tokens: torch.Tensor,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> _Gradients:
    num_rows, num_pairs = permuted_tokens.size(0), sorted_indices.size(0)
    if num_pairs == 0 or num_rows == 0:
        return _zeros(grad_unpermuted_tokens, num_rows, permuted_tokens.dtype, probs)
    dpermuted, dprobs = torch.ops.npu.npu_moe_token_unpermute_grad(
        _whole(permuted_tokens, num_pairs),
        grad_unpermuted_tokens,
        sorted_indices,
        None if probs is None else probs.contiguous(),
        padded_mode,
        restore_shape,
    )
    return dpermuted[:num_rows], permuted_tokens.new_empty(0, 0) if probs is None else dprobs


def _unpermute_grad_fake(
    permuted_tokens: torch.Tensor,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> _Gradients:
    return _empty(grad_unpermuted_tokens, permuted_tokens.size(0), permuted_tokens.dtype, probs)


def _unpermute_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gradients) -> None:
    permuted_tokens, dout, sorted_indices, probs, _, _ = inputs
    _save(ctx, dout, sorted_indices, probs, permuted_tokens, output)


def _unpermute_grad_backward(
    ctx: Any, ddpermuted: torch.Tensor, ddprobs: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    ddout, dprobs, dpermuted = _second_gradients(ctx, ddpermuted, ddprobs)
    return dpermuted, ddout, None, dprobs, None, None


_unpermute_grad_op = register_op(
    "npu_moe_token_unpermute_grad(Tensor permuted_tokens, Tensor grad_unpermuted_tokens, Tensor sorted_indices,"
    " Tensor? probs, bool padded_mode, SymInt[]? restore_shape) -> (Tensor, Tensor)",
    cpu=_unpermute_grad_cpu,
    npu=_unpermute_grad_npu,
    fake=_unpermute_grad_fake,
    setup_context=_unpermute_grad_setup_context,
    backward=_unpermute_grad_backward,
    differentiable=("permuted_tokens", "grad_unpermuted_tokens", "probs"),
)
_unpermute_grad_v2_op = register_op(
    "npu_moe_token_unpermute_grad_v2(Tensor grad_unpermuted_tokens, Tensor sorted_indices,"
    " SymInt permuted_tokens_size_0, ScalarType permuted_tokens_dtype, Tensor? probs, bool padded_mode,"
    " SymInt[]? restore_shape, Tensor? permuted_tokens) -> (Tensor, Tensor)",
    cpu=_unpermute_grad_v2_cpu,
    npu=_unpermute_grad_v2_npu,
    fake=_unpermute_grad_v2_fake,
    setup_context=_unpermute_grad_v2_setup_context,
    backward=_unpermute_grad_v2_backward,
    differentiable=("grad_unpermuted_tokens", "probs", "permuted_tokens"),
)


@typed
def npu_moe_token_unpermute_grad(
    permuted_tokens: torch.Tensor,
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of :func:`npu_moe_token_unpermute` with respect to its ``permuted_tokens`` and ``probs``.

    Args:
        permuted_tokens: ``[M, H]``, the argument of the forward call; without ``probs`` only its shape and dtype
            matter.
        grad_unpermuted_tokens: ``[T, H]``, gradient of the result, float16, bfloat16 or float32 (on CPU also float64).
        sorted_indices: int32 ``[T*K]``, the argument of the forward call. On NPU every row may be named once at most.
        probs: ``[T, K]``, the argument of the forward call.
        padded_mode: must be False.
        restore_shape: ignored.

    Returns:
        ``(grad_permuted_tokens, grad_probs)``: shape and dtype of ``permuted_tokens``; and shape and dtype of
        ``probs``, computed also where ``probs`` is 0, or None without ``probs``. Differentiable with respect to all
        float arguments.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``; on CPU also a negative index whose weight is not 0.

    Example:
        >>> rows, sorted_indices = torch.tensor([[10.0], [20.0]]), torch.tensor([1, 0], dtype=torch.int32)
        >>> npu_moe_token_unpermute_grad(rows, torch.ones(1, 1), sorted_indices, torch.tensor([[0.75, 0.25]]))
        (tensor([[0.2500],
                [0.7500]]), tensor([[20., 10.]]))
    """
    op = "npu_moe_token_unpermute_grad"
    check_rows(op, "permuted_tokens", permuted_tokens)
    require_device(op, "grad_unpermuted_tokens", grad_unpermuted_tokens, permuted_tokens)
    _check(op, grad_unpermuted_tokens, sorted_indices, probs, padded_mode)
    if grad_unpermuted_tokens.size(1) != permuted_tokens.size(1):
        reject(
            f"{op}: grad_unpermuted_tokens must have {permuted_tokens.size(1)} columns like permuted_tokens, "
            f"but has shape {tuple(grad_unpermuted_tokens.shape)}"
        )
    if probs is None:
        permuted_tokens = permuted_tokens.detach()  # no value of it has an effect
    dpermuted, dprobs = _unpermute_grad_op(
        permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs, padded_mode, restore_shape
    )
    return dpermuted, None if probs is None else dprobs


@typed
def npu_moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype | int,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
    permuted_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`npu_moe_token_unpermute_grad` that needs ``permuted_tokens`` for the gradient of ``probs`` only.

    Args:
        grad_unpermuted_tokens: ``[T, H]``, gradient of the result, float16, bfloat16 or float32 (on CPU also float64).
        sorted_indices: int32 ``[T*K]``, the argument of the forward call. On NPU every row may be named once at most.
        permuted_tokens_size_0: M.
        permuted_tokens_dtype: dtype of the first result.
        probs: ``[T, K]``, the argument of the forward call.
        padded_mode: must be False.
        restore_shape: ignored.
        permuted_tokens: ``[M, H]``, required with ``probs``, without them not looked at.

    Returns:
        As :func:`npu_moe_token_unpermute_grad`.

    Raises:
        OperatorError: wrong rank, dtype, size or ``padded_mode``, ``probs`` without ``permuted_tokens``; on CPU also a
            negative index whose weight is not 0.

    Example:
        >>> grad, sorted_indices = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0], dtype=torch.int32)
        >>> npu_moe_token_unpermute_grad_v2(grad, sorted_indices, 2, torch.float16)
        (tensor([[2.],
                [1.]], dtype=torch.float16), None)
    """
    op = "npu_moe_token_unpermute_grad_v2"
    dtype = as_float_dtype(op, "permuted_tokens_dtype", permuted_tokens_dtype)
    _check(op, grad_unpermuted_tokens, sorted_indices, probs, padded_mode)
    if permuted_tokens_size_0 < 0:
        reject(f"{op}: permuted_tokens_size_0 must not be negative, but is {permuted_tokens_size_0}")
    if probs is None:
        permuted_tokens = None
    else:
        require(permuted_tokens is not None, f"{op}: permuted_tokens must be given with probs")
        assert permuted_tokens is not None
        require_device(op, "permuted_tokens", permuted_tokens, grad_unpermuted_tokens)
        check_rows(op, "permuted_tokens", permuted_tokens)
        if permuted_tokens.size(0) != permuted_tokens_size_0 or permuted_tokens.size(1) != grad_unpermuted_tokens.size(
            1
        ):
            reject(
                f"{op}: permuted_tokens must have permuted_tokens_size_0 = {permuted_tokens_size_0} rows and the "
                f"columns of grad_unpermuted_tokens, but has shape {tuple(permuted_tokens.shape)}"
            )
    dpermuted, dprobs = _unpermute_grad_v2_op(
        grad_unpermuted_tokens,
        sorted_indices,
        permuted_tokens_size_0,
        dtype,
        probs,
        padded_mode,
        restore_shape,
        permuted_tokens,
    )
    return dpermuted, None if probs is None else dprobs
