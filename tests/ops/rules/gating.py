"""Rules of gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, I32, Rule, zeros


def gating(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_gating_top_k_softmax(x, **options)


def gating_v2(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_gating_top_k_softmax_v2(x, **options)


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
    (
        "gating-finished-of-three-dims",
        gating(zeros(2, 3, 4), finished=zeros(6, dtype=torch.bool)),
        "finished must have the leading shape of x (2, 3), but has (6,)",
    ),
    ("gating-v2-1d", gating_v2(zeros(4)), "npu_moe_gating_top_k_softmax_v2: x must have 2 or 3 dimensions"),
    ("gating-v2-too-many", gating_v2(zeros(3, 4), k=5), "softmax_v2: k must be between 0 and the number of experts 4"),
    ("gating-v2-renorm", gating_v2(zeros(3, 4), renorm=2), "softmax_v2: renorm must be 0 or 1, but is 2"),
    ("gating-v2-negative-renorm", gating_v2(zeros(3, 4), renorm=-1), "renorm must be 0 or 1, but is -1"),
    ("gating-v2-k-of-none", gating_v2(zeros(3, 4), k=None), "softmax_v2: k must be an int, but is NoneType"),
]

LEGAL = [gating(zeros(3, 4)), gating_v2(zeros(3, 4))]
