"""The shared expert: a gated feed-forward network that every token passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moe_npu.layers.activations import GatedActivation, get_activation


class SharedExpert(nn.Module):
    """``down_proj(act(gate) * up)``, optionally scaled per token by ``sigmoid(gate(x))`` (Qwen2-MoE).

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: name of a gated activation, or a callable ``[T, 2I] -> [T, I]``.
        has_gate: whether the result is scaled by a learned gate.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | GatedActivation = "silu",
        has_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = get_activation(activation)
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype) if has_gate else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply to tokens ``[T, H]``."""
        output: torch.Tensor = self.down_proj(self.activation(self.gate_up_proj(hidden_states)))  # [T, H]
        return output if self.gate is None else F.sigmoid(self.gate(hidden_states)) * output
