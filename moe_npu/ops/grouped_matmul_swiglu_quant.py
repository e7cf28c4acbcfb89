"""Grouped int8 or int4 matmul, SwiGLU and quantization of the result: the first half of a quantized MoE layer.

    c = int32(x @ weight[g]) * x_scale * weight_scale[g]
    s = silu(left half of c) * right half of c
    y_scale = max |s| / 127,   y = round(s / y_scale)

in float32, row by row. Products with int4 weights accumulate in float16 (spec: grouped matmul 1.8.7, 1.8.8), and a
bias makes up for how int8 activations are split in two int4 digits. Spec: grouped matmul 3.5, 3.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moe_npu.ops._errors import as_dtype, dtype_name, reject, require, require_device, require_dim, require_no_gradient
from moe_npu.ops._fused_matmul import (
    check_group_list,
    check_weight,
    expert_weight,
    list_type,
    npu_list_type,
    require_tensor,
)
from moe_npu.ops._groups import CUMSUM, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import (
    INT4_PER_WORD,
    int4_matmul,
    int8_int4_matmul,
    int_matmul,
    quantize_rows,
    signed_words,
    unpack_int4,
)
from moe_npu.ops._signature import typed

_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int8, torch.int32)

# limits of the second version
_MAX_EXPERTS, _MAX_COLUMNS, _INT4_K_LIMIT = 1024, 10240, 20000


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    assist: torch.Tensor | None,
    assist_name: str,
    smooth_scale: torch.Tensor | None,
) -> None:
    """The rules of the arguments; N is the size of weight_scale, since a weight in tiles has no axis of this size."""
    if (
        x.dtype not in _INTEGERS
        or weight.dtype not in _INTEGERS
        or (x.dtype, weight.dtype) == (torch.int32, torch.int8)
    ):
        reject(
            f"{op}: x and weight must be int8 and int8, int8 and int32 (int4 weights) or int32 and int32 (both int4), "
            f"but are {dtype_name(x.dtype)} and {dtype_name(weight.dtype)}"
        )
    require_tensor(op, "x", x, _INTEGERS, ("M", "K"), x)
    m, k = x.size(0), x.size(1) * (INT4_PER_WORD if x.dtype == torch.int32 else 1)
    per_group = weight_scale.dim() == 3 and (x.dtype, weight.dtype) == (torch.int8, torch.int32)
    require_dim(op, "weight_scale", weight_scale, (2, 3) if per_group else (2,))
    experts, columns = weight.size(0) if weight.dim() else 0, weight_scale.size(-1)
    scales = (torch.int64,) if weight.dtype == torch.int32 else _SCALES
    require_tensor(
        op, "weight_scale", weight_scale, scales, (experts, "G", columns) if per_group else (experts, columns), x
    )
    if columns < 2 or columns % 2 != 0:
        reject(f"{op}: output_n is half of n. it must be greater than 0, and n even, but n is {columns}")
    if per_group and (weight_scale.size(1) < 1 or k % weight_scale.size(1) != 0 or k // weight_scale.size(1) % 2 != 0):
        reject(
            f"{op}: weight_scale must cut K = {k} into groups of one even length, but has {weight_scale.size(1)} groups"
        )
    require_device(op, "weight", weight, x)
    check_weight(op, "weight", weight, experts, k, columns)
    require_tensor(op, "x_scale", x_scale, (torch.float32,), (m,), x)
    check_group_list(op, group_list, experts, x)
    if (x.dtype, weight.dtype) == (torch.int8, torch.int32):
        if assist is None:
            reject(f"{op}: {assist_name} must be given for int4 weights and int8 x: 8 * sum over K of weight * scale")
        require_tensor(op, assist_name, assist, (torch.float32,), (experts, columns), x)
    else:
        require(assist is None, f"{op}: {assist_name} must be None except for int4 weights and int8 x")
    if smooth_scale is not None:
        require(x.dtype == torch.int32, f"{op}: smooth_scale must be None unless x and weight both hold int4 values")
        require_dim(op, "smooth_scale", smooth_scale, (1, 2))
        shape = (experts,) if smooth_scale.dim() == 1 else (experts, columns // 2)
        require_tensor(op, "smooth_scale", smooth_scale, (torch.float32,), shape, x)
    for name, tensor in (
        ("weight_scale", weight_scale),
        ("x_scale", x_scale),
        (assist_name, assist),
        ("smooth_scale", smooth_scale),
    ):
        require_no_gradient(op, name, tensor)


def _swiglu_quant(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    group_list_type: int,
    assist: torch.Tensor | None,
    smooth_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    half = weight_scale.size(-1) // 2
    y = x.new_zeros(x.size(0), half, dtype=torch.int8)
    y_scale = x.new_zeros(x.size(0), dtype=torch.float32)
    for group, start, end in row_groups(op, group_list, group_list_type, x.size(0)):
        matrix, scale = expert_weight(weight, group), weight_scale[group]
        row_scale = x_scale[start:end].unsqueeze(1)
        if weight.dtype == torch.int8:
            values = int_matmul(x[start:end], matrix).float() * row_scale * scale.float()
        else:
            words = scale if scale.dim() == 2 else scale.unsqueeze(0)
            if assist is None:
                values = int4_matmul(unpack_int4(x[start:end]), matrix, words).float() * row_scale
            else:
                values = int8_int4_matmul(x[start:end], matrix, words, assist[group]) * row_scale
        values = F.silu(values[:, :half]) * values[:, half:]
        if smooth_scale is not None:
            values *= smooth_scale[group]
        y[start:end], y_scale[start:end] = quantize_rows(values)
    return y, y_scale


def _npu_x(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # the kernel splits int8 values for int4 weights in place
    return x.clone(memory_format=torch.contiguous_format) if x.dtype != weight.dtype else x.contiguous()


# ---------------------------------------------------------------- the first version


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "npu_grouped_matmul_swiglu_quant"
    y, y_scale = _swiglu_quant(op, x, weight, weight_scale, x_scale, group_list, CUMSUM, bias, None)
    return y, y_scale, x.new_zeros((), dtype=torch.float32)


def _npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.size(0) == 0:
        y, y_scale, y_offset = _fake(x, weight, group_list, weight_scale, x_scale, bias)
        return y, y_scale, y_offset.zero_()
    return torch.ops.npu.npu_grouped_matmul_swiglu_quant(
        _npu_x(x, weight),
        weight.contiguous(),
        group_list,
        weight_scale.contiguous(),
        x_scale.contiguous(),
        bias=None if bias is None else bias.contiguous(),
    )


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.size(0), weight_scale.size(-1) // 2, dtype=torch.int8)
    return y, x.new_empty(x.size(0), dtype=torch.float32), x.new_empty((), dtype=torch.float32)


_op = register_op(
    "npu_grouped_matmul_swiglu_quant(Tensor x, Tensor weight, Tensor group_list, Tensor weight_scale, Tensor x_scale,"
    " Tensor? bias) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_grouped_matmul_swiglu_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of each group times the weight of the group, SwiGLU, and int8 codes of every row of the result.

    ``y * y_scale[:, None]`` approximates ``silu(a) * b`` with the halves ``a, b`` of the dequantized product. The
    values of the scales are not looked at. No argument may require a gradient.

    Args:
        x: ``[M, K]`` int8, the rows of group 0 first; K at most 65535.
        weight: int8 ``[E, K, N]``, or in tiles ``[E, N / 32, K / 16, 16, 32]``; or int4, int32 words ``[E, K, N / 8]``
            or in tiles ``[E, N / 64, K / 16, 16, 8]``.
        group_list: ``[E]`` int64, cumulative row counts.
        weight_scale: ``[E, N]`` float32, float16 or bfloat16; for int4 weights int64 words ``[E, N]`` or ``[E, G, N]``,
            the bits of a float32 each. N is taken from here.
        x_scale: ``[M]`` float32.
        bias: for int4 weights ``[E, N]`` float32, ``8 * (weight * scale).sum(K)``; else None.
        offset: must be None.

    Returns:
        ``(y, y_scale, y_offset)``: int8 ``[M, N / 2]``; float32 ``[M]``; and a scalar without meaning. Rows beyond the
        last group are zero on CPU and undefined on a device.

    Raises:
        OperatorError: dtypes, shapes or devices as above do not hold, or an argument requires a gradient; on CPU also
            negative or decreasing cumulative sums, or more rows than there are.

    Example:
        >>> x = torch.tensor([[10, -20]], dtype=torch.int8)
        >>> weight = torch.tensor([[[10, 20, -30, 40], [40, -50, 60, 10]]], dtype=torch.int8)
        >>> scale = torch.tensor([[0.01, 0.02, 0.01, 0.02]])
        >>> y, y_scale, _ = npu_grouped_matmul_swiglu_quant(
        ...     x, weight, torch.tensor([1]), scale, torch.tensor([0.1])
        ... )
        >>> y, y_scale
        (tensor([[ 50, 127]], dtype=torch.int8), tensor([0.0069]))
    """
    op = "npu_grouped_matmul_swiglu_quant"
    require(x.dtype == torch.int8, f"{op}: x must have dtype int8, but has {dtype_name(x.dtype)}")
    require(offset is None, f"{op}: offset must be None")
    weight_scale = signed_words(weight_scale)
    _check(op, x, weight, weight_scale, x_scale, group_list, bias, "bias", None)
    return _op(x, weight, group_list, weight_scale, x_scale, bias)


