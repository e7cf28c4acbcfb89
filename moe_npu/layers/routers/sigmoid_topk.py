"""Sigmoid of each logit, then the k best, often after adding a bias that only chooses (AFMoE, MiniMax-M2, LFM2)."""

from __future__ import annotations

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction


class SigmoidTopKRouter(LinearRouter):
    """``topk(sigmoid(x @ weight.T) + e_score_correction_bias)``; :class:`LinearRouter` has the arguments.

    Example:
        >>> import torch
        >>> router = SigmoidTopKRouter(16, num_experts=8, top_k=2, norm_topk_prob=True, has_correction_bias=True)
        >>> router.e_score_correction_bias[5] = 1.0
        >>> router(torch.randn(3, 16)).topk_ids[:, 0]
        tensor([5, 5, 5], dtype=torch.int32)
    """

    score_function: ScoreFunction = "sigmoid"
