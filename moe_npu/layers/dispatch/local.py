"""All experts on this device: sort, compute, un-sort."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_npu import ops
from moe_npu.layers.dispatch.base import Dispatched, TokenDispatcher
from moe_npu.quant import QuantizedRows
from moe_npu.quant.scheme import refuse_gradient


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

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        quantize: bool = False,
    ) -> Dispatched:
        """See :meth:`TokenDispatcher.dispatch`.

        Raises:
            ValueError: a gradient of rows that are to be quantized is asked for.
        """
        if quantize:
            refuse_gradient(hidden_states)
        rows, sorted_indices, expert_tokens, row_scale = ops.npu_moe_init_routing_v2(
            hidden_states,
            topk_ids.to(torch.int32),
            expert_num=self.num_experts + self.has_absent_experts,
            active_expert_range=[0, self.num_experts],
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            quant_mode=1 if quantize else -1,
        )  # [T * K, H], [T * K], [E], [T * K]
        if self.has_absent_experts:
            # Absent pairs have no row. In its gradient, combine writes a row for each pair, also of weight zero: give
            # each one of its own from the end, which belongs to no expert
            is_absent = sorted_indices < 0
            own_row = rows.size(0) - is_absent.cumsum(0, dtype=torch.int32)
            sorted_indices = torch.where(is_absent, own_row, sorted_indices)
            topk_weights = topk_weights.masked_fill(is_absent.view_as(topk_weights), 0)
        state = _State(sorted_indices, topk_weights)
        return Dispatched(
            QuantizedRows(rows, row_scale, hidden_states.dtype) if quantize else rows, expert_tokens, state
        )

    def combine(self, expert_rows: torch.Tensor, state: _State) -> torch.Tensor:
        """See :meth:`TokenDispatcher.combine`."""
        return ops.npu_moe_token_unpermute(expert_rows, state.sorted_indices, state.topk_weights)
