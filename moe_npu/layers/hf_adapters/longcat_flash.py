"""LongCat-Flash: experts beyond the routed ones do nothing but pass their tokens on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from moe_npu.layers._precision import grouped_linear
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.hf_adapters.base import Adapter, apply_gate, dispatch_rows


class GroupedLongcatFlashExperts(Adapter, LongcatFlashExperts):
    """``LongcatFlashExperts`` by two grouped matmuls, and one product for all identity experts of a token."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[T, H]``, ids and weights ``[T, K]`` to ``[T, H]``."""
        num_experts = self.num_routed_experts
        is_identity = top_k_index >= num_experts  # [T, K]
        identity_weight = top_k_weights.masked_fill(~is_identity, 0).sum(dim=1, keepdim=True)  # [T, 1]
        output = self.identity_expert(hidden_states) * identity_weight  # [T, H]
        if self.gate_up_proj is None:
            return output.to(hidden_states.dtype)
        dispatcher = LocalDispatcher(num_experts, has_absent_experts=True)
        topk_ids = top_k_index.clamp(max=num_experts)
        rows, expert_tokens, state = dispatch_rows(dispatcher, hidden_states, topk_ids, top_k_weights)
        # gate_up_proj has unused matrices for the identity experts: groups without rows, so that its gradient comes
        # back whole and not as the padded gradient of a slice
        unused = (0, self.total_experts - num_experts)
        gate_up = grouped_linear(rows, self.gate_up_proj.mT, F.pad(expert_tokens, unused), None)  # [R, 2I]
        rows = apply_gate(self.act_fn, gate_up)  # [R, I]
        rows = grouped_linear(rows, self.down_proj.mT, expert_tokens, None)  # [R, H]
        return (dispatcher.combine(rows, state) + output).to(hidden_states.dtype)
