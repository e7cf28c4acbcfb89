"""ERNIE 4.5: softmax with a bias that only chooses, and weights normalized by a sum that is bounded below."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from moe_npu.layers.families.base import (
    PER_EXPERT,
    STACKED,
    Config,
    Layer,
    Tensor,
    after_dense_layers,
    grouped_experts,
    register_family,
    register_unsupported,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import SoftmaxTopKRouter


def _is_moe_layer(config: Config, layer_idx: int) -> bool:
    last = config.get("moe_layer_end_index", -1)
    if last == -1:
        last = config["num_hidden_layers"] - 1
    in_range = config.get("moe_layer_start_index", 1) <= layer_idx <= last
    return bool(in_range and (layer_idx + 1) % config.get("moe_layer_interval", 1) == 0)


@register_family("ernie4_5_moe", is_moe_layer=_is_moe_layer)
def ernie(config: Config, layer_idx: int | None) -> Layer:
    """With shared experts."""
    layer = _layer(config)
    num_shared, bias = config.get("n_shared_experts", 0), config.get("use_bias", False)
    if not num_shared:
        return layer
    return replace(
        layer,
        shared_expert=shared_expert(config, config["moe_intermediate_size"] * num_shared, bias=bias),
        tensors=(*layer.tensors, *shared_expert_tensors("shared_experts", bias=bias)),
    )


@register_family("ernie4_5_vl_moe_text", is_moe_layer=after_dense_layers(1))
def ernie_vl(config: Config, layer_idx: int | None) -> Layer:
    """The experts of one modality. The shared experts are a neighbour of both."""
    if not isinstance(config["moe_intermediate_size"], int):
        raise ValueError(
            f"'ernie4_5_vl_moe_text' has experts for text and for images, of sizes {config['moe_intermediate_size']}: "
            "make a layer of each from its block, e.g. MoE.from_hf(block.text_moe), or from a config in which "
            "moe_intermediate_size is one of them"
        )
    return _layer(config)


def _layer(config: Config) -> Layer:
    """The bias is stored as ``[1, E]``."""
    return Layer(
        router=partial(
            SoftmaxTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=True,
            norm_min=config.get("moe_norm_min", 1e-12),
            has_correction_bias=True,
            logits_dtype=torch.float32,
            weights_dtype="input",
            follows_autocast=False,
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        tensors=(
            Tensor("router.weight", ("gate.weight",)),
            Tensor(
                "router.e_score_correction_bias",
                ("gate.moe_statics.e_score_correction_bias",),
                (1, config["num_experts"]),
            ),
        ),
    )


register_unsupported(
    "a mask of modalities, which a MoE does not take, sends each token to one of two sets of experts; text_moe and "
    "vision_moe are layers of their own.",
    blocks=("Ernie4_5_VLMoeMoeBlock",),
)
