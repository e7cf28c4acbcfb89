"""The MoE layer: router, dispatch, experts, combine, and what some models put around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_npu.layers.dispatch import LocalDispatcher, TokenDispatcher
from moe_npu.layers.routers import Router, RouterOutput


class MoE(nn.Module):
    """A sparse feed-forward layer: each token is computed by the ``top_k`` experts that its router chooses.

    ::

        latent = latent_down_proj(x)
        routed = sum over k of topk_weights[k] * experts[topk_ids[k]](latent)
        y      = output_transform(latent_up_proj(routed) * routed_scaling_factor + shared_expert(x))

    and all but the second line are left out by default. A router whose ``scales_input`` is true (Llama 4) makes that
    ``sum of experts[topk_ids[k]](topk_weights[k] * latent)``.

    Args:
        router: chooses experts and weights.
        experts: ``(rows [R, H], expert_tokens [E]) -> [R, H]``, e.g. ``GroupedExperts`` or ``QuantizedExperts``. Those
            with a true ``takes_quantized_rows`` get ``moe_npu.quant.QuantizedRows``.
        dispatcher: brings rows to their experts and back; the experts of this device by default.
        shared_expert: ``[T, H] -> [T, H]``, added for every token.
        latent_down_proj: ``[T, H] -> [T, L]``, what the experts, then of hidden size L, read of a token; the router and
            the shared expert read the token itself (Nemotron-H, Muse Spark).
        latent_up_proj: ``[T, L] -> [T, H]``, applied to the weighted sum of the experts; needs ``latent_down_proj``.
        num_zero_experts: Z, identity experts without weights (LongCat-Flash). They are the last Z of the
            ``router.num_experts`` ids; a dispatcher given here must take these as absent.
        routed_scaling_factor: factor of the sum of the experts. Routers may scale the weights instead.
        output_transform: ``[T, H] -> [T, H]``, applied last, e.g. a norm.
        expert_load: called with ``topk_ids [T, K]`` of every forward, e.g. to count the tokens of each expert.

    Raises:
        ValueError: parts that do not fit each other.

    Example:
        >>> import moe_npu
        >>> moe = moe_npu.MoE(
        ...     moe_npu.SoftmaxTopKRouter(64, num_experts=8, top_k=2, norm_topk_prob=True),
        ...     moe_npu.GroupedExperts(num_experts=8, hidden_size=64, intermediate_size=32),
        ... )
        >>> moe(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module,
        *,
        dispatcher: TokenDispatcher | None = None,
        shared_expert: nn.Module | None = None,
        latent_down_proj: nn.Module | None = None,
        latent_up_proj: nn.Module | None = None,
        num_zero_experts: int = 0,
        routed_scaling_factor: float = 1.0,
        output_transform: nn.Module | None = None,
        expert_load: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (latent_down_proj is None) != (latent_up_proj is None):
            given, missing = ("down", "up") if latent_up_proj is None else ("up", "down")
            raise ValueError(f"latent_{given}_proj is given without latent_{missing}_proj")
        if not 0 <= num_zero_experts < router.num_experts:
            raise ValueError(
                f"num_zero_experts must leave some of the {router.num_experts} experts of the router, "
                f"but is {num_zero_experts}"
            )
        self.num_experts = router.num_experts - num_zero_experts
        if dispatcher is None:
            dispatcher = LocalDispatcher(self.num_experts, has_absent_experts=num_zero_experts > 0)
        _check_sizes(self.num_experts, num_zero_experts, experts, dispatcher)
        num_counted = getattr(expert_load, "num_experts", self.num_experts)
        if num_counted not in (self.num_experts, router.num_experts):
            raise ValueError(f"expert_load counts {num_counted} experts, but the router has {router.num_experts}")
        self.router = router
        self.experts = experts
        self.dispatcher = dispatcher
        self.shared_expert = shared_expert
        self.latent_down_proj = latent_down_proj
        self.latent_up_proj = latent_up_proj
        self.num_zero_experts = num_zero_experts
        self.routed_scaling_factor = routed_scaling_factor
        self.output_transform = output_transform
        self.expert_load = expert_load

    @classmethod
    def from_config(
        cls,
        config: Any,
        layer_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoE:
        """A layer of a model of transformers, with random weights.

        Args:
            config: the config of the model, a mapping with the entries of its ``config.json``, or the path of that.
            layer_idx: index of the layer; needed where MoE layers differ.
            device: device of the parameters.
            dtype: dtype of the parameters.

        Raises:
            ValueError: the family is not known or has no native layer, the layer is a dense one, or the config lacks an
                entry.
            TypeError: ``config`` is none of these.

        Example:
            >>> import moe_npu
            >>> config = {
            ...     "model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8,
            ...     "num_experts_per_tok": 2, "norm_topk_prob": True, "hidden_act": "silu",
            ... }
            >>> moe_npu.MoE.from_config(config).experts.gate_up_proj.shape
            torch.Size([8, 64, 64])
        """
        return _families().from_config(config, layer_idx, device=device, dtype=dtype)

    @classmethod
    def from_hf(cls, module: nn.Module, *, config: Any = None, layer_idx: int | None = None) -> MoE:
        """A copy of a MoE block of transformers, which computes the same.

        What a block does in training only, jitter of its input, is left out. The weights are copied, each in its dtype
        and on its device.

        Args:
            module: the block, e.g. ``model.model.layers[0].mlp``; the decoder layer of Gemma 4.
            config: the config of the model, for the blocks that do not hold it (DBRX, JetMoE).
            layer_idx: index of the layer; needed where MoE layers differ and the block does not hold it.

        Raises:
            ValueError: there is no native layer for this block, its tensors are not those that its config says, or
                tensors that are one parameter here are partly frozen.
        """
        return _families().from_hf(module, config=config, layer_idx=layer_idx)

    def to_hf(self, module: nn.Module, *, config: Any = None, layer_idx: int | None = None) -> None:
        """Copy the weights into a MoE block of transformers, in place; the inverse of :meth:`from_hf`.

        Args:
            module: the block.
            config: as for :meth:`from_hf`.
            layer_idx: as for :meth:`from_hf`.

        Raises:
            ValueError: there is no native layer for this block, or it is not of the sizes of this layer. Nothing is
                copied then.
        """
        _families().to_hf(self, module, config=config, layer_idx=layer_idx)

    def forward(self, hidden_states: torch.Tensor, *, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Apply to tokens.

        Args:
            hidden_states: ``[..., H]``.
            token_ids: ``[...]``, int32 or int64: what the tokens are; for routers that look at it.

        Returns:
            Shape and dtype of ``hidden_states``; under autocast its dtype.

        Raises:
            ValueError: ``token_ids`` is not one id per token.
        """
        return self.forward_with_routing(hidden_states, token_ids=token_ids)[0]

    def forward_with_routing(
        self, hidden_states: torch.Tensor, *, token_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RouterOutput]:
        """:meth:`forward` and what the router decided, e.g. for a load-balancing loss."""
        tokens = hidden_states.reshape(-1, hidden_states.size(-1))  # [T, H]
        routing = self._route(tokens, hidden_states, token_ids)
        if self.expert_load is not None:
            self.expert_load(routing.topk_ids)
        latent = tokens if self.latent_down_proj is None else self.latent_down_proj(tokens)  # [T, L]
        output = self._routed(latent, routing)  # [T, L]
        if self.latent_up_proj is not None:
            output = self.latent_up_proj(output)  # [T, H]
        if self.routed_scaling_factor != 1:
            output = output * self.routed_scaling_factor
        if self.shared_expert is not None:
            output = output + self.shared_expert(tokens)
        if self.output_transform is not None:
            output = self.output_transform(output)
        return output.view(hidden_states.shape), routing

    def _route(self, tokens: torch.Tensor, hidden_states: torch.Tensor, token_ids: torch.Tensor | None) -> RouterOutput:
        if token_ids is None:
            routing: RouterOutput = self.router(tokens)
            return routing
        if token_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"token_ids must be one id per token, of shape {tuple(hidden_states.shape[:-1])}, "
                f"but has shape {tuple(token_ids.shape)}"
            )
        routing = self.router(tokens, token_ids=token_ids.reshape(-1))
        return routing

    def _routed(self, tokens: torch.Tensor, routing: RouterOutput) -> torch.Tensor:
        """The weighted sum of the experts of each token ``[T, H]``."""
        rows, topk_ids, topk_weights = tokens, routing.topk_ids, routing.topk_weights  # [T, H], [T, K], [T, K]
        if self.router.scales_input:
            # a token scaled differently for each of its experts is as many tokens of one expert, each of weight one
            rows = (tokens.unsqueeze(1) * topk_weights.unsqueeze(-1)).to(tokens.dtype).flatten(0, 1)  # [T * K, H]
            topk_ids, topk_weights = topk_ids.reshape(-1, 1), torch.ones_like(topk_weights).view(-1, 1)  # [T * K, 1]
        quantize: bool = getattr(self.experts, "takes_quantized_rows", False)
        dispatched = self.dispatcher.dispatch(rows, topk_ids, topk_weights, quantize=quantize)
        expert_rows = self.experts(dispatched.rows, dispatched.expert_tokens)  # [R, H]
        output = self.dispatcher.combine(expert_rows, dispatched.state)  # [T, H], or [T * K, H] of scaled tokens
        if self.router.scales_input:
            output = output.unflatten(0, routing.topk_ids.shape).sum(1)  # [T, H]
        if self.num_zero_experts:
            is_real = routing.topk_ids < self.num_experts
            weight = routing.topk_weights.masked_fill(is_real, 0).sum(-1, keepdim=True)  # [T, 1]
            output = output + (tokens * weight).to(output.dtype)
        return output


def _check_sizes(num_experts: int, num_zero_experts: int, experts: nn.Module, dispatcher: TokenDispatcher) -> None:
    """Refuse ids that nobody computes. Parts that do not say their sizes are taken as they are."""
    has_absent_experts = getattr(dispatcher, "has_absent_experts", False)
    if isinstance(dispatcher, LocalDispatcher) and num_zero_experts and not has_absent_experts:
        raise ValueError(
            "the dispatcher must have has_absent_experts=True, since the ids of zero experts have no weights"
        )
    num_dispatched = getattr(dispatcher, "num_experts", num_experts)
    if num_dispatched != num_experts and not (has_absent_experts and num_dispatched < num_experts):
        raise ValueError(
            f"the dispatcher is made for {num_dispatched} experts, but the router chooses among {num_experts}"
        )
    num_weights = getattr(experts, "num_experts", num_dispatched)
    if num_weights != num_dispatched:
        raise ValueError(
            f"the router chooses among {num_experts + num_zero_experts} experts, {num_zero_experts} of them zero "
            f"experts, but there are {num_weights} experts"
        )


def _families() -> Any:
    from moe_npu.layers import families  # they build MoE layers, so they import this file

    return families
