"""What every dispatcher does: bring rows to their experts, and the results back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch


class Dispatched(NamedTuple):
    """Rows sorted by expert.

    Attributes:
        rows: ``[R, H]``, the rows of local expert 0 first.
        expert_tokens: ``[e]`` int64, rows of each local expert.
        state: what :meth:`TokenDispatcher.combine` needs to bring the results back.
        absent_rows: ``[R, 1]`` bool, True for rows at the end that belong to no local expert; None if there are none.
            Experts leave undefined values there.
    """

    rows: torch.Tensor
    expert_tokens: torch.Tensor
    state: Any
    absent_rows: torch.Tensor | None = None


class TokenDispatcher(ABC):
    """Brings tokens to their experts and the weighted results back. Holds no state between calls."""

    @abstractmethod
    def dispatch(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> Dispatched:
        """Sort the (token, expert) pairs of ``hidden_states [T, H]``, both others ``[T, K]``, by expert."""

    @abstractmethod
    def combine(self, expert_rows: torch.Tensor, state: Any) -> torch.Tensor:
        """The weighted sum ``[T, H]`` of the experts' results ``[R, H]`` of each token."""


def count_expert_tokens(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert ``0 .. num_experts - 1`` occurs, int64 ``[num_experts]``; other ids are not counted.

    Without a host read and without a data-dependent shape, unlike ``bincount``. Exact up to 2**24 per expert.
    """
    ids = topk_ids.detach().flatten().clamp(max=num_experts)
    # num_experts + 1 bins of width num_experts / (num_experts + 1): bin i holds i and no other integer
    counts = torch.histc(ids.float(), bins=num_experts + 1, min=0, max=num_experts)
    return counts[:num_experts].to(torch.int64)
