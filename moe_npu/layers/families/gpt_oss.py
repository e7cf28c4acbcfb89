"""gpt-oss and the privacy filter of OpenAI: biases everywhere and a clipped activation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from moe_npu.layers.activations import clipped_swiglu
from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.families.base import (
    STACKED_TRANSPOSED,
    Config,
    Layer,
    every_layer,
    register_family,
    router_tensors,
    routing_sizes,
)
from moe_npu.layers.routers import TopKSoftmaxRouter


def _experts(config: Config) -> partial[GroupedExperts]:
    return partial(
        GroupedExperts,
        config["num_experts"],
        config["hidden_size"],
        config["intermediate_size"],
        activation=clipped_swiglu(alpha=config.get("swiglu_alpha", 1.702), limit=config.get("swiglu_limit", 7.0)),
        bias=True,
    )


@register_family("gpt_oss", is_moe_layer=every_layer)
def gpt_oss(config: Config, layer_idx: int | None) -> Layer:
    """Gate and up alternate in the columns of ``gate_up_proj``."""
    return Layer(
        router=partial(TopKSoftmaxRouter, *routing_sizes(config), bias=True),
        experts=_experts(config),
        layout=replace(STACKED_TRANSPOSED, order="interleaved"),
        tensors=router_tensors("router", bias=True),
    )


@register_family("openai_privacy_filter", is_moe_layer=every_layer)
def openai_privacy_filter(config: Config, layer_idx: int | None) -> Layer:
    """Like gpt-oss with a router in float32. There the weights are divided by K and the sum is multiplied by it."""
    return Layer(
        router=partial(TopKSoftmaxRouter, *routing_sizes(config), bias=True, logits_dtype=torch.float32),
        experts=_experts(config),
        layout=STACKED_TRANSPOSED,
        tensors=router_tensors("router", bias=True),
    )
