"""Dequantization of int32 accumulators, SwiGLU, and quantization to int8 codes.

    int32 x:  v = (x + bias_int32) * weight_scale[g] * activation_scale[row] + bias_float;   else v = x
    SwiGLU:   mode 0  silu(a) * b,   a and b the halves; a the left one if activate_left, else the right one
              mode 1  clipped (see `clipped_swiglu`), a and b the even and the odd columns
              mode 2  clipped, a and b as in mode 0
    static:   y = round(v / quant_scale[g] + quant_offset[g])
    dynamic:  v = v * quant_scale[g],   scale = max |v| * (1 / 127),   y = round(v / scale)

in float32, rounded half to even and clamped to int8. Spec: grouped matmul 3.4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._groups import COUNTS, Group, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import round_to_int
from moe_npu.ops._signature import typed
from moe_npu.ops.clipped_swiglu import gated, operands

_OP = "npu_dequant_swiglu_quant"
_HALVES = (torch.float16, torch.bfloat16)
_STATIC = 0
_MAX_COLUMNS = 10496  # of the result, with groups
_PLAIN, _INTERLEAVED = 0, 1


def _check(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    group_index: torch.Tensor | None,
    quant_mode: int,
    swiglu_mode: int,
) -> None:
    for argument, tensor in (
        ("weight_scale", weight_scale),
        ("activation_scale", activation_scale),
        ("bias", bias),
        ("quant_scale", quant_scale),
        ("quant_offset", quant_offset),
        ("group_index", group_index),
    ):
        require_device(_OP, argument, tensor, x)
    if x.dim() < 2:
        reject(f"{_OP}: x dim should larger than 1, but x has shape {tuple(x.shape)}")
    require_dtype(_OP, "x", x, (torch.int32, *_HALVES))
    if x.size(-1) % 2 != 0:
        reject(f"{_OP}: the last dim of x must be even, but is {x.size(-1)}")
    require(quant_mode in (0, 1), f"{_OP}: quant_mode only support 0 or 1, but got {quant_mode}")
    require(swiglu_mode in (0, 1, 2), f"{_OP}: swiglu_mode only support 0, 1 or 2, but got {swiglu_mode}")
    if group_index is not None:
        if x.size(-1) > 2 * _MAX_COLUMNS:
            reject(f"{_OP}: H, half of x, must be at most {_MAX_COLUMNS} with group_index, but is {x.size(-1) // 2}")
        require_dtype(_OP, "group_index", group_index, (torch.int64,))
        require_dim(_OP, "group_index", group_index, (1,))
        if x.dim() != 2:
            reject(f"{_OP}: x must have 2 dimensions with group_index, but has shape {tuple(x.shape)}")
        require(bias is None, f"{_OP}: bias must be None with group_index")
    num_groups = 1 if group_index is None else group_index.size(0)
    if x.dtype == torch.int32:
        _check_dequantization(x, weight_scale, activation_scale, bias, num_groups)
    _check_quantization(x, quant_scale, quant_offset, quant_mode, num_groups)


def _check_dequantization(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
) -> None:
    if weight_scale is None:
        reject(f"{_OP}: weight_scale must be given for int32 x")
    columns = x.size(-1)
    require_dtype(_OP, "weight_scale", weight_scale, (torch.float32,))
    if weight_scale.shape != (num_groups, columns) and not (num_groups == 1 and weight_scale.shape == (columns,)):
        reject(f"{_OP}: weight_scale must have shape {(num_groups, columns)}, but has {tuple(weight_scale.shape)}")
    if activation_scale is not None:
        require_dtype(_OP, "activation_scale", activation_scale, (torch.float32,))
        leading, rows = tuple(x.shape[:-1]), math.prod(x.shape[:-1])
        shape = tuple(activation_scale.shape)
        if not any(shape == allowed for allowed in ((rows, 1), (rows,), (*leading, 1), leading)):
            reject(f"{_OP}: activation_scale must have one number per row, shape {(rows, 1)}, but has {shape}")
    if bias is not None:
        require_dtype(_OP, "bias", bias, (torch.int32, torch.float32, *_HALVES))
        if bias.shape != (columns,) and bias.shape != (1, columns):
            reject(f"{_OP}: bias must have shape {(columns,)}, but has {tuple(bias.shape)}")


def _check_quantization(
    x: torch.Tensor,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    quant_mode: int,
    num_groups: int,
) -> None:
    columns = x.size(-1) // 2
    if quant_mode != _STATIC:
        if quant_scale is not None:
            require_dtype(_OP, "quant_scale", quant_scale, (torch.float32, *_HALVES))
            is_one_row = num_groups == 1 and quant_scale.shape == (columns,)
            if quant_scale.shape != (num_groups, columns) and not is_one_row:
                reject(
                    f"{_OP}: quant_scale must have shape {(num_groups, columns)} in dynamic mode, "
                    f"but has {tuple(quant_scale.shape)}"
                )
        return
    for argument, factors in (("quant_scale", quant_scale), ("quant_offset", quant_offset)):
        if factors is None:
            continue
        require_dtype(_OP, argument, factors, (torch.float32,))
        shape = tuple(factors.shape)
        if not any(shape == allowed for allowed in ((num_groups, columns), (num_groups,), (num_groups, 1))):
            reject(
                f"{_OP}: {argument} must have shape {(num_groups, columns)} or {(num_groups,)} in static mode, one row "
                f"or one number per group, but has {shape}"
            )


def _check_numbers(clamp_limit: float, glu_alpha: float, glu_bias: float) -> None:
    if not 0.0 < clamp_limit < math.inf:
        reject(f"{_OP}: clamp_limit should be positive finite, but is {clamp_limit}")
    for argument, value in (("glu_alpha", glu_alpha), ("glu_bias", glu_bias)):
        if not -math.inf < value < math.inf:
            reject(f"{_OP}: {argument} should be finite, but is {value}")


def _cpu(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.flatten(0, -2)
    groups = [Group(0, 0, rows.size(0))]
    if group_index is not None:
        groups = row_groups(_OP, group_index, COUNTS, rows.size(0), "group_index")
    y = torch.zeros(rows.size(0), rows.size(1) // 2, dtype=torch.int8)
    scale = torch.zeros(rows.size(0), dtype=torch.float32)
    for group, start, end in groups:
        values = rows[start:end]
        if x.dtype == torch.int32:
            assert weight_scale is not None
            of_rows = None if activation_scale is None else activation_scale.reshape(-1, 1)[start:end]
            values = _dequantized(values, _row(weight_scale, group), of_rows, bias)
        values = _swiglu(values.float(), activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
        if quant_mode == _STATIC:
            values = _scaled(values, quant_scale, quant_offset, group)
        else:
            if quant_scale is not None:
                values = values * _row(quant_scale, group).float()
            amax = values.abs().amax(-1) if y.size(1) else values.new_zeros(end - start)
            scale[start:end] = amax * (1.0 / 127.0)
            values = values / scale[start:end, None]
        y[start:end] = round_to_int(values, -128, 127)
    return y.view(_y_shape(x)), scale.view(x.shape[:-1])


def _row(factors: torch.Tensor, group: int) -> torch.Tensor:
    return factors[group] if factors.dim() == 2 else factors  # of the only group


def _dequantized(
    values: torch.Tensor, weight_scale: torch.Tensor, activation_scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if bias is not None and bias.dtype == torch.int32:
        values = values + bias
    values = values.float() * weight_scale
    if activation_scale is not None:
        values = values * activation_scale
    if bias is not None and bias.dtype != torch.int32:
        values = values + bias.float()
    return values


def _swiglu(
    values: torch.Tensor, activate_left: bool, swiglu_mode: int, clamp_limit: float, glu_alpha: float, glu_bias: float
) -> torch.Tensor:
    a, b = operands(values, swiglu_mode == _INTERLEAVED)
    if swiglu_mode != _INTERLEAVED and not activate_left:
        a, b = b, a
    return F.silu(a) * b if swiglu_mode == _PLAIN else gated(a, b, glu_alpha, clamp_limit, glu_bias)


def _scaled(
    values: torch.Tensor, quant_scale: torch.Tensor | None, quant_offset: torch.Tensor | None, group: int
) -> torch.Tensor:
    if quant_scale is not None and _is_one_per_group(quant_scale):
        # the device multiplies by the reciprocal, and takes 0 for no scale
        divisor = quant_scale[group]
        values = values * torch.where(divisor == 0, 1.0, divisor.reciprocal())
    elif quant_scale is not None:
        values = values / quant_scale[group]
    return values if quant_offset is None else values + quant_offset[group]


def _is_one_per_group(factors: torch.Tensor) -> bool:
    return factors.dim() == 1 or factors.size(1) == 1


def _y_shape(x: torch.Tensor) -> list[int]:
    return [*x.shape[:-1], x.shape[-1] // 2]


def _npu(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.numel() == 0:
        return x.new_zeros(_y_shape(x), dtype=torch.int8), x.new_zeros(x.shape[:-1], dtype=torch.float32)
    is_integer = x.dtype == torch.int32
    if is_integer and weight_scale is not None and group_index is not None:
        weight_scale = weight_scale if weight_scale.dim() == 2 else weight_scale.unsqueeze(0)
    if quant_mode == _STATIC:
        quant_scale, quant_offset = (
            factors.flatten() if factors is not None and _is_one_per_group(factors) else factors
            for factors in (quant_scale, quant_offset)
        )
    return torch.ops.npu.npu_dequant_swiglu_quant(
        x.contiguous(),
        weight_scale=weight_scale if is_integer else None,
        activation_scale=activation_scale if is_integer else None,
        bias=bias if is_integer else None,
        quant_scale=quant_scale,
        quant_offset=quant_offset if quant_mode == _STATIC else None,
        group_index=group_index,
        # the kernel demands True of interleaved columns, where it means nothing
        activate_left=activate_left or swiglu_mode == _INTERLEAVED,
        quant_mode=quant_mode,
        swiglu_mode=swiglu_mode,
        clamp_limit=clamp_limit,
        glu_alpha=glu_alpha,
        glu_bias=glu_bias,
    )


def _fake(
    x: torch.Tensor,
    weight_scale: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    group_index: torch.Tensor | None,
    activate_left: bool,
    quant_mode: int,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(_y_shape(x), dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = register_op(
    "npu_dequant_swiglu_quant(Tensor x, Tensor? weight_scale, Tensor? activation_scale, Tensor? bias,"
    " Tensor? quant_scale, Tensor? quant_offset, Tensor? group_index, bool activate_left, int quant_mode,"
    " int swiglu_mode, float clamp_limit, float glu_alpha, float glu_bias) -> (Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: torch.dtype | int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int32 accumulators scaled back, SwiGLU, and int8 codes of the result: dynamically ``swiglu ~= y * scale``.

    Rounding has no gradient: the results are detached from the arguments.

    Args:
        x: ``[..., 2H]`` of at least two dimensions, with ``group_index`` exactly two; T rows; int32, float16 or
            bfloat16. Where it is not int32, ``weight_scale``, ``activation_scale`` and ``bias`` are ignored.
        weight_scale: float32 ``[G, 2H]``, for G = 1 also ``[2H]``; G is 1 without ``group_index``.
        activation_scale: float32 ``[T, 1]`` or ``[T]``, or the leading shape of x; None is 1.
        bias: ``[2H]``: int32, added to x, or float32, float16 or bfloat16, added after the scales. Not with
            ``group_index``.
        quant_scale: dynamic: ``[G, H]`` (``[H]`` for G = 1) float32, float16 or bfloat16, a factor. Static: ``[G, H]``
            or ``[G]`` float32, a divisor. None is 1.
        quant_offset: static: float32, shapes as ``quant_scale``; added. Dynamic: ignored.
        group_index: ``[G]`` int64 counts of rows. Rows behind them are zero, on NPU undefined.
        activate_left: which half is activated, by default the right one; no effect in ``swiglu_mode`` 1.
        quant_mode: 0 static, 1 dynamic (one scale per row).
        dst_type: ignored; the result is int8.
        round_mode: ignored; half to even.
        activate_dim: ignored; the last.
        swiglu_mode: 0 plain halves, 1 clipped interleaved columns, 2 clipped halves.
        clamp_limit: bound of the clipped variants, as in :func:`npu_clipped_swiglu`.
        glu_alpha: factor in their sigmoid.
        glu_bias: added to the linear operand in them.

    Returns:
        ``(y, scale)``: int8 ``[..., H]``; float32 ``[...]``, 0 for a row of zeros; in static mode zeros, on NPU
        undefined.

    Raises:
        OperatorError: wrong dtype, rank, size, mode or number; on CPU also a negative count or more rows in
            group_index than there are.

    Example:
        >>> x = torch.tensor([[100, -200, 300, 50]], dtype=torch.int32)
        >>> npu_dequant_swiglu_quant(x, weight_scale=torch.full((4,), 0.01), activate_left=True, quant_mode=1)
        (tensor([[127,  -7]], dtype=torch.int8), tensor([0.0173]))
    """
    _check(x, weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index, quant_mode, swiglu_mode)
    _check_numbers(clamp_limit, glu_alpha, glu_bias)
    factors = (
        None if tensor is None else tensor.detach()
        for tensor in (weight_scale, activation_scale, bias, quant_scale, quant_offset)
    )
    return _op(
        x.detach(),
        *factors,
        group_index,
        activate_left,
        quant_mode,
        swiglu_mode,
        clamp_limit,
        glu_alpha,
        glu_bias,
    )
