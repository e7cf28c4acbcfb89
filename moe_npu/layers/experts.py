"""The experts of a MoE layer: their stacked weights and their forward over sorted rows."""

from __future__ import annotations

import math

import torch
from torch import nn

from moe_npu.layers._lora import with_lora
from moe_npu.layers._precision import grouped_linear
from moe_npu.layers.activations import Activation, get_activation


class GroupedExperts(nn.Module):
    """E feed-forward networks, computed by two grouped matmuls.

    With a gate ``down_proj[e] @ (act(gate) * up)``, where ``gate, up`` are the halves of ``gate_up_proj[e] @ x``;
    without ``down_proj[e] @ act(up_proj[e] @ x)``. The parameters are those of transformers' experts, experts first:

    ======================  ==============================  =========================
    parameter               shape                           exists
    ======================  ==============================  =========================
    ``gate_up_proj``        ``[E, 2I, H]``, gate first      with a gate
    ``up_proj``             ``[E, I, H]``                   without a gate
    ``down_proj``           ``[E, H, I]``                   always
    ``gate_up_proj_bias``   ``[E, 2I]``                     with a gate; else None
    ``up_proj_bias``        ``[E, I]``                      without a gate; else None
    ``down_proj_bias``      ``[E, H]``                      always; None without bias
    ======================  ==============================  =========================

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: name of an activation, or a callable: ``[R, 2I] -> [R, I]`` with a gate, ``[R, I] -> [R, I]``
            without.
        bias: whether both projections have a bias.
        has_gate: whether the experts have a gate.
        post_norm: applied to the results of the experts ``[R, H]``, before they are weighted (Muse Spark); one for all
            experts.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: there is no such activation, or it is not one for experts with, or without, a gate.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | Activation = "silu",
        bias: bool = False,
        has_gate: bool = True,
        post_norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.has_gate = has_gate
        self.activation = get_activation(activation, has_gate=has_gate)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        if has_gate:
            self.gate_up_proj = parameter(2 * intermediate_size, hidden_size)
            self.gate_up_proj_bias = parameter(2 * intermediate_size) if bias else None
        else:
            self.up_proj = parameter(intermediate_size, hidden_size)
            self.up_proj_bias = parameter(intermediate_size) if bias else None
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.down_proj_bias = parameter(hidden_size) if bias else None
        self.post_norm = post_norm
        self.reset_parameters()

    @property
    def weight_names(self) -> tuple[str, str]:
        """The names of both weights: ``"gate_up_proj"`` or ``"up_proj"``, and ``"down_proj"``."""
        return ("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"

    def reset_parameters(self) -> None:
        """Fill every expert as ``nn.Linear`` does. The norm fills itself."""
        for name in self.weight_names:
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
        if self.has_gate:
            rows = self._linear("gate_up_proj", self.gate_up_proj, self.gate_up_proj_bias, hidden_states, expert_tokens)
        else:
            rows = self._linear("up_proj", self.up_proj, self.up_proj_bias, hidden_states, expert_tokens)
        rows = self.activation(rows)  # [R, I]
        rows = self._linear("down_proj", self.down_proj, self.down_proj_bias, rows, expert_tokens)  # [R, H]
        if self.post_norm is None:
            return rows
        output: torch.Tensor = self.post_norm(zero_undefined_rows(rows, expert_tokens))
        return output

    def _linear(
        self,
        name: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        expert_tokens: torch.Tensor,
    ) -> torch.Tensor:
        y = grouped_linear(rows, weight.mT, expert_tokens, bias)
        return with_lora(self, name, rows, expert_tokens, y)

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, has_gate={self.has_gate}, "
            f"bias={self.down_proj_bias is not None}"
        )


def zero_undefined_rows(rows: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
    """Rows with zeros in the place of those that belong to no expert, before a norm of all rows.

    These are undefined, also in backward, and would reach the gradient of the norm's weight.

    Args:
        rows: ``[R, H]``, sorted by expert, those of no expert last.
        expert_tokens: ``[E]`` int64, rows of each expert.

    Returns:
        ``[R, H]``, dtype of rows.
    """
    is_undefined = torch.arange(rows.size(0), device=rows.device) >= expert_tokens.sum()  # [R]
    return rows.masked_fill(is_undefined.unsqueeze(1), 0)
