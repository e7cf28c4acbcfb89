"""Router gating by softmax over the experts and the k best of them; two forms.

    npu_moe_gating_top_k_softmax      y, ids = top_k(softmax(x));  row_idx[row, j] = j * rows + row
    npu_moe_gating_top_k_softmax_v2   renorm 0: y, ids = top_k(softmax(x)), and softmax(x) itself on demand
                                      renorm 1: v, ids = top_k(x), y = softmax(v), which sums to one

The softmax is float32 (float64 for float64) with one rounding to the dtype of x at the end; top_k is a stable
descending sort, so that ties go to the lower expert. The first form rounds float16 probabilities before it sorts them.
Rows that are ``finished`` get E, one past the last expert, for ids. Spec: routing 1.1 and 1.2.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import reject, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops._top_k import stable_top_k

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_Gated = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check(op: str, x: torch.Tensor, finished: torch.Tensor | None, k: int) -> None:
    require_device(op, "finished", finished, x)
    require_dim(op, "x", x, (2, 3))
    require_dtype(op, "x", x, _FLOATS)
    if not 0 <= k <= x.size(-1):
        reject(f"{op}: k must be between 0 and the number of experts {x.size(-1)}, but is {k}")
    if finished is not None:
        require_dtype(op, "finished", finished, (torch.bool,))
        if finished.shape != x.shape[:-1]:
            reject(
                f"{op}: finished must have the leading shape of x {tuple(x.shape[:-1])}, "
                f"but has {tuple(finished.shape)}"
            )


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))


def _top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = stable_top_k(scores, k)
    return values, ids.to(torch.int32, memory_format=torch.contiguous_format)


def _packed(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # not contiguous(), which keeps the strides of the slice where there are no rows or just one
    return y.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _mark_finished(expert_idx: torch.Tensor, finished: torch.Tensor | None, num_experts: int) -> None:
    if finished is not None:
        expert_idx.masked_fill_(finished.unsqueeze(-1), num_experts)


# ---------------------------------------------------------------- npu_moe_gating_top_k_softmax


def _row_idx(x: torch.Tensor, k: int) -> torch.Tensor:
    """``row_idx[row, j] = j * rows + row``: the column-major index of each (token, slot) pair."""
    leading = x.shape[:-1]
    rows = leading.numel()
    index = torch.arange(rows * k, dtype=torch.int32, device=x.device).view(k, rows)
    return index.t().clone(memory_format=torch.contiguous_format).view(*leading, k)


def _cpu(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> _Gated:
    probabilities = _softmax(x)
    if x.dtype == torch.float16:
        # values that collide in float16 are ties there, decided for the lower expert
        probabilities = probabilities.to(x.dtype)
    y, expert_idx = _top_k(probabilities, k)
    _mark_finished(expert_idx, finished, x.size(-1))
    return _packed(y, x.dtype), expert_idx, _row_idx(x, k)


def _npu(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> _Gated:
    return torch.ops.npu.npu_moe_gating_top_k_softmax(x, finished, k)


def _fake(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> _Gated:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gated) -> None:
    x, finished, ctx.k = inputs
    # finished rows do not tell which experts their weights belong to
    ctx.save_for_backward(x, output[1] if finished is None else None)
    ctx.mark_non_differentiable(output[1], output[2])


def _softmax_gradient(probabilities: torch.Tensor, dp: torch.Tensor) -> torch.Tensor:
    return probabilities * (dp - (dp * probabilities).sum(-1, keepdim=True))


def _backward(ctx: Any, dy: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    x, expert_idx = ctx.saved_tensors
    if expert_idx is None:
        expert_idx = _op(x.detach(), None, ctx.k)[1]
    probabilities = _softmax(x)
    dp = torch.zeros_like(probabilities).scatter(-1, expert_idx.long(), dy.to(probabilities.dtype))
    return _softmax_gradient(probabilities, dp).to(x.dtype), None, None


# ---------------------------------------------------------------- npu_moe_gating_top_k_softmax_v2


def _v2_cpu(x: torch.Tensor, k: int, finished: torch.Tensor | None, renorm: int, output_softmax: bool) -> _Gated:
    if renorm == 1:
        logits, expert_idx = _top_k(x, k)
        y, softmax_result = _softmax(logits), _no_softmax(x)
    else:
        probabilities = _softmax(x)
        y, expert_idx = _top_k(probabilities, k)
        softmax_result = probabilities.contiguous() if output_softmax else _no_softmax(x)
    _mark_finished(expert_idx, finished, x.size(-1))
    return _packed(y, x.dtype), expert_idx, softmax_result


def _no_softmax(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _v2_npu(x: torch.Tensor, k: int, finished: torch.Tensor | None, renorm: int, output_softmax: bool) -> _Gated:
    def call(x: torch.Tensor, finished: torch.Tensor | None) -> _Gated:
        return torch.ops.npu.npu_moe_gating_top_k_softmax_v2(
            x, k=k, finished=finished, renorm=renorm, output_softmax=output_softmax
        )

    if renorm == 1 or not output_softmax:
        return call(x, finished)
    if k == 0:  # torch_npu launches nothing then, and leaves the softmax unwritten
        y, expert_idx, _ = call(x, finished)
        return y, expert_idx, _softmax(x).contiguous()
    if x.dim() == 2:
        return call(x, finished)
    # the shape function loses the last dimension of a three-dimensional softmax
    y, expert_idx, softmax_result = call(x.flatten(0, 1), None if finished is None else finished.flatten())
    shape = (*x.shape[:-1], k)
    return y.view(shape), expert_idx.view(shape), softmax_result.view(x.shape)


def _v2_fake(x: torch.Tensor, k: int, finished: torch.Tensor | None, renorm: int, output_softmax: bool) -> _Gated:
    shape = (*x.shape[:-1], k)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    softmax_result = x.new_empty(x.shape if renorm == 0 and output_softmax else (0,), dtype=compute_dtype)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), softmax_result


def _v2_setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gated) -> None:
    x, ctx.k, finished, ctx.renorm, output_softmax = inputs
    ctx.save_for_backward(x, output[1] if finished is None else None)
    ctx.has_softmax = ctx.renorm == 0 and output_softmax
    ctx.mark_non_differentiable(output[1], *(() if ctx.has_softmax else output[2:]))
    ctx.set_materialize_grads(False)  # zeros for results without a gradient would be launches on a device


def _v2_backward(
    ctx: Any, dy: torch.Tensor | None, _: torch.Tensor | None, dsoftmax: torch.Tensor | None
) -> tuple[Any, ...]:
    x, expert_idx = ctx.saved_tensors
    if dy is None and dsoftmax is None:
        return None, None, None, None, None
    if dy is None:
        dy = x.new_zeros(*x.shape[:-1], ctx.k)
    if expert_idx is None:
        expert_idx = _v2_op(x.detach(), ctx.k, None, ctx.renorm, False)[1]
    chosen = expert_idx.long()
    if ctx.renorm == 1:
        y = _softmax(x.gather(-1, chosen))
        dlogits = torch._softmax_backward_data(dy.to(y.dtype), y, -1, y.dtype)
        dx = torch.zeros_like(x).scatter(-1, chosen, dlogits.to(x.dtype))
    else:
        probabilities = _softmax(x)
        dp = torch.zeros_like(probabilities).scatter(-1, chosen, dy.to(probabilities.dtype))
        dx = torch._softmax_backward_data(
            dp if dsoftmax is None else dp + dsoftmax, probabilities, -1, probabilities.dtype
        )
    return dx.to(x.dtype), None, None, None, None


_op = register_op(
    "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished, int k) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x",),
)
_v2_op = register_op(
    "npu_moe_gating_top_k_softmax_v2(Tensor x, int k, Tensor? finished, int renorm, bool output_softmax) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=_v2_cpu,
    npu=_v2_npu,
    fake=_v2_fake,
    setup_context=_v2_setup_context,
    backward=_v2_backward,
    differentiable=("x",),
)


@typed
def npu_moe_gating_top_k_softmax(x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1) -> _Gated:
    """The k most probable experts of each row and their probabilities, which do not sum to one.

    Args:
        x: router logits ``[T, E]`` or ``[B, T, E]``, float16, bfloat16 or float32 (on CPU also float64). The softmax
            is computed in float32.
        finished: bool, the leading shape of x. The experts of a finished row are all ``E``, one past the last; its
            weights are unchanged.
        k: experts per row, ``0 <= k <= E``.

    Returns:
        ``(y, expert_idx, row_idx)``, each ``[..., k]``: the probabilities in descending order, dtype of x,
        differentiable; the experts, int32, ties to the lower one; and ``row_idx[row, j] = j * rows + row``, int32.

    Raises:
        OperatorError: wrong rank or dtype, k out of range, or ``finished`` that does not fit.

    Example:
        >>> y, expert_idx, row_idx = npu_moe_gating_top_k_softmax(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), k=2)
        >>> y, expert_idx, row_idx
        (tensor([[0.4576, 0.4576]]), tensor([[1, 2]], dtype=torch.int32), tensor([[0, 1]], dtype=torch.int32))
    """
    _check("npu_moe_gating_top_k_softmax", x, finished, k)
    return _op(x, finished, k)


@typed
def npu_moe_gating_top_k_softmax_v2(
    x: torch.Tensor,
    *,
    k: int = 1,
    finished: torch.Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> _Gated:
    """The k best experts of each row, with probabilities among all experts or among the k.

    Args:
        x: router logits ``[T, E]`` or ``[B, T, E]``, float16, bfloat16 or float32 (on CPU also float64).
        k: experts per row, ``0 <= k <= E``.
        finished: bool, the leading shape of x. The experts of a finished row are all ``E``, one past the last; its
            weights are unchanged.
        renorm: 0 (or None): softmax over all experts, then the k best. 1: the k best logits, then softmax over
            these, so that the weights of a row sum to one.
        output_softmax: whether to return the softmax over all experts; without effect where ``renorm`` is 1. None is
            False.

    Returns:
        ``(y, expert_idx, softmax_result)``: the weights ``[..., k]`` in descending order, dtype of x; the experts
        ``[..., k]``, int32, ties to the lower one; the softmax, float32 for every dtype of x and of its shape, or an
        empty tensor of shape ``(0,)``. Weights and softmax are differentiable.

    Raises:
        OperatorError: wrong rank or dtype, k or renorm out of range, or ``finished`` that does not fit.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
        >>> npu_moe_gating_top_k_softmax_v2(x, k=2, renorm=1)
        (tensor([[0.5000, 0.5000]]), tensor([[1, 2]], dtype=torch.int32), tensor([]))
    """
    op = "npu_moe_gating_top_k_softmax_v2"
    _check(op, x, finished, k)
    renorm = 0 if renorm is None else renorm
    if renorm not in (0, 1):
        reject(f"{op}: renorm must be 0 or 1, but is {renorm}")
    return _v2_op(x, k, finished, renorm, bool(output_softmax))
