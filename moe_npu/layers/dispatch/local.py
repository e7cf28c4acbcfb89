"""All experts on this device: sort, compute, un-sort."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_npu import ops
from moe_npu.layers.dispatch.base import Dispatched, TokenDispatcher, count_expert_tokens


@dataclass(frozen=True)
class _State:
    sorted_indices: torch.Tensor  # [T * K]
    topk_weights: torch.Tensor  # [T, K]


class LocalDispatcher(TokenDispatcher):
    """Sorts the rows of this device by expert.

    Args:
        num_experts: E; ids of E and above are experts that live elsewhere.
        has_absent_experts: whether such ids can occur. Their pairs contribute nothing, forward and backward.
    """

    def __init__(self, num_experts: int, *, has_absent_experts: bool = False) -> None:
        self.num_experts = num_experts
        self.has_absent_experts = has_absent_experts

    def dispatch(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> Dispatched:
        """See :meth:`TokenDispatcher.dispatch`."""
        rows, sorted_indices = ops.npu_moe_token_permute(hidden_states, topk_ids)  # [T * K, H], [T * K]
        expert_tokens = count_expert_tokens(topk_ids, self.num_experts)  # [E]
        if not self.has_absent_experts:
            return Dispatched(rows, expert_tokens, _State(sorted_indices, topk_weights))
        # absent experts have the largest ids, hence the last rows. Their results, and the gradient that comes back
        # through them, are undefined: a weight of zero leaves out the former, masked_fill's backward the latter
        absent_rows = torch.arange(rows.size(0), device=rows.device) >= expert_tokens.sum()
        absent_rows = absent_rows.unsqueeze(1)  # [T * K, 1]
        rows = rows.masked_fill(absent_rows, 0)
        topk_weights = topk_weights.masked_fill(topk_ids >= self.num_experts, 0)
        return Dispatched(rows, expert_tokens, _State(sorted_indices, topk_weights), absent_rows)

    def combine(self, expert_rows: torch.Tensor, state: _State) -> torch.Tensor:
        """See :meth:`TokenDispatcher.combine`."""
        return ops.npu_moe_token_unpermute(expert_rows, state.sorted_indices, state.topk_weights)
