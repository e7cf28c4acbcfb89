"""Numeric primitives of the CPU kernels: matmuls with stated accumulation, int4 packing, dequantisation.

Spec: grouped matmul 0.2 (rounding, accumulation), 0.4 (int4 packing), 1.8.6 (dequantised weights).
"""

from __future__ import annotations

from functools import lru_cache

import torch

INT4_PER_WORD = 8
# products of int8 values are at most 2**14: sums of this many are exact in float32
_EXACT_FLOAT32_TERMS = 1024


@lru_cache(maxsize=1)
def _native_half_rows() -> int:
    """Rows from which a half-precision matmul is faster on operands converted to float32 (measured)."""
    return 64 if torch.cpu.get_capabilities().get("avx512_bf16") else 4


@lru_cache(maxsize=1)
def _has_int8_dot_product() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def matmul_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """``out[:] = x @ weight + bias``: accumulated in float32 (float64 for float64), rounded once to ``out.dtype``.

    Shapes: out ``[M, N]``, x ``[M, K]``, weight ``[K, N]`` of x's dtype and any strides, bias ``[N]``.
    """
    if x.dtype in (torch.float32, torch.float64):
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)
    elif bias is None and x.size(0) < _native_half_rows():
        torch.mm(x, weight, out=out)  # oneDNN accumulates in float32; a bias would be added after rounding
    else:
        product = torch.mm(x.float(), weight.float())
        out.copy_(product if bias is None else product.add_(bias))


def int_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact int32 ``x @ weight`` of int8 ``[M, K]`` and ``[K, N]``.

    ``torch._int_mm`` where the CPU has int8 dot products; elsewhere it is a scalar loop, about 30 times slower than
    float32 matmuls over slices of K short enough for every partial sum to be exact.
    """
    if _has_int8_dot_product():
        return torch._int_mm(x, weight)
    accumulator = torch.zeros(x.size(0), weight.size(1), dtype=torch.int32)
    for start in range(0, x.size(1), _EXACT_FLOAT32_TERMS):
        terms = slice(start, start + _EXACT_FLOAT32_TERMS)
        accumulator += torch.mm(x[:, terms].float(), weight[terms].float()).to(torch.int32)
    return accumulator


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int4 values ``[..., L]`` (any integer dtype, low four bits) into int32 words ``[..., L / 8]``.

    Element 0 sits in the least significant nibble.
    """
    nibbles = values.to(torch.int32).unflatten(-1, (-1, INT4_PER_WORD)).bitwise_and(0xF)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    # the nibbles do not overlap, so the sum is their union; int32 addition wraps to the sign bit as wanted
    return nibbles.bitwise_left_shift(shifts).sum(-1, dtype=torch.int32)


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """Int8 values ``[..., 8 * L]`` in -8..7 of int32 words ``[..., L]``; the inverse of :func:`pack_int4`."""
    shifts = torch.arange(28, -1, -4, dtype=torch.int32, device=words.device)
    nibbles = words.unsqueeze(-1).bitwise_left_shift(shifts).bitwise_right_shift(28)
    return nibbles.to(torch.int8).flatten(-2)


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether the last two axes are a transposed view (spec: grouped matmul 0.5)."""
    rows, columns = weight.shape[-2:]
    if rows == 1 and columns == 1:
        return False
    return bool(weight.stride(-2) == 1 and weight.stride(-1) == rows)  # not a symbolic one


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the strides of fresh memory.

    A contiguous tensor may have any stride along an axis of size 1, and the device recognises a transposed view by
    its strides alone.
    """
    tensor = tensor.contiguous()
    return tensor.reshape(-1).view(tensor.shape) if 1 in tensor.shape else tensor


def unpack_int4_weight(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Int8 ``[..., K, N]`` of an int32-packed weight of N ``columns``: packed along N, or else along K."""
    if weight.size(-1) * INT4_PER_WORD == columns:
        return unpack_int4(weight)
    return unpack_int4(weight.mT).mT


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """``(weight + offset) * scale`` in the dtype of ``scale``, rounded as the device rounds (spec 1.8.6).

    Args:
        weight: int8 ``[..., K, N]``.
        scale: float16 or bfloat16, ``[..., G, N]``; row ``k // (K / G)`` applies to weight row k.
        offset: as scale.
    """
    grouped = weight.unflatten(-2, (scale.size(-2), -1))  # [..., G, K / G, N]
    scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
    if scale.dtype == torch.float16:
        result = (grouped.to(torch.float16) + offset) * scale
    else:
        result = ((grouped.float() + offset) * scale.float()).to(scale.dtype)
    return result.flatten(-3, -2)