# ---------------------------------------------------------------- the second version


def _v2_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    smooth_scale: torch.Tensor | None,
    weight_assist_matrix: torch.Tensor | None,
    dequant_mode: int,
    group_list_type: int,
    tuning_config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "npu_grouped_matmul_swiglu_quant_v2"
    return _swiglu_quant(
        op,
        x,
        weight,
        weight_scale,
        x_scale,
        group_list,
        group_list_type,
        weight_assist_matrix,
        _per_column(smooth_scale),
    )


def _per_column(smooth_scale: torch.Tensor | None) -> torch.Tensor | None:
    """``[E, N / 2]`` or ``[E, 1]``."""
    return smooth_scale.unsqueeze(1) if smooth_scale is not None and smooth_scale.dim() == 1 else smooth_scale


def _v2_npu(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    smooth_scale: torch.Tensor | None,
    weight_assist_matrix: torch.Tensor | None,
    dequant_mode: int,
    group_list_type: int,
    tuning_config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.size(0) == 0:
        return _v2_allocate(x, weight_scale)
    # torch_npu's shape function knows no result of dequant_mode 1 with int4 weights: that cannot be lowered to a graph
    return torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        _npu_x(x, weight),
        [weight.contiguous()],
        [weight_scale.contiguous()],
        x_scale.contiguous(),
        group_list,
        smooth_scale=None if smooth_scale is None else smooth_scale.contiguous(),
        weight_assist_matrix=None if weight_assist_matrix is None else [weight_assist_matrix.contiguous()],
        dequant_mode=dequant_mode,
        group_list_type=npu_list_type(group_list, group_list_type),
        tuning_config=tuning_config,
    )


