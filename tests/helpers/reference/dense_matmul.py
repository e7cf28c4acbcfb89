"""References of the quantized dense matmuls."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import Codes, Float, decode_scale_word, unpack_int4
from tests.helpers.reference.quantize import NUMBERS, trans_quant_param


def _columns(parameter: Tensor, columns: int) -> Tensor:
    """One value per column of a parameter that has one, or one in all."""
    flat = parameter.reshape(-1)
    return flat.expand(columns) if flat.numel() == 1 else flat


def _dequantize(weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """spec: weight-only quantization 1.8.6. [K,N] integers to float64 values that were rounded to the scale's dtype."""
    rows, columns = weight.shape
    is_grouped = scale.dim() == 2 and scale.shape[0] > 1
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for k in range(rows):
        row = k // group_size if is_grouped else 0
        factor = scale[row] if is_grouped else _columns(scale, columns)
        shift = torch.zeros_like(factor)
        if offset is not None:
            shift = offset[row] if is_grouped else _columns(offset, columns)
        if scale.dtype == torch.float16:
            shifted = (weight[k].double() + shift.double()).numpy().astype(np.float16)
            scaled = (shifted.astype(np.float64) * factor.double().numpy()).astype(np.float16)
            result[k] = torch.from_numpy(scaled.astype(np.float64))
        else:
            shifted = weight[k].numpy().astype(np.float32) + shift.float().numpy()
            result[k] = torch.from_numpy(shifted * factor.float().numpy()).to(torch.bfloat16).double()
    return result


def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
) -> Tensor | Codes:
    """spec: npu_weight_quant_batchmatmul 2.8. Differentiable with respect to x and bias."""
    if weight.dtype == torch.int32:
        weight = unpack_int4(weight) if weight.shape[0] == x.shape[1] else unpack_int4(weight.t()).t()
    columns = weight.shape[1]
    y = x.double() @ _dequantize(weight, antiquant_scale, antiquant_offset, antiquant_group_size)
    if bias is not None:
        y = y + _columns(bias, columns).double()
    if quant_scale is None:
        return y
    if quant_scale.dtype == torch.int64:
        decoded = [decode_scale_word(int(word)) for word in _columns(quant_scale, columns)]
        factors = torch.tensor([factor for factor, _ in decoded], dtype=torch.float64)
        shifts = torch.tensor([shift for _, shift in decoded], dtype=torch.float64)
        return Codes((y * factors).clamp(-256, 255) + shifts, slack=1e-3)
    y = y * _columns(quant_scale, columns).double()
    if quant_offset is not None:
        y = y + _columns(quant_offset, columns).double()
    return Codes(y, slack=1e-3)


def _logical(x1: Tensor, x2: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if x1.dtype == torch.int8:
        return x1.numpy().astype(np.int64), x2.numpy().astype(np.int64)
    left = unpack_int4(x1)
    right = unpack_int4(x2) if x2.shape[-2] == left.shape[-1] else unpack_int4(x2.mT).mT
    return left.numpy().astype(np.int64), right.numpy().astype(np.int64)


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | int | None = None,
) -> Tensor | Float:
    """spec: npu_quant_matmul 2.9, in float32 steps."""
    dtype = NUMBERS[output_dtype] if isinstance(output_dtype, int) else output_dtype or torch.int8
    left, right = _logical(x1, x2)
    rows, columns = left.shape[-2], right.shape[-1]
    if scale.dim() == 2:
        assert offset is not None and pertoken_scale is not None
        groups = scale.shape[0]
        length = left.shape[-1] // groups
        value = np.zeros((*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), rows, columns), dtype=np.float32)
        for group in range(groups):
            terms = slice(group * length, (group + 1) * length)
            a, b = left[..., terms], right[..., terms, :]
            shifted = (a @ b).astype(np.float32) - a.sum(-1, keepdims=True).astype(np.float32) * offset[
                group
            ].float().numpy()
            value = value + shifted * scale[group].numpy()
        value = value * pertoken_scale.numpy()[:, None]
        return Float(torch.from_numpy(value).double(), dtype)
    acc = left @ right
    if bias is not None and bias.dtype == torch.int32:
        acc = acc + bias.numpy().astype(np.int64)
    acc = acc.astype(np.int32)
    if dtype == torch.int32:
        return torch.from_numpy(acc)
    if scale.dtype == torch.float32 and pertoken_scale is None and dtype in (torch.int8, torch.float16):
        scale = trans_quant_param(scale, offset)
    if scale.dtype in (torch.int64, torch.uint64):
        decoded = [decode_scale_word(int(word)) for word in _columns(scale.view(torch.int64), columns)]
        factors = np.array([factor for factor, _ in decoded], dtype=np.float32)
        shifts = np.array([shift for _, shift in decoded], dtype=np.int64)
        value = acc.astype(np.float32) * factors
        if dtype == torch.int8:
            nine_bits = np.clip(np.rint(value), -256, 255).astype(np.int64)
            return torch.from_numpy(np.clip(nine_bits + shifts, -128, 127).astype(np.int8))
        return Float(torch.from_numpy(value).double(), dtype)
    value = acc.astype(np.float32) * _columns(scale, columns).float().numpy()
    if pertoken_scale is not None:
        value = value * pertoken_scale.numpy()[:, None]
    if bias is not None and bias.dtype != torch.int32:
        value = value + bias.float().numpy()
    return Float(torch.from_numpy(value).double(), dtype)
