"""References of the SwiGLU family."""

from __future__ import annotations

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
