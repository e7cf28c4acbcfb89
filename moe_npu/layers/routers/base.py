"""What every router is and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import nn


class RouterOutput(NamedTuple):
    """The decision of a router for T tokens.

    Attributes:
        router_logits: ``[T, E]``, before scoring; what load-balancing losses take.
        topk_weights: ``[T, K]``, the weight of each chosen expert.
        topk_ids: ``[T, K]`` int32, the chosen experts, best first.
    """

    router_logits: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class Router(nn.Module, ABC):
    """Chooses ``top_k`` of ``num_experts`` experts for each token."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts = {num_experts}, but is {top_k}")
        self.num_experts = num_experts
        self.top_k = top_k

    @abstractmethod
    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route tokens ``[T, H]``."""
