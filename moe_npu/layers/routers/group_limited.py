"""The k best experts of the best groups (DeepSeek-V2: groups by maximum; DeepSeek-V3: by the sum of the two best)."""

from __future__ import annotations

import math
from typing import Literal

import torch

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction, check_score_function


class GroupLimitedRouter(LinearRouter):
    """Scores of all experts, the groups that are best by them, and the k best experts of these groups.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        num_groups: number of groups of consecutive experts.
        topk_groups: number of groups that experts are chosen from.
        score_function: ``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``.
        group_score: ``"max"`` or ``"top2_sum"``.
        norm_topk_prob: divide the K weights of a token by their sum.
        has_correction_bias: whether there is a buffer ``e_score_correction_bias`` that only chooses.
        group_fill: as for :class:`LinearRouter`.
        norm_eps: added to the sum of the weights.
        routed_scaling_factor: factor of the weights, last.
        logits_dtype: as for :class:`LinearRouter`, float32 by default.
        scores_dtype: as for :class:`LinearRouter`.
        weights_dtype: as for :class:`LinearRouter`.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        ValueError: groups that do not divide the experts, or that have fewer than K experts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        topk_groups: int,
        score_function: ScoreFunction,
        group_score: Literal["max", "top2_sum"],
        norm_topk_prob: bool,
        has_correction_bias: bool = False,
        group_fill: float = -math.inf,
        norm_eps: float = 1e-20,
        routed_scaling_factor: float = 1.0,
        logits_dtype: torch.dtype | None = torch.float32,
        scores_dtype: torch.dtype | None = torch.float32,
        weights_dtype: torch.dtype | Literal["input"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_score_function(score_function)
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            norm_topk_prob=norm_topk_prob,
            norm_eps=norm_eps,
            routed_scaling_factor=routed_scaling_factor,
            has_correction_bias=has_correction_bias,
            logits_dtype=logits_dtype,
            scores_dtype=scores_dtype,
            weights_dtype=weights_dtype,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_score=group_score,
            group_fill=group_fill,
            device=device,
            dtype=dtype,
        )
        self.score_function = score_function

    def extra_repr(self) -> str:
        """The sizes, and what is not the default."""
        return f"{super().extra_repr()}, score_function={self.score_function!r}"
