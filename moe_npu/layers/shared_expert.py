"""The shared expert: a feed-forward network that every token passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moe_npu.layers.activations import Activation, get_activation


class SharedExpert(nn.Module):
    """``down_proj(act(gate) * up)`` with ``gate, up`` the halves of ``gate_up_proj(x)``, for every token.

    Without a gate it is ``down_proj(act(up_proj(x)))`` (Nemotron-H), and with an output gate the result is scaled per
    token by ``sigmoid(gate(x))`` (Qwen2-MoE). Several shared experts of one activation are one of the sum of their
    sizes, their weights one after the other: gates, then ups in ``gate_up_proj``, and columns in ``down_proj``.

    Args:
        hidden_size: H.
        intermediate_size: I, of all shared experts together.
        activation: name of an activation, or a callable: ``[T, 2I] -> [T, I]`` with a gate, ``[T, I] -> [T, I]``
            without.
        has_gate: whether the activation is gated, as of :class:`GroupedExperts`.
        has_output_gate: whether the result is scaled by a learned gate, ``gate.weight [1, H]``.
        bias: whether both projections have a bias; the output gate has none.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: there is no such activation, or it is not one for experts with, or without, a gate.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | Activation = "silu",
        has_gate: bool = True,
        has_output_gate: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.has_gate = has_gate
        self.activation = get_activation(activation, has_gate=has_gate)

        def linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        if has_gate:
            self.gate_up_proj = linear(hidden_size, 2 * intermediate_size, bias=bias)
        else:
            self.up_proj = linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = linear(intermediate_size, hidden_size, bias=bias)
        self.gate = linear(hidden_size, 1, bias=False) if has_output_gate else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply to tokens ``[T, H]``."""
        rows = self.gate_up_proj(hidden_states) if self.has_gate else self.up_proj(hidden_states)  # [T, 2I] or [T, I]
        output: torch.Tensor = self.down_proj(self.activation(rows))  # [T, H]
        return output if self.gate is None else F.sigmoid(self.gate(hidden_states)) * output
