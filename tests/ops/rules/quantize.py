"""Rules of quantize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, F16, F32, I32, Rule, int64, ints, zeros


def quant(*shape: int, dtype: torch.dtype = F16, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_dynamic_quant(zeros(*(shape or (4, 8)), dtype=dtype), **options)


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
    ("quant-dtype-bool", quant(dst_type=True), "dst_type must be a dtype or the number of one, but is True"),
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
    ("pack-float", pack(zeros(2, 8)), "weight dtype only support int32, but is float32"),
    ("pack-empty", pack(zeros(0, 8, dtype=I32)), "weight must have 2 or 3 dimensions and not be empty"),
    ("pack-transposed", pack(zeros(8, 16, dtype=I32).t()), "weight is Not contiguous, its strides are (1, 16)"),
    ("pack-12-columns", pack(zeros(2, 12, dtype=I32)), "weight last dim should be the multiple of 8, but is 12"),
]

LEGAL = [quant(), pack(zeros(2, 8, dtype=I32))]
