"""The form of a rule and what the tables make their calls with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.ops.samples.base import BF16, F16, F32, F64, int64

I8, I32, I64 = torch.int8, torch.int32, torch.int64
ELSEWHERE = torch.device("meta")

# name, a call that breaks one rule, what the error says
Rule = tuple[str, Callable[[], Any], str]

__all__ = ["BF16", "ELSEWHERE", "F16", "F32", "F64", "I8", "I32", "I64", "Rule", "int64", "ints", "zeros"]


def zeros(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=I32)
