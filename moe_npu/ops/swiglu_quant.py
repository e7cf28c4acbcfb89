"""SwiGLU of rows and their quantization to int8 or int4 codes.

    L, R = x.chunk(2, -1),   s = silu(L) * R if activate_left else L * silu(R)
    static:   y = round(s * smooth + offset)
    dynamic:  v = s * smooth,   scale = Q / max |v|,   y = round(v * scale)     with Q = 127 (int8) or 7 (int4)

in float32, rounded half to even and clamped to -Q - 1 .. Q. The scale is the reciprocal of the one that
``npu_dynamic_quant`` returns. Spec: grouped matmul 3.3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from moe_npu.ops._errors import as_dtype, reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._groups import COUNTS, CUMSUM, Group, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import round_to_int
from moe_npu.ops._signature import typed

_OP = "npu_swiglu_quant"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STATIC = 0
_MAX_COLUMNS = 8192  # of x


def _check(
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    group_index: torch.Tensor | None,
    quant_mode: int,
    group_list_type: int,
    dst_type: torch.dtype,
) -> None:
    for argument, tensor in (("smooth_scales", smooth_scales), ("offsets", offsets), ("group_index", group_index)):
        require_device(_OP, argument, tensor, x)
    if x.dim() < 2:
        reject(f"{_OP}: x dim should larger than 1, but x has shape {tuple(x.shape)}")
    require_dtype(_OP, "x", x, _FLOATS)
    require(quant_mode in (0, 1), f"{_OP}: quant_mode only support 0 or 1, but got {quant_mode}")
    require(
        group_list_type in (CUMSUM, COUNTS),
        f"{_OP}: group_list_type only support 0(cumsum) or 1(count), but got {group_list_type}",
    )
    require(
        dst_type in (torch.int8, torch.quint4x2),
        f"{_OP}: dtype must be torch.int8 for int8 or torch.quint4x2 for int4, but dst_type is {dst_type}",
    )
    if x.size(-1) > _MAX_COLUMNS:
        reject(f"{_OP}: the last dim of x must be at most {_MAX_COLUMNS}, but is {x.size(-1)}")
    multiple = 2 if dst_type == torch.int8 else 4
    if x.size(-1) % multiple != 0:
        reject(f"{_OP}: the last dim of x must be a multiple of {multiple} for {dst_type}, but is {x.size(-1)}")
    if group_index is not None:
        require_dtype(_OP, "group_index", group_index, (torch.int32,))
        require_dim(_OP, "group_index", group_index, (1,))
    num_groups = 1 if group_index is None else group_index.size(0)
    _check_factors("smooth_scales", smooth_scales, num_groups, x.size(-1) // 2)
    if quant_mode == _STATIC:
        _check_factors("offsets", offsets, num_groups, x.size(-1) // 2)
        if smooth_scales is not None and offsets is not None and smooth_scales.shape != offsets.shape:
            reject(
                f"{_OP}: smooth_scales and offsets should have the same shape when quant_mode is 0, "
                f"but have {tuple(smooth_scales.shape)} and {tuple(offsets.shape)}"
            )


def _check_factors(argument: str, factors: torch.Tensor | None, num_groups: int, columns: int) -> None:
    if factors is None:
        return
    require_dtype(_OP, argument, factors, (torch.float32,))
    if factors.shape != (num_groups, columns) and factors.shape != (num_groups,):
        reject(
            f"{_OP}: {argument} must have shape {(num_groups, columns)} or {(num_groups,)}, one row or one number per "
            f"group, but has {tuple(factors.shape)}"
        )


def _cpu(
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    group_list_type: int,
    dst_type: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = x.flatten(0, -2).chunk(2, -1)
    num_rows, columns = left.shape
    groups = [Group(0, 0, num_rows)]
    if group_index is not None:
        groups = row_groups(_OP, group_index, group_list_type, num_rows, "group_index")
    codes = torch.zeros(num_rows, columns, dtype=torch.int8)
    scale = torch.zeros(num_rows, dtype=torch.float32)
    largest = 127 if dst_type == torch.int8 else 7
    for group, start, end in groups:
        a, b = left[start:end].float(), right[start:end].float()
        values = F.silu(a).mul_(b) if activate_left else F.silu(b).mul_(a)
        if smooth_scales is not None:
            values *= smooth_scales[group]
        if quant_mode == _STATIC:
            if offsets is not None:
                values += offsets[group]
        else:
            amax = values.abs().amax(-1) if columns else values.new_zeros(end - start)
            scale[start:end] = torch.tensor(float(largest)) / amax  # of tensors: the true quotient
            values *= scale[start:end, None]
        codes[start:end] = round_to_int(values, -largest - 1, largest)
    if dst_type != torch.int8:
        codes = _pack_in_bytes(codes)
    return codes.view(_y_shape(x, dst_type)), scale.view(x.shape[:-1])


def _pack_in_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Int4 values ``[..., N]`` two per int8 ``[..., N / 2]``, the first in the low four bits."""
    return codes[..., ::2].bitwise_and(15) | codes[..., 1::2].bitwise_left_shift(4)


