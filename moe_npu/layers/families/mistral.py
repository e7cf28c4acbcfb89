"""Mistral 4 and Mistral Large 4: the best softmax scores of the best groups."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moe_npu.layers.families.base import (
    PER_EXPERT_W123,
    STACKED,
    Config,
    Layer,
    after_dense_layers,
    after_first_layers,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import GroupLimitedRouter


def _layer(config: Config, **router: Any) -> Layer:
    size = config["moe_intermediate_size"]
    return Layer(
        router=partial(
            GroupLimitedRouter,
            *routing_sizes(config),
            num_groups=config.get("n_group", 1),
            topk_groups=config.get("topk_group", 1),
            score_function="softmax",
            group_score="top2_sum",
            group_fill=0.0,
            routed_scaling_factor=config["routed_scaling_factor"],
            **router,
        ),
        experts=grouped_experts(config, size),
        layout=STACKED,
        shared_expert=shared_expert(config, size * config["n_shared_experts"]),
        tensors=(*router_tensors(), *shared_expert_tensors("shared_experts")),
    )


@register_family("mistral4", is_moe_layer=after_first_layers(0, "first_k_dense_replace"))
def mistral4(config: Config, layer_idx: int | None) -> Layer:
    """Routes in the dtype of the model."""
    return _layer(config, norm_topk_prob=config["norm_topk_prob"], logits_dtype=None, scores_dtype=None)


@register_family("mistral_large4_text", is_moe_layer=after_dense_layers(1))
def mistral_large4(config: Config, layer_idx: int | None) -> Layer:
    """Routes in float32."""
    layer = _layer(config, norm_topk_prob=True, logits_dtype=torch.float32)
    return replace(layer, checkpoint=PER_EXPERT_W123)
