"""Rules of SwiGLU with quantization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F32, I8, I32, Rule, int64, ints, zeros


def quant(*shape: int, dtype: torch.dtype = F32, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu_quant(zeros(*(shape or (4, 8)), dtype=dtype), **options)


def dequant(*shape: int, dtype: torch.dtype = I32, **options: Any) -> Callable[[], Any]:
    if dtype == I32:
        options.setdefault("weight_scale", zeros(8))
    return lambda: ops.npu_dequant_swiglu_quant(zeros(*(shape or (4, 8)), dtype=dtype), **options)


def _grouped(counts: list[int], **options: Any) -> Callable[[], Any]:
    return dequant(**{"group_index": int64(counts), "weight_scale": zeros(len(counts), 8), **options})


_ELSEWHERE: list[Rule] = [
    *[
        (f"swiglu-quant-{name}-elsewhere", quant(**{name: zeros(1).to(ELSEWHERE)}), f"{name} must be on cpu")
        for name in ("smooth_scales", "offsets", "group_index")
    ],
    *[
        (f"dequant-{name}-elsewhere", dequant(**{name: zeros(8).to(ELSEWHERE)}), f"{name} must be on cpu")
        for name in ("weight_scale", "activation_scale", "bias", "quant_scale", "quant_offset", "group_index")
    ],
]

_QUANT: list[Rule] = [
    ("swiglu-quant-vector", quant(8), "npu_swiglu_quant: x dim should larger than 1, but x has shape (8,)"),
    ("swiglu-quant-integers", quant(dtype=I32), "x must have dtype float16, bfloat16, float32, but has int32"),
    ("swiglu-quant-mode", quant(quant_mode=2), "quant_mode only support 0 or 1, but got 2"),
    ("swiglu-quant-pairs", quant(group_list_type=2), "group_list_type only support 0(cumsum) or 1(count), but got 2"),
    (
        "swiglu-quant-dst-type",
        quant(dst_type=torch.uint8),
        "dtype must be torch.int8 for int8 or torch.quint4x2 for int4, but dst_type is torch.uint8",
    ),
    ("swiglu-quant-dst-type-number", quant(dst_type=3), "dtype must be torch.int8 for int8 or torch.quint4x2 for int4"),
    ("swiglu-quant-wide", quant(1, 8194), "the last dim of x must be at most 8192, but is 8194"),
    ("swiglu-quant-odd", quant(4, 7), "the last dim of x must be a multiple of 2 for torch.int8, but is 7"),
    (
        "swiglu-quant-odd-int4",
        quant(4, 6, dst_type=torch.quint4x2),
        "the last dim of x must be a multiple of 4 for torch.quint4x2, but is 6",
    ),
    ("swiglu-quant-int64-groups", quant(group_index=int64([4])), "group_index must have dtype int32, but has int64"),
    ("swiglu-quant-groups-2d", quant(group_index=ints(4).view(1, 1)), "group_index must have 1 dimensions"),
    ("swiglu-quant-smooth-dtype", quant(smooth_scales=zeros(1, 4, dtype=F16)), "smooth_scales must have dtype float32"),
    (
        "swiglu-quant-smooth-vector",
        quant(smooth_scales=zeros(4)),
        "smooth_scales must have shape (1, 4) or (1,), one row or one number per group, but has (4,)",
    ),
    (
        "swiglu-quant-smooth-groups",
        quant(smooth_scales=zeros(1, 4), group_index=ints(2, 4)),
        "smooth_scales must have shape (2, 4) or (2,)",
    ),
    ("swiglu-quant-offset-dtype", quant(offsets=zeros(1, dtype=I32)), "offsets must have dtype float32"),
    ("swiglu-quant-offset-shape", quant(offsets=zeros(1, 8)), "offsets must have shape (1, 4) or (1,), one row or"),
    (
        "swiglu-quant-different-shapes",
        quant(smooth_scales=zeros(1, 4), offsets=zeros(1)),
        "smooth_scales and offsets should have the same shape when quant_mode is 0, but have (1, 4) and (1,)",
    ),
    (
        "swiglu-quant-decreasing",
        quant(group_index=ints(3, 2)),
        "npu_swiglu_quant: each difference of group_index should be larger than or equal to 0",
    ),
    (
        "swiglu-quant-negative",
        quant(group_index=ints(3, -1), group_list_type=1),
        "group_index counts should be larger than or equal to 0, but are [3, -1]",
    ),
    (
        "swiglu-quant-too-many",
        quant(group_index=ints(3, 2), group_list_type=1),
        "group_index covers 5 rows but there are only 4",
    ),
]

_DEQUANT: list[Rule] = [
    ("dequant-vector", dequant(8), "npu_dequant_swiglu_quant: x dim should larger than 1, but x has shape (8,)"),
    ("dequant-float32", dequant(dtype=F32), "x must have dtype int32, float16, bfloat16, but has float32"),
    (
        "dequant-wide",
        dequant(1, 20994, group_index=torch.tensor([1])),
        "H, half of x, must be at most 10496 with group_index, but is 10497",
    ),
    ("dequant-odd", dequant(4, 7), "the last dim of x must be even, but is 7"),
    ("dequant-mode", dequant(quant_mode=-1), "quant_mode only support 0 or 1, but got -1"),
    ("dequant-swiglu-mode", dequant(swiglu_mode=3), "swiglu_mode only support 0, 1 or 2, but got 3"),
    ("dequant-int32-groups", _grouped([4], group_index=ints(4)), "group_index must have dtype int64, but has int32"),
    ("dequant-groups-2d", _grouped([4], group_index=int64([[4]])), "group_index must have 1 dimensions"),
    (
        "dequant-groups-of-three-dims",
        dequant(2, 2, 8, group_index=int64([4])),
        "x must have 2 dimensions with group_index, but has shape (2, 2, 8)",
    ),
    ("dequant-groups-and-bias", _grouped([4], bias=zeros(8)), "bias must be None with group_index"),
    ("dequant-without-scale", dequant(weight_scale=None), "weight_scale must be given for int32 x"),
    ("dequant-scale-dtype", dequant(weight_scale=zeros(8, dtype=BF16)), "weight_scale must have dtype float32"),
    ("dequant-scale-shape", dequant(weight_scale=zeros(4)), "weight_scale must have shape (1, 8), but has (4,)"),
    (
        "dequant-scale-of-two-groups",
        _grouped([2, 2], weight_scale=zeros(8)),
        "weight_scale must have shape (2, 8), but has (8,)",
    ),
    ("dequant-rows-dtype", dequant(activation_scale=zeros(4, dtype=F16)), "activation_scale must have dtype float32"),
    (
        "dequant-rows-shape",
        dequant(activation_scale=zeros(1, 4)),
        "activation_scale must have one number per row, shape (4, 1), but has (1, 4)",
    ),
    ("dequant-bias-dtype", dequant(bias=zeros(8, dtype=I8)), "bias must have dtype int32, float32, float16, bfloat16"),
    ("dequant-bias-shape", dequant(bias=zeros(4)), "bias must have shape (8,), but has (4,)"),
    (
        "dequant-smooth-dtype",
        dequant(quant_mode=1, quant_scale=zeros(4, dtype=I32)),
        "quant_scale must have dtype float32, float16, bfloat16, but has int32",
    ),
    (
        "dequant-smooth-shape",
        dequant(quant_mode=1, quant_scale=zeros(1)),
        "quant_scale must have shape (1, 4) in dynamic mode, but has (1,)",
    ),
    ("dequant-divisor-dtype", dequant(quant_scale=zeros(1, dtype=F16)), "quant_scale must have dtype float32, but has"),
    (
        "dequant-divisor-shape",
        dequant(quant_scale=zeros(4)),
        "quant_scale must have shape (1, 4) or (1,) in static mode, one row or one number per group, but has (4,)",
    ),
    ("dequant-offset-shape", dequant(quant_offset=zeros(2)), "quant_offset must have shape (1, 4) or (1,) in static"),
    *[
        (
            f"dequant-limit-{value}",
            dequant(clamp_limit=value),
            f"clamp_limit should be positive finite, but is {value}",
        )
        for value in (0.0, -1.0, math.inf, math.nan)
    ],
    *[
        (f"dequant-{name}-{value}", dequant(**{name: value}), f"{name} should be finite, but is {value}")
        for name in ("glu_alpha", "glu_bias")
        for value in (math.inf, -math.inf, math.nan)
    ],
    (
        "dequant-negative",
        _grouped([5, -1]),
        "npu_dequant_swiglu_quant: group_index counts should be larger than or equal to 0",
    ),
    ("dequant-too-many", _grouped([3, 2]), "group_index covers 5 rows but there are only 4"),
]

RULES: list[Rule] = [*_ELSEWHERE, *_QUANT, *_DEQUANT]

LEGAL: list[Callable[[], Any]] = [
    quant(),
    quant(quant_mode=1, dst_type=1, offsets=zeros(9)),
    quant(smooth_scales=zeros(2), offsets=zeros(2), group_index=ints(2, 4)),
    dequant(),
    dequant(2, 2, 8),
    dequant(quant_mode=1, quant_scale=zeros(4, dtype=F16), bias=zeros(8)),
    dequant(dtype=BF16, weight_scale=zeros(3), bias=zeros(3)),
    _grouped([2, 2]),
    _grouped([4], weight_scale=zeros(8)),
]