def _y_shape(x: torch.Tensor, dst_type: torch.dtype) -> list[int]:
    return [*x.shape[:-1], x.shape[-1] // (2 if dst_type == torch.int8 else 4)]


def _npu(
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    group_list_type: int,
    dst_type: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.numel() == 0:
        y, scale = _fake(x, smooth_scales, offsets, group_index, activate_left, quant_mode, group_list_type, dst_type)
        return y, scale.fill_(0.0 if quant_mode == _STATIC else math.inf)
    if quant_mode != _STATIC:
        offsets = None
    elif smooth_scales is None and offsets is not None:  # torch_npu takes both or none
        smooth_scales = torch.ones_like(offsets)
    elif offsets is None and smooth_scales is not None:
        offsets = torch.zeros_like(smooth_scales)
    # never None for dst_type: the shape function of torch_npu takes that for float32 (and int4 for a byte per code)
    return torch.ops.npu.npu_swiglu_quant(
        x.contiguous(),
        smooth_scales=smooth_scales,
        offsets=offsets,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
        group_list_type=group_list_type,
        dst_type=dst_type,
    )


def _fake(
    x: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    group_list_type: int,
    dst_type: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(_y_shape(x, dst_type), dtype=torch.int8)
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = register_op(
    "npu_swiglu_quant(Tensor x, Tensor? smooth_scales, Tensor? offsets, Tensor? group_index, bool activate_left,"
    " int quant_mode, int group_list_type, ScalarType dst_type) -> (Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_swiglu_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU of the halves of each row, quantized: dynamically ``swiglu * smooth ~= y / scale``.

    Rounding has no gradient: the results are detached from the arguments.

    Args:
        x: ``[..., 2N]`` of at least two dimensions; float16, bfloat16 or float32. The leading axes are flattened to
            rows.
        smooth_scales: float32 ``[G, N]`` or ``[G]``, multiplied in first; G is 1 without ``group_index``.
        offsets: float32, the shape of ``smooth_scales``; added in static mode, ignored in dynamic mode.
        group_index: ``[G]`` int32: rows of group g use ``smooth_scales[g]`` and ``offsets[g]``. Rows behind the last
            group are zero, on NPU undefined.
        activate_left: which half goes through silu; by default the right one.
        quant_mode: 0 static, 1 dynamic (one scale per row).
        group_list_type: group_index holds 0 cumulative sums or 1 counts.
        dst_type: None or ``torch.int8``; ``torch.quint4x2`` for int4, N even.

    Returns:
        ``(y, scale)``: y int8 ``[..., N]``; int4 two per byte, the first in the low four bits: int8 ``[..., N / 2]``.
        scale float32 ``[...]``, ``127 / max`` (int4: ``7 / max``), inf for a row of zeros; in static mode zeros, on NPU
        undefined.

    Raises:
        OperatorError: wrong dtype, rank, size or mode; on CPU also a group_index that decreases or covers more rows
            than there are.

    Example:
        >>> npu_swiglu_quant(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), quant_mode=1)
        (tensor([[ 46, 127]], dtype=torch.int8), tensor([16.1658]))
    """
    dtype = as_dtype(_OP, "dst_type", dst_type) or torch.int8
    _check(x, smooth_scales, offsets, group_index, quant_mode, group_list_type, dtype)
    smooth, offset = (None if factors is None else factors.detach() for factors in (smooth_scales, offsets))
    return _op(x.detach(), smooth, offset, group_index, activate_left, quant_mode, group_list_type, dtype)
