"""Experts row by row and MoE layers token by token, in float64, from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SQRT_2 = math.sqrt(2)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / SQRT_2))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": lambda x: relu(x) ** 2,
    "silu": silu,
}


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def act(gate_up: Tensor) -> Tensor:
        half = gate_up.size(-1) // 2
        return function(gate_up[..., :half]) * gate_up[..., half:]

    return act


def expert(experts: nn.Module, act: Callable[[Tensor], Tensor], index: int, x: Tensor) -> Tensor:
    """One expert applied to one row ``[H]``, from the parameters of ``GroupedExperts``."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = getattr(experts, first)[index].double() @ x.double()
    if getattr(experts, f"{first}_bias") is not None:
        rows = rows + getattr(experts, f"{first}_bias")[index].double()
    y = experts.down_proj[index].double() @ act(rows)
    if experts.down_proj_bias is not None:
        y = y + experts.down_proj_bias[index].double()
    if experts.post_norm is not None:  # an RMS norm
        y = y / (y.square().mean() + experts.post_norm.eps).sqrt() * experts.post_norm.weight.double()
    return y


def sorted_rows(experts: nn.Module, act: Callable[[Tensor], Tensor], x: Tensor, expert_tokens: list[int]) -> Tensor:
    """Experts applied to rows ``[R, H]`` that are sorted by expert."""
    owners = [index for index, count in enumerate(expert_tokens) for _ in range(count)]
    out = [expert(experts, act, owner, row) for owner, row in zip(owners, x, strict=True)]
    return torch.stack(out) if out else x.double()


def mlp(module: nn.Module, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A ``SharedExpert`` applied to tokens ``[T, H]``."""

    def linear(layer: nn.Linear, rows: Tensor) -> Tensor:
        y = rows @ layer.weight.double().T
        return y if layer.bias is None else y + layer.bias.double()

    y = linear(module.down_proj, act(linear(module.gate_up_proj if module.has_gate else module.up_proj, x.double())))
    return y if module.gate is None else y / (1 + torch.exp(-linear(module.gate, x.double())))
