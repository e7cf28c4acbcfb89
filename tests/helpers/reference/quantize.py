"""References of the quantization operators."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import Float, pack_int4, unpack_int4

NUMBERS = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
}


def _dtype(dtype: torch.dtype | int | None) -> torch.dtype | None:
    """spec: dtype codes 0.10."""
    return NUMBERS[dtype] if isinstance(dtype, int) else dtype


def _quantize_vector(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.float32]:
    """The integers and the scale of one float32 vector that shares a scale, in float32 steps."""
    amax = np.float32(np.max(np.abs(values))) if values.size else np.float32(0)
    if amax == 0:
        return np.zeros(values.shape, dtype=np.int8), np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.rint(values * (np.float32(limit) / amax))
    scaled = np.where(np.isnan(scaled), np.float32(0), scaled)
    return np.clip(scaled, -limit, limit).astype(np.int8), amax * (np.float32(1) / np.float32(limit))


def _smoothed(input: Tensor, smooth_scales: Tensor | None, group_index: Tensor | None, quant_mode: str) -> np.ndarray:
    """The input in float32, multiplied by its smoothing factors."""
    value = input.float().numpy().copy()
    if smooth_scales is None:
        return value
    smooth = smooth_scales.float().numpy()
    if quant_mode == "perchannel":
        return value * smooth[:, None]
    if group_index is None:
        return value * smooth
    rows = value.reshape(-1, value.shape[-1])
    start = 0
    for group, end in enumerate(group_index.tolist()):
        for row in range(start, end):
            rows[row] = rows[row] * smooth[group]
        start = end
    return rows.reshape(value.shape)


def dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | None = None,
    quant_mode: str = "pertoken",
) -> tuple[Tensor, Tensor]:
    """spec: npu_dynamic_quant 2.2. y (int8, or packed int32 for quint4x2) and the scale, exact in float32."""
    dst_type = _dtype(dst_type)
    limit = 7 if dst_type == torch.quint4x2 else 127
    value = _smoothed(input, smooth_scales, group_index, quant_mode)
    y = np.zeros(value.shape, dtype=np.int8)
    if quant_mode == "pertensor":
        y, factor = _quantize_vector(value, limit)
        scale = np.full((1,), factor, dtype=np.float32)
    elif quant_mode == "perchannel":
        scale = np.zeros((*value.shape[:-2], value.shape[-1]), dtype=np.float32)
        for index in np.ndindex(*scale.shape):
            vector = (*index[:-1], slice(None), index[-1])
            y[vector], scale[index] = _quantize_vector(value[vector], limit)
    else:
        scale = np.zeros(value.shape[:-1], dtype=np.float32)
        for index in np.ndindex(*scale.shape):
            y[index], scale[index] = _quantize_vector(value[index], limit)
    quantized = torch.from_numpy(y)
    if dst_type == torch.quint4x2:
        quantized = pack_int4(quantized)
    return quantized, torch.from_numpy(scale)


def _asymmetric_vector(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.float32, np.float32]:
    """Codes, scale and offset of one float32 vector that shares them, in float32 steps with true divisions."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = np.float32(values.max()) if values.size else np.float32(0)
    smallest = np.float32(values.min()) if values.size else np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = max((largest - smallest) / np.float32(high - low), np.float32(1e-12))
        offset = np.float32(high) - largest / scale
        rounded = np.rint(values / scale + offset)
    return np.clip(np.where(np.isnan(rounded), np.float32(0), rounded), low, high).astype(np.int8), scale, offset


def dynamic_quant_asymmetric(
    input: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | int | None = None,
    quant_mode: str = "pertoken",
) -> tuple[Tensor, Tensor, Tensor]:
    """spec: npu_dynamic_quant_asymmetric 2.3. y, scale and offset, exact in float32."""
    is_int4 = _dtype(dst_type) == torch.quint4x2
    value = _smoothed(input, smooth_scales, group_index, quant_mode)
    shape = {"pertoken": value.shape[:-1], "perchannel": (*value.shape[:-2], value.shape[-1]), "pertensor": (1,)}
    y = np.zeros(value.shape, dtype=np.int8)
    scale = np.zeros(shape[quant_mode], dtype=np.float32)
    offset = np.zeros(shape[quant_mode], dtype=np.float32)
    for index in np.ndindex(*scale.shape):
        vector: tuple[int | slice, ...] = index
        if quant_mode == "perchannel":
            vector = (*index[:-1], slice(None), index[-1])
        elif quant_mode == "pertensor":
            vector = (slice(None),) * value.ndim
        y[vector], scale[index], offset[index] = _asymmetric_vector(value[vector], 4 if is_int4 else 8)
    quantized = torch.from_numpy(y)
    return pack_int4(quantized) if is_int4 else quantized, torch.from_numpy(scale), torch.from_numpy(offset)


def quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype | int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """spec: npu_quantize 2.1. Element by element, in float32 steps."""
    ranges = {
        torch.int8: (torch.int8, -128, 127),
        torch.qint8: (torch.int8, -128, 127),
        torch.uint8: (torch.uint8, 0, 255),
        torch.quint8: (torch.uint8, 0, 255),
        torch.int32: (torch.int32, -(2**31), 2**31 - 1),
        torch.qint32: (torch.int32, -(2**31), 2**31 - 1),
        torch.quint4x2: (torch.int8, -8, 7),
    }
    wanted = _dtype(dtype)
    assert wanted is not None
    is_packed = not div_mode and wanted in (torch.int32, torch.quint4x2)
    result_dtype, low, high = ranges[torch.quint4x2 if is_packed else wanted]
    if not div_mode:
        axis = -2 if axis == -2 else -1
    values = input.float().numpy()
    factors = scales.float().numpy().reshape(-1)
    zeros = None if zero_points is None else zero_points.double().numpy().reshape(-1)
    codes = np.zeros(values.shape, dtype=np.int64)
    for index in np.ndindex(*values.shape):
        channel = 0 if factors.size == 1 else index[axis]
        with np.errstate(divide="ignore", invalid="ignore"):
            code = values[index] * (np.float32(1) / factors[channel] if div_mode else factors[channel])
            code = code if zeros is None else code + np.float32(zeros[channel])
        codes[index] = 0 if np.isnan(code) else int(np.clip(np.rint(float(code)), low, high))
    quantized = torch.from_numpy(codes).to(result_dtype)
    return pack_int4(quantized) if is_packed else quantized


def anti_quant(
    x: Tensor, scale: Tensor, *, offset: Tensor | None = None, dst_dtype: torch.dtype | int | None = None
) -> Float:
    """spec: npu_anti_quant 2.6. Element by element, in float32 steps."""
    values = (unpack_int4(x) if x.dtype == torch.int32 else x).numpy().astype(np.float32)
    factors = scale.float().numpy()
    shifts = np.zeros_like(factors) if offset is None else offset.float().numpy()
    result = np.zeros(values.shape, dtype=np.float64)
    for index in np.ndindex(*values.shape):
        channel = 0 if factors.size == 1 else index[-1]
        result[index] = (values[index] + shifts[channel]) * factors[channel]
    return Float(torch.from_numpy(result), _dtype(dst_dtype) or torch.float16)


def _fp19_bits(scale: float, round_mode: int) -> int:
    """spec: FP19 0.3. Field by field."""
    bits = struct.unpack("<I", struct.pack("<f", scale))[0]
    sign, exponent, mantissa = bits >> 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if round_mode == 1 and exponent == 0:
        return int(sign << 31)
    short, rest = mantissa >> 13, mantissa & 0x1FFF
    if round_mode == 1 and exponent != 0xFF and (rest > 0x1000 or (rest == 0x1000 and short % 2 == 1)):
        short += 1
        if short == 1024:
            short, exponent = 0, exponent + 1
    return int((sign << 31) | (exponent << 23) | (short << 13))


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """spec: npu_trans_quant_param 2.5. One word at a time."""
    shape = scale.shape if offset is None or scale.numel() >= offset.numel() else offset.shape
    scales = scale.flatten().tolist()
    offsets = [0.0] if offset is None else offset.flatten().tolist()
    length = max(len(scales), len(offsets))
    words = []
    for index in range(length):
        value = offsets[index % len(offsets)]
        field = int(np.clip(np.rint(0.0 if np.isnan(value) else value), -256, 255)) & 0x1FF
        words.append(_fp19_bits(scales[index % len(scales)], round_mode or 0) | (field << 37) | (1 << 46))
    return torch.tensor(words, dtype=torch.int64).reshape(shape)


def format_cast(input: Tensor, acl_format: int | None = None) -> Tensor:
    """spec: npu_format_cast 2.7. The identity."""
    return input.clone()


def int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """spec: npu_convert_weight_to_int4pack 2.4. The second argument has no effect."""
    return pack_int4(weight)
