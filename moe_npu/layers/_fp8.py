"""Grouped matmuls with float8 weights that have one scale per block of rows and columns.

    y[r] = x[r] @ (code * scale).T      code float8 e4m3, scale one number per block

The weight of all experts is brought to the dtype of the rows for the time of one matmul, and again for its gradient:
no copy outlives a call. Activations stay as they are, while kernels that multiply float8 by float8 round them first.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu import ops
from moe_npu.layers._precision import autocast_dtype


def fp8_grouped_linear(
    name: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int] | None,
    expert_tokens: torch.Tensor,
    *,
    num_stacked: int,
) -> torch.Tensor:
    """Rows times the dequantized weights of their experts; passes the gradient of ``rows``.

    Args:
        name: of the weight, for messages.
        rows: ``[R, K]``, float16, bfloat16 or float32, sorted by expert.
        weight: ``[E, N, K]`` float8_e4m3fn.
        scale_inv: ``[E, N / block rows, K / block columns]``, float32 or float8_e8m0fnu: what a block is multiplied by.
        block_size: rows and columns of a block, or None for one scale of each stacked weight.
        expert_tokens: ``[E]`` int64.
        num_stacked: how many weights are stacked along N; each has blocks of its own.

    Returns:
        ``[R, N]``, dtype of ``rows``, or that of autocast where it is on.

    Raises:
        ValueError: another dtype of weight or scale, or scales that do not tile the weight.
    """
    _check(name, weight, scale_inv, block_size, num_stacked)
    rows = rows.to(autocast_dtype(rows) or rows.dtype)
    return _Fp8GroupedMm.apply(rows, weight.detach(), scale_inv.detach(), expert_tokens)


def _check(
    name: str,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    block_size: tuple[int, int] | None,
    num_stacked: int,
) -> None:
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{name} must be float8_e4m3fn, but is {weight.dtype}: experts_implementation='moe_npu' cannot multiply "
            "packed FP4 or other codes; choose another implementation or load the model with dequantize=True"
        )
    if scale_inv.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise ValueError(f"{name}_scale_inv must be float32 or float8_e8m0fnu, but is {scale_inv.dtype}")
    num_experts, num_rows, num_columns = weight.shape
    own_rows = num_rows // num_stacked
    # a weight smaller than a block is one
    block_rows, block_columns = (
        min(*sizes) for sizes in zip(block_size or weight.shape[1:], (own_rows, num_columns), strict=True)
    )
    row_counts = [num_rows // block_rows]
    if block_rows == own_rows:
        row_counts.append(1)  # some releases keep one scale for both
    expected = [(num_experts, count, num_columns // block_columns) for count in row_counts]
    if own_rows % block_rows or num_columns % block_columns or tuple(scale_inv.shape) not in expected:
        raise ValueError(
            f"{name}_scale_inv must have one scale for each block of {block_rows} x {block_columns} of {name} "
            f"{tuple(weight.shape)}, in which {num_stacked} weights are stacked, but has shape {tuple(scale_inv.shape)}"
        )


def _dequantized(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[E, N, K]`` of ``dtype``: code times scale, rounded once."""
    # A float8 is the upper half of a float16 whose exponent counts from another zero. As integers, since not every
    # device knows float8
    codes = weight.view(torch.int8).to(torch.int16)
    halves = ((codes & 0x7F) << 7) | (codes & -0x8000)
    blocks = (weight.size(0), scale_inv.size(1), -1, scale_inv.size(2), weight.size(2) // scale_inv.size(2))
    scale = _as_float(scale_inv) * 256
    # in place: the product of a bfloat16 and a float32 would be a float32 weight
    return halves.view(torch.float16).to(dtype).view(blocks).mul_(scale[:, :, None, :, None]).view(weight.shape)


def _as_float(scale: torch.Tensor) -> torch.Tensor:
    if scale.dtype == torch.float32:
        return scale
    return (scale.view(torch.uint8).to(torch.int32) << 23).view(torch.float32)  # e8m0 is the exponent of a float32


class _Fp8GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, expert_tokens: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale_inv, expert_tokens)
        return ops.grouped_mm(rows, _dequantized(weight, scale_inv, rows.dtype).mT, expert_tokens)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale_inv, expert_tokens = ctx.saved_tensors
        dx = ops.grouped_mm(dy.contiguous(), _dequantized(weight, scale_inv, dy.dtype), expert_tokens)
        return dx, None, None, None
