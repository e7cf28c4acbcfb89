"""Qwen2-MoE, Qwen3-MoE, Qwen3-Next and their relatives, and OLMoE, which has their layer without a shared expert."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from moe_npu.layers.families.base import (
    PER_EXPERT,
    STACKED,
    STACKED_TRANSPOSED,
    Config,
    Layer,
    Tensor,
    after_dense_layers,
    by_sparse_step,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import SoftmaxTopKRouter


def _layer(config: Config, *, norm_topk_prob: bool, intermediate_size: int, has_shared_expert: bool) -> Layer:
    shared = None
    tensors = router_tensors()
    if has_shared_expert:
        shared = shared_expert(config, config["shared_expert_intermediate_size"], has_output_gate=True)
        tensors += (
            *shared_expert_tensors("shared_expert"),
            Tensor("shared_expert.gate.weight", ("shared_expert_gate.weight",)),
        )
    return Layer(
        router=partial(SoftmaxTopKRouter, *routing_sizes(config), norm_topk_prob=norm_topk_prob),
        experts=grouped_experts(config, intermediate_size),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared,
        tensors=tensors,
    )


@register_family("qwen3_moe", "qwen3_omni_moe_text", is_moe_layer=by_sparse_step)
@register_family("mellum", is_moe_layer=after_dense_layers(0))
def qwen3_moe(config: Config, layer_idx: int | None) -> Layer:
    """Softmax over all experts, normalized if the config says so."""
    return _layer(
        config,
        norm_topk_prob=config.get("norm_topk_prob", False),
        intermediate_size=config["moe_intermediate_size"],
        has_shared_expert=False,
    )


@register_family("qwen3_vl_moe_text", is_moe_layer=by_sparse_step)
def qwen3_vl_moe(config: Config, layer_idx: int | None) -> Layer:
    """Like Qwen3-MoE, always normalized. Checkpoints store the experts stacked and transposed."""
    layer = _layer(
        config,
        norm_topk_prob=True,
        intermediate_size=config["moe_intermediate_size"],
        has_shared_expert=False,
    )
    return replace(layer, checkpoint=STACKED_TRANSPOSED)


@register_family("qwen2_moe", "qwen3_next", is_moe_layer=by_sparse_step)
@register_family("qwen3_omni_moe_talker_text", "qwen4_exp_text", is_moe_layer=every_layer)
def qwen2_moe(config: Config, layer_idx: int | None) -> Layer:
    """With a shared expert that has a gate for its output."""
    return _layer(
        config,
        norm_topk_prob=config["norm_topk_prob"],
        intermediate_size=config["moe_intermediate_size"],
        has_shared_expert=True,
    )


@register_family("qwen3_5_moe_text", is_moe_layer=every_layer)
def qwen3_5_moe(config: Config, layer_idx: int | None) -> Layer:
    """Like Qwen2-MoE, always normalized."""
    return _layer(
        config,
        norm_topk_prob=True,
        intermediate_size=config["moe_intermediate_size"],
        has_shared_expert=True,
    )


@register_family("olmoe", "flex_olmo", is_moe_layer=every_layer)
def olmoe(config: Config, layer_idx: int | None) -> Layer:
    """Like Qwen3-MoE; the size of an expert is ``intermediate_size``."""
    return _layer(
        config,
        norm_topk_prob=config.get("norm_topk_prob", False),
        intermediate_size=config["intermediate_size"],
        has_shared_expert=False,
    )
