"""Softmax over all experts, then the k best (Switch, Mixtral, Qwen-MoE, OLMoE)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from moe_npu import ops
from moe_npu.layers.routers.base import Router, RouterOutput


class SoftmaxTopKRouter(Router):
    """``topk(softmax(x @ weight.T))``, the weights of a token optionally scaled to sum to one.

    The softmax is computed in float32 and the weights are rounded to the dtype of the logits once, at the end.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        norm_topk_prob: divide the K weights by their sum (Mixtral and Qwen3 do, OLMoE and most Qwen2 do not).
        device: device of the weight.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, top_k)
        self.hidden_size = hidden_size
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight as ``nn.Linear`` does."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route tokens ``[T, H]``."""
        router_logits = F.linear(hidden_states, self.weight)  # [T, E]
        # the softmax of the k best logits is that of all logits, its k best values divided by their sum
        topk_weights, topk_ids, _ = ops.npu_moe_gating_top_k_softmax_v2(
            router_logits, k=self.top_k, renorm=int(self.norm_topk_prob)
        )  # [T, K]
        return RouterOutput(router_logits, topk_weights, topk_ids)

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"norm_topk_prob={self.norm_topk_prob}"
        )
