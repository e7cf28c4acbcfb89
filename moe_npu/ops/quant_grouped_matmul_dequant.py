"""`npu_quant_grouped_matmul_dequant`: float16 rows quantized, multiplied by int8 weights, and dequantized.

    v = x * smooth_scale,   xs = x_scale, or max |v| / 127
    q = clamp(round(v * (1 / xs)), -128, 127)
    y = int32(q @ quantized_weight[g].T) * weight_scale[g] * xs

in float32, with one rounding at the end. The maximum is that of the row, or of all rows. Spec: grouped matmul 3.9.
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import reject, require, require_dim, require_no_gradient
from moe_npu.ops._fused_matmul import check_group_list, require_tensor
from moe_npu.ops._groups import CUMSUM, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import dense, int_matmul, round_to_int
from moe_npu.ops._signature import typed

_OP = "npu_quant_grouped_matmul_dequant"
_QUANT_MODES = ("pertoken", "pertensor")


def _check(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    x_scale: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
    quant_mode: str,
) -> None:
    if quant_mode not in _QUANT_MODES:
        reject(f"{_OP}: quant_mode must be one of {_QUANT_MODES}, but is {quant_mode!r}")
    if x.dim() != 2:
        reject(f"{_OP}: the x dim support only 2, but x has shape {list(x.shape)}")
    if x.dtype != torch.float16:
        reject(f"{_OP}: the x dtype support only float16, but is {x.dtype}")
    require_dim(_OP, "quantized_weight", quantized_weight, (3,))
    experts, columns = quantized_weight.size(0), quantized_weight.size(1)
    require_tensor(_OP, "quantized_weight", quantized_weight, (torch.int8,), ("E", "N", x.size(1)), x)
    require_tensor(_OP, "weight_scale", weight_scale, (torch.float32,), (experts, columns), x)
    check_group_list(_OP, group_list, experts, x)
    if x_scale is not None:
        shape = (x.size(0) if quant_mode == "pertoken" else 1,)
        require_tensor(_OP, "x_scale", x_scale, (torch.float32,), shape, x)
    if smooth_scale is not None:
        require_tensor(_OP, "smooth_scale", smooth_scale, (torch.float16,), (x.size(1),), x)
    for name, tensor in (
        ("x", x),
        ("weight_scale", weight_scale),
        ("x_scale", x_scale),
        ("smooth_scale", smooth_scale),
    ):
        require_no_gradient(_OP, name, tensor)


def _cpu(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    x_scale: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
    quant_mode: str,
) -> torch.Tensor:
    groups = row_groups(_OP, group_list, CUMSUM, x.size(0))
    values = x.float()
    if smooth_scale is not None:
        values = values * smooth_scale.float()
    if x_scale is not None:
        scale = x_scale
    elif values.numel() == 0:
        scale = values.new_zeros(1)
    else:
        scale = (values.abs().amax(1) if quant_mode == "pertoken" else values.abs().amax().view(1)) / 127
    scale = scale.unsqueeze(1).expand(x.size(0), 1)
    codes = round_to_int(values * scale.reciprocal(), -128, 127)
    y = x.new_zeros(x.size(0), weight_scale.size(1))
    for group, start, end in groups:
        accumulator = int_matmul(codes[start:end], quantized_weight[group].t())
        y[start:end] = accumulator.float() * weight_scale[group] * scale[start:end]
    return y


def _npu(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    x_scale: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
    quant_mode: str,
) -> torch.Tensor:
    if x.numel() == 0:
        return x.new_zeros(x.size(0), weight_scale.size(1))
    return torch.ops.npu.npu_quant_grouped_matmul_dequant(
        dense(x),
        quantized_weight.contiguous(),
        weight_scale.contiguous(),
        group_list,
        x_scale=None if x_scale is None else x_scale.contiguous(),
        smooth_scale=None if smooth_scale is None else smooth_scale.contiguous(),
        quant_mode=quant_mode,
    )


def _fake(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    x_scale: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
    quant_mode: str,
) -> torch.Tensor:
    return x.new_empty(x.size(0), weight_scale.size(1))


_op = register_op(
    f"{_OP}(Tensor x, Tensor quantized_weight, Tensor weight_scale, Tensor group_list, Tensor? x_scale,"
    " Tensor? smooth_scale, str quant_mode) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_quant_grouped_matmul_dequant(
    x: torch.Tensor,
    quantized_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_offset: torch.Tensor | None = None,
    smooth_scale: torch.Tensor | None = None,
    quant_mode: str | None = "pertoken",
) -> torch.Tensor:
    """The rows of each group, quantized to int8 on the way in, times the int8 weight of the group.

    No argument may require a gradient: rounding has none. The kernel exists on inference products only.

    Args:
        x: ``[M, K]`` float16, the rows of group 0 first.
        quantized_weight: ``[E, N, K]`` int8: one row per column of the result.
        weight_scale: ``[E, N]`` float32.
        group_list: ``[E]`` int64, cumulative row counts.
        bias: must be None.
        x_scale: what the codes of x are multiplied by to give x: float32 ``[M]``, or ``[1]`` for ``"pertensor"``; None:
            the largest magnitude divided by 127.
        x_offset: must be None.
        smooth_scale: ``[K]`` float16, multiplied into x first.
        quant_mode: ``"pertoken"``, one scale per row of x, or ``"pertensor"``, one in all.

    Returns:
        ``[M, N]`` float16. Rows beyond the last group are zero on CPU and undefined on a device.

    Raises:
        OperatorError: dtypes, shapes, devices or mode as above do not hold, or an argument requires a gradient; on CPU
            also negative or decreasing cumulative sums, or more rows than there are.

    Example:
        >>> x = torch.tensor([[0.5, 4.0]], dtype=torch.float16)
        >>> weight = torch.tensor([[[7, 8], [-9, 10]]], dtype=torch.int8)
        >>> npu_quant_grouped_matmul_dequant(x, weight, torch.tensor([[0.5, 0.25]]), torch.tensor([1]))
        tensor([[17.7656,  8.8672]], dtype=torch.float16)
    """
    require(bias is None, f"{_OP}: bias must be None")
    require(x_offset is None, f"{_OP}: x_offset must be None")
    quant_mode = "pertoken" if quant_mode is None else quant_mode
    _check(x, quantized_weight, weight_scale, group_list, x_scale, smooth_scale, quant_mode)
    return _op(x, quantized_weight, weight_scale, group_list, x_scale, smooth_scale, quant_mode)
