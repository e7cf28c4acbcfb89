"""Square root of the softplus of each logit, then the k best (DeepSeek-V4)."""

from __future__ import annotations

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction


class SqrtSoftplusRouter(LinearRouter):
    """``topk(sqrt(softplus(x @ weight.T)) + e_score_correction_bias)``; :class:`LinearRouter` has the arguments."""

    score_function: ScoreFunction = "sqrt_softplus"
