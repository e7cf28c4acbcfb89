"""The k best logits, then the softmax of these (gpt-oss, Granite-MoE, Aria)."""

from __future__ import annotations

from typing import Literal

import torch

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction


class TopKSoftmaxRouter(LinearRouter):
    """``softmax(topk(x @ weight.T + bias))``: weights that sum to ``routed_scaling_factor``.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        bias: whether the linear map has a bias.
        routed_scaling_factor: factor of the weights.
        logits_dtype: as for :class:`LinearRouter`.
        scores_dtype: as for :class:`LinearRouter`.
        weights_dtype: as for :class:`LinearRouter`.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    score_function: ScoreFunction = "softmax"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        routed_scaling_factor: float = 1.0,
        logits_dtype: torch.dtype | None = None,
        scores_dtype: torch.dtype | None = torch.float32,
        weights_dtype: torch.dtype | Literal["input"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            norm_topk_prob=True,
            routed_scaling_factor=routed_scaling_factor,
            bias=bias,
            logits_dtype=logits_dtype,
            scores_dtype=scores_dtype,
            weights_dtype=weights_dtype,
            selects_by="logits",
            device=device,
            dtype=dtype,
        )

    def _route(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self._gate_softmax(logits)  # with normalization, it takes the best logits first

    def _weigh_forced(self, logits: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return self._scale(torch.softmax(self._as_scores(logits.gather(1, topk_ids)), -1))
