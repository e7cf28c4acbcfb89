"""The MoE layer: router, dispatch, experts, combine, and the shared expert."""

from __future__ import annotations

import torch
from torch import nn

from moe_npu.layers.dispatch import LocalDispatcher, TokenDispatcher
from moe_npu.layers.routers import Router, RouterOutput


class MoE(nn.Module):
    """A sparse feed-forward layer: each token is computed by the ``top_k`` experts that its router chooses.

    Args:
        router: chooses experts and weights.
        experts: ``(rows [R, H], expert_tokens [E]) -> [R, H]``, e.g. ``GroupedExperts`` or ``QuantizedExperts``. Those
            with a true ``takes_quantized_rows`` get ``moe_npu.quant.QuantizedRows``.
        dispatcher: brings rows to their experts and back; the experts of this device by default.
        shared_expert: ``[T, H] -> [T, H]``, added for every token.

    Example:
        >>> import moe_npu
        >>> moe = moe_npu.MoE(
        ...     moe_npu.SoftmaxTopKRouter(64, num_experts=8, top_k=2, norm_topk_prob=True),
        ...     moe_npu.GroupedExperts(num_experts=8, hidden_size=64, intermediate_size=32),
        ... )
        >>> moe(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        *,
        dispatcher: TokenDispatcher | None = None,
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher = LocalDispatcher(router.num_experts) if dispatcher is None else dispatcher
        self.shared_expert = shared_expert

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply to tokens ``[..., H]``; the result has their shape and dtype."""
        return self.forward_with_routing(hidden_states)[0]

    def forward_with_routing(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, RouterOutput]:
        """:meth:`forward` and what the router decided, e.g. for a load-balancing loss."""
        tokens = hidden_states.reshape(-1, hidden_states.size(-1))  # [T, H]
        routing: RouterOutput = self.router(tokens)
        quantize: bool = getattr(self.experts, "takes_quantized_rows", False)
        dispatched = self.dispatcher.dispatch(tokens, routing.topk_ids, routing.topk_weights, quantize=quantize)
        expert_rows = self.experts(dispatched.rows, dispatched.expert_tokens)  # [R, H]
        output = self.dispatcher.combine(expert_rows, dispatched.state)  # [T, H]
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        return output.view(hidden_states.shape), routing
