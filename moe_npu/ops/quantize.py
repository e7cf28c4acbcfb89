"""Quantization with given scales, and back again (spec: grouped matmul 2.1, 2.6).

    npu_quantize     y = round(x * (1 / scale) + zero_point)         (div_mode)
                     y = round(x * scale + zero_point)               (not div_mode)
    npu_anti_quant   y = (x + offset) * scale

The first is what torch.quantize_per_channel computes, to the last tie. The spec also has round(x / scale) + zero_point,
which differs from it by one where x / scale is half an odd number and the zero point odd, or next to such a number.
Arithmetic is float32, rounding is half to even, integers saturate, NaN gives 0.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import DTYPE_CODES, as_dtype, dtype_name, reject, require, require_device, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import INT4_PER_WORD, pack_int4, round_to_int, unpack_int4
from moe_npu.ops._signature import typed
from moe_npu.ops.format import FRACTAL_NZ, format_of

# ---------------------------------------------------------------- npu_quantize

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# what is asked for by quantized and by plain dtypes: the dtype and the range of the codes
_DIVIDED = {
    torch.int8: (torch.int8, -128, 127),
    torch.qint8: (torch.int8, -128, 127),
    torch.uint8: (torch.uint8, 0, 255),
    torch.quint8: (torch.uint8, 0, 255),
    torch.int32: (torch.int32, -(2**31), 2**31 - 1),
    torch.qint32: (torch.int32, -(2**31), 2**31 - 1),
}
# int32 means packed int4 here
_MULTIPLIED = {
    torch.int8: (torch.int8, -128, 127),
    torch.qint8: (torch.int8, -128, 127),
    torch.quint4x2: (torch.int32, -8, 7),
    torch.int32: (torch.int32, -8, 7),
}


def _check_quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype | int,
    axis: int,
    div_mode: bool,
) -> torch.dtype:
    """The dtype that is asked for."""
    op = "npu_quantize"
    require_device(op, "scales", scales, input)
    require_device(op, "zero_points", zero_points, input)
    if input.dtype not in _FLOATS:
        reject(f"{op}: input must have dtype float32, float16, bfloat16, but has {dtype_name(input.dtype)}")
    # not as_dtype: any other number is refused in the words of this operator
    wanted = dtype if isinstance(dtype, torch.dtype) else DTYPE_CODES.get(int(dtype))
    if div_mode and wanted not in _DIVIDED:
        reject(f"{op}: Param (dtype) must be Int8, UInt8, Int32, but is {dtype}")
    if not div_mode and wanted not in _MULTIPLIED:
        reject(f"{op}: Param (dtype) must be Int8 or Int4 (quint4x2) with div_mode=False, but is {dtype}")
    assert wanted is not None
    if div_mode:
        _check_divisors(op, input, scales, zero_points, axis)
    else:
        _check_factors(op, input, scales, zero_points, axis)
        if _is_packed(wanted, div_mode) and input.size(-1) % INT4_PER_WORD != 0:
            reject(f"{op}: Input shape last dim must be divded by 8, but is {input.size(-1)}")
    if zero_points is not None and zero_points.shape != scales.shape:
        reject(
            f"{op}: zero_points must have the shape {tuple(scales.shape)} of scales, but has {tuple(zero_points.shape)}"
        )
    return wanted


def _check_divisors(
    op: str, input: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, axis: int
) -> None:
    is_bfloat16 = input.dtype == torch.bfloat16
    allowed = (torch.float32, torch.bfloat16) if is_bfloat16 else (torch.float32,)
    if scales.dtype not in allowed:
        reject(f"{op}: scales must have dtype float32, or that of bfloat16 input, but has {dtype_name(scales.dtype)}")
    if zero_points is not None:
        integers = (torch.int8, torch.uint8, torch.int32)
        require_dtype(op, "zero_points", zero_points, (*integers, torch.bfloat16) if is_bfloat16 else integers)
    if scales.numel() == 1:
        return
    if not -input.dim() <= axis < input.dim():
        reject(f"{op}: axis {axis} is out of range for input of {input.dim()} dimensions")
    if scales.shape != (input.size(axis),):
        reject(
            f"{op}: scales must have 1 element or shape {(input.size(axis),)}, the size of input along axis {axis}, "
            f"but has {tuple(scales.shape)}"
        )


def _check_factors(
    op: str, input: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, axis: int
) -> None:
    if axis < -2:
        reject(f"{op}: axis must be -2 or larger with div_mode=False, but is {axis}")
    if input.dim() < (2 if axis == -2 else 1):
        reject(f"{op}: input has no axis {min(axis, -1)}, its shape is {tuple(input.shape)}")
    # scales of weights in NZ come in float16 too
    is_nz = input.dtype == torch.float32 and format_of(input) == FRACTAL_NZ
    if scales.dtype != input.dtype and not (is_nz and scales.dtype == torch.float16):
        reject(f"{op}: scales must have dtype {dtype_name(input.dtype)} like input, but has {dtype_name(scales.dtype)}")
    if zero_points is not None and zero_points.dtype != scales.dtype:
        reject(
            f"{op}: zero_points must have dtype {dtype_name(scales.dtype)} like scales, "
            f"but has {dtype_name(zero_points.dtype)}"
        )
    axis = _effective_axis(axis)
    size = input.size(axis)
    broadcast = [1] * input.dim()
    broadcast[axis] = size
    if not (
        scales.shape == (1,)
        or scales.shape == (size,)
        or list(scales.shape) == broadcast
        or (scales.dim() == input.dim() and scales.numel() == 1)
    ):
        reject(
            f"{op}: scales must have shape (1,), {(size,)} or {tuple(broadcast)}, with 1 or the size of input along "
            f"axis {axis}, but has {tuple(scales.shape)}"
        )


def _effective_axis(axis: int) -> int:
    """The axis of scales with ``div_mode=False``: all but -2 mean the last."""
    return -2 if axis == -2 else -1


def _is_packed(dtype: torch.dtype, div_mode: bool) -> bool:
    return not div_mode and dtype in (torch.quint4x2, torch.int32)


def _along(parameter: torch.Tensor, input: torch.Tensor, axis: int) -> torch.Tensor:
    """A parameter in the shape that broadcasts along ``axis`` of ``input``."""
    shape = [1] * input.dim()
    if parameter.numel() != 1:
        shape[axis] = parameter.numel()
    return parameter.reshape(shape)


def _quantize_cpu(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int,
    div_mode: bool,
) -> torch.Tensor:
    axis = axis if div_mode else _effective_axis(axis)
    scale = _along(scales.float(), input, axis)
    zero = None if zero_points is None else _along(zero_points, input, axis)
    values = input.float()
    if div_mode and scales.numel() == 1:
        # one rounding of product and sum, as torch quantizes with one scale (with several it rounds both)
        values = (values.double() * (1.0 / scale).double() + (0 if zero is None else zero.double())).float()
    else:
        values = values * (1.0 / scale if div_mode else scale)
        values = values if zero is None else values + zero.float()
    result, low, high = (_DIVIDED if div_mode else _MULTIPLIED)[dtype]
    if _is_packed(dtype, div_mode):
        return pack_int4(round_to_int(values, low, high))
    # the largest int32 is no float32
    wide = values.double() if result == torch.int32 else values
    return round_to_int(wide, low, high, result).contiguous()


def _quantize_npu(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int,
    div_mode: bool,
) -> torch.Tensor:
    if input.numel() == 0:
        return _quantize_fake(input, scales, zero_points, dtype, axis, div_mode)
    if _is_packed(dtype, div_mode):
        dtype = torch.quint4x2  # the shape function of torch_npu takes int32 for the other mode
    # contiguous: the shape function repeats the strides of input, the kernel does not
    return torch.ops.npu.npu_quantize(input.contiguous(), scales, zero_points, dtype, axis, div_mode)


def _quantize_fake(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int,
    div_mode: bool,
) -> torch.Tensor:
    if _is_packed(dtype, div_mode):
        return input.new_empty([*input.shape[:-1], input.shape[-1] // INT4_PER_WORD], dtype=torch.int32)
    return input.new_empty(input.shape, dtype=(_DIVIDED if div_mode else _MULTIPLIED)[dtype][0])


_quantize_op = register_op(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, ScalarType dtype, int axis, bool div_mode)"
    " -> Tensor",
    cpu=_quantize_cpu,
    npu=_quantize_npu,
    fake=_quantize_fake,
)


@typed
def npu_quantize(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype | int,
    axis: int = 1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Integer codes of ``input``: divided by ``scales`` (the default), or multiplied by them.

    =================  =====================================  =============================================
    argument           div_mode=True                          div_mode=False
    =================  =====================================  =============================================
    result             ``round(input / scale + zero_point)``  ``round(input * scale + zero_point)``
    input              float32, float16, bfloat16             the same
    scales             float32; also bfloat16 with such       dtype of input
                       input
    zero_points        None, int8, uint8 or int32; also       None or dtype of scales
                       bfloat16 with bfloat16 input
    dtype              (q)int8, (q)uint8, (q)int32            (q)int8; quint4x2 or int32 for packed int4
    shape of scales    1 element, or ``[size(axis)]``         1 element, or ``[size(axis)]``, or of the rank of
                                                              input with size 1 on all other axes
    axis               of scales                              -2, else the last
    =================  =====================================  =============================================

    Rounding has no gradient: the result is detached.

    Args:
        input: any shape, with at least one axis for div_mode=False.
        scales: see the table.
        zero_points: see the table; of the shape of scales.
        dtype: see the table; a dtype or its number.
        axis: see the table.
        div_mode: whether scales divide.

    Returns:
        int8, uint8 or int32 of the shape of input; for packed int4 int32 with the last dim divided by 8.

    Raises:
        OperatorError: a dtype or shape that is not in the table, or a last dim that int4 words do not fill.

    Example:
        >>> x = torch.tensor([[0.26, -0.8, 2.5, -100.0]])
        >>> npu_quantize(x, torch.tensor([3.0, 3.0, 1.0, 2.0]), None, torch.qint8, -1, False)
        tensor([[   1,   -2,    2, -128]], dtype=torch.int8)
    """
    wanted = _check_quantize(input, scales, zero_points, dtype, axis, div_mode)
    zero_points = None if zero_points is None else zero_points.detach()
    return _quantize_op(input.detach(), scales.detach(), zero_points, wanted, axis, div_mode)


