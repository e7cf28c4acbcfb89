"""Router gating: softmax over the experts, then the k best (spec: routing 1.1)."""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_Gated = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> None:
    op = "npu_moe_gating_top_k_softmax"
    require_device(op, "finished", finished, x)
    require_dim(op, "x", x, (2, 3))
    require_dtype(op, "x", x, _FLOATS)
    if not 0 <= k <= x.size(-1):
        reject(f"{op}: k must be between 0 and the number of experts {x.size(-1)}, but is {k}")
    if finished is not None:
        require_dtype(op, "finished", finished, (torch.bool,))
        require(
            finished.shape == x.shape[:-1],
            f"{op}: finished must have the leading shape of x {tuple(x.shape[:-1])}, but has {tuple(finished.shape)}",
        )


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))


def _row_idx(x: torch.Tensor, k: int) -> torch.Tensor:
    """``row_idx[row, j] = j * rows + row``: the column-major index of each (token, slot) pair."""
    leading = x.shape[:-1]
    rows = leading.numel()
    index = torch.arange(rows * k, dtype=torch.int32, device=x.device).view(k, rows)
    return index.t().contiguous().view(*leading, k)


def _cpu(x: torch.Tensor, finished: torch.Tensor | None, k: int) -> _Gated:
    probabilities = _softmax(x)
    if x.dtype == torch.float16:
        # values that collide in float16 are ties there, decided for the lower expert
        probabilities = probabilities.to(x.dtype)
    # torch.topk does not order ties: only a stable sort gives the lowest expert first
    y, expert_idx = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    y, expert_idx = y[..., :k].to(x.dtype).contiguous(), expert_idx[..., :k].to(torch.int32).contiguous()
    if finished is not None:
        expert_idx.masked_fill_(finished.unsqueeze(-1), x.size(-1))
    return y, expert_idx, _row_idx(x, k)


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


def _backward(ctx: Any, dy: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    x, expert_idx = ctx.saved_tensors
    if expert_idx is None:
        expert_idx = _op(x.detach(), None, ctx.k)[1]
    probabilities = _softmax(x)
    dp = torch.zeros_like(probabilities).scatter(-1, expert_idx.long(), dy.to(probabilities.dtype))
    dx = probabilities * (dp - (dp * probabilities).sum(-1, keepdim=True))
    return dx.to(x.dtype), None, None


_op = register_op(
    "npu_moe_gating_top_k_softmax(Tensor x, Tensor? finished, int k) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
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
    _check(x, finished, k)
    return _op(x, finished, k)
