"""Granite-MoE, Aria and Cohere: the softmax of the best logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moe_npu.layers.families.base import (
    PER_EXPERT,
    STACKED,
    STACKED_TRANSPOSED,
    Config,
    Layer,
    Scale,
    after_dense_layers,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import SigmoidTopKRouter, TopKSoftmaxRouter
from moe_npu.layers.weight_layouts import ExpertLayout


def _has_experts(config: Config, layer_idx: int) -> bool:
    return bool(config["num_experts"] > 0)


@register_family("granitemoe", "granitemoeshared", "granitemoe_swa", is_moe_layer=every_layer)
@register_family("granitemoehybrid", is_moe_layer=_has_experts)
def granite(config: Config, layer_idx: int | None) -> Layer:
    """The router's logits count as float32. The shared MLP of some is a neighbour of the block, not a part."""
    return Layer(
        router=partial(TopKSoftmaxRouter, *routing_sizes(config), weights_dtype="input"),
        experts=grouped_experts(config, config["intermediate_size"]),
        layout=STACKED,
        checkpoint=(
            None
            if config.model_type == "granitemoe_swa"
            else ExpertLayout(gate_up="input_linear.weight", down="output_linear.weight")
        ),
        tensors=router_tensors("router"),
    )


@register_family("aria_text", is_moe_layer=every_layer)
def aria(config: Config, layer_idx: int | None) -> Layer:
    """Experts are SwiGLU whatever ``hidden_act`` says; the softmax is computed in the dtype of the model."""
    bias = config.get("mlp_bias", False)
    size = config["intermediate_size"]
    return Layer(
        router=partial(TopKSoftmaxRouter, *routing_sizes(config)),
        experts=grouped_experts(config, size, activation="silu"),
        layout=STACKED_TRANSPOSED,
        checkpoint=replace(STACKED_TRANSPOSED, gate_up="experts.fc1.weight", down="experts.fc2.weight"),
        shared_expert=shared_expert(config, size * config["n_shared_experts"], bias=bias),
        tensors=(*router_tensors("router"), *shared_expert_tensors("shared_experts", bias=bias)),
    )


@register_family("cohere2_moe", is_moe_layer=after_dense_layers(0))
def cohere(config: Config, layer_idx: int | None) -> Layer:
    """Softmax or sigmoid of the best logits; the shared expert is added or averaged with the others."""
    select = config.get("expert_selection_fn", "softmax")
    router: Any
    if select == "softmax":
        router = partial(TopKSoftmaxRouter, *routing_sizes(config), weights_dtype="input")
    elif select == "sigmoid":
        router = partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=config.get("norm_topk_prob", True),
            scores_dtype=None,
            selects_by="logits",
            weights_dtype="input",
        )
    else:
        raise ValueError(f"expert_selection_fn must be 'softmax' or 'sigmoid', but is {select!r}")
    size, num_shared = config["intermediate_size"], config.get("n_shared_experts", 0)
    strategy = config.get("shared_expert_combination_strategy", "average")
    if num_shared and strategy not in ("sum", "average"):
        raise ValueError(f"shared_expert_combination_strategy must be 'sum' or 'average', but is {strategy!r}")
    return Layer(
        router=router,
        experts=grouped_experts(config, size),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, size * num_shared) if num_shared else None,
        tensors=(*router_tensors(), *(shared_expert_tensors("shared_experts") if num_shared else ())),
        output_transform=partial(_half) if num_shared and strategy == "average" else None,
    )


def _half(*, device: torch.device | str | None, dtype: torch.dtype | None) -> Scale:
    return Scale(0.5)
