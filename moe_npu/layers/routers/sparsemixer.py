"""SparseMixer: two experts, one after the other, sampled in training with a gradient that corrects for it (PhiMoE).

    near(s) = s where (max(s) - s) / max(|s|, max(s)) <= 2 * jitter_eps, else -inf
    first:    p = softmax(near(s)),                        id = argmax(s), in training a sample of p
    second:   the same without the first expert
    weight:   p[id], in training times 1/3 in a part of the samples (Heun's third-order method)

Liu et al., "Sparse Backpropagation for MoE Training" (2023). The gradient of a weight is that of ``p[id]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction

_MIDPOINT = 0.3333  # as published models were trained: not exactly a third
_MIDPOINT_RATE = 0.75


class SparseMixerRouter(LinearRouter):
    """The best expert and the second best, each weighed by a softmax over the experts that are nearly as good.

    In training both are sampled, with the random numbers of the default generator in the order in which transformers
    draws them. Weights do not sum to one.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K, which must be 2.
        jitter_eps: half of the relative distance from the best logit that counts as near.
        device: device of the weight.
        dtype: dtype of the weight.

    Raises:
        ValueError: ``top_k`` is not 2, or ``jitter_eps`` is negative.
    """

    score_function: ScoreFunction = "softmax"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        jitter_eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if top_k != 2:
            raise ValueError(f"top_k must be 2 for a SparseMixerRouter, but is {top_k}")
        if jitter_eps < 0:
            raise ValueError(f"jitter_eps must not be negative, but is {jitter_eps}")
        super().__init__(
            hidden_size, num_experts, top_k, norm_topk_prob=False, scores_dtype=None, device=device, dtype=dtype
        )
        self.jitter_eps = jitter_eps

    def _route(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self._mix(logits, None)

    def _weigh_forced(self, logits: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return self._mix(logits, topk_ids)[0]

    def _mix(self, logits: torch.Tensor, forced: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        first, first_id = self._pick(logits, logits, None if forced is None else forced[:, :1], num_draws=1)
        rest = logits.scatter(1, first_id, -math.inf)
        # transformers draws twice for the second expert and uses the later number
        second, second_id = self._pick(logits, rest, None if forced is None else forced[:, 1:], num_draws=2)
        return torch.cat([first, second], -1), torch.cat([first_id, second_id], -1)

    def _pick(
        self, logits: torch.Tensor, candidates: torch.Tensor, forced: torch.Tensor | None, *, num_draws: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and id ``[T, 1]`` of one expert among the ``candidates``, logits with -inf for those that are not."""
        with torch.no_grad():
            best, best_id = candidates.max(-1, keepdim=True)  # [T, 1]
            scale = torch.maximum(logits.abs(), best)
            is_far = (best - logits) / scale > 2 * self.jitter_eps
        near = candidates.masked_fill(is_far, -math.inf)
        if forced is not None:
            chosen_id = forced
        elif self.training:  # adding Gumbel noise to logits samples their softmax
            chosen_id = (near - torch.empty_like(near).exponential_().log()).max(-1, keepdim=True).indices
        else:
            chosen_id = best_id
        probabilities = torch.softmax(near, -1)
        weight = probabilities.gather(1, chosen_id)
        if self.training:
            likeliest, likeliest_id = probabilities.max(-1, keepdim=True)
            for _ in range(num_draws):
                draw = torch.rand_like(likeliest)
            is_full = (chosen_id == likeliest_id) | (draw > _MIDPOINT_RATE)
            weight = _ScaleForward.apply(weight, torch.where(is_full, 1.0, _MIDPOINT).to(weight.dtype))
        return weight, chosen_id

    def extra_repr(self) -> str:
        """The sizes, and what is not the default."""
        return f"{super().extra_repr()}, jitter_eps={self.jitter_eps}"


class _ScaleForward(torch.autograd.Function):
    """A product whose gradient is that of its first factor alone."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return weight * factor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
