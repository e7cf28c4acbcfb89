"""References of the SwiGLU family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.helpers.reference.common import sigmoid


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """spec: npu_swiglu 3.1. The first half along dim is activated and multiplied with the second."""
    half = input.shape[dim] // 2
    first, second = input.double().narrow(dim, 0, half), input.double().narrow(dim, half, half)
    return first * sigmoid(first) * second


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """spec: npu_swiglu_backward 3.1."""
    half = input.shape[dim] // 2
    a, b = input.double().narrow(dim, 0, half), input.double().narrow(dim, half, half)
    dy = grad_output.double()
    grad_a = dy * b * sigmoid(a) * (1.0 + a * (1.0 - sigmoid(a)))
    grad_b = dy * a * sigmoid(a)
    return torch.cat([grad_a, grad_b], dim=dim)


def clipped_swiglu(
    x: Tensor,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """spec: npu_clipped_swiglu 3.2. Row by row; nothing is computed of the rows behind the counts."""
    dim %= x.dim()
    length = math.prod(x.shape[dim:])
    rows = x.double().reshape(math.prod(x.shape[:dim]), length)
    covered = rows.shape[0] if group_index is None else sum(int(count) for count in group_index)
    first = [2 * i if interleaved else i for i in range(length // 2)]
    second = [2 * i + 1 if interleaved else i + length // 2 for i in range(length // 2)]
    results = []
    for number, row in enumerate(rows):
        if number >= covered:
            results.append(torch.zeros(length // 2, dtype=torch.float64))
            continue
        a = row[torch.tensor(first, dtype=torch.int64)].clamp(max=limit)
        b = row[torch.tensor(second, dtype=torch.int64)].clamp(min=-limit, max=limit)
        results.append(a * sigmoid(alpha * a) * (b + bias))
    shape = list(x.shape)
    shape[dim] //= 2
    return torch.stack(results).reshape(shape) if results else torch.zeros(shape, dtype=torch.float64)
