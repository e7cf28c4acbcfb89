"""LongCat-Flash: experts that return their input."""

from __future__ import annotations

from functools import partial

import torch

from moe_npu.layers.families.base import (
    PER_EXPERT,
    STACKED,
    Config,
    Layer,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
)
from moe_npu.layers.routers import SoftmaxTopKRouter


@register_family("longcat_flash", is_moe_layer=every_layer)
def longcat_flash(config: Config, layer_idx: int | None) -> Layer:
    """Softmax with a correction bias, not normalized, over all experts. A bias of the classifier is not used."""
    num_experts, num_zero = config["num_experts"], config.get("zero_expert_num", 0)
    return Layer(
        router=partial(
            SoftmaxTopKRouter,
            config["hidden_size"],
            num_experts + num_zero,
            config["num_experts_per_tok"],
            norm_topk_prob=False,
            has_correction_bias=True,
            routed_scaling_factor=config["routed_scaling_factor"],
            logits_dtype=torch.float32,
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        num_zero_experts=num_zero,
        has_zero_rows=num_zero > 0,
        tensors=router_tensors("router.classifier", correction_bias="router.e_score_correction_bias"),
        ignored=("router.classifier.bias",) if config.get("router_bias", False) else (),
    )
