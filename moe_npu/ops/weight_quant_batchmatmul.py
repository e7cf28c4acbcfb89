"""Dense matmul with integer weights (spec: grouped matmul 2.8, 1.8.6).

    y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias
    y = round(y * quant_scale + quant_offset), saturated to int8                  with quant_scale

The weight in brackets is rounded to the dtype of x as the device rounds it; the product, the bias and the second line
are float32. Words as quant_scale hold an offset of their own, added after a rounding to nine bits (spec 1.8.3).
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import (
    dtype_name,
    reject,
    require,
    require_device,
    require_dim,
    require_dtype,
    require_no_gradient,
)
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import (
    INT4_PER_WORD,
    dequantize_weight,
    is_transposed,
    matmul_into,
    offset_of_words,
    round_to_int,
    scale_of_words,
    unpack_int4_weight,
)
from moe_npu.ops._signature import typed
from moe_npu.ops.grouped_mm import grouped_mm

_OP = "npu_weight_quant_batchmatmul"
_HALVES = (torch.float16, torch.bfloat16)
_MAX_SIZE = 65535
_GROUP_STEP = 32


def _is_packed_along_n(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether int4 words run along N; else they run along K, or the weight is int8."""
    return weight.dtype == torch.int32 and weight.size(0) == x.size(1)


def _num_columns(x: torch.Tensor, weight: torch.Tensor) -> int:
    return weight.size(1) * INT4_PER_WORD if _is_packed_along_n(x, weight) else weight.size(1)


def _is_grouped(antiquant_scale: torch.Tensor) -> bool:
    return antiquant_scale.dim() == 2 and antiquant_scale.size(0) > 1


