"""Gemma 4 and DiffusionGemma: a branch of the decoder layer with norms before and behind the experts."""

from __future__ import annotations

from functools import partial

from torch import nn

from moe_npu.layers.families.base import (
    STACKED,
    Config,
    Layer,
    Tensor,
    grouped_experts,
    register_family,
    routing_sizes,
)
from moe_npu.layers.routers.gemma4 import Gemma4Router


def _has_experts(config: Config, layer_idx: int) -> bool:
    return bool(config.get("enable_moe_block", config.model_type == "diffusion_gemma_text"))


@register_family("gemma4_text", "diffusion_gemma_text", is_moe_layer=_has_experts)
def gemma4(config: Config, layer_idx: int | None) -> Layer:
    """The MoE branch of a decoder layer, from the residual to what is added to the other branch."""
    hidden, eps = config["hidden_size"], config["rms_norm_eps"]
    return Layer(
        router=partial(Gemma4Router, *routing_sizes(config), rms_norm_eps=eps),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        latent_down_proj=partial(nn.RMSNorm, hidden, eps=eps),
        latent_up_proj=partial(nn.RMSNorm, hidden, eps=eps),
        tensors=(
            Tensor("router.weight", ("router.proj.weight",)),
            Tensor("router.scale", ("router.scale",)),
            Tensor("router.per_expert_scale", ("router.per_expert_scale",)),
            Tensor("latent_down_proj.weight", ("pre_feedforward_layernorm_2.weight",)),
            Tensor("latent_up_proj.weight", ("post_feedforward_layernorm_2.weight",)),
        ),
        is_branch=True,
    )
