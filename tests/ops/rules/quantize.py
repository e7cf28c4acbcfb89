"""Rules of quantize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F32, F64, I8, I32, Rule, int64, ints, zeros


def quant(*shape: int, dtype: torch.dtype = F16, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_dynamic_quant(zeros(*(shape or (4, 8)), dtype=dtype), **options)


def asymmetric(*shape: int, dtype: torch.dtype = F16, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_dynamic_quant_asymmetric(zeros(*(shape or (4, 8)), dtype=dtype), **options)


def divided(
    scales: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    dtype: Any = torch.qint8,
    *,
    input: torch.Tensor | None = None,
    **options: Any,
) -> Callable[[], Any]:
    input = zeros(4, 8) if input is None else input
    return lambda: ops.npu_quantize(input, zeros(8) if scales is None else scales, zero, dtype, **options)


def multiplied(*args: Any, **options: Any) -> Callable[[], Any]:
    return divided(*args, div_mode=False, **options)


def anti(*shape: int, x: torch.dtype = I8, scale: torch.Tensor | None = None, **options: Any) -> Callable[[], Any]:
    scale = zeros(8) if scale is None else scale
    return lambda: ops.npu_anti_quant(zeros(*(shape or (4, 8)), dtype=x), scale, **options)


def words(scale: torch.Tensor, offset: torch.Tensor | None = None, round_mode: int | None = 0) -> Callable[[], Any]:
    return lambda: ops.npu_trans_quant_param(scale, offset, round_mode)


def cast(input: torch.Tensor, *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_format_cast(input, *args, **options)


def pack(weight: torch.Tensor) -> Callable[[], Any]:
    return lambda: ops.npu_convert_weight_to_int4pack(weight)


def smooth(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return zeros(*shape, dtype=dtype)


RULES: list[Rule] = [
    ("quant-smooth-elsewhere", quant(smooth_scales=smooth(8).to(ELSEWHERE)), "smooth_scales must be on cpu"),
    (
        "quant-groups-elsewhere",
        quant(smooth_scales=smooth(1, 8), group_index=zeros(1, dtype=I32).to(ELSEWHERE)),
        "group_index must be on cpu",
    ),
    ("quant-dtype-number", quant(dst_type=23), "dst_type must be a dtype or the number of one, but is 23"),
    ("quant-dtype-bool", quant(dst_type=True), "dst_type must be a dtype or an int or None, but is bool"),
    ("quant-float32", quant(dtype=F32), "input must have dtype float16, bfloat16, but has float32"),
    ("quant-1d", quant(8), "Input shape dim should be greater than 1, but input has shape (8,)"),
    ("quant-dst-type", quant(dst_type=torch.uint8), "dst_type must be None, torch.int8 or torch.quint4x2"),
    ("quant-int4-of-9", quant(4, 9, dst_type=torch.quint4x2), "must be divded by 8 when int4 quantization, but is 9"),
    ("quant-mode", quant(quant_mode="perrow"), "quant_mode must be one of ('pertoken', 'perchannel', 'pertensor')"),
    ("quant-dst-type-max", quant(dst_type_max=1.0), "dst_type_max must be 0 for integer results, but is 1.0"),
    ("quant-groups-alone", quant(group_index=ints(4)), "group_index needs smooth_scales, which is None"),
    ("quant-smooth-dtype", quant(smooth_scales=smooth(8, dtype=F32)), "smooth_scales must have dtype float16, but has"),
    ("quant-smooth-shape", quant(smooth_scales=smooth(1, 8)), "smooth_scales must have shape (8,), but has (1, 8)"),
    (
        "quant-groups-of-channels",
        quant(smooth_scales=smooth(1, 8), group_index=ints(4), quant_mode="perchannel"),
        "group_index must be None for quant_mode 'perchannel'",
    ),
    (
        "quant-int64-groups",
        quant(smooth_scales=smooth(1, 8), group_index=int64([4])),
        "group_index must have dtype int32",
    ),
    (
        "quant-no-groups",
        quant(smooth_scales=smooth(0, 8), group_index=ints()),
        "group_index must have shape [E] with 1",
    ),
    (
        "quant-other-groups",
        quant(smooth_scales=smooth(2, 8), group_index=ints(4)),
        "smooth_scales must have shape (1, 8)",
    ),
    (
        "quant-uncovered-rows",
        quant(smooth_scales=smooth(1, 8), group_index=ints(3)),
        "the last entry of group_index must be the number of rows 4, but is 3",
    ),
    ("pack-float", pack(zeros(2, 8)), "weight dtype only support int32 and float32"),
    ("pack-empty", pack(zeros(0, 8, dtype=I32)), "weight must have 2 or 3 dimensions and not be empty"),
    ("pack-transposed", pack(zeros(8, 16, dtype=I32).t()), "weight is Not contiguous, its strides are (1, 16)"),
    ("pack-12-columns", pack(zeros(2, 12, dtype=I32)), "weight last dim should be the multiple of 8, but is 12"),
]

RULES += [
    (
        "asymmetric-float32",
        asymmetric(dtype=F32),
        "npu_dynamic_quant_asymmetric: input must have dtype float16, bfloat16",
    ),
    ("asymmetric-1d", asymmetric(8), "npu_dynamic_quant_asymmetric: Input shape dim should be greater than 1"),
    (
        "asymmetric-uncovered-rows",
        asymmetric(smooth_scales=smooth(1, 8), group_index=ints(3)),
        "npu_dynamic_quant_asymmetric: the last entry of group_index must be the number of rows 4, but is 3",
    ),
    (
        "asymmetric-decreasing-groups",
        asymmetric(smooth_scales=smooth(2, 8), group_index=ints(5, 4)),
        "npu_dynamic_quant_asymmetric",
    ),
    ("quantize-scales-elsewhere", divided(zeros(8, device="meta")), "scales must be on cpu"),
    ("quantize-zero-elsewhere", divided(zero=zeros(8, dtype=I32, device="meta")), "zero_points must be on cpu"),
    ("quantize-float64", divided(input=zeros(4, 8, dtype=F64)), "input must have dtype float32, float16, bfloat16"),
    ("quantize-dtype", divided(dtype=F16), "Param (dtype) must be Int8, UInt8, Int32, but is torch.float16"),
    ("quantize-dtype-int4", divided(dtype=torch.quint4x2), "Param (dtype) must be Int8, UInt8, Int32"),
    ("quantize-dtype-number", divided(dtype=290), "Param (dtype) must be Int8, UInt8, Int32, but is 290"),
    ("quantize-multiplied-dtype", multiplied(dtype=torch.quint8), "Param (dtype) must be Int8 or Int4 (quint4x2) with"),
    (
        "quantize-int4-of-9",
        multiplied(zeros(9), dtype=torch.quint4x2, input=zeros(4, 9)),
        "Input shape last dim must be divded by 8, but is 9",
    ),
    (
        "quantize-zero-shape",
        divided(zero=zeros(1, dtype=I32)),
        "zero_points must have the shape (8,) of scales, but has (1,)",
    ),
    ("quantize-scales-float16", divided(zeros(8, dtype=F16)), "scales must have dtype float32, or that of bfloat16"),
    ("quantize-scales-bfloat16", divided(zeros(8, dtype=BF16)), "scales must have dtype float32, or that of bfloat16"),
    ("quantize-zero-float", divided(zero=zeros(8)), "zero_points must have dtype int8, uint8, int32, but has float32"),
    ("quantize-axis", divided(axis=2), "axis 2 is out of range for input of 2 dimensions"),
    (
        "quantize-scales-shape",
        divided(axis=0),
        "scales must have 1 element or shape (4,), the size of input along axis 0, but has (8,)",
    ),
    ("quantize-multiplied-axis", multiplied(axis=-3), "axis must be -2 or larger with div_mode=False, but is -3"),
    ("quantize-no-axis", multiplied(axis=-2, input=zeros(8)), "input has no axis -2, its shape is (8,)"),
    ("quantize-no-dims", multiplied(input=zeros()), "input has no axis -1, its shape is ()"),
    ("quantize-multiplied-scales", multiplied(zeros(8, dtype=F16)), "scales must have dtype float32 like input"),
    (
        "quantize-multiplied-zero",
        multiplied(zero=zeros(8, dtype=I32)),
        "zero_points must have dtype float32 like scales, but has int32",
    ),
    (
        "quantize-multiplied-scales-shape",
        multiplied(axis=-2),
        "scales must have shape (1,), (4,) or (4, 1), with 1 or the size of input along axis -2, but has (8,)",
    ),
    ("anti-scale-elsewhere", anti(scale=zeros(8, device="meta")), "scale must be on cpu"),
    ("anti-offset-elsewhere", anti(offset=zeros(8, device="meta")), "offset must be on cpu"),
    ("anti-float", anti(x=F16), "x must have dtype int8, or int32 for packed int4, but has float16"),
    ("anti-source", anti(src_dtype=torch.quint4x2), "src_dtype must be None or torch.int8 with x of torch.int8"),
    (
        "anti-int4-source",
        anti(4, 1, x=I32, src_dtype=I8),
        "src_dtype must be None or torch.quint4x2 with x of torch.int32",
    ),
    (
        "anti-result",
        anti(dst_dtype=F32),
        "dst_dtype must be None, torch.float16 or torch.bfloat16, but is torch.float32",
    ),
    ("anti-nine-dims", anti(*[1] * 8, 8), "x must have at most 8 dimensions, packed int4 at least 1, but has 9"),
    ("anti-scale-dtype", anti(scale=zeros(8, dtype=F16)), "scale must have dtype float32, bfloat16, but has float16"),
    ("anti-scale-shape", anti(scale=zeros(4)), "scale must have shape (1,) or (8,), but has (4,)"),
    ("anti-scale-dims", anti(scale=zeros(1, 8)), "scale must have shape (1,) or (8,), but has (1, 8)"),
    ("anti-int4-scale", anti(4, 1, x=I32, scale=zeros(4)), "scale must have shape (1,) or (8,), but has (4,)"),
    (
        "anti-offset",
        anti(offset=zeros(1)),
        "offset must be torch.float32 of shape (8,) like scale, but is torch.float32 of shape (1,)",
    ),
    ("words-offset-elsewhere", words(zeros(4), zeros(4, device="meta")), "offset must be on cpu"),
    ("words-float16", words(zeros(4, dtype=F16)), "scale must have dtype float32, but has float16"),
    ("words-empty", words(zeros(0)), "scale must have shape [N], [1, N] or [G, N] and not be empty, but has (0,)"),
    ("words-three-dims", words(zeros(1, 2, 3)), "scale must have shape [N], [1, N] or [G, N]"),
    ("words-transposed", words(zeros(2, 3).t()), "scale must be contiguous"),
    ("words-round-mode", words(zeros(4), None, 2), "round_mode should be 0 or 1, but round_mode is 2"),
    ("words-offset-dtype", words(zeros(4), zeros(4, dtype=I32)), "offset must have dtype float32, but has int32"),
    (
        "words-lengths",
        words(zeros(4), zeros(3)),
        "offset must have the shape (4,) of scale, one row of it or one number",
    ),
    ("words-row-offset", words(zeros(1, 4), zeros(3)), "offset must have the shape (1, 4) of scale"),
    ("format-none", cast(zeros(4, 8)), "npu_format_cast: needs a format, by one of acl_format and dst"),
    ("format-both", cast(zeros(4, 8), 29, zeros(4, 8)), "needs a format, by one of acl_format and dst"),
    ("format-unknown", cast(zeros(4, 8), 5), "acl_format must be one of 0 NCHW, 1 NHWC, 2 ND, 3 NC1HWC0"),
    ("format-nz-vector", cast(zeros(8), 29), "format FRACTAL_NZ needs at least 2 dimensions, but input has shape (8,)"),
    ("format-none-in-place", lambda: ops.npu_format_cast_(zeros(4, 8)), "needs a format, by one of src and acl_format"),
]

LEGAL = [
    quant(),
    asymmetric(),
    divided(),
    divided(zero=zeros(8, dtype=I32)),
    multiplied(),
    multiplied(zero=zeros(8), dtype=torch.quint4x2),
    anti(),
    anti(offset=zeros(8)),
    anti(4, 1, x=I32),
    words(zeros(4), zeros(4)),
    words(zeros(1, 4), zeros(1, 4)),
    cast(zeros(4, 8), 29),
    cast(zeros(8), 2),
    pack(zeros(2, 8, dtype=I32)),
]
