"""JetMoE: experts in the feed-forward layer, and query and output projections as experts in the attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoA, JetMoeMoE, JetMoeParallelExperts, JetMoeTopKGating

from moe_npu import ops
from moe_npu.layers._precision import grouped_linear
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.hf_adapters.base import Adapter, apply_gate, dispatch_rows


class GroupedJetMoeTopKGating(Adapter, JetMoeTopKGating):
    """``JetMoeTopKGating`` that leaves the counts of the experts on the device."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """``[T, H]`` to ids and weights ``[T, K]`` and, fifth, where transformers records them, logits ``[T, E]``."""
        logits = self.layer(hidden_states).float()  # [T, E]
        topk_logits, topk_ids = logits.topk(self.top_k, dim=1)  # [T, K], [T, K]
        topk_weights = torch.softmax(topk_logits, dim=1).type_as(hidden_states)
        return topk_ids, topk_weights, None, None, logits


class GroupedJetMoeParallelExperts(Adapter, JetMoeParallelExperts):
    """``JetMoeParallelExperts`` by one grouped matmul."""

    def forward(self, inputs: torch.Tensor, expert_size: torch.Tensor) -> torch.Tensor:
        """Rows ``[R, in]`` sorted by expert, ``expert_size [E]`` of each; ``[R, out]``."""
        return grouped_linear(inputs, self.weight.mT, expert_size, None)


class _Mixture(Adapter):
    """What both mixtures share."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Replaced submodules have weights that we do not know."""
        for name, expected in _SUBMODULES.items():
            if type(getattr(module, name)) is not expected:
                return f"its {name} is {type(getattr(module, name)).__name__}, not {expected.__name__}"
        return None

    @classmethod
    def install(cls, module: Any) -> None:
        """Also the router and both projections, which speak of counts on the device."""
        super().install(module)
        GroupedJetMoeTopKGating.install(module.router)
        GroupedJetMoeParallelExperts.install(module.input_linear)
        GroupedJetMoeParallelExperts.install(module.output_linear)


_SUBMODULES = {
    "router": JetMoeTopKGating,
    "input_linear": JetMoeParallelExperts,
    "output_linear": JetMoeParallelExperts,
}


class GroupedJetMoeMoE(_Mixture, JetMoeMoE):
    """``JetMoeMoE`` by two grouped matmuls."""

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """``[B, S, H]`` to ``[B, S, H]``."""
        tokens = layer_input.reshape(-1, layer_input.size(-1))  # [T, H]
        topk_ids, topk_weights, *_ = self.router(tokens)  # [T, K]
        dispatcher = LocalDispatcher(self.router.num_experts)
        rows, expert_tokens, state = dispatch_rows(dispatcher, tokens, topk_ids, topk_weights)
        rows = apply_gate(self.activation, self.input_linear(rows, expert_tokens))  # [R, I]
        return dispatcher.combine(self.output_linear(rows, expert_tokens), state).view(layer_input.shape) + self.bias


class GroupedJetMoeMoA(_Mixture, JetMoeMoA):
    """``JetMoeMoA``: a grouped matmul before the attention and one behind it."""

    def map(self, layer_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, Any]]:
        """``[B, S, H]`` to the queries ``[B, S, K, N]``, the router logits, and what :meth:`reduce` needs."""
        batch, length, hidden = layer_input.shape
        tokens = layer_input.reshape(-1, hidden)  # [T, H]
        topk_ids, topk_weights, _, _, logits = self.router(tokens)
        dispatcher = LocalDispatcher(self.num_experts)
        rows, expert_tokens, state = dispatch_rows(dispatcher, tokens, topk_ids, topk_weights)
        queries = ops.npu_moe_token_unpermute(self.input_linear(rows, expert_tokens), state.sorted_indices)  # [T*K, N]
        return queries.view(batch, length, self.top_k, self.hidden_size), logits, (topk_ids, state)

    def reduce(self, layer_input: torch.Tensor, topo_info: tuple[torch.Tensor, Any]) -> torch.Tensor:
        """The attention of each pair ``[B, S, K, N]`` to ``[B, S, H]``."""
        topk_ids, state = topo_info
        batch, length, _, width = layer_input.shape
        pairs = layer_input.reshape(-1, width)  # [T * K, N]
        dispatcher = LocalDispatcher(self.num_experts)
        ones = pairs.new_ones(pairs.size(0), 1)
        rows, expert_tokens, _ = dispatch_rows(dispatcher, pairs, topk_ids.reshape(-1, 1), ones)
        rows = self.output_linear(rows, expert_tokens)  # [R, H]
        # the sort is stable: pairs have the rows that they had as tokens, so the first state sums the K of each token
        return dispatcher.combine(rows, state).view(batch, length, self.input_size) + self.bias
