"""SwiGLU: the first half of a tensor, activated, times the second half.

    a, b = input.chunk(2, dim)
    y = silu(a) * b                                             with silu(a) = a * s, s = 1 / (1 + exp(-a))
    da = dy * b * s * (1 + a * (1 - s)),   db = dy * a * s

All arithmetic is float32 (float64 for float64) with one rounding at the end. Spec: grouped matmul 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moe_npu.ops._errors import reject, require, require_device, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check(op: str, input: torch.Tensor, dim: int) -> None:
    require_dtype(op, "input", input, _FLOATS)
    require(1 <= input.dim() <= 8, f"{op}: input must have 1 to 8 dimensions, but has shape {tuple(input.shape)}")
    if not -input.dim() <= dim < input.dim():
        reject(f"{op}: dim {dim} is out of range for input of {input.dim()} dimensions")
    if input.size(dim) % 2 != 0:
        reject(
            f"{op}: input must have an even size along dim {dim} to be split in halves, "
            f"but has shape {tuple(input.shape)}"
        )


def _halves(input: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves in the dtype of the arithmetic."""
    compute_dtype = torch.promote_types(input.dtype, torch.float32)
    a, b = input.to(compute_dtype).chunk(2, dim)
    return a, b


def _cpu(input: torch.Tensor, dim: int) -> torch.Tensor:
    a, b = _halves(input, dim)
    return F.silu(a).mul_(b).to(input.dtype).contiguous()


def _npu(input: torch.Tensor, dim: int) -> torch.Tensor:
    if input.numel() == 0:
        return _fake(input, dim)
    return torch.ops.npu.npu_swiglu(input, dim)


def _fake(input: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(input.shape)
    shape[dim] = shape[dim] // 2
    return input.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, ctx.dim = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
    (input,) = ctx.saved_tensors
    return _backward_op(dy.contiguous(), input, ctx.dim), None


def _backward_cpu(grad_output: torch.Tensor, input: torch.Tensor, dim: int) -> torch.Tensor:
    a, b = _halves(input, dim)
    dy = grad_output.to(a.dtype)
    sigmoid = torch.sigmoid(a)
    silu = a * sigmoid
    # s (1 + a (1 - s)) = s + silu - silu s
    dsilu = sigmoid + silu - silu * sigmoid
    return torch.cat((dy * b * dsilu, dy * silu), dim).to(input.dtype).contiguous()  # cat keeps channels-last strides


def _backward_npu(grad_output: torch.Tensor, input: torch.Tensor, dim: int) -> torch.Tensor:
    if input.numel() == 0:
        return _backward_fake(grad_output, input, dim)
    # contiguous: the shape function of torch_npu repeats the strides of input, the kernel does not
    return torch.ops.npu.npu_swiglu_backward(grad_output.contiguous(), input.contiguous(), dim)


def _backward_fake(grad_output: torch.Tensor, input: torch.Tensor, dim: int) -> torch.Tensor:
    return input.new_empty(input.shape)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad_output, input, ctx.dim = inputs
    ctx.save_for_backward(grad_output, input)


def _backward_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    grad_output, input = ctx.saved_tensors
    a, b = _halves(input, ctx.dim)
    grad_a, grad_b = _halves(grad, ctx.dim)
    dy = grad_output.to(a.dtype)
    sigmoid = torch.sigmoid(a)
    silu = a * sigmoid
    dsilu = sigmoid + silu - silu * sigmoid
    ddsilu = sigmoid * (1 - sigmoid) * (2 + a * (1 - 2 * sigmoid))
    ddy = grad_a * b * dsilu + grad_b * silu
    dinput = torch.cat((grad_a * dy * b * ddsilu + grad_b * dy * dsilu, grad_a * dy * dsilu), ctx.dim)
    return ddy.to(grad_output.dtype), dinput.to(input.dtype), None


_op = register_op(
    "npu_swiglu(Tensor input, int dim) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("input",),
)
_backward_op = register_op(
    "npu_swiglu_backward(Tensor grad_output, Tensor input, int dim) -> Tensor",
    cpu=_backward_cpu,
    npu=_backward_npu,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    differentiable=("grad_output", "input"),
)


@typed
def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``silu(a) * b`` of the two halves ``a, b`` of ``input`` along ``dim``; the first half is activated.

    Args:
        input: 1 to 8 dimensions, even size along ``dim``; float16, bfloat16 or float32 (on CPU also float64).
        dim: the dimension that is halved.

    Returns:
        The dtype of ``input``, its shape with ``dim`` halved, contiguous. Twice differentiable.

    Raises:
        OperatorError: wrong dtype or rank, ``dim`` out of range, or an odd size along it.

    Example:
        >>> npu_swiglu(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([2.1932, 7.0464])
    """
    _check("npu_swiglu", input, dim)
    return _op(input, dim)


@typed
def npu_swiglu_backward(grad_output: torch.Tensor, input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The gradient of :func:`npu_swiglu` with respect to its ``input``.

    Args:
        grad_output: gradient of the result: the dtype of ``input``, its shape with ``dim`` halved.
        input: the argument of the forward call.
        dim: the dimension that was halved.

    Returns:
        Dtype and shape of ``input``, contiguous.

    Raises:
        OperatorError: as :func:`npu_swiglu`, or ``grad_output`` does not fit ``input``.

    Example:
        >>> npu_swiglu_backward(torch.ones(1), torch.tensor([1.0, 3.0]))
        tensor([2.7830, 0.7311])
    """
    op = "npu_swiglu_backward"
    require_device(op, "grad_output", grad_output, input)
    _check(op, input, dim)
    expected = list(input.shape)
    expected[dim] //= 2
    require(
        grad_output.dtype == input.dtype and list(grad_output.shape) == expected,
        f"{op}: grad_output must be {input.dtype} of shape {tuple(expected)}, "
        f"but is {grad_output.dtype} of shape {tuple(grad_output.shape)}",
    )
    return _backward_op(grad_output, input, dim)
