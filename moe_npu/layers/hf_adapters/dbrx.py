"""DBRX: the matrices of all experts stacked along the first dimension of flat parameters."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU, DbrxExperts

from moe_npu.layers._precision import grouped_linear
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.hf_adapters.base import Adapter, dispatch_rows


class GroupedDbrxExpertGLU(Adapter, DbrxExpertGLU):
    """``DbrxExpertGLU`` of all experts at once. The experts of ``w1``, ``v1``, ``w2 [E*I, H]`` are views."""

    def forward(self, x: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
        """Rows ``[R, H]`` sorted by expert, ``expert_tokens [E]`` of each; ``[R, H]``."""
        shape = (self.moe_num_experts, self.ffn_hidden_size, self.hidden_size)
        w1, v1, w2 = (weight.view(shape) for weight in (self.w1, self.v1, self.w2))  # [E, I, H]
        gate = grouped_linear(x, w1.mT, expert_tokens, None)  # [R, I]
        up = grouped_linear(x, v1.mT, expert_tokens, None)  # [R, I]
        return grouped_linear(self.activation_fn(gate) * up, w2, expert_tokens, None)


class GroupedDbrxExperts(Adapter, DbrxExperts):
    """``DbrxExperts`` by three grouped matmuls."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """A replaced ``mlp`` has weights that we do not know."""
        mlp = type(module.mlp)
        return None if mlp is DbrxExpertGLU else f"its mlp is {mlp.__name__}, not DbrxExpertGLU"

    @classmethod
    def install(cls, module: Any) -> None:
        """Also ``mlp``, which holds the parameters, so that hooks that bring them run before they are read."""
        super().install(module)
        GroupedDbrxExpertGLU.install(module.mlp)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[B, S, H]``, ids and weights ``[B * S, K]`` to ``[B, S, H]``."""
        tokens = hidden_states.reshape(-1, self.hidden_size)  # [T, H]
        dispatcher = LocalDispatcher(self.num_experts)
        rows, expert_tokens, state = dispatch_rows(dispatcher, tokens, top_k_index, top_k_weights)
        return (
            dispatcher.combine(self.mlp(rows, expert_tokens), state).to(hidden_states.dtype).view(hidden_states.shape)
        )
