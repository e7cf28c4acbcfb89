"""In which dtype experts multiply: that of autocast where it is on, and half precision for quantized weights."""

from __future__ import annotations

import torch

from moe_npu import ops


def autocast_dtype(rows: torch.Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of ``rows``, None where it is off."""
    device_type = rows.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # autocast does not know meta
        return None
    return torch.get_autocast_dtype(device_type)


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, expert_tokens: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``ops.grouped_mm``, in the dtype of autocast where a linear layer would be."""
    dtype = autocast_dtype(rows)
    if dtype is not None:
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return ops.grouped_mm(rows, weight, expert_tokens, bias=bias)


def half_precision(rows: torch.Tensor) -> torch.Tensor:
    """Rows as quantized kernels take them: the dtype of autocast where it is on, and bfloat16 for float32."""
    dtype = autocast_dtype(rows)
    if dtype is None:
        dtype = torch.bfloat16 if rows.dtype == torch.float32 else rows.dtype
    return rows.to(dtype)
