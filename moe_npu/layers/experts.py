"""The experts of a MoE layer: their stacked weights and their forward over sorted rows."""

from __future__ import annotations

import math

import torch
from torch import nn

from moe_npu.layers._precision import grouped_linear
from moe_npu.layers.activations import GatedActivation, get_activation


class GroupedExperts(nn.Module):
    """E gated feed-forward networks, computed by two grouped matmuls.

    ``down_proj[e] @ (act(gate) * up)`` with ``gate, up`` the halves of ``gate_up_proj[e] @ x``. The parameters are
    those of transformers' experts: ``gate_up_proj [E, 2I, H]``, ``down_proj [E, H, I]`` and, with ``bias``,
    ``gate_up_proj_bias [E, 2I]``, ``down_proj_bias [E, H]``.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: name of a gated activation, or a callable ``[R, 2I] -> [R, I]``.
        bias: whether both projections have a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | GatedActivation = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = get_activation(activation)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(2 * intermediate_size, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(2 * intermediate_size) if bias else None
        self.down_proj_bias = parameter(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill every expert as ``nn.Linear`` does."""
        for name in ("gate_up_proj", "down_proj"):
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            bound = 1 / math.sqrt(weight.size(-1))
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, hidden_states: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows.

        Args:
            hidden_states: ``[R, H]``, rows sorted by expert, dtype of the weights.
            expert_tokens: ``[E]`` int64, rows of each expert.

        Returns:
            ``[R, H]``, dtype of the weights, or that of autocast where it is on.
        """
        gate_up = grouped_linear(hidden_states, self.gate_up_proj.mT, expert_tokens, self.gate_up_proj_bias)  # [R, 2I]
        rows = self.activation(gate_up)  # [R, I]
        return grouped_linear(rows, self.down_proj.mT, expert_tokens, self.down_proj_bias)  # [R, H]

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, bias={self.gate_up_proj_bias is not None}"
        )
