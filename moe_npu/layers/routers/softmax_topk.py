"""Softmax over all experts, then the k best (Switch, Mixtral, Qwen-MoE, OLMoE)."""

from __future__ import annotations

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction


class SoftmaxTopKRouter(LinearRouter):
    """``topk(softmax(x @ weight.T))``, the weights of a token optionally scaled to sum to one.

    The softmax is computed in float32 and the weights are rounded to their dtype once, at the end. Mixtral and Qwen3
    normalize the weights (``norm_topk_prob``), OLMoE and most Qwen2 do not; ERNIE chooses by
    ``softmax + e_score_correction_bias``. :class:`LinearRouter` has the arguments.

    Example:
        >>> import torch
        >>> router = SoftmaxTopKRouter(16, num_experts=8, top_k=2, norm_topk_prob=True)
        >>> router(torch.randn(3, 16)).topk_ids.shape
        torch.Size([3, 2])
    """

    score_function: ScoreFunction = "softmax"
