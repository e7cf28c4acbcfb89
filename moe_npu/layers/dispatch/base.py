"""What every dispatcher does: bring rows to their experts, and the results back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from moe_npu.quant import QuantizedRows


class Dispatched(NamedTuple):
    """Rows sorted by expert.

    Attributes:
        rows: ``[R, H]``, the rows of local expert 0 first. Rows at the end that belong to no local expert are
            undefined, and experts leave undefined values there.
        expert_tokens: ``[e]`` int64, rows of each local expert.
        state: what :meth:`TokenDispatcher.combine` needs to bring the results back.
    """

    rows: torch.Tensor | QuantizedRows
    expert_tokens: torch.Tensor
    state: Any


class TokenDispatcher(ABC):
    """Brings tokens to their experts and the weighted results back. Holds no state between calls."""

    @abstractmethod
    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        quantize: bool = False,
    ) -> Dispatched:
        """Sort the (token, expert) pairs of ``hidden_states [T, H]``, both others ``[T, K]``, by expert.

        With ``quantize`` the rows come as :class:`moe_npu.quant.QuantizedRows`, rounded while they are copied.
        """

    @abstractmethod
    def combine(self, expert_rows: torch.Tensor, state: Any) -> torch.Tensor:
        """The weighted sum ``[T, H]`` of the experts' results ``[R, H]`` of each token."""
