"""Rules of swiglu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, F16, F32, I32, Rule, int64, ints, zeros


def swiglu(input: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu(input, **options)


def swiglu_backward(grad: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu_backward(grad, zeros(3, 4), **options)


def clipped(*shape: int, dtype: torch.dtype = F32, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_clipped_swiglu(zeros(*(shape or (3, 4)), dtype=dtype), **options)


RULES: list[Rule] = [
    (
        "swiglu-gradient-elsewhere",
        lambda: ops.npu_swiglu_backward(zeros(2).to(ELSEWHERE), zeros(4)),
        "grad_output must be on cpu",
    ),
    ("swiglu-integers", swiglu(zeros(3, 4, dtype=I32)), "npu_swiglu: input must have dtype float16, bfloat16, float32"),
    ("swiglu-scalar", swiglu(zeros()), "input must have 1 to 8 dimensions, but has shape ()"),
    ("swiglu-nine-dims", swiglu(zeros(*[2] * 9)), "input must have 1 to 8 dimensions"),
    ("swiglu-dim", swiglu(zeros(3, 4), dim=2), "dim 2 is out of range for input of 2 dimensions"),
    ("swiglu-odd", swiglu(zeros(3, 4), dim=0), "must have an even size along dim 0 to be split in halves"),
    ("swiglu-grad-shape", swiglu_backward(zeros(3, 4)), "grad_output must be torch.float32 of shape (3, 2), but is"),
    ("swiglu-grad-dtype", swiglu_backward(zeros(3, 2, dtype=F16)), "but is torch.float16 of shape (3, 2)"),
    ("clipped-groups-elsewhere", clipped(group_index=int64([3]).to(ELSEWHERE)), "group_index must be on cpu"),
    ("clipped-integers", clipped(dtype=I32), "npu_clipped_swiglu: x must have dtype float16, bfloat16, float32"),
    ("clipped-vector", clipped(4), "x dim should larger than 1, but x has shape (4,)"),
    ("clipped-dim", clipped(dim=-3), "dim -3 is out of range for x of 2 dimensions"),
    ("clipped-odd", clipped(3, 4, dim=0), "x must have an even size along dim 0, but has shape (3, 4)"),
    ("clipped-odd-last", clipped(4, 3), "x must have an even size along dim -1"),
    ("clipped-int32-groups", clipped(group_index=ints(3)), "group_index must have dtype int64, but has int32"),
    ("clipped-groups-2d", clipped(group_index=int64([[3]])), "group_index must have 1 dimensions"),
    (
        "clipped-negative-count",
        clipped(group_index=int64([2, -1])),
        "npu_clipped_swiglu: group_index counts should be larger than or equal to 0, but are [2, -1]",
    ),
]

LEGAL = [swiglu(zeros(3, 4)), swiglu_backward(zeros(3, 2)), clipped(), clipped(group_index=int64([2, 9]))]
