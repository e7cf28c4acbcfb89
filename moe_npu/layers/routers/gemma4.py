"""Softmax top-k of a normalized input, with a learned factor for each expert (Gemma 4)."""

from __future__ import annotations

import torch
from torch import nn

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction


class Gemma4Router(LinearRouter):
    """``topk(softmax(linear(rms_norm(x) * scale / sqrt(H))))``, normalized, times ``per_expert_scale[ids]``.

    The weights are float32.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        rms_norm_eps: added to the mean square.
        device: device of the parameters: ``weight`` ``[E, H]``, ``scale`` ``[H]``, ``per_expert_scale`` ``[E]``.
        dtype: dtype of the parameters.
    """

    score_function: ScoreFunction = "softmax"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        rms_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            norm_topk_prob=True,
            weights_dtype=torch.float32,
            device=device,
            dtype=dtype,
        )
        self.rms_norm_eps = rms_norm_eps
        self.scale = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.per_expert_scale = nn.Parameter(torch.ones(num_experts, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Fill the weight as ``nn.Linear`` does, and the factors with ones."""
        super().reset_parameters()
        nn.init.ones_(self.scale)
        nn.init.ones_(self.per_expert_scale)

    def _prepare(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = x * (x.square().mean(-1, keepdim=True) + self.rms_norm_eps).pow(-0.5)
        return normed.to(hidden_states.dtype) * self.scale * self.hidden_size**-0.5

    def _route(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        weights, topk_ids = super()._route(logits, token_ids)
        return weights * self._scale_of(topk_ids), topk_ids

    def _weigh_forced(self, logits: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return super()._weigh_forced(logits, topk_ids) * self._scale_of(topk_ids)

    def _scale_of(self, topk_ids: torch.Tensor) -> torch.Tensor:
        # the gradient of indexing with brackets waits for the device
        return self.per_expert_scale.index_select(0, topk_ids.flatten()).view(topk_ids.shape)