# ---------------------------------------------------------------- npu_anti_quant

_MAX_DIMS = 8


def _check_anti_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dst_dtype: torch.dtype,
    src_dtype: torch.dtype | None,
) -> None:
    op = "npu_anti_quant"
    require_device(op, "scale", scale, x)
    require_device(op, "offset", offset, x)
    if x.dtype not in (torch.int8, torch.int32):
        reject(f"{op}: x must have dtype int8, or int32 for packed int4, but has {dtype_name(x.dtype)}")
    expected = torch.int8 if x.dtype == torch.int8 else torch.quint4x2
    if src_dtype not in (None, expected):
        reject(f"{op}: src_dtype must be None or {expected} with x of {x.dtype}, but is {src_dtype}")
    require(
        dst_dtype in (torch.float16, torch.bfloat16),
        f"{op}: dst_dtype must be None, torch.float16 or torch.bfloat16, but is {dst_dtype}",
    )
    if not (0 if x.dtype == torch.int8 else 1) <= x.dim() <= _MAX_DIMS:
        reject(f"{op}: x must have at most {_MAX_DIMS} dimensions, packed int4 at least 1, but has {x.dim()}")
    require_dtype(op, "scale", scale, (torch.float32, torch.bfloat16))
    width = 1 if x.dim() == 0 else x.size(-1) * (1 if x.dtype == torch.int8 else INT4_PER_WORD)
    if scale.dim() != 1 or scale.size(0) not in (1, width):
        reject(f"{op}: scale must have shape (1,) or {(width,)}, but has {tuple(scale.shape)}")
    if offset is not None and (offset.dtype != scale.dtype or offset.shape != scale.shape):
        reject(
            f"{op}: offset must be {scale.dtype} of shape {tuple(scale.shape)} like scale, "
            f"but is {offset.dtype} of shape {tuple(offset.shape)}"
        )


