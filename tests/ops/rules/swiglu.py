"""Rules of swiglu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, F16, I32, Rule, zeros


def swiglu(input: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu(input, **options)


def swiglu_backward(grad: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu_backward(grad, zeros(3, 4), **options)


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
]

LEGAL = [swiglu(zeros(3, 4)), swiglu_backward(zeros(3, 2))]
