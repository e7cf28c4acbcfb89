"""The differentiable core of a MoE layer: one x, one stacked weight, one y, and the gradient of the weight.

    y[r] = x[r] @ weight[g] (+ bias[g])        for the rows r of group g
    dweight[g] = x[rows of g].T @ dy[rows of g]

Operands of less than float32 are accumulated in float32 and rounded once. Both are `npu_grouped_matmul` calls on a
device (spec: grouped matmul 1.8.1, 1.8.2 and 4) and each is the gradient of the other, so any order of derivative
stays within these two operators.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import dtype_name, reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._groups import COUNTS, CUMSUM, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import dense, is_transposed, matmul_into
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check(op: str, x: torch.Tensor, other: torch.Tensor, expert_tokens: torch.Tensor, other_name: str) -> None:
    require_dtype(op, "x", x, _FLOATS)
    require(
        x.dtype == other.dtype,
        f"{op}: x and {other_name} must have one dtype, but are {dtype_name(x.dtype)} and {dtype_name(other.dtype)}",
    )
    require_dim(op, "x", x, (2,))
    require_dim(op, "expert_tokens", expert_tokens, (1,))
    require_dtype(op, "expert_tokens", expert_tokens, (torch.int64,))
    require(expert_tokens.size(0) > 0, f"{op}: expert_tokens must have one entry per expert, but is empty")
    for name, tensor in ((other_name, other), ("expert_tokens", expert_tokens)):
        require(tensor.device == x.device, f"{op}: {name} is on {tensor.device} but x is on {x.device}")


def _list_type(expert_tokens: torch.Tensor) -> int:
    # a device refuses a length-1 list of counts; for one expert the count is the cumulative sum
    return CUMSUM if expert_tokens.size(0) == 1 else COUNTS


def _cpu(x: torch.Tensor, weight: torch.Tensor, expert_tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty(x.size(0), weight.size(2))
    end = 0
    for group, start, end in row_groups("grouped_mm", expert_tokens, COUNTS, x.size(0), "expert_tokens"):
        matmul_into(y[start:end], x[start:end], weight[group], None if bias is None else bias[group])
    y[end:].zero_()
    return y


def _npu(x: torch.Tensor, weight: torch.Tensor, expert_tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.size(0) == 0:
        return x.new_empty(0, weight.size(2))
    if bias is not None and x.dtype == torch.bfloat16:
        bias = bias.float()
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [dense(x)],  # a transposed view is refused
        [weight],
        bias=None if bias is None else [bias],
        group_list=expert_tokens,
        split_item=3,
        group_type=0,
        group_list_type=_list_type(expert_tokens),
    )
    return y


def _fake(
    x: torch.Tensor, weight: torch.Tensor, expert_tokens: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.size(0), weight.size(2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, expert_tokens, bias = inputs
    ctx.save_for_backward(x, weight, expert_tokens)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, expert_tokens = ctx.saved_tensors
    needs_dx, needs_dweight, _, needs_dbias = ctx.needs_input_grad
    dx, dweight, dbias = grouped_mm_gradients(
        x, weight, expert_tokens, dy.contiguous(), needs_dx, needs_dweight, ctx.bias_dtype if needs_dbias else None
    )
    return dx, dweight, None, dbias


def grouped_mm_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_tokens: torch.Tensor,
    dy: torch.Tensor,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, weight and bias that are asked for; the one of bias where ``bias_dtype`` is given.

    ``dy`` must be contiguous: the device kernel does not take the zero strides of an expanded gradient.
    """
    dx = dweight = dbias = None
    if needs_dx:
        dx = _op(dy, weight.mT, expert_tokens, None)
    if needs_dweight:
        if is_transposed(weight):  # the gradient in the layout of the parameter behind the view: no copy later
            dweight = _weight_grad_op(dy, x, expert_tokens).mT
        else:
            dweight = _weight_grad_op(x, dy, expert_tokens)
    if bias_dtype is not None:
        dbias = bias_gradient(dy, expert_tokens, bias_dtype)
    return dx, dweight, dbias


