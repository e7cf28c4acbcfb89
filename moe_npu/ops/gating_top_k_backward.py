"""The gradient of gating by groups of experts, from the scores that the forward call returns.

    w = s[ids],  D = sum of w + eps,  g = routed_scaling_factor * dy
    G = scatter of (g - sum of w g / D) / D to the chosen experts, of g where w is not normalized
    dx = s (G - sum of s G),   s (1 - s) G   or   (1 - exp(-s^2)) / (2 s) G                   norm_type 0, 1, 2

All arithmetic is float32 (float64 for float64) with one rounding to the dtype of dy at the end. The gradient of the
forward operator is the same formula, with s computed again from x. Spec: routing 1.4.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import reject, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 0, 1, 2
_TINY = 1e-8  # below, 1 - exp(-s^2) is s^2 to the last bit


def check_choices(op: str, renorm: int, norm_type: int) -> None:
    """Raise unless both are numbers that mean something."""
    if renorm not in (0, 1):
        reject(f"{op}: renorm must be 0 or 1, but is {renorm}")
    if norm_type not in (SOFTMAX, SIGMOID, SQRT_SOFTPLUS):
        reject(f"{op}: norm_type must be 0, 1 or 2, but is {norm_type}")


def is_normalized(norm_type: int, renorm: int) -> bool:
    """Whether weights are divided by their sum: softmax probabilities only if asked for, the other scores always."""
    return norm_type != SOFTMAX or renorm == 1


def check_range(op: str, argument: str, index: torch.Tensor, size: int) -> None:
    """Raise unless every element is in ``0..size - 1``. Reads values: CPU kernels only."""
    low, high = (int(bound) for bound in index.aminmax()) if index.numel() else (0, -1)
    if low < 0 or high >= size:
        reject(f"{op}: {argument} must be between 0 and {size - 1}, but is {low} to {high}")


def _check(x_norm: torch.Tensor, grad_y: torch.Tensor, expert_idx: torch.Tensor, renorm: int, norm_type: int) -> None:
    op = "npu_moe_gating_top_k_backward"
    require_device(op, "grad_y", grad_y, x_norm)
    require_device(op, "expertIdx", expert_idx, x_norm)
    require_dim(op, "x_norm", x_norm, (2,))
    require_dtype(op, "x_norm", x_norm, (torch.float32,))
    require_dim(op, "grad_y", grad_y, (2,))
    require_dtype(op, "grad_y", grad_y, _FLOATS)
    require_dtype(op, "expertIdx", expert_idx, (torch.int32,))
    if grad_y.size(0) != x_norm.size(0):
        reject(f"{op}: grad_y must have the {x_norm.size(0)} rows of x_norm, but has {grad_y.size(0)}")
    if expert_idx.shape != grad_y.shape:
        reject(
            f"{op}: expertIdx must have the shape of grad_y {tuple(grad_y.shape)}, but has {tuple(expert_idx.shape)}"
        )
    check_choices(op, renorm, norm_type)


def _slope(scores: torch.Tensor, norm_type: int) -> torch.Tensor:
    """ds/dx of an elementwise score, from the score."""
    if norm_type == SIGMOID:
        return scores * (1 - scores)
    # s^2 = log(1 + exp(x)), so that sigmoid(x) = 1 - exp(-s^2)
    safe = scores.clamp_min(_TINY)
    return torch.where(scores < _TINY, scores / 2, -torch.expm1(-safe * safe) / (2 * safe))


def _slope_slope(scores: torch.Tensor, norm_type: int) -> torch.Tensor:
    """The derivative of ``_slope`` with respect to the score."""
    if norm_type == SIGMOID:
        return 1 - 2 * scores
    safe = scores.clamp_min(_TINY)
    square = safe * safe
    return torch.where(scores < _TINY, 0.5, torch.exp(-square) + torch.expm1(-square) / (2 * square))


def gradient(
    scores: torch.Tensor,
    dy: torch.Tensor,
    expert_idx: torch.Tensor,
    renorm: int,
    norm_type: int,
    routed_scaling_factor: float,
    eps: float,
) -> torch.Tensor:
    """Gradient of the logits from the scores of all experts, in the dtype of the arithmetic; differentiable."""
    index = expert_idx.long()
    scores = scores.to(torch.promote_types(scores.dtype, dy.dtype))
    dw = dy.to(scores.dtype) * routed_scaling_factor
    if is_normalized(norm_type, renorm):
        chosen = scores.gather(1, index)
        total = chosen.sum(1, keepdim=True) + eps
        dw = (dw - (chosen / total * dw).sum(1, keepdim=True)) / total
    # add: a table of experts may name one twice
    ds = torch.zeros_like(scores).scatter_add(1, index, dw)
    if norm_type == SOFTMAX:
        return scores * (ds - (scores * ds).sum(1, keepdim=True))
    return _slope(scores, norm_type) * ds


def _cpu(
    x_norm: torch.Tensor,
    grad_y: torch.Tensor,
    expert_idx: torch.Tensor,
    renorm: int,
    norm_type: int,
    routed_scaling_factor: float,
    eps: float,
) -> torch.Tensor:
    check_range("npu_moe_gating_top_k_backward", "expertIdx", expert_idx, x_norm.size(1))
    dx = gradient(x_norm, grad_y, expert_idx, renorm, norm_type, routed_scaling_factor, eps)
    return dx.to(grad_y.dtype).contiguous()


def _npu(
    x_norm: torch.Tensor,
    grad_y: torch.Tensor,
    expert_idx: torch.Tensor,
    renorm: int,
    norm_type: int,
    routed_scaling_factor: float,
    eps: float,
) -> torch.Tensor:
    if norm_type != SIGMOID:  # the kernel knows no other
        dx = gradient(x_norm, grad_y, expert_idx, renorm, norm_type, routed_scaling_factor, eps)
        return dx.to(grad_y.dtype).contiguous()
    return torch.ops.npu.npu_moe_gating_top_k_backward(
        x_norm,
        grad_y,
        expert_idx,
        renorm=0,  # reserved
        norm_type=norm_type,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )


def _fake(x_norm: torch.Tensor, grad_y: torch.Tensor, *_: Any) -> torch.Tensor:
    return grad_y.new_empty(x_norm.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x_norm, grad_y, expert_idx, *ctx.options = inputs
    ctx.save_for_backward(x_norm, grad_y, expert_idx)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x_norm, grad_y, expert_idx = ctx.saved_tensors
    renorm, norm_type, routed_scaling_factor, eps = ctx.options
    index = expert_idx.long()
    scores = x_norm.to(torch.promote_types(x_norm.dtype, grad_y.dtype))
    grad = grad.to(scores.dtype)
    dw = grad_y.to(scores.dtype) * routed_scaling_factor
    normalized = is_normalized(norm_type, renorm)
    chosen = scores.gather(1, index)
    total = chosen.sum(1, keepdim=True) + eps
    if normalized:
        dw = (dw - (chosen / total * dw).sum(1, keepdim=True)) / total
    ds = torch.zeros_like(scores).scatter_add(1, index, dw)

    # dx = J(s) ds with a symmetric J: through J, and back through it to ds
    if norm_type == SOFTMAX:
        along = (scores * grad).sum(1, keepdim=True)
        dscores = grad * (ds - (scores * ds).sum(1, keepdim=True)) - along * ds
        dds = scores * (grad - along)
    else:
        dscores = grad * ds * _slope_slope(scores, norm_type)
        dds = grad * _slope(scores, norm_type)

    ddw = dds.gather(1, index)
    if normalized:
        ddw_sum = ddw.sum(1, keepdim=True)
        dchosen = -(dw * ddw_sum + (dw * ddw).sum(1, keepdim=True)) / total
        dscores = dscores.scatter_add(1, index, dchosen)
        ddw = (ddw - chosen / total * ddw_sum) / total
    dgrad_y = (ddw * routed_scaling_factor).to(grad_y.dtype)
    return dscores.to(x_norm.dtype), dgrad_y, None, None, None, None, None


_op = register_op(
    "npu_moe_gating_top_k_backward(Tensor x_norm, Tensor grad_y, Tensor expertIdx, int renorm, int norm_type, "
    "float routed_scaling_factor, float eps) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x_norm", "grad_y"),
    is_lowered=False,
)


@typed
def npu_moe_gating_top_k_backward(
    x_norm: torch.Tensor,
    grad_y: torch.Tensor,
    expertIdx: torch.Tensor,  # noqa: N803 - torch_npu's name
    *,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> torch.Tensor:
    """The gradient of :func:`npu_moe_gating_top_k` with respect to x.

    Args:
        x_norm: ``[T, E]`` float32 (on CPU also float64): ``norm_out`` of the forward call, which needs
            ``out_flag=True`` there.
        grad_y: ``[T, k]``, float16, bfloat16 or float32 (on CPU also float64): gradient of ``y``.
        expertIdx: ``[T, k]`` int32: ``expert_idx`` of the forward call.
        renorm: as in the forward call.
        norm_type: as in the forward call.
        routed_scaling_factor: as in the forward call.
        eps: as in the forward call.

    Returns:
        ``[T, E]``, dtype of ``grad_y``. Differentiable.

    Raises:
        OperatorError: wrong rank, dtype or size, or an option out of range; on CPU also an expert out of range.

    Example:
        >>> x_norm = torch.tensor([[0.5, 0.25, 0.75]])
        >>> npu_moe_gating_top_k_backward(
        ...     x_norm, torch.tensor([[1.0, 0.0]]), torch.tensor([[2, 1]], dtype=torch.int32), norm_type=1
        ... )
        tensor([[ 0.0000, -0.1406,  0.0469]])
    """
    _check(x_norm, grad_y, expertIdx, renorm, norm_type)
    return _op(x_norm, grad_y, expertIdx, renorm, norm_type, routed_scaling_factor, eps)