def _check_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
    require_dtype(_OP, "x", x, _HALVES)
    require_dtype(_OP, "weight", weight, (torch.int8, torch.int32))
    require_dim(_OP, "x", x, (2,))
    require_dim(_OP, "weight", weight, (2,))
    if x.numel() == 0 or weight.numel() == 0:
        reject(f"{_OP}: x and weight must not be empty, but have shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.dtype == torch.int8:
        fits = weight.size(0) == x.size(1)
    else:
        fits = weight.size(0) == x.size(1) or (weight.size(0) * INT4_PER_WORD == x.size(1) and is_transposed(weight))
    if not fits:
        reject(
            f"{_OP}: weight must be [K, N], int4 words [K, N / 8] or the transposed view of [N, K / 8], with "
            f"K = {x.size(1)} of x, but has shape {tuple(weight.shape)}"
        )
    columns = _num_columns(x, weight)
    if x.size(1) > _MAX_SIZE or columns > _MAX_SIZE:
        reject(f"{_OP}: K and N must be at most {_MAX_SIZE}, but are {x.size(1)} and {columns}")


def _check_antiquant(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, columns: int, group_size: int
) -> None:
    require_dtype(_OP, "antiquant_scale", scale, (x.dtype,))
    if group_size != 0 and not (group_size % _GROUP_STEP == 0 and _GROUP_STEP <= group_size <= x.size(1) - 1):
        reject(
            f"{_OP}: antiquant_group_size must be 0 or a multiple of {_GROUP_STEP} in {_GROUP_STEP}..K - 1 = "
            f"{x.size(1) - 1}, but is {group_size}"
        )
    allowed = [(1,), (columns,), (1, 1), (1, columns)]
    if group_size:
        allowed.append(((x.size(1) + group_size - 1) // group_size, columns))
    shape = tuple(scale.shape)
    # element by element: symbolic sizes are not found in a list of tuples
    if not any(len(shape) == len(form) and all(a == b for a, b in zip(shape, form, strict=True)) for form in allowed):
        reject(
            f"{_OP}: antiquant_scale must have one of the shapes {allowed} with antiquant_group_size {group_size}, "
            f"but has {tuple(scale.shape)}"
        )
    if offset is not None and (offset.dtype != scale.dtype or offset.shape != scale.shape):
        reject(
            f"{_OP}: antiquant_offset must be {scale.dtype} of shape {tuple(scale.shape)} like antiquant_scale, "
            f"but is {offset.dtype} of shape {tuple(offset.shape)}"
        )


def _check_results(
    x: torch.Tensor,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
) -> None:
    allowed = [(1,), (columns,), (1, columns)]
    if bias is not None:
        require_dtype(_OP, "bias", bias, (torch.float16 if x.dtype == torch.float16 else torch.float32,))
        if tuple(bias.shape) not in allowed:
            reject(f"{_OP}: bias must have one of the shapes {allowed}, but has {tuple(bias.shape)}")
    if quant_scale is None:
        require(quant_offset is None, f"{_OP}: quant_offset needs quant_scale, which is None")
        return
    if quant_scale.dtype not in (torch.float32, torch.int64):
        reject(f"{_OP}: quant_scale must have dtype float32, int64, but has {dtype_name(quant_scale.dtype)}")
    if tuple(quant_scale.shape) not in allowed:
        reject(f"{_OP}: quant_scale must have one of the shapes {allowed}, but has {tuple(quant_scale.shape)}")
    if quant_offset is None:
        return
    require(
        quant_scale.dtype == torch.float32, f"{_OP}: quant_offset must be None with int64 words, which hold an offset"
    )
    if quant_offset.dtype != torch.float32 or quant_offset.shape != quant_scale.shape:
        reject(
            f"{_OP}: quant_offset must be float32 of shape {tuple(quant_scale.shape)} like quant_scale, "
            f"but is {dtype_name(quant_offset.dtype)} of shape {tuple(quant_offset.shape)}"
        )


def _dequantize(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """The weight ``[K, N]`` in the dtype of x."""
    if weight.dtype == torch.int32:
        weight = unpack_int4_weight(weight, _num_columns(x, weight))
    offset = torch.zeros_like(scale) if offset is None else offset
    if not _is_grouped(scale):
        return dequantize_weight(weight, scale.reshape(1, -1), offset.reshape(1, -1))
    # one row of scales per row of the weight: the last group may be shorter
    rows = torch.arange(weight.size(0), device=weight.device) // group_size
    return dequantize_weight(weight, scale[rows], offset[rows])


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
) -> torch.Tensor:
    dense = _dequantize(x, weight, antiquant_scale, antiquant_offset, antiquant_group_size)
    if quant_scale is None:
        y = x.new_empty(x.size(0), dense.size(1))
        matmul_into(y, x, dense, None if bias is None else bias.reshape(-1).float())
        return y
    product = torch.mm(x.float(), dense.float())
    if bias is not None:
        product += bias.reshape(-1)
    if quant_scale.dtype == torch.int64:
        nine_bits = round_to_int(product * scale_of_words(quant_scale.reshape(-1)), -256, 255, torch.int64)
        return (nine_bits + offset_of_words(quant_scale.reshape(-1))).clamp_(-128, 127).to(torch.int8)
    product *= quant_scale.reshape(-1)
    if quant_offset is not None:
        product += quant_offset.reshape(-1)
    return round_to_int(product, -128, 127)


def _npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
) -> torch.Tensor:
    # of views the device reads transposed ones only, and takes them for words along K
    along_k = weight.dtype == torch.int32 and not _is_packed_along_n(x, weight)
    if _is_packed_along_n(x, weight) or not is_transposed(weight):
        weight = weight.contiguous()

    def multiply(weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.npu.npu_weight_quant_batchmatmul(
            x if is_transposed(x) else x.contiguous(),
            weight,
            antiquant_scale,
            antiquant_offset,
            quant_scale,
            quant_offset,
            None if bias is None else bias.contiguous(),
            antiquant_group_size,
            inner_precise,
        )

    try:
        return multiply(weight)
    except RuntimeError as error:
        # torch_npu knows a transposed view by the memory that it is of, which must have been allocated as [N, K / 8]:
        # not as part of more, nor by moving the view to the device
        if not along_k or "weight_k_dim" not in str(error):
            raise
        return multiply(weight.mT.clone(memory_format=torch.contiguous_format).mT)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    *_: Any,
) -> torch.Tensor:
    dtype = x.dtype if quant_scale is None else torch.int8
    return x.new_empty([x.size(0), _num_columns(x, weight)], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, scale, offset, _, _, bias, ctx.group_size, _ = inputs
    ctx.save_for_backward(x, weight, scale, offset)
    ctx.bias = None if bias is None else (bias.dtype, bias.shape)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, scale, offset = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dense = _dequantize(x, weight, scale, offset, ctx.group_size)
        count = torch.full((1,), dy.size(0), dtype=torch.int64, device=dy.device)
        dx = grouped_mm(dy.contiguous(), dense.mT.unsqueeze(0), count)
    if ctx.bias is not None and ctx.needs_input_grad[6]:
        dtype, shape = ctx.bias
        total = dy.float().sum(0)
        if shape[-1] != total.size(0):
            total = total.sum()
        dbias = total.reshape(shape).to(dtype)
    return dx, None, None, None, None, None, dbias, None, None


_op = register_op(
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset,"
    " Tensor? quant_scale, Tensor? quant_offset, Tensor? bias, int antiquant_group_size, int inner_precise) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x", "bias"),
)


@typed
def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: torch.dtype | int | None = None,
) -> torch.Tensor:
    """``x @ ((weight + antiquant_offset) * antiquant_scale) + bias`` with int8 or int4 weights.

    Differentiable with respect to ``x`` and ``bias``, unless the result is quantized.

    Args:
        x: ``[M, K]`` float16 or bfloat16, not empty; K and N are at most 65535.
        weight: int8 ``[K, N]``, or int32 words of eight int4 values: ``[K, N / 8]``, or the transposed view of
            ``[N, K / 8]``.
        antiquant_scale: dtype of x; ``[1]``, ``[N]``, ``[1, N]`` or, with groups, ``[ceil(K / group size), N]``.
        antiquant_offset: dtype and shape of antiquant_scale; None for 0.
        quant_scale: float32, or int64 words of :func:`npu_trans_quant_param`; ``[1]``, ``[N]`` or ``[1, N]``.
        quant_offset: float32 of the shape of quant_scale; not with words, which hold an offset.
        bias: ``[1]``, ``[N]`` or ``[1, N]``; float16 with float16 x, float32 with bfloat16 x.
        antiquant_group_size: rows of the weight that share a scale, a multiple of 32 in ``32..K - 1``; the last group
            may be shorter. Ignored where antiquant_scale has one row.
        inner_precise: 0 or 1, a hint to the device.
        weight_dtype: must be None.

    Returns:
        ``[M, N]`` in the dtype of x; int8 with quant_scale.

    Raises:
        OperatorError: wrong dtype or shape, an empty tensor, or a scale that requires a gradient.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
        >>> weight = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> scale, offset = torch.tensor([[0.5, 0.25], [1.0, 0.0]], dtype=torch.float16)
        >>> npu_weight_quant_batchmatmul(x, weight, scale, offset)
        tensor([[5.0000, 1.5000]], dtype=torch.float16)
    """
    for name, tensor in (
        ("weight", weight),
        ("antiquant_scale", antiquant_scale),
        ("antiquant_offset", antiquant_offset),
        ("quant_scale", quant_scale),
        ("quant_offset", quant_offset),
        ("bias", bias),
    ):
        require_device(_OP, name, tensor, x)
    _check_weight(x, weight)
    columns = _num_columns(x, weight)
    _check_antiquant(x, antiquant_scale, antiquant_offset, columns, antiquant_group_size)
    _check_results(x, quant_scale, quant_offset, bias, columns)
    if inner_precise not in (0, 1):
        reject(f"{_OP}: inner_precise must be 0 or 1, but is {inner_precise}")
    require(weight_dtype is None, f"{_OP}: weight_dtype must be None; only later devices reinterpret dtypes")
    group_size = antiquant_group_size if _is_grouped(antiquant_scale) else 0
    tensors = (antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias)
    if quant_scale is not None:
        x = x.detach()
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)  # type: ignore[assignment]
    require_no_gradient(_OP, "antiquant_scale", tensors[0])
    require_no_gradient(_OP, "antiquant_offset", tensors[1])
    return _op(x, weight, *tensors, group_size, inner_precise)
