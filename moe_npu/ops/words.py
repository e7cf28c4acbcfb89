"""Words: a scale and an offset in one int64, eight int4 values in one int32 (spec: grouped matmul 2.4, 2.5, 0.3, 0.4).

bits 0..31 of an int64 word   float32 scale, its mantissa cut to ten bits
bits 37..45                   offset, two's complement
bit 46                        set: the results are signed
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import dtype_name, reject, require, require_device
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import INT4_PER_WORD, pack_int4, round_to_int
from moe_npu.ops._signature import typed

# ---------------------------------------------------------------- npu_trans_quant_param

_FP19 = 0xFFFFE000
_SIGNED_OUTPUT = 1 << 46


def _check_trans_quant_param(scale: torch.Tensor, offset: torch.Tensor | None, round_mode: int) -> None:
    op = "npu_trans_quant_param"
    require_device(op, "offset", offset, scale)
    if scale.dtype != torch.float32:
        reject(f"{op}: scale must have dtype float32, but has {dtype_name(scale.dtype)}")
    if scale.dim() not in (1, 2) or scale.numel() == 0:
        reject(f"{op}: scale must have shape [N], [1, N] or [G, N] and not be empty, but has {tuple(scale.shape)}")
    require(scale.is_contiguous(), f"{op}: scale must be contiguous")
    if round_mode not in (0, 1):
        reject(f"{op}: round_mode should be 0 or 1, but round_mode is {round_mode}")
    if offset is None:
        return
    if offset.dtype != torch.float32:
        reject(f"{op}: offset must have dtype float32, but has {dtype_name(offset.dtype)}")
    if scale.dim() == 2:
        fits = offset.shape == scale.shape or (offset.dim() in (1, 2) and offset.numel() in (1, scale.size(1)))
    else:
        fits = offset.dim() == 1 and (
            offset.size(0) == scale.size(0) or (offset.numel() > 0 and 1 in (scale.size(0), offset.size(0)))
        )
    if not fits:
        reject(
            f"{op}: offset must have the shape {tuple(scale.shape)} of scale, one row of it or one number, or for one "
            f"scale one dimension, but has {tuple(offset.shape)}"
        )


def scale_words(scale: torch.Tensor, offset: torch.Tensor | None, round_mode: int) -> torch.Tensor:
    """Int64 words of float32 scales and offsets of shapes that broadcast."""
    bits = scale.view(torch.int32).to(torch.int64).bitwise_and(0xFFFFFFFF)
    if round_mode == 1:
        exponent = bits.bitwise_right_shift(23).bitwise_and(0xFF)
        # to ten bits of mantissa, half to even, with a carry into the exponent
        rounded = bits + 0xFFF + bits.bitwise_right_shift(13).bitwise_and(1)
        rounded = torch.where(exponent == 0xFF, bits, rounded)
        bits = torch.where(exponent == 0, bits.bitwise_and(1 << 31), rounded)
    words = bits.bitwise_and(_FP19).bitwise_or(_SIGNED_OUTPUT)
    if offset is None:
        return words
    field = round_to_int(offset, -256, 255, torch.int64).bitwise_and(0x1FF).bitwise_left_shift(37)
    return words.bitwise_or(field).contiguous()


def _trans_quant_param_npu(scale: torch.Tensor, offset: torch.Tensor | None, round_mode: int) -> torch.Tensor:
    if scale.dim() == 1:
        return torch.ops.npu.npu_trans_quant_param(scale, offset, round_mode)
    # one row at most is accepted, and each element is a word of its own
    flat = None if offset is None else offset.expand(scale.shape).flatten()
    return torch.ops.npu.npu_trans_quant_param(scale.flatten(), flat, round_mode).view(scale.shape)


def _trans_quant_param_fake(scale: torch.Tensor, offset: torch.Tensor | None, round_mode: int) -> torch.Tensor:
    # sizes of 1 are constants to a compiler
    shape = scale.shape if offset is None or scale.dim() == 2 or offset.size(0) == 1 else offset.shape
    return scale.new_empty(shape, dtype=torch.int64)


_trans_quant_param_op = register_op(
    "npu_trans_quant_param(Tensor scale, Tensor? offset, int round_mode) -> Tensor",
    cpu=scale_words,
    npu=_trans_quant_param_npu,
    fake=_trans_quant_param_fake,
)


@typed
def npu_trans_quant_param(
    scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0
) -> torch.Tensor:
    """The int64 words in which matmuls with int8 results take scale and offset.

    Bits 0 to 31 hold the float32 scale cut to ten bits of mantissa, bits 37 to 45 the offset -256..255, bit 46 is set.
    Words have no gradient: the result is detached.

    Args:
        scale: float32 ``[N]``, ``[1, N]`` or (on CPU and here on a device too) ``[G, N]``; contiguous, not empty.
        offset: float32, rounded to the nearest integer: the shape of scale, or one row or one number for a scale of
            more, or ``[N]`` with scale ``[1]``; None for 0.
        round_mode: 0 cuts the mantissa off, 1 rounds it to nearest even (and subnormal scales to zero).

    Returns:
        int64 of the shape of the larger argument.

    Raises:
        OperatorError: wrong dtype, shape or round_mode.

    Example:
        >>> words = npu_trans_quant_param(torch.tensor([1.0, 0.5]), torch.tensor([0.0, -2.0]))
        >>> [hex(word) for word in words.tolist()]
        ['0x40003f800000', '0x7fc03f000000']
    """
    round_mode = round_mode or 0
    _check_trans_quant_param(scale, offset, round_mode)
    return _trans_quant_param_op(scale.detach(), None if offset is None else offset.detach(), round_mode)


# ---------------------------------------------------------------- npu_convert_weight_to_int4pack


def _check_int4pack(weight: torch.Tensor) -> None:
    op = "npu_convert_weight_to_int4pack"
    if weight.dtype != torch.int32:
        reject(
            f"{op}: weight dtype only support int32 and float32 (float4 values), of which here int32 only, "
            f"but is {dtype_name(weight.dtype)}"
        )
    if weight.dim() not in (2, 3) or weight.numel() == 0:
        reject(f"{op}: weight must have 2 or 3 dimensions and not be empty, but has shape {tuple(weight.shape)}")
    if not weight.is_contiguous():
        reject(f"{op}: weight is Not contiguous, its strides are {tuple(weight.stride())}")
    if weight.size(-1) % INT4_PER_WORD != 0:
        reject(f"{op}: weight last dim should be the multiple of 8, but is {weight.size(-1)}")


def _int4pack_cpu(weight: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
    return pack_int4(weight)


def _int4pack_npu(weight: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
    # torch_npu packs the first matrix of a 3-D tensor only
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(weight.flatten(0, -2), inner_k_tiles)
    return packed.view(*weight.shape[:-1], -1)


def _int4pack_fake(weight: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
    return weight.new_empty(*weight.shape[:-1], weight.shape[-1] // INT4_PER_WORD)


_int4pack_op = register_op(
    "npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles) -> Tensor",
    cpu=_int4pack_cpu,
    npu=_int4pack_npu,
    fake=_int4pack_fake,
    is_lowered=False,
)


@typed
def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """Int4 values packed eight to an int32 along the last axis, element 0 in the lowest four bits.

    For a weight transposed in the grouped matmul, pack ``[N, K]`` and transpose the result.

    Args:
        weight: int32, contiguous, ``[R, C]`` or ``[E, R, C]``, not empty, ``C % 8 == 0``; the low four bits of each
            element are kept, so values belong in -8..7.
        inner_k_tiles: ignored, as on the device.

    Returns:
        int32 of the shape of weight with the last dim divided by 8.

    Raises:
        OperatorError: another dtype, not contiguous, empty, or a last dim that is no multiple of 8.

    Example:
        >>> npu_convert_weight_to_int4pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int32))
        tensor([[-2023406815]], dtype=torch.int32)
    """
    _check_int4pack(weight)
    return _int4pack_op(weight, inner_k_tiles)
