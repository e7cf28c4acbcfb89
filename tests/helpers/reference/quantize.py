"""References of the quantization operators."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import pack_int4


def _quantise_vector(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.float32]:
    """The integers and the scale of one float32 vector that shares a scale, in float32 steps."""
    amax = np.float32(np.max(np.abs(values))) if values.size else np.float32(0)
    if amax == 0:
        return np.zeros(values.shape, dtype=np.int8), np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.rint(values * (np.float32(limit) / amax))
    scaled = np.where(np.isnan(scaled), np.float32(0), scaled)
    return np.clip(scaled, -limit, limit).astype(np.int8), amax * (np.float32(1) / np.float32(limit))


def dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | None = None,
    quant_mode: str = "pertoken",
) -> tuple[Tensor, Tensor]:
    """spec: npu_dynamic_quant 2.2. y (int8, or packed int32 for quint4x2) and the scale, exact in float32."""
    limit = 7 if dst_type == torch.quint4x2 else 127
    value = input.float().numpy().copy()
    if smooth_scales is not None:
        smooth = smooth_scales.float().numpy()
        if quant_mode == "perchannel":
            value = value * smooth[:, None]
        elif group_index is None:
            value = value * smooth
        else:
            rows = value.reshape(-1, value.shape[-1])
            start = 0
            for group, end in enumerate(group_index.tolist()):
                for row in range(start, end):
                    rows[row] = rows[row] * smooth[group]
                start = end
            value = rows.reshape(value.shape)
    y = np.zeros(value.shape, dtype=np.int8)
    if quant_mode == "pertensor":
        y, factor = _quantise_vector(value, limit)
        scale = np.full((1,), factor, dtype=np.float32)
    elif quant_mode == "perchannel":
        scale = np.zeros((*value.shape[:-2], value.shape[-1]), dtype=np.float32)
        for index in np.ndindex(*scale.shape):
            vector = (*index[:-1], slice(None), index[-1])
            y[vector], scale[index] = _quantise_vector(value[vector], limit)
    else:
        scale = np.zeros(value.shape[:-1], dtype=np.float32)
        for index in np.ndindex(*scale.shape):
            y[index], scale[index] = _quantise_vector(value[index], limit)
    quantised = torch.from_numpy(y)
    if dst_type == torch.quint4x2:
        quantised = pack_int4(quantised)
    return quantised, torch.from_numpy(scale)
