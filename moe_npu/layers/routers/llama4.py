"""The k best logits and their sigmoid, which scales what the experts read (Llama 4)."""

from __future__ import annotations

import torch

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction


class Llama4Router(LinearRouter):
    """``sigmoid(topk(x @ weight.T))``; the weights scale the input of the experts, ahead of their activation.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        device: device of the weight.
        dtype: dtype of the weight.
    """

    scales_input = True
    score_function: ScoreFunction = "sigmoid"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            norm_topk_prob=False,
            selects_by="logits",
            device=device,
            dtype=dtype,
        )
