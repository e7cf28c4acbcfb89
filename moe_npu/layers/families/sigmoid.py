"""AFMoE, Flint, Kolibri, Laguna, Lara, LFM2 and Step: mostly sigmoid scores, each with its own details."""

from __future__ import annotations

from functools import partial

import torch

from moe_npu.layers.families.base import (
    PER_EXPERT,
    PER_EXPERT_W123,
    STACKED,
    Config,
    Layer,
    after_dense_layers,
    after_first_layers,
    by_sparse_step,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import SigmoidTopKRouter, SoftmaxTopKRouter


@register_family("afmoe", is_moe_layer=after_first_layers(1, "num_dense_layers"))
def afmoe(config: Config, layer_idx: int | None) -> Layer:
    """A correction bias that belongs to the block."""
    size, num_shared = config["moe_intermediate_size"], config["n_shared_experts"]
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=True,
            norm_eps=1e-20,
            has_correction_bias=True,
            routed_scaling_factor=config["routed_scaling_factor"],
            weights_dtype=torch.float32,
        ),
        experts=grouped_experts(config, size),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, size * num_shared),
        tensors=(
            *router_tensors("router.gate", correction_bias="expert_bias"),
            *shared_expert_tensors("shared_experts"),
        ),
    )


@register_family("flint", is_moe_layer=by_sparse_step)
def flint(config: Config, layer_idx: int | None) -> Layer:
    """No correction bias; a shared expert without a gate for its output."""
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=config["norm_topk_prob"],
            logits_dtype=torch.float32,
            follows_autocast=False,
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, config["shared_expert_intermediate_size"]),
        tensors=(*router_tensors(), *shared_expert_tensors("shared_expert")),
    )


@register_family("lara_mini", is_moe_layer=every_layer)
def lara_mini(config: Config, layer_idx: int | None) -> Layer:
    """Softmax in float32; a shared expert without a gate for its output."""
    return Layer(
        router=partial(
            SoftmaxTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=config["norm_topk_prob"],
            logits_dtype=torch.float32,
            weights_dtype="input",
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        shared_expert=shared_expert(config, config["shared_expert_intermediate_size"]),
        tensors=(*router_tensors(), *shared_expert_tensors("shared_expert")),
    )


@register_family("kolibri1", is_moe_layer=every_layer)
def kolibri(config: Config, layer_idx: int | None) -> Layer:
    """The correction bias is added to the logits."""
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=config["norm_topk_prob"],
            has_correction_bias=True,
            selects_by="logits",
            logits_dtype=torch.float32,
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, config["shared_expert_intermediate_size"]),
        tensors=(
            *router_tensors(correction_bias="gate.e_score_correction_bias"),
            *shared_expert_tensors("shared_experts"),
        ),
    )


@register_family("laguna", is_moe_layer=after_dense_layers(1))
def laguna(config: Config, layer_idx: int | None) -> Layer:
    """Logits may be bounded; the sum of the experts is scaled."""
    if config.get("moe_apply_router_weight_on_input", False):
        raise ValueError("moe_apply_router_weight_on_input must be False for 'laguna', as in transformers")
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=True,
            has_correction_bias=True,
            logit_softcap=config.get("moe_router_logit_softcapping", 0.0) or None,
            weights_dtype="input",
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, config["shared_expert_intermediate_size"]),
        tensors=(
            *router_tensors(correction_bias="gate.e_score_correction_bias"),
            *shared_expert_tensors("shared_experts"),
        ),
        routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
    )


@register_family("lfm2_moe", is_moe_layer=after_first_layers(2, "num_dense_layers"))
def lfm2(config: Config, layer_idx: int | None) -> Layer:
    """Scores in the dtype of the model; the correction bias is optional."""
    has_bias = config.get("use_expert_bias", True)
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=config["norm_topk_prob"],
            norm_eps=1e-6,
            has_correction_bias=has_bias,
            routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
            scores_dtype=None,
        ),
        # SwiGLU whatever the config says
        experts=grouped_experts(config, config["moe_intermediate_size"], activation="silu"),
        layout=STACKED,
        checkpoint=PER_EXPERT_W123,
        tensors=router_tensors(correction_bias="expert_bias" if has_bias else None),
    )
