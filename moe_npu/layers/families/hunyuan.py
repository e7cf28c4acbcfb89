"""Hunyuan: HunYuan-MoE-V1 and HY-V3. HY-V4 has the layer of GLM-5."""

from __future__ import annotations

from functools import partial

import torch

from moe_npu.layers.families.base import (
    PER_EXPERT,
    STACKED,
    Config,
    Layer,
    after_dense_layers,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import SigmoidTopKRouter, SoftmaxTopKRouter


def _of_layer(config: Config, name: str, layer_idx: int | None) -> int:
    value = config[name]
    if isinstance(value, int):
        return value
    if layer_idx is None:
        raise ValueError(f"layer_idx is needed: {name} is {value}, one number per layer")
    return int(config.at(name, layer_idx))


@register_family("hunyuan_v1_moe", is_moe_layer=every_layer)
def hunyuan_v1(config: Config, layer_idx: int | None) -> Layer:
    """Softmax, normalized; sizes may differ between layers."""
    num_experts = _of_layer(config, "num_experts", layer_idx)
    size = config["intermediate_size"]
    return Layer(
        router=partial(
            SoftmaxTopKRouter,
            config["hidden_size"],
            num_experts,
            _of_layer(config, "moe_topk", layer_idx),
            norm_topk_prob=True,
        ),
        experts=grouped_experts(config, size, num_experts=num_experts),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, size),
        tensors=(*router_tensors("gate.wg"), *shared_expert_tensors("shared_mlp")),
    )


@register_family("hy_v3", is_moe_layer=after_dense_layers(1))
def hy_v3(config: Config, layer_idx: int | None) -> Layer:
    """Sigmoid with a correction bias."""
    size, bias = config["moe_intermediate_size"], config.get("mlp_bias", False)
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=True,
            norm_eps=1e-20,
            has_correction_bias=True,
            routed_scaling_factor=config["routed_scaling_factor"],
            logits_dtype=torch.float32,
        ),
        experts=grouped_experts(config, size),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, size * config["n_shared_experts"], bias=bias),
        tensors=(
            *router_tensors(correction_bias="e_score_correction_bias"),
            *shared_expert_tensors("shared_experts", bias=bias),
        ),
    )
