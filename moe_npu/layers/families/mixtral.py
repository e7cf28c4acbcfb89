"""Mixtral, MiniMax, PhiMoE and Jamba: plain experts of size ``intermediate_size``."""

from __future__ import annotations

from functools import partial

import torch

from moe_npu.layers.activations import clipped_swiglu
from moe_npu.layers.families.base import (
    PER_EXPERT,
    PER_EXPERT_W123,
    STACKED,
    Config,
    Layer,
    Tensor,
    after_dense_layers,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
)
from moe_npu.layers.routers import SigmoidTopKRouter, SoftmaxTopKRouter
from moe_npu.layers.routers.sparsemixer import SparseMixerRouter


@register_family("mixtral", "minimax", is_moe_layer=every_layer)
def mixtral(config: Config, layer_idx: int | None) -> Layer:
    """Softmax, normalized, weights in float32. The jitter of training is left out."""
    return Layer(
        router=partial(SoftmaxTopKRouter, *routing_sizes(config), norm_topk_prob=True, weights_dtype=torch.float32),
        experts=grouped_experts(config, config["intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT_W123,
        tensors=router_tensors(),
    )


@register_family("minimax_m2", is_moe_layer=every_layer)
def minimax_m2(config: Config, layer_idx: int | None) -> Layer:
    """Sigmoid with a correction bias."""
    return Layer(
        router=_sigmoid_router(config),
        experts=grouped_experts(config, config["intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT_W123,
        tensors=router_tensors(correction_bias="e_score_correction_bias"),
    )


@register_family("minimax_m3_vl_text", is_moe_layer=after_dense_layers(0))
def minimax_m3(config: Config, layer_idx: int | None) -> Layer:
    """Like MiniMax-M2, with the activation of gpt-oss and a shared expert."""
    activation = clipped_swiglu(alpha=config["swiglu_alpha"], limit=config["swiglu_limit"])
    return Layer(
        router=_sigmoid_router(config),
        experts=grouped_experts(config, config["intermediate_size"], activation=activation),
        layout=STACKED,
        checkpoint=PER_EXPERT_W123,
        shared_expert=shared_expert(config, config["shared_intermediate_size"], activation=activation),
        tensors=(
            *router_tensors(correction_bias="gate.e_score_correction_bias"),
            Tensor("shared_expert.gate_up_proj.weight", ("shared_experts.gate_up_proj.weight",)),
            Tensor("shared_expert.down_proj.weight", ("shared_experts.down_proj.weight",)),
        ),
        routed_scaling_factor=config["routed_scaling_factor"],
    )


def _sigmoid_router(config: Config) -> partial[SigmoidTopKRouter]:
    return partial(
        SigmoidTopKRouter,
        *routing_sizes(config),
        norm_topk_prob=True,
        has_correction_bias=True,
        weights_dtype=torch.float32,
    )


@register_family("phimoe", is_moe_layer=every_layer)
def phimoe(config: Config, layer_idx: int | None) -> Layer:
    """SparseMixer. The jitter of its input in training is left out."""
    return Layer(
        router=partial(SparseMixerRouter, *routing_sizes(config), jitter_eps=config["router_jitter_noise"]),
        experts=grouped_experts(config, config["intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT_W123,
        tensors=router_tensors("router"),
    )


def _every_period(config: Config, layer_idx: int) -> bool:
    period, offset = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)
    return bool(config["num_experts"] > 1 and layer_idx % period == offset)


@register_family("jamba", is_moe_layer=_every_period)
def jamba(config: Config, layer_idx: int | None) -> Layer:
    """Softmax, not normalized."""
    return Layer(
        router=partial(SoftmaxTopKRouter, *routing_sizes(config), norm_topk_prob=False, weights_dtype="input"),
        experts=grouped_experts(config, config["intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        tensors=router_tensors("router"),
    )