def bias_gradient(dy: torch.Tensor, expert_tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the rows of each expert, ``[E, N]``: a weight gradient with a column of ones for x."""
    ones = dy.new_ones(dy.size(0), 1, dtype=dtype)
    return _weight_grad_op(ones, dy.to(dtype), expert_tokens).squeeze(1)


def _weight_grad_cpu(x: torch.Tensor, dy: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
    # zeroed memory is free for the experts without rows: untouched pages are never mapped
    dweight = x.new_zeros(expert_tokens.size(0), x.size(1), dy.size(1))
    half = x.dtype in (torch.float16, torch.bfloat16)
    for group, start, end in row_groups("grouped_mm_weight_grad", expert_tokens, COUNTS, x.size(0), "expert_tokens"):
        rows, drows = x[start:end].t(), dy[start:end]
        if half:
            dweight[group] = torch.mm(rows.float(), drows.float())
        else:
            torch.mm(rows, drows, out=dweight[group])
    return dweight


def _weight_grad_npu(x: torch.Tensor, dy: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
    if x.size(0) == 0:
        return x.new_zeros(expert_tokens.size(0), x.size(1), dy.size(1))
    (dweight,) = torch.ops.npu.npu_grouped_matmul(
        [dense(x).t()],
        [dense(dy)],
        group_list=expert_tokens,
        split_item=3,
        group_type=2,
        group_list_type=_list_type(expert_tokens),
    )
    return dweight


def _weight_grad_fake(x: torch.Tensor, dy: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
    return x.new_empty(expert_tokens.size(0), x.size(1), dy.size(1))


def _weight_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_grad_backward(ctx: Any, ddweight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, dy, expert_tokens = ctx.saved_tensors
    ddweight = ddweight.contiguous()
    dx = _op(dy, ddweight.mT, expert_tokens, None) if ctx.needs_input_grad[0] else None
    ddy = _op(x, ddweight, expert_tokens, None) if ctx.needs_input_grad[1] else None
    return dx, ddy, None


_op = register_op(
    "grouped_mm(Tensor x, Tensor weight, Tensor expert_tokens, Tensor? bias) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "weight", "bias"),
)
_weight_grad_op = register_op(
    "grouped_mm_weight_grad(Tensor x, Tensor dy, Tensor expert_tokens) -> Tensor",
    cpu=_weight_grad_cpu,
    npu=_weight_grad_npu,
    fake=_weight_grad_fake,
    setup_context=_weight_grad_setup_context,
    backward=_weight_grad_backward,
    differentiable=("x", "dy"),
)


@typed
def grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, expert_tokens: torch.Tensor, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of x, sorted by expert, each multiplied by the weight of its expert.

    Differentiable any number of times with respect to ``x``, ``weight`` and ``bias``.

    Args:
        x: ``[R, K]``, float16, bfloat16 or float32 (on CPU also float64), the rows of expert 0 first.
        weight: ``[E, K, N]``, dtype of x. A transposed view of ``[E, N, K]`` memory is read as it is, never copied,
            and its gradient comes back in the same layout.
        expert_tokens: ``[E]`` int64, number of rows of each expert.
        bias: ``[E, N]``, dtype of x, or float32 for bfloat16 x.

    Returns:
        ``[R, N]``, dtype of x, accumulated in float32. Rows beyond the last group are zero on CPU and *undefined* on
        a device, and so is their gradient: mask them where they can occur.

    Raises:
        OperatorError: shapes, dtypes or devices disagree; on CPU also negative counts or more rows counted than given.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> weight = torch.stack([torch.eye(2), torch.ones(2, 2)])
        >>> grouped_mm(x, weight, torch.tensor([1, 2]))
        tensor([[ 1.,  2.],
                [ 7.,  7.],
                [11., 11.]])
    """
    op = "grouped_mm"
    require_device(op, "bias", bias, x)
    _check(op, x, weight, expert_tokens, "weight")
    require_dim(op, "weight", weight, (3,))
    if weight.size(0) != expert_tokens.size(0):
        reject(f"{op}: weight has {weight.size(0)} experts but expert_tokens has {expert_tokens.size(0)} entries")
    if x.size(1) != weight.size(1):
        reject(
            f"{op}: x has {x.size(1)} columns but each expert's weight has {weight.size(1)} rows (weight is [E, K, N])"
        )
    if bias is not None:
        require(
            bias.dtype == x.dtype or (bias.dtype == torch.float32 and x.dtype == torch.bfloat16),
            f"{op}: bias must have the dtype of x, {dtype_name(x.dtype)}, or be float32 for bfloat16 x, "
            f"but has {dtype_name(bias.dtype)}",
        )
        if bias.shape != (weight.size(0), weight.size(2)):
            reject(f"{op}: bias must have shape {(weight.size(0), weight.size(2))}, but has {tuple(bias.shape)}")
    return _op(x, weight, expert_tokens, bias)


@typed
def grouped_mm_weight_grad(x: torch.Tensor, dy: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
    """Per expert ``x.T @ dy`` over its rows: the weight gradient of :func:`grouped_mm`.

    Args:
        x: ``[R, K]``, float16, bfloat16 or float32 (on CPU also float64), the rows of expert 0 first.
        dy: ``[R, N]``, dtype of x.
        expert_tokens: ``[E]`` int64, number of rows of each expert.

    Returns:
        ``[E, K, N]``, dtype of x; zero for experts without rows. Rows beyond the last group do not contribute.

    Raises:
        OperatorError: shapes, dtypes or devices disagree; on CPU also negative counts or more rows counted than given.

    Example:
        >>> dy = torch.tensor([[1.0], [2.0], [3.0]])
        >>> grouped_mm_weight_grad(torch.ones(3, 1), dy, torch.tensor([1, 2])).flatten()
        tensor([1., 5.])
    """
    op = "grouped_mm_weight_grad"
    _check(op, x, dy, expert_tokens, "dy")
    require_dim(op, "dy", dy, (2,))
    if x.size(0) != dy.size(0):
        reject(f"{op}: x has {x.size(0)} rows but dy has {dy.size(0)}")
    return _weight_grad_op(x, dy, expert_tokens)
