"""SwiGLU with clipped operands: the variant of gpt-oss.

    a = min(a, limit),   b = clamp(b, -limit, limit)
    y = a * s * (b + bias)                                      with s = 1 / (1 + exp(-alpha * a))
    da = dy * (b + bias) * s * (1 + alpha * a * (1 - s))        zero where a was clipped
    db = dy * a * s                                             zero where b was clipped

a and b are the even and odd elements of a row, or its halves; a row is everything from ``dim`` on. All arithmetic is
float32 (float64 for float64) with one rounding at the end. Spec: grouped matmul 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_npu.ops._errors import reject, require_device, require_dim, require_dtype
from moe_npu.ops._groups import COUNTS, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check(x: torch.Tensor, group_index: torch.Tensor | None, dim: int) -> None:
    op = "npu_clipped_swiglu"
    require_device(op, "group_index", group_index, x)
    require_dtype(op, "x", x, _FLOATS)
    if x.dim() < 2:
        reject(f"{op}: x dim should larger than 1, but x has shape {tuple(x.shape)}")
    if not -x.dim() <= dim < x.dim():
        reject(f"{op}: dim {dim} is out of range for x of {x.dim()} dimensions")
    if x.size(dim) % 2 != 0:
        reject(f"{op}: x must have an even size along dim {dim}, but has shape {tuple(x.shape)}")
    if group_index is not None:
        require_dtype(op, "group_index", group_index, (torch.int64,))
        require_dim(op, "group_index", group_index, (1,))


def gated(a: torch.Tensor, b: torch.Tensor, alpha: float, limit: float, bias: float) -> torch.Tensor:
    """The formula, on operands in the dtype of the arithmetic."""
    a = a.clamp(max=limit)
    return a * torch.sigmoid(alpha * a) * (b.clamp(-limit, limit) + bias)


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``[rows, length]``: the axes before ``dim``, and the others."""
    dim %= x.dim()
    return x.reshape(math.prod(x.shape[:dim]), math.prod(x.shape[dim:]))


def operands(rows: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands of the last axis: its even and odd elements, or its halves."""
    if interleaved:
        return rows[..., ::2], rows[..., 1::2]
    a, b = rows.chunk(2, -1)
    return a, b


def _num_covered(group_index: torch.Tensor | None, num_rows: int) -> int:
    if group_index is None:
        return num_rows
    total = int(group_index.sum())
    # the counts alone: they may go past the rows
    row_groups("npu_clipped_swiglu", group_index, COUNTS, max(total, num_rows), "group_index")
    return min(total, num_rows)


def _cpu(
    x: torch.Tensor,
    group_index: torch.Tensor | None,
    dim: int,
    alpha: float,
    limit: float,
    bias: float,
    interleaved: bool,
) -> torch.Tensor:
    rows = _rows(x, dim)
    num_covered = _num_covered(group_index, rows.size(0))
    y = x.new_zeros(_result_shape(x, dim))
    a, b = operands(rows[:num_covered].to(torch.promote_types(x.dtype, torch.float32)), interleaved)
    _rows(y, dim)[:num_covered] = gated(a, b, alpha, limit, bias)
    return y


def _npu(
    x: torch.Tensor,
    group_index: torch.Tensor | None,
    dim: int,
    alpha: float,
    limit: float,
    bias: float,
    interleaved: bool,
) -> torch.Tensor:
    if x.numel() == 0:
        return x.new_empty(_result_shape(x, dim))
    return torch.ops.npu.npu_clipped_swiglu(
        x.contiguous(),
        group_index=group_index,
        dim=dim,
        alpha=alpha,
        limit=limit,
        bias=bias,
        interleaved=interleaved,
    )


def _result_shape(x: torch.Tensor, dim: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] //= 2
    return shape


def _fake(
    x: torch.Tensor,
    group_index: torch.Tensor | None,
    dim: int,
    alpha: float,
    limit: float,
    bias: float,
    interleaved: bool,
) -> torch.Tensor:
    return x.new_empty(_result_shape(x, dim))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, group_index, ctx.dim, ctx.alpha, ctx.limit, ctx.bias, ctx.interleaved = inputs
    ctx.save_for_backward(x, group_index)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, group_index = ctx.saved_tensors
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    rows, dy = _rows(x, ctx.dim).to(compute_dtype), _rows(dy, ctx.dim).to(compute_dtype)
    if group_index is not None:
        # beyond the groups x and dy may be anything, and the device leaves y unwritten
        outside = (torch.arange(rows.size(0), device=x.device) >= group_index.sum()).unsqueeze(-1)
        rows, dy = rows.masked_fill(outside, 0.0), dy.masked_fill(outside, 0.0)
    a, b = operands(rows, ctx.interleaved)
    is_a_kept, is_b_kept = a <= ctx.limit, (b >= -ctx.limit) & (b <= ctx.limit)
    a, b = a.clamp(max=ctx.limit), b.clamp(-ctx.limit, ctx.limit)
    sigmoid = torch.sigmoid(ctx.alpha * a)
    da = torch.where(is_a_kept, dy * (b + ctx.bias) * (sigmoid + ctx.alpha * a * sigmoid * (1 - sigmoid)), 0.0)
    db = torch.where(is_b_kept, dy * a * sigmoid, 0.0)
    dx = torch.stack((da, db), -1) if ctx.interleaved else torch.cat((da, db), -1)
    return dx.reshape(x.shape).to(x.dtype), None, None, None, None, None, None


_op = register_op(
    "npu_clipped_swiglu(Tensor x, Tensor? group_index, int dim, float alpha, float limit, float bias, bool interleaved)"
    " -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x",),
)


@typed
def npu_clipped_swiglu(
    x: torch.Tensor,
    *,
    group_index: torch.Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> torch.Tensor:
    """``a * sigmoid(alpha * a) * (b + bias)`` with ``a = min(a, limit)`` and ``b`` clamped to ``-limit..limit``.

    Args:
        x: at least two dimensions, even size along ``dim``; float16, bfloat16 or float32 (on CPU also float64).
        group_index: ``[G]`` int64 counts. Only the first ``sum(group_index)`` rows are computed, where a row is one
            index into the axes before ``dim``. The others are zero, on NPU undefined; their gradient is zero.
        dim: the dimension that is halved. It is merged with all that follow before it is split.
        alpha: factor in the sigmoid.
        limit: bound of a from above and of b from both sides. Nothing flows back through a value that was clipped.
        bias: added to b.
        interleaved: a is elements 0, 2, 4, ... and b elements 1, 3, 5, ...; else they are the halves.

    Returns:
        The dtype of ``x``, its shape with ``dim`` halved, contiguous. Twice differentiable.

    Raises:
        OperatorError: wrong dtype or rank, ``dim`` out of range, an odd size along it; on CPU also negative counts.

    Example:
        >>> npu_clipped_swiglu(torch.tensor([[1.0, 2.0, 8.0, -9.0, -1.0, 0.5]]))
        tensor([[  2.5374, -41.9997,  -0.2313]])
    """
    _check(x, group_index, dim)
    return _op(x, group_index, dim, alpha, limit, bias, interleaved)