def _v2_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    smooth_scale: torch.Tensor | None,
    weight_assist_matrix: torch.Tensor | None,
    dequant_mode: int,
    group_list_type: int,
    tuning_config: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _v2_allocate(x, weight_scale)


def _v2_allocate(x: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.size(0), weight_scale.size(-1) // 2, dtype=torch.int8)
    return y, x.new_empty(x.size(0), dtype=torch.float32)


_v2_op = register_op(
    "npu_grouped_matmul_swiglu_quant_v2(Tensor x, Tensor weight, Tensor weight_scale, Tensor x_scale,"
    " Tensor group_list, Tensor? smooth_scale, Tensor? weight_assist_matrix, int dequant_mode, int group_list_type,"
    " int[]? tuning_config) -> (Tensor, Tensor)",
    cpu=_v2_cpu,
    npu=_v2_npu,
    fake=_v2_fake,
)


def _only(op: str, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(tensors) != 1:
        reject(f"{op}: The size of {name} should be 1, current size is {len(tensors)}.")
    return tensors[0]


@typed
def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    smooth_scale: torch.Tensor | None = None,
    weight_assist_matrix: Sequence[torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: torch.dtype | int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: torch.dtype | int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: torch.dtype | int | None = None,
    weight_dtype: torch.dtype | int | None = None,
    weight_scale_dtype: torch.dtype | int | None = None,
    x_scale_dtype: torch.dtype | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`npu_grouped_matmul_swiglu_quant` with other argument order, counts, and int4 activations.

    ======  ============  ================================  ====================  ==================
    x       weight        weight_scale                      weight_assist_matrix  smooth_scale
    ======  ============  ================================  ====================  ==================
    int8    int8          float32, float16, bfloat16        None                  None
    int8    int32 (int4)  int64 ``[E, N]``, ``[E, G, N]``   float32 ``[E, N]``    None
    int32   int32         int64 ``[E, N]``                  None                  None or float32
    ======  ============  ================================  ====================  ==================

    Args:
        x: ``[M, K]`` int8, or ``[M, K / 8]`` int32 words of int4 values; the rows of group 0 first.
        weight: a list of one tensor, as in the first version.
        weight_scale: a list of one tensor, ``[E, N]`` or see the table. N is taken from here.
        x_scale: ``[M]`` float32.
        group_list: ``[E]`` int64.
        smooth_scale: ``[E, N / 2]`` or ``[E]`` float32, multiplied in before the quantization.
        weight_assist_matrix: a list of one tensor, ``8 * (weight * scale).sum(K)``: the bias of the first version.
        bias: must be None.
        dequant_mode: 0, or for int8 x with int4 weights 1; whether there are groups of K is seen from
            ``weight_scale``.
        dequant_dtype: ``torch.float32`` or its number 6.
        quant_mode: must be 0, one scale per row.
        quant_dtype: ``torch.int8`` or its number 1.
        group_list_type: 0 cumulative sums, 1 counts.
        tuning_config: a hint.
        x_dtype: must be None.
        weight_dtype: must be None.
        weight_scale_dtype: must be None.
        x_scale_dtype: must be None.

    Returns:
        ``(y, y_scale)``: int8 ``[M, N / 2]`` and float32 ``[M]``. Rows beyond the last group are zero on CPU and
        undefined on a device.

    Raises:
        OperatorError: as :func:`npu_grouped_matmul_swiglu_quant`, or a mode that does not exist.

    Example:
        >>> x = torch.tensor([[10, -20]], dtype=torch.int8)
        >>> weight = torch.tensor([[[10, 20, -30, 40], [40, -50, 60, 10]]], dtype=torch.int8)
        >>> scale = torch.tensor([[0.01, 0.02, 0.01, 0.02]])
        >>> npu_grouped_matmul_swiglu_quant_v2(
        ...     x, [weight], [scale], torch.tensor([0.1]), torch.tensor([1]), group_list_type=1
        ... )
        (tensor([[ 50, 127]], dtype=torch.int8), tensor([0.0069]))
    """
    op = "npu_grouped_matmul_swiglu_quant_v2"
    matrix, scale = _only(op, "weight", weight), signed_words(_only(op, "weight_scale", weight_scale))
    # an empty list and a list of one empty tensor mean None too
    assist = _only(op, "weight_assist_matrix", weight_assist_matrix) if weight_assist_matrix else None
    if assist is not None and assist.dim() == 1 and assist.size(0) == 0:
        assist = None
    require(bias is None, f"{op}: bias must be None")
    if quant_mode not in (None, 0):
        reject(f"{op}: quant_mode must be 0, one scale per row, but is {quant_mode}")
    if as_dtype(op, "dequant_dtype", dequant_dtype) not in (None, torch.float32):
        reject(f"{op}: dequant_dtype must be torch.float32 (6), but is {dequant_dtype}")
    if as_dtype(op, "quant_dtype", quant_dtype) not in (None, torch.int8):
        reject(f"{op}: quant_dtype must be torch.int8 (1), but is {quant_dtype}")
    for name, code in (
        ("x_dtype", x_dtype),
        ("weight_dtype", weight_dtype),
        ("weight_scale_dtype", weight_scale_dtype),
        ("x_scale_dtype", x_scale_dtype),
    ):
        require(code is None, f"{op}: {name} must be None, but is {code}; only later devices reinterpret dtypes")
    encoding = list_type(op, group_list_type, CUMSUM)
    _check(op, x, matrix, scale, x_scale, group_list, assist, "weight_assist_matrix", smooth_scale)
    modes = (0, 1) if (x.dtype, matrix.dtype) == (torch.int8, torch.int32) else (0,)
    dequant_mode = dequant_mode or 0
    if matrix.size(0) > _MAX_EXPERTS or scale.size(-1) > _MAX_COLUMNS:
        reject(
            f"{op}: weight must have at most {_MAX_EXPERTS} experts and N = {_MAX_COLUMNS}, "
            f"but has {matrix.size(0)} and {scale.size(-1)}"
        )
    k = x.size(1) * (INT4_PER_WORD if x.dtype == torch.int32 else 1)
    if matrix.dtype == torch.int32 and k >= _INT4_K_LIMIT:
        reject(f"{op}: K must be less than {_INT4_K_LIMIT} for int4 weights, but is {k}")
    if dequant_mode not in modes:
        reject(f"{op}: dequant_mode must be one of {modes} for these dtypes, but is {dequant_mode}")
    return _v2_op(
        x,
        matrix,
        scale,
        x_scale,
        group_list,
        smooth_scale,
        assist,
        dequant_mode,
        encoding,
        None if tuning_config is None else list(tuning_config),
    )
