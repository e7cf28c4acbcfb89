"""References of SwiGLU with quantization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.helpers.reference.common import Codes, Float, group_ends, sigmoid, silu


def _group_of_rows(group_list: Tensor | None, group_list_type: int, num_rows: int) -> list[int | None]:
    """The group of each row: 0 without a list, None behind the last group."""
    if group_list is None:
        return [0] * num_rows
    groups: list[int | None] = []
    for group, end in enumerate(group_ends(group_list, group_list_type)):
        groups += [group] * (end - len(groups))
    return groups + [None] * (num_rows - len(groups))


def _code_values(values: Tensor) -> Tensor:
    """spec: 0.2. What has no value gets code 0."""
    return torch.where(torch.isnan(values), torch.zeros_like(values), values)


def _two_per_byte(values: Tensor) -> Tensor:
    """spec: npu_swiglu_quant 3.3. Rounded to int4; the first of two in the low nibble of an int8."""
    whole = values.round().clamp(-8, 7).to(torch.int64)
    packed = torch.zeros(*values.shape[:-1], values.shape[-1] // 2, dtype=torch.int64)
    for column in range(packed.shape[-1]):
        packed[..., column] = (whole[..., 2 * column] % 16) + 16 * (whole[..., 2 * column + 1] % 16)
    return torch.where(packed >= 128, packed - 256, packed).to(torch.int8)


def swiglu_quant(
    x: Tensor,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | int | None = None,
) -> tuple[Codes | Tensor, Float]:
    """spec: npu_swiglu_quant 3.3."""
    is_int4 = dst_type in (torch.quint4x2, 16)
    largest = 7 if is_int4 else 127
    columns = x.shape[-1] // 2
    rows = x.double().reshape(math.prod(x.shape[:-1]), 2 * columns)
    values = torch.zeros(rows.shape[0], columns, dtype=torch.float64)
    scale = torch.zeros(rows.shape[0], dtype=torch.float64)
    for row, group in enumerate(_group_of_rows(group_index, group_list_type, rows.shape[0])):
        if group is None:
            continue
        left, right = rows[row, :columns], rows[row, columns:]
        value = silu(left) * right if activate_left else left * silu(right)
        if smooth_scales is not None:
            value = value * smooth_scales[group].double()
        if quant_mode == 0:
            values[row] = value if offsets is None else value + offsets[group].double()
            continue
        amax = value.abs().max().item() if columns else 0.0
        scale[row] = largest / amax if amax else math.inf
        values[row] = value * scale[row]
    values = _code_values(values)
    scales = Float(scale.reshape(x.shape[:-1]), torch.float32)
    if is_int4:
        return _two_per_byte(values).reshape(*x.shape[:-1], columns // 2), scales
    return Codes(values.reshape(*x.shape[:-1], columns)), scales


def dequant_swiglu_quant(
    x: Tensor,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Codes, Float]:
    """spec: npu_dequant_swiglu_quant 3.4."""
    columns = x.shape[-1] // 2
    rows = x.reshape(math.prod(x.shape[:-1]), 2 * columns)
    values = torch.zeros(rows.shape[0], columns, dtype=torch.float64)
    scale = torch.zeros(rows.shape[0], dtype=torch.float64)
    for row, group in enumerate(_group_of_rows(group_index, 1, rows.shape[0])):
        if group is None:
            continue
        value = rows[row]
        if value.dtype == torch.int32:
            assert weight_scale is not None
            total = value.long()
            if bias is not None and bias.dtype == torch.int32:
                total = total + bias.reshape(-1).long()
            value = total.float().double()  # the low bits of large sums are lost
            value = value * (weight_scale[group] if weight_scale.dim() == 2 else weight_scale).double()
            if activation_scale is not None:
                value = value * activation_scale.reshape(-1)[row].double()
            if bias is not None and bias.dtype != torch.int32:
                value = value + bias.reshape(-1).double()
        value = _gated(value.double(), activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
        if quant_mode == 1:
            if quant_scale is not None:
                value = value * (quant_scale[group] if quant_scale.dim() == 2 else quant_scale).double()
            amax = value.abs().max().item() if columns else 0.0
            scale[row] = amax / 127
            values[row] = value / scale[row]
            continue
        if quant_scale is not None:
            divisor = quant_scale[group].double()
            is_one_number = quant_scale.dim() == 1 or quant_scale.shape[1] == 1
            value = value if is_one_number and divisor.item() == 0 else value / divisor
        if quant_offset is not None:
            value = value + quant_offset[group].double()
        values[row] = value
    shape = x.shape[:-1]
    return Codes(_code_values(values).reshape(*shape, columns)), Float(scale.reshape(shape), torch.float32)


def _gated(
    value: Tensor, activate_left: bool, swiglu_mode: int, clamp_limit: float, glu_alpha: float, glu_bias: float
) -> Tensor:
    half = value.shape[0] // 2
    if swiglu_mode == 1:
        a, b = value[0::2], value[1::2]
    elif activate_left:
        a, b = value[:half], value[half:]
    else:
        a, b = value[half:], value[:half]
    if swiglu_mode == 0:
        return silu(a) * b
    a, b = a.clamp(max=clamp_limit), b.clamp(min=-clamp_limit, max=clamp_limit)
    return a * sigmoid(glu_alpha * a) * (b + glu_bias)