def _anti_quant_values(x: torch.Tensor, offset: torch.Tensor | None, compute_dtype: torch.dtype) -> torch.Tensor:
    values = (unpack_int4(x) if x.dtype == torch.int32 else x).to(compute_dtype)
    return values if offset is None else values + _along(offset.to(compute_dtype), values, -1)


def _anti_quant_cpu(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dst_dtype: torch.dtype,
    src_dtype: torch.dtype | None,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(scale.dtype, torch.float32)
    values = _anti_quant_values(x, offset, compute_dtype)
    return (values * _along(scale.to(compute_dtype), values, -1)).to(dst_dtype).contiguous()


def _anti_quant_npu(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dst_dtype: torch.dtype,
    src_dtype: torch.dtype | None,
) -> torch.Tensor:
    if x.numel() == 0:
        return _anti_quant_fake(x, scale, offset, dst_dtype, src_dtype)
    return torch.ops.npu.npu_anti_quant(x.contiguous(), scale, offset=offset, dst_dtype=dst_dtype, src_dtype=src_dtype)


def _anti_quant_fake(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dst_dtype: torch.dtype,
    src_dtype: torch.dtype | None,
) -> torch.Tensor:
    shape = list(x.shape)
    if x.dtype == torch.int32:
        shape[-1] = shape[-1] * INT4_PER_WORD
    return x.new_empty(shape, dtype=dst_dtype)


def _anti_quant_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, offset, _, _ = inputs
    ctx.save_for_backward(x, scale, offset)


def _anti_quant_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale, offset = ctx.saved_tensors
    compute_dtype = torch.promote_types(scale.dtype, torch.float32)
    dy = dy.to(compute_dtype).contiguous()  # one order of summation
    dscale = doffset = None
    if ctx.needs_input_grad[1]:
        dscale = _sum_along(dy * _anti_quant_values(x, offset, compute_dtype), scale)
    if ctx.needs_input_grad[2]:
        doffset = _sum_along(dy * _along(scale.to(compute_dtype), dy, -1), scale)
    return None, dscale, doffset, None, None


def _sum_along(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    total = gradient.sum().view(1) if parameter.size(0) == 1 else gradient.reshape(-1, parameter.size(0)).sum(0)
    return total.to(parameter.dtype)


_anti_quant_op = register_op(
    "npu_anti_quant(Tensor x, Tensor scale, Tensor? offset, ScalarType dst_dtype, ScalarType? src_dtype) -> Tensor",
    cpu=_anti_quant_cpu,
    npu=_anti_quant_npu,
    fake=_anti_quant_fake,
    setup_context=_anti_quant_setup_context,
    backward=_anti_quant_backward,
    differentiable=("scale", "offset"),
)


@typed
def npu_anti_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    dst_dtype: torch.dtype | int | None = None,
    src_dtype: torch.dtype | int | None = None,
) -> torch.Tensor:
    """``(x + offset) * scale`` of int8 or packed int4 codes, in float32 and rounded once.

    Differentiable with respect to ``scale`` and ``offset``.

    Args:
        x: int8, or int32 words of eight int4 values; up to 8 dimensions.
        scale: ``[1]`` or ``[H]`` for H values in the last dim (eight per word); float32 or bfloat16.
        offset: shape and dtype of scale; None for 0.
        dst_dtype: None or ``torch.float16``; ``torch.bfloat16``.
        src_dtype: None, or what x holds: ``torch.int8`` or ``torch.quint4x2``.

    Returns:
        ``dst_dtype``, the shape of x; for int4 with the last dim times 8.

    Raises:
        OperatorError: wrong dtype or shape.

    Example:
        >>> two = torch.tensor([2.0])
        >>> npu_anti_quant(torch.tensor([1, 2, 3, 4], dtype=torch.int8), two, offset=two)
        tensor([ 6.,  8., 10., 12.], dtype=torch.float16)
    """
    op = "npu_anti_quant"
    dst_dtype = as_dtype(op, "dst_dtype", dst_dtype) or torch.float16
    src_dtype = as_dtype(op, "src_dtype", src_dtype)
    _check_anti_quant(x, scale, offset, dst_dtype, src_dtype)
    return _anti_quant_op(x, scale, offset, dst_dtype, torch.int8 if x.dtype == torch.int8 else torch.quint4x2)
