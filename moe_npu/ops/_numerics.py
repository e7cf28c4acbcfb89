"""Numeric primitives of the CPU kernels: matmuls with stated accumulation, rounding, int4 packing, scale words.

Spec: grouped matmul 0.2 (rounding, accumulation), 0.3 (scale words), 0.4 (int4 packing), 0.9 (tiles), 1.8.6
(dequantized weights), 1.8.7 and 1.8.8 (int4 products).
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
        # it takes any other strides (of an axis of size 1, of expanded rows) for these, and reads other memory
        x, weight = (matrix if _is_plain(matrix) else dense(matrix) for matrix in (x, weight))
        return torch._int_mm(x, weight)
    accumulator = torch.zeros(x.size(0), weight.size(1), dtype=torch.int32)
    for start in range(0, x.size(1), _EXACT_FLOAT32_TERMS):
        terms = slice(start, start + _EXACT_FLOAT32_TERMS)
        accumulator += torch.mm(x[:, terms].float(), weight[terms].float()).to(torch.int32)
    return accumulator


def _is_plain(matrix: torch.Tensor) -> bool:
    """Whether the rows, or else the columns, of ``matrix`` lie one after the other, gaps allowed."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return 1 not in (rows, columns) and ((right == 1 and down >= columns) or (down == 1 and right >= rows))


def round_to_int(values: torch.Tensor, low: int, high: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Float values rounded half to even, clamped to ``low..high``, as ``dtype``; NaN gives 0."""
    return values.round().nan_to_num(0.0, float("inf"), float("-inf")).clamp_(low, high).to(dtype)


def signed_words(words: torch.Tensor) -> torch.Tensor:
    """Scale words given as uint64 as the int64 that tables and kernels know; anything else as it is."""
    return words.view(torch.int64) if words.dtype == torch.uint64 else words


def scale_of_words(words: torch.Tensor) -> torch.Tensor:
    """The float32 scale in the low half of int64 or uint64 words, truncated to 10 mantissa bits ("fp19")."""
    # 0xFFFFE000 as a signed number clears the 13 bits
    return words.view(torch.int64).to(torch.int32).bitwise_and(-0x2000).view(torch.float32)


def offset_of_words(words: torch.Tensor) -> torch.Tensor:
    """The offset -256..255 in bits 37 to 45 of int64 words."""
    offset = words.view(torch.int64).bitwise_right_shift(37).bitwise_and(0x1FF)
    return torch.where(offset >= 256, offset - 512, offset)


def requantize(accumulator: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Int8 of int32 accumulators ``[M, N]`` by scale words ``[N]``, through nine bits (spec 1.8.3)."""
    rounded = (accumulator.float() * scale_of_words(words)).round().clamp(-256, 255)
    return (rounded + offset_of_words(words)).clamp(-128, 127).to(torch.int8)


def int4_matmul(x: torch.Tensor, weight: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Float16 ``x @ (weight * scale)`` of int4 values: each group of K is scaled in float16, then summed in float16.

    Shapes: x ``[M, K]`` and weight ``[K, N]`` int8 holding int4 values, words ``[G, N]``, one row per K / G terms.
    """
    scale = scale_of_words(words)
    length = x.size(1) // scale.size(0)
    total = torch.zeros(x.size(0), weight.size(1), dtype=torch.float16)
    for group in range(scale.size(0)):
        terms = slice(group * length, (group + 1) * length)
        part = (int_matmul(x[:, terms], weight[terms]).float() * scale[group]).to(torch.float16)
        total = part if group == 0 else total + part
    return total


def int8_int4_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    words: torch.Tensor,
    bias: torch.Tensor,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float32 product of int8 activations and int4 weights as the device forms it, before the scale of the rows.

    x is split in two int4 digits, ``16 * high + low = x - 8``; the caller's bias makes up for the 8. With ``offset``
    (asymmetric weights) the sum of each row of x times the offset is added (spec 1.8.8).

    Shapes: x ``[M, K]`` int8, weight ``[K, N]`` int8 holding int4 values, words ``[G, N]``, bias and offset ``[N]``.
    """
    high = x.bitwise_right_shift(4)
    low = x.bitwise_and(15) - 8
    total = 16 * int4_matmul(high, weight, words).float() + int4_matmul(low, weight, words).float() + bias
    return total if offset is None else total + x.sum(1, keepdim=True).float() * offset


def from_tiles(weight: torch.Tensor) -> torch.Tensor:
    """``[E, K, N]`` of a weight in the tile order of FRACTAL_NZ ``[E, N / c, K / 16, 16, c]`` (spec 0.9)."""
    experts, _, row_tiles, rows, _ = weight.shape
    return weight.permute(0, 2, 3, 1, 4).reshape(experts, row_tiles * rows, -1)


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 codes of float32 rows and the scale of each, ``max|v| / 127``: ``values ~= codes * scale``.

    A zero row has scale 0 and codes 0. Shapes: ``[..., H]`` to ``[..., H]`` and ``[...]``.
    """
    scale = (values.abs().amax(-1) if values.size(-1) else values.new_zeros(values.shape[:-1])) / 127
    return round_to_int(values / scale.unsqueeze(-1), -128, 127), scale


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
    if 1 not in tensor.shape:
        return tensor
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tensor.as_strided(tensor.shape, strides[::-1])


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
