"""Rules of gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, I32, Rule, zeros


def gating(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_gating_top_k_softmax(x, **options)


RULES: list[Rule] = [
    (
        "gating-finished-elsewhere",
        gating(zeros(3, 4), finished=torch.zeros(3, dtype=torch.bool, device=ELSEWHERE)),
        "finished must be on cpu",
    ),
    ("gating-1d", gating(zeros(4)), "x must have 2 or 3 dimensions, but has shape (4,)"),
    ("gating-integers", gating(zeros(3, 4, dtype=I32)), "x must have dtype float16, bfloat16, float32, but has int32"),
    ("gating-too-many", gating(zeros(3, 4), k=5), "k must be between 0 and the number of experts 4, but is 5"),
    ("gating-negative-k", gating(zeros(3, 4), k=-1), "k must be between 0 and the number of experts 4, but is -1"),
    ("gating-finished-dtype", gating(zeros(3, 4), finished=zeros(3)), "finished must have dtype bool, but has float32"),
    (
        "gating-finished-shape",
        gating(zeros(3, 4), finished=zeros(3, 1, dtype=torch.bool)),
        "finished must have the leading shape of x (3,), but has (3, 1)",
    ),
]

LEGAL = [gating(zeros(3, 4))]
