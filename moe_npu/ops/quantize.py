"""Quantisation of activations and packing of weights (spec: grouped matmul 2.2, 2.4).

    v = input * smooth_scales,   amax = max |v|
    scale = amax * (1 / Q),      y = round(v * (Q / amax))       with Q = 127 (int8) or 7 (int4)

in float32, rounded half to even; a zero row gives scale 0 and y 0.
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import as_dtype, dtype_name, reject, require, require_device, require_dtype
from moe_npu.ops._groups import CUMSUM, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import INT4_PER_WORD, pack_int4
from moe_npu.ops._signature import typed

_HALVES = (torch.float16, torch.bfloat16)
_QUANT_MODES = ("pertoken", "perchannel", "pertensor")
_MAX_GROUPS = 1024


def _check_dynamic_quant(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
    dst_type_max: float,
) -> None:
    op = "npu_dynamic_quant"
    require_device(op, "smooth_scales", smooth_scales, input)
    require_device(op, "group_index", group_index, input)
    if input.dtype not in _HALVES:
        reject(f"{op}: input must have dtype float16, bfloat16, but has {dtype_name(input.dtype)}")
    require(
        input.dim() >= 2, f"{op}: Input shape dim should be greater than 1, but input has shape {tuple(input.shape)}"
    )
    require(
        dst_type in (torch.int8, torch.quint4x2),
        f"{op}: dst_type must be None, torch.int8 or torch.quint4x2, but is {dst_type}",
    )
    if dst_type != torch.int8 and input.size(-1) % INT4_PER_WORD != 0:
        reject(f"{op}: Input shape last dim must be divded by 8 when int4 quantization, but is {input.size(-1)}")
    if quant_mode not in _QUANT_MODES:
        reject(f"{op}: quant_mode must be one of {_QUANT_MODES}, but is {quant_mode!r}")
    if dst_type_max != 0.0:
        reject(f"{op}: dst_type_max must be 0 for integer results, but is {dst_type_max}")
    if smooth_scales is None:
        require(group_index is None, f"{op}: group_index needs smooth_scales, which is None")
        return
    require_dtype(op, "smooth_scales", smooth_scales, (input.dtype,))
    channels = input.size(-2) if quant_mode == "perchannel" else input.size(-1)
    if group_index is None:
        if smooth_scales.shape != (channels,):
            reject(f"{op}: smooth_scales must have shape {(channels,)}, but has {tuple(smooth_scales.shape)}")
        return
    require(quant_mode != "perchannel", f"{op}: group_index must be None for quant_mode 'perchannel'")
    require_dtype(op, "group_index", group_index, (torch.int32,))
    if not (group_index.dim() == 1 and 1 <= group_index.size(0) <= _MAX_GROUPS):
        reject(
            f"{op}: group_index must have shape [E] with 1 to {_MAX_GROUPS} groups, but has {tuple(group_index.shape)}"
        )
    if smooth_scales.shape != (group_index.size(0), channels):
        reject(
            f"{op}: smooth_scales must have shape {(group_index.size(0), channels)} with this group_index, "
            f"but has {tuple(smooth_scales.shape)}"
        )


def _smoothed(
    input: torch.Tensor, smooth_scales: torch.Tensor | None, group_index: torch.Tensor | None, quant_mode: str
) -> torch.Tensor:
    values = input.float()
    if smooth_scales is None:
        return values
    if group_index is None:
        return values * smooth_scales.float().unsqueeze(-1 if quant_mode == "perchannel" else 0)
    rows = values.flatten(0, -2)
    groups = row_groups("npu_dynamic_quant", group_index, CUMSUM, rows.size(0))
    covered = groups[-1].end if groups else 0
    require(
        covered == rows.size(0),
        f"npu_dynamic_quant: the last entry of group_index must be the number of rows {rows.size(0)}, but is {covered}",
    )
    smoothed = torch.empty_like(rows)
    for group, start, end in groups:
        torch.mul(rows[start:end], smooth_scales[group].float(), out=smoothed[start:end])
    return smoothed.view(input.shape)


def _dynamic_quant_cpu(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = _smoothed(input, smooth_scales, group_index, quant_mode)
    largest = 127.0 if dst_type == torch.int8 else 7.0
    if quant_mode == "pertoken":
        amax = _amax(values, -1)
        scale = amax.squeeze(-1)
    elif quant_mode == "perchannel":
        amax = _amax(values, -2)
        scale = amax.squeeze(-2)
    else:
        amax = values.abs().amax() if values.numel() else values.new_zeros(())
        scale = amax.view(1)
    # a division of tensors: with a Python number torch multiplies by the reciprocal, which moves ties
    factor = torch.where(amax == 0, 0.0, torch.tensor(largest) / amax)
    values = (values * factor).round_()
    if not bool(torch.isfinite(factor).all() & torch.isfinite(amax).all()):  # the factor of a tiny maximum is infinite
        values = values.nan_to_num_(0.0).clamp_(-largest, largest)
    codes = values.to(torch.int8).contiguous()
    # the device multiplies by the reciprocal, a float32 constant
    return codes if dst_type == torch.int8 else pack_int4(codes), (scale * (1.0 / largest)).contiguous()


def _amax(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest magnitude along ``dim``, which stays with size one; zero where there is none."""
    if values.numel() == 0:
        shape = list(values.shape)
        shape[dim] = 1
        return values.new_zeros(shape)
    return values.abs().amax(dim, keepdim=True)


