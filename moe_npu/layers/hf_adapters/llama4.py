"""Llama 4: every expert computes every token, scaled by its score; here only the chosen ones do."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from moe_npu.layers._precision import grouped_linear
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.hf_adapters.base import Adapter, apply_gate, dispatch_rows


class GroupedLlama4TextExperts(Adapter, Llama4TextExperts):
    """``Llama4TextExperts`` over the rows of the chosen experts."""

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """The expert ``topk_ids [T, 1]`` of each row ``[T, H]``; ``[T, H]``."""
        dispatcher = LocalDispatcher(self.num_experts)
        ones = hidden_states.new_ones(topk_ids.shape)
        rows, expert_tokens, state = dispatch_rows(dispatcher, hidden_states, topk_ids, ones)
        rows = apply_gate(self.act_fn, grouped_linear(rows, self.gate_up_proj, expert_tokens, None))  # [R, I]
        return dispatcher.combine(grouped_linear(rows, self.down_proj, expert_tokens, None), state)


class GroupedLlama4TextMoe(Adapter, Llama4TextMoe):
    """``Llama4TextMoe``: the score of the router scales the input of an expert, not its output."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Experts of another class, e.g. quantized by transformers, have weights that we do not know."""
        experts = type(module.experts)
        return None if experts is Llama4TextExperts else f"its experts are {experts.__name__}, not Llama4TextExperts"

    @classmethod
    def install(cls, module: Any) -> None:
        """Also the experts, whose forward takes the chosen ids."""
        super().install(module)
        GroupedLlama4TextExperts.install(module.experts)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[..., H]`` to ``[T, H]``, and the router logits ``[T, E]``."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)  # [T, H]
        router_scores, router_logits = self.router(hidden_states)  # [T, E], [T, E]
        topk_ids = router_logits.topk(self.top_k, dim=1).indices  # [T, K]
        topk_scores = router_scores.gather(1, topk_ids)
        pairs = (hidden_states.unsqueeze(1) * topk_scores.unsqueeze(-1)).flatten(0, 1)  # [T * K, H]
        routed = self.experts(pairs, topk_ids.view(-1, 1)).view(-1, self.top_k, self.hidden_dim)  # [T, K, H]
        output = self.shared_expert(hidden_states)
        return output + routed.sum(dim=1).to(output.dtype), router_logits
