"""Rules of grouped_mm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, F16, F64, I8, Rule, int64, ints, zeros


def grouped_mm(**changes: Any) -> Callable[[], Any]:
    legal = {"x": zeros(5, 3), "weight": zeros(2, 3, 4), "expert_tokens": int64([2, 3])}
    return lambda: ops.grouped_mm(**{**legal, **changes})


def weight_grad(**changes: Any) -> Callable[[], Any]:
    legal = {"x": zeros(5, 3), "dy": zeros(5, 4), "expert_tokens": int64([2, 3])}
    return lambda: ops.grouped_mm_weight_grad(**{**legal, **changes})


RULES: list[Rule] = [
    (
        "mm-bias-elsewhere",
        grouped_mm(bias=torch.zeros(2, 4, device=ELSEWHERE)),
        "bias must be on cpu like the first argument, but is on meta",
    ),
    (
        "mm-integers",
        grouped_mm(x=zeros(5, 3, dtype=I8)),
        "grouped_mm: x must have dtype float16, bfloat16, float32, but",
    ),
    (
        "mm-mixed-dtypes",
        grouped_mm(weight=zeros(2, 3, 4, dtype=F16)),
        "x and weight must have one dtype, but are float32",
    ),
    ("mm-3d-x", grouped_mm(x=zeros(1, 5, 3)), "x must have 2 dimensions, but has shape (1, 5, 3)"),
    ("mm-2d-counts", grouped_mm(expert_tokens=int64([[2, 3]])), "expert_tokens must have 1 dimensions"),
    ("mm-int32-counts", grouped_mm(expert_tokens=ints(2, 3)), "expert_tokens must have dtype int64, but has int32"),
    ("mm-no-counts", grouped_mm(expert_tokens=int64([])), "expert_tokens must have one entry per expert, but is empty"),
    ("mm-other-device", grouped_mm(weight=zeros(2, 3, 4, device="meta")), "weight is on meta but x is on cpu"),
    ("mm-2d-weight", grouped_mm(weight=zeros(3, 4)), "weight must have 3 dimensions, but has shape (3, 4)"),
    ("mm-other-experts", grouped_mm(weight=zeros(3, 3, 4)), "weight has 3 experts but expert_tokens has 2 entries"),
    ("mm-other-k", grouped_mm(weight=zeros(2, 9, 4)), "x has 3 columns but each expert's weight has 9 rows"),
    (
        "mm-bias-dtype",
        grouped_mm(bias=zeros(2, 4, dtype=F16)),
        "bias must have the dtype of x, float32, or be float32 for bfloat16 x, but has",
    ),
    ("mm-float64-bias", grouped_mm(bias=zeros(2, 4, dtype=F64)), "but has float64"),
    ("mm-bias-shape", grouped_mm(bias=zeros(4)), "bias must have shape (2, 4), but has (4,)"),
    ("mm-negative-count", grouped_mm(expert_tokens=int64([-1, 3])), "should be larger than or equal to 0"),
    ("mm-beyond-rows", grouped_mm(expert_tokens=int64([3, 3])), "expert_tokens covers 6 rows but there are only 5"),
    ("weight-grad-3d-dy", weight_grad(dy=zeros(1, 5, 4)), "grouped_mm_weight_grad: dy must have 2 dimensions"),
    ("weight-grad-other-rows", weight_grad(dy=zeros(4, 4)), "x has 5 rows but dy has 4"),
]

LEGAL = [grouped_mm(), weight_grad()]
