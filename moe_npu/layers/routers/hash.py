"""Experts by token: a table says which experts a token goes to, the logits only weigh them (DeepSeek-V4)."""

from __future__ import annotations

from typing import Literal

import torch

from moe_npu.layers.routers.base import LinearRouter, ScoreFunction, check_integers, check_score_function

_MAX_HASHED = 64  # experts per token of the operator


class HashRouter(LinearRouter):
    """``ids = tid2eid[token_ids]``, and weights from the scores of these experts.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        vocab_size: number of tokens V. The buffer ``tid2eid`` ``[V, K]``, int64, has their experts; it is filled with
            ``(token * K + slot) % E`` until a checkpoint is loaded.
        score_function: ``"sqrt_softplus"``, ``"sigmoid"`` or ``"softmax"``.
        norm_topk_prob: divide the K weights of a token by their sum.
        norm_eps: added to that sum.
        routed_scaling_factor: factor of the weights, last.
        logits_dtype: as for :class:`LinearRouter`.
        scores_dtype: as for :class:`LinearRouter`.
        weights_dtype: as for :class:`LinearRouter`.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        ValueError: ``vocab_size`` is not positive.
    """

    tid2eid: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        score_function: ScoreFunction = "sqrt_softplus",
        norm_topk_prob: bool = True,
        norm_eps: float = 1e-20,
        routed_scaling_factor: float = 1.0,
        logits_dtype: torch.dtype | None = None,
        scores_dtype: torch.dtype | None = torch.float32,
        weights_dtype: torch.dtype | Literal["input"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_score_function(score_function)
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be positive, but is {vocab_size}")
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            norm_topk_prob=norm_topk_prob,
            norm_eps=norm_eps,
            routed_scaling_factor=routed_scaling_factor,
            logits_dtype=logits_dtype,
            scores_dtype=scores_dtype,
            weights_dtype=weights_dtype,
            device=device,
            dtype=dtype,
        )
        self.score_function = score_function
        self.register_buffer("tid2eid", torch.empty(vocab_size, top_k, dtype=torch.int64, device=device))
        self._reset_table()

    def reset_parameters(self) -> None:
        """Fill the weight as ``nn.Linear`` does, and the table evenly."""
        super().reset_parameters()
        self._reset_table()

    def _reset_table(self) -> None:
        pairs = torch.arange(self.tid2eid.numel(), device=self.tid2eid.device)
        self.tid2eid.copy_(pairs.view(self.tid2eid.shape) % self.num_experts)

    def _route(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if token_ids is None:
            raise ValueError("HashRouter chooses experts by token: give token_ids [tokens]")
        check_integers("token_ids", token_ids)
        if token_ids.shape != logits.shape[:1]:
            raise ValueError(f"token_ids must be [tokens = {logits.size(0)}], but is {list(token_ids.shape)}")
        if self._is_one_operator(logits) and self.top_k <= _MAX_HASHED:
            return self._gate(logits, token_ids, self.tid2eid)
        topk_ids = self.tid2eid.index_select(0, token_ids)
        return self._weigh(self._score(logits), topk_ids), topk_ids