def _dynamic_quant_npu(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if input.numel() == 0:
        return _dynamic_quant_fake(input, smooth_scales, group_index, dst_type, quant_mode)
    # contiguous: the shape function of torch_npu repeats the strides of input, the kernel does not
    return torch.ops.npu.npu_dynamic_quant(
        input.contiguous(),
        smooth_scales=smooth_scales,
        group_index=group_index,
        dst_type=dst_type,
        quant_mode=quant_mode,
    )


def _dynamic_quant_fake(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = list(input.shape)
    if quant_mode == "pertoken":
        scale = input.new_empty(shape[:-1], dtype=torch.float32)
    elif quant_mode == "perchannel":
        scale = input.new_empty([*shape[:-2], shape[-1]], dtype=torch.float32)
    else:
        scale = input.new_empty(1, dtype=torch.float32)
    if dst_type == torch.int8:
        return input.new_empty(shape, dtype=torch.int8), scale
    return input.new_empty([*shape[:-1], shape[-1] // INT4_PER_WORD], dtype=torch.int32), scale


_dynamic_quant_op = register_op(
    "npu_dynamic_quant(Tensor input, Tensor? smooth_scales, Tensor? group_index, ScalarType dst_type, str quant_mode)"
    " -> (Tensor, Tensor)",
    cpu=_dynamic_quant_cpu,
    npu=_dynamic_quant_npu,
    fake=_dynamic_quant_fake,
)


@typed
def npu_dynamic_quant(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: torch.dtype | int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 or int4 codes of ``input`` and the scale that gives them back: ``input ~= y * scale``.

    Rounding has no gradient: the results are detached from ``input``.

    Args:
        input: ``[..., H]`` of at least two dimensions, float16 or bfloat16.
        smooth_scales: ``[H]``, dtype of input, multiplied in first; with ``group_index`` ``[E, H]``; ``[size(-2)]`` for
            ``"perchannel"``.
        group_index: ``[E]`` int32, cumulative row counts: rows of group e use ``smooth_scales[e]``.
        dst_type: None or ``torch.int8``; ``torch.quint4x2`` for int4, eight per int32, H a multiple of 8.
        quant_mode: the axis of the maximum: ``"pertoken"`` the last, ``"perchannel"`` the one before, ``"pertensor"``
            all.
        dst_type_max: must be 0.

    Returns:
        ``(y, scale)``: int8 of the shape of input, or int32 with the last dim divided by 8; and float32, the shape of
        input without the reduced axis (``[1]`` per tensor). A zero row has scale 0.

    Raises:
        OperatorError: wrong dtype, rank, size or mode; on CPU also a group_index that does not end at the row count.

    Example:
        >>> npu_dynamic_quant(torch.tensor([[1.0, -2.0, 3.0, 4.0]], dtype=torch.bfloat16))
        (tensor([[ 32, -64,  95, 127]], dtype=torch.int8), tensor([0.0315]))
    """
    dst_type = as_dtype("npu_dynamic_quant", "dst_type", dst_type) or torch.int8
    _check_dynamic_quant(input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max)
    smooth = None if smooth_scales is None else smooth_scales.detach()
    return _dynamic_quant_op(input.detach(), smooth, group_index, dst_type, quant_mode)


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
    op = "npu_convert_weight_to_int4pack"
    require(weight.dtype == torch.int32, f"{op}: weight dtype only support int32, but is {dtype_name(weight.dtype)}")
    require(
        weight.dim() in (2, 3) and weight.numel() > 0,
        f"{op}: weight must have 2 or 3 dimensions and not be empty, but has shape {tuple(weight.shape)}",
    )
    require(weight.is_contiguous(), f"{op}: weight is Not contiguous, its strides are {tuple(weight.stride())}")
    if weight.size(-1) % INT4_PER_WORD != 0:
        reject(f"{op}: weight last dim should be the multiple of 8, but is {weight.size(-1)}")
    return _int4pack_op(weight, inner_k_tiles)
