"""Quantisation of activations by their own range (spec: grouped matmul 2.2, 2.3).

    v = input * smooth_scales,   amax = max |v|
    scale = amax * (1 / Q),      y = round(v * (Q / amax))       with Q = 127 (int8) or 7 (int4)

in float32, rounded half to even; a zero row gives scale 0 and y 0. Asymmetric, with divisions as written, since the
last bit of an offset near zero depends on them:

    scale = max((max v - min v) / R, 1e-12)                      with R = 255 or 15, high = 127 or 7
    offset = high - max v / scale,   y = round(v / scale + offset)
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import as_dtype, dtype_name, reject, require, require_device, require_dtype
from moe_npu.ops._groups import CUMSUM, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import INT4_PER_WORD, pack_int4, round_to_int
from moe_npu.ops._signature import typed

_HALVES = (torch.float16, torch.bfloat16)
_QUANT_MODES = ("pertoken", "perchannel", "pertensor")
_MAX_GROUPS = 1024
_SMALLEST_SCALE = 1e-12


def _check(
    op: str,
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
    dst_type_max: float,
) -> None:
    require_device(op, "smooth_scales", smooth_scales, input)
    require_device(op, "group_index", group_index, input)
    if input.dtype not in _HALVES:
        reject(f"{op}: input must have dtype float16, bfloat16, but has {dtype_name(input.dtype)}")
    if input.dim() < 2:
        reject(f"{op}: Input shape dim should be greater than 1, but input has shape {tuple(input.shape)}")
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
    op: str,
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    quant_mode: str,
) -> torch.Tensor:
    values = input.float()
    if smooth_scales is None:
        return values
    if group_index is None:
        return values * smooth_scales.float().unsqueeze(-1 if quant_mode == "perchannel" else 0)
    rows = values.flatten(0, -2)
    groups = row_groups(op, group_index, CUMSUM, rows.size(0), "group_index")
    covered = groups[-1].end if groups else 0
    require(
        covered == rows.size(0),
        f"{op}: the last entry of group_index must be the number of rows {rows.size(0)}, but is {covered}",
    )
    smoothed = torch.empty_like(rows)
    for group, start, end in groups:
        torch.mul(rows[start:end], smooth_scales[group].float(), out=smoothed[start:end])
    return smoothed.view(input.shape)


def _extreme(values: torch.Tensor, quant_mode: str, largest: bool) -> torch.Tensor:
    """The largest or smallest value along what shares a scale, which stays with size one; zero where there is none."""
    dims = {"pertoken": [-1], "perchannel": [-2], "pertensor": list(range(values.dim()))}[quant_mode]
    if values.numel() == 0:
        shape = list(values.shape)
        for dim in dims:
            shape[dim] = 1
        return values.new_zeros(shape)
    return values.amax(dims, keepdim=True) if largest else values.amin(dims, keepdim=True)


def _without_reduced(parameter: torch.Tensor, quant_mode: str) -> torch.Tensor:
    if quant_mode == "pertensor":
        return parameter.reshape(-1)[:1].clone()
    return parameter.squeeze(-1 if quant_mode == "pertoken" else -2).contiguous()


def _symmetric_cpu(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = _smoothed("npu_dynamic_quant", input, smooth_scales, group_index, quant_mode)
    limit = 127.0 if dst_type == torch.int8 else 7.0
    amax = _extreme(values.abs(), quant_mode, largest=True)
    # a division of tensors: with a Python number torch multiplies by the reciprocal, which moves ties
    factor = torch.where(amax == 0, 0.0, torch.tensor(limit) / amax)
    values = (values * factor).round_()
    if not bool(torch.isfinite(factor).all() & torch.isfinite(amax).all()):  # the factor of a tiny maximum is infinite
        values = values.nan_to_num_(0.0).clamp_(-limit, limit)
    codes = values.to(torch.int8).contiguous()
    # the device multiplies by the reciprocal, a float32 constant
    scale = _without_reduced(amax, quant_mode) * (1.0 / limit)
    return codes if dst_type == torch.int8 else pack_int4(codes), scale


def _asymmetric_cpu(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = _smoothed("npu_dynamic_quant_asymmetric", input, smooth_scales, group_index, quant_mode)
    low, high = (-128, 127) if dst_type == torch.int8 else (-8, 7)
    largest, smallest = _extreme(values, quant_mode, largest=True), _extreme(values, quant_mode, largest=False)
    scale = ((largest - smallest) / torch.tensor(float(high - low))).clamp(min=_SMALLEST_SCALE)
    offset = high - largest / scale
    codes = round_to_int(values / scale + offset, low, high).contiguous()
    return (
        codes if dst_type == torch.int8 else pack_int4(codes),
        _without_reduced(scale, quant_mode),
        _without_reduced(offset, quant_mode),
    )


def _symmetric_npu(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if input.numel() == 0:
        y, scale = _symmetric_fake(input, smooth_scales, group_index, dst_type, quant_mode)
        return y, scale.zero_()
    # contiguous: the shape function of torch_npu repeats the strides of input, the kernel does not
    return torch.ops.npu.npu_dynamic_quant(
        input.contiguous(),
        smooth_scales=smooth_scales,
        group_index=group_index,
        dst_type=dst_type,
        quant_mode=quant_mode,
    )


def _asymmetric_npu(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if input.numel() == 0:  # as a row of zeros
        y, scale, offset = _asymmetric_fake(input, smooth_scales, group_index, dst_type, quant_mode)
        return y, scale.fill_(_SMALLEST_SCALE), offset.fill_(127.0 if dst_type == torch.int8 else 7.0)
    return torch.ops.npu.npu_dynamic_quant_asymmetric(
        input.contiguous(),
        smooth_scales=smooth_scales,
        group_index=group_index,
        dst_type=dst_type,
        quant_mode=quant_mode,
    )


def _symmetric_fake(
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


def _asymmetric_fake(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: torch.dtype,
    quant_mode: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, scale = _symmetric_fake(input, smooth_scales, group_index, dst_type, quant_mode)
    return y, scale, torch.empty_like(scale)


_ARGUMENTS = "(Tensor input, Tensor? smooth_scales, Tensor? group_index, ScalarType dst_type, str quant_mode)"
_symmetric_op = register_op(
    f"npu_dynamic_quant{_ARGUMENTS} -> (Tensor, Tensor)",
    cpu=_symmetric_cpu,
    npu=_symmetric_npu,
    fake=_symmetric_fake,
)
_asymmetric_op = register_op(
    f"npu_dynamic_quant_asymmetric{_ARGUMENTS} -> (Tensor, Tensor, Tensor)",
    cpu=_asymmetric_cpu,
    npu=_asymmetric_npu,
    fake=_asymmetric_fake,
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
    _check("npu_dynamic_quant", input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max)
    smooth = None if smooth_scales is None else smooth_scales.detach()
    return _symmetric_op(input.detach(), smooth, group_index, dst_type, quant_mode)


@typed
def npu_dynamic_quant_asymmetric(
    input: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: torch.dtype | int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Int8 or int4 codes that use their whole range, with scale and offset: ``input ~= (y - offset) * scale``.

    Rounding has no gradient: the results are detached from ``input``.

    Args:
        input: as in :func:`npu_dynamic_quant`.
        smooth_scales: as there.
        group_index: as there, cumulative.
        dst_type: as there.
        quant_mode: as there, the axis of the maximum and the minimum.
        dst_type_max: must be 0.

    Returns:
        ``(y, scale, offset)``: y as there; scale and offset float32 of the shape of the scale there. The offset is not
        an integer. Where all values of a row are equal, the scale is 1e-12 and y depends on cancellation.

    Raises:
        OperatorError: as :func:`npu_dynamic_quant`.

    Example:
        >>> y, scale, offset = npu_dynamic_quant_asymmetric(torch.tensor([[1.0, -1.0, 3.0, 4.1]], dtype=torch.float16))
        >>> y, scale, offset
        (tensor([[ -28, -128,   72,  127]], dtype=torch.int8), tensor([0.0200]), tensor([-78.0153]))
    """
    op = "npu_dynamic_quant_asymmetric"
    dst_type = as_dtype(op, "dst_type", dst_type) or torch.int8
    _check(op, input, smooth_scales, group_index, dst_type, quant_mode, dst_type_max)
    smooth = None if smooth_scales is None else smooth_scales.detach()
    return _asymmetric_op(input.detach(), smooth, group_index, dst_type, quant_mode)
