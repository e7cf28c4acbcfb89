"""Symmetric integer quantization of weights: codes and scales, and back."""

from __future__ import annotations

import torch
from einops import rearrange

from moe_npu.ops import _numerics
from moe_npu.ops._numerics import INT4_PER_WORD


def quantize(
    weight: torch.Tensor, *, bits: int, group_size: int | None = None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer codes of ``weight`` and the scales that give it back: ``weight ~= codes * scale`` per group.

    The scale of a group is its largest magnitude over ``2**(bits - 1) - 1``, rounded to ``scale_dtype`` *before* the
    codes are computed, so that the codes fit the scale that is stored. A group of zeros gets a small positive scale.

    Args:
        weight: ``[..., N, K]``, any float dtype, finite.
        bits: 8 or 4.
        group_size: how many consecutive values along K share a scale, a divisor of K; None for all of them.
        scale_dtype: dtype of the scales.

    Returns:
        ``(codes, scale)``: int8 ``[..., N, K]`` in ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``, and ``[..., N, G]`` with
        ``G = K / group_size``.

    Raises:
        ValueError: NaN or infinite weights, unknown ``bits``, or a ``group_size`` that does not divide K.

    Example:
        >>> codes, scale = quantize(torch.tensor([[0.6, -1.0, 0.25, 0.0]]), bits=4, scale_dtype=torch.float32)
        >>> codes, scale
        (tensor([[ 4, -7,  2,  0]], dtype=torch.int8), tensor([[0.1429]]))
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, but is {bits}")
    if not weight.is_floating_point() or weight.dim() < 2:
        raise ValueError(
            f"weight must be a float tensor [..., N, K], but is {weight.dtype} of shape {tuple(weight.shape)}"
        )
    columns = weight.size(-1)
    group_size = columns if group_size is None else group_size
    if group_size < 1 or columns % group_size != 0:
        raise ValueError(f"group_size must divide the {columns} input features of the weight, but is {group_size}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, but holds NaN or infinite values")
    largest = 2 ** (bits - 1) - 1
    groups = rearrange(weight.float(), "... (g s) -> ... g s", s=group_size)
    scale = (groups.abs().amax(-1) / largest).to(scale_dtype)  # [..., N, G]
    if bool(torch.isinf(scale).any()):
        raise ValueError(
            f"weight is too large for scales of {scale_dtype}: its largest magnitude is {weight.abs().max()}"
        )
    scale = torch.where(scale == 0, torch.finfo(scale_dtype).eps, scale)
    codes = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-largest, largest).to(torch.int8)
    return rearrange(codes, "... g s -> ... (g s)"), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``codes * scale``, each scale applied to its group of consecutive values along K.

    Args:
        codes: int8 ``[..., N, K]``.
        scale: ``[..., N, G]``, G a divisor of K.
        dtype: dtype of the result; the product is formed in float32.

    Returns:
        ``[..., N, K]`` of ``dtype``.

    Example:
        >>> dequantize(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]]))
        tensor([[ 1., -2.]])
    """
    groups = rearrange(codes, "... (g s) -> ... g s", g=scale.size(-1))
    return rearrange((groups.float() * scale.float().unsqueeze(-1)).to(dtype), "... g s -> ... (g s)")


def group_size_for(columns: int, wanted: int) -> int:
    """The largest divisor of ``columns`` that is even and at most ``wanted``.

    Raises:
        ValueError: ``columns`` cannot be packed (no multiple of 8), or ``wanted`` is less than 2.

    Example:
        >>> group_size_for(768, 128), group_size_for(1408, 128), group_size_for(64, 128)
        (128, 128, 64)
    """
    if columns % INT4_PER_WORD != 0 or columns == 0:
        raise ValueError(f"int4 weights need a multiple of {INT4_PER_WORD} input features, but there are {columns}")
    if wanted < 2:
        raise ValueError(f"group_size must be at least 2, but is {wanted}")
    return next(size for size in range(min(wanted, columns), 1, -1) if columns % size == 0 and size % 2 == 0)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Int4 codes eight to an int32 word along the last axis, the first in the lowest four bits.

    Args:
        codes: ``[..., L]``, an integer dtype, values in -8..7, L a multiple of 8.

    Returns:
        int32 ``[..., L/8]``.

    Raises:
        ValueError: another dtype, a value out of range, or an L that is no multiple of 8.

    Example:
        >>> pack_int4(torch.tensor([1, 2, 3, 4, 5, 6, 7, -8]))
        tensor([-2023406815], dtype=torch.int32)
    """
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers, but are {codes.dtype}")
    if codes.dim() == 0 or codes.size(-1) % INT4_PER_WORD != 0:
        raise ValueError(
            f"the last axis of codes must be a multiple of {INT4_PER_WORD}, but shape is {tuple(codes.shape)}"
        )
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes must lie in -8..7, but reach from {int(codes.min())} to {int(codes.max())}")
    return _numerics.pack_int4(codes)


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """The int8 codes ``[..., 8 * L]`` in -8..7 of int32 words ``[..., L]``: the inverse of :func:`pack_int4`.

    Raises:
        ValueError: words are not int32, or have no axis.

    Example:
        >>> unpack_int4(torch.tensor([-2023406815], dtype=torch.int32))
        tensor([ 1,  2,  3,  4,  5,  6,  7, -8], dtype=torch.int8)
    """
    if words.dtype != torch.int32 or words.dim() == 0:
        raise ValueError(f"words must be int32 [..., L], but are {words.dtype} of shape {tuple(words.shape)}")
    return _numerics.unpack_int4(words)
