"""DeepSeek-V2, -V3 and -V4, and the many models that have the layer of DeepSeek-V3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_npu.layers.activations import clamped_swiglu
from moe_npu.layers.families.base import (
    PER_EXPERT,
    PER_EXPERT_W123,
    STACKED,
    Config,
    Layer,
    Tensor,
    after_dense_layers,
    after_first_layers,
    every_layer,
    grouped_experts,
    grouped_sigmoid_router,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import (
    GroupLimitedRouter,
    HashRouter,
    Router,
    SigmoidTopKRouter,
    SoftmaxTopKRouter,
    SqrtSoftplusRouter,
)


@register_family("deepseek_v2", is_moe_layer=after_first_layers(0, "first_k_dense_replace"))
@register_family("deepseek_ocr2_text", "unlimited_ocr_text", is_moe_layer=after_dense_layers(1))
def deepseek_v2(config: Config, layer_idx: int | None) -> Layer:
    """Softmax over all experts or those of the best groups, not normalized, and scaled."""
    scaling: dict[str, Any] = {"norm_topk_prob": False, "routed_scaling_factor": config["routed_scaling_factor"]}
    method = config.get("topk_method", "greedy")
    router: Callable[..., Router]
    if method == "greedy":
        router = partial(SoftmaxTopKRouter, *routing_sizes(config), logits_dtype=torch.float32, **scaling)
    elif method == "group_limited_greedy":
        router = partial(
            GroupLimitedRouter,
            *routing_sizes(config),
            num_groups=config["n_group"],
            topk_groups=config["topk_group"],
            score_function="softmax",
            group_score="max",
            group_fill=0.0,
            **scaling,
        )
    else:
        raise ValueError(f"topk_method must be 'greedy' or 'group_limited_greedy', but is {method!r}")
    bias = config.get("mlp_bias", False)
    return Layer(
        router=router,
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, config["moe_intermediate_size"] * config["n_shared_experts"], bias=bias),
        tensors=(*router_tensors(), *shared_expert_tensors("shared_experts", bias=bias)),
    )


@register_family("deepseek_v3", is_moe_layer=after_first_layers(3, "first_k_dense_replace"))
@register_family("dots1", is_moe_layer=after_first_layers(0, "first_k_dense_replace"))
@register_family("glm4_moe", "glm4v_moe_text", is_moe_layer=after_first_layers(1, "first_k_dense_replace"))
@register_family("deepseek_v32", "glm_moe_dsa", is_moe_layer=after_dense_layers(3))
@register_family("bailing_hybrid", is_moe_layer=after_dense_layers(2))
@register_family("exaone_moe", "glm4_moe_lite", is_moe_layer=after_dense_layers(1))
@register_family("solar_open", is_moe_layer=every_layer)
def deepseek_v3(config: Config, layer_idx: int | None) -> Layer:
    """Sigmoid with a correction bias and groups, one shared expert."""
    return _v3_layer(config)


def _v3_layer(config: Config) -> Layer:
    return Layer(
        router=grouped_sigmoid_router(config),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        shared_expert=shared_expert(config, config["moe_intermediate_size"] * config["n_shared_experts"]),
        tensors=_V3_TENSORS,
    )


@register_family("kimi_linear", is_moe_layer=after_dense_layers(1))
def kimi_linear(config: Config, layer_idx: int | None) -> Layer:
    """Checkpoints name the projections of an expert as Mixtral does."""
    return replace(_v3_layer(config), checkpoint=PER_EXPERT_W123)


_V3_TENSORS = (
    *router_tensors(correction_bias="gate.e_score_correction_bias"),
    *shared_expert_tensors("shared_experts"),
)


@register_family("dots3_note_text", is_moe_layer=after_dense_layers(1))
def dots3_note(config: Config, layer_idx: int | None) -> Layer:
    """The shared expert has a size of its own."""
    size = config["shared_experts_intermediate_size"] * config["n_shared_experts"]
    return replace(_v3_layer(config), shared_expert=shared_expert(config, size))


def _is_sparse_vision_layer(config: Config, layer_idx: int) -> bool:
    return bool(config.at("mlp_layer_types", layer_idx) == "sparse")


@register_family("dots3_note_vision_encoder", is_moe_layer=_is_sparse_vision_layer)
def dots3_note_vision(config: Config, layer_idx: int | None) -> Layer:
    """Every layer has another number of experts."""
    layer_config = config.of_layer(layer_idx)
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(layer_config),
            norm_topk_prob=True,
            norm_eps=1e-20,
            has_correction_bias=True,
            routed_scaling_factor=layer_config["routed_scaling_factor"],
            logits_dtype=torch.float32,
        ),
        experts=grouped_experts(layer_config, layer_config["moe_intermediate_size"]),
        layout=STACKED,
        tensors=router_tensors(correction_bias="e_score_correction_bias"),
    )


@register_family("mimo_v2_flash", is_moe_layer=after_dense_layers(1))
def mimo_v2_flash(config: Config, layer_idx: int | None) -> Layer:
    """Without a shared expert."""
    return Layer(
        router=grouped_sigmoid_router(config),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        tensors=router_tensors(correction_bias="gate.e_score_correction_bias"),
    )


@register_family("axk1", is_moe_layer=after_dense_layers(1))
def axk1(config: Config, layer_idx: int | None) -> Layer:
    """A norm comes last."""
    return replace(
        _v3_layer(config),
        output_transform=partial(nn.RMSNorm, config["hidden_size"], eps=config["rms_norm_eps"]),
        tensors=(*_V3_TENSORS, Tensor("output_transform.weight", ("post_mlp_layernorm.weight",))),
    )


@register_family("axk2", is_moe_layer=after_dense_layers(1))
def axk2(config: Config, layer_idx: int | None) -> Layer:
    """Groups are optional, and the experts of other groups count as zero."""
    router: Callable[..., Router]
    if config.get("n_group", None) is None:
        router = partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=config["norm_topk_prob"],
            norm_eps=1e-20,
            has_correction_bias=True,
            routed_scaling_factor=config["routed_scaling_factor"],
            logits_dtype=torch.float32,
        )
    else:
        router = partial(grouped_sigmoid_router(config), group_fill=0.0)
    return replace(_v3_layer(config), router=router)


@register_family("beam", is_moe_layer=after_dense_layers(3))
def beam(config: Config, layer_idx: int | None) -> Layer:
    """Without a shared expert; the sum of the experts is scaled."""
    return Layer(
        router=grouped_sigmoid_router(config, routed_scaling_factor=1.0),
        experts=grouped_experts(config, config["moe_intermediate_size"]),
        layout=STACKED,
        checkpoint=PER_EXPERT,
        tensors=router_tensors(correction_bias="gate.e_score_correction_bias"),
        routed_scaling_factor=config["routed_scaling_factor"],
    )


@register_family("glm5_next_text", is_moe_layer=after_dense_layers(3))
@register_family("hy_v4", "hy_v4_vl_text", is_moe_layer=after_dense_layers(1))
def glm5_next(config: Config, layer_idx: int | None) -> Layer:
    """Experts with a clamped activation; that of GLM's shared expert is clamped as well."""
    activation = clamped_swiglu(limit=config["swiglu_limit"])
    layer = replace(
        _v3_layer(config), experts=grouped_experts(config, config["moe_intermediate_size"], activation=activation)
    )
    if config.model_type != "glm5_next_text":
        return layer
    size = config["moe_intermediate_size"] * config["n_shared_experts"]
    return replace(layer, shared_expert=shared_expert(config, size, activation=activation))


def _is_hash_layer(config: Config, layer_idx: int) -> bool:
    if config.get("mlp_layer_types", None) is not None:
        return bool(config.at("mlp_layer_types", layer_idx) == "hash_moe")
    return bool(layer_idx < config.get("num_hash_layers", 3))


@register_family("deepseek_v4", is_moe_layer=every_layer)
def deepseek_v4(config: Config, layer_idx: int | None) -> Layer:
    """Square root of softplus; the first layers choose experts by token."""
    if layer_idx is None:
        raise ValueError("layer_idx is needed: the first layers of 'deepseek_v4' choose experts by token")
    scoring = config.get("scoring_func", "sqrtsoftplus")
    if scoring != "sqrtsoftplus":
        raise ValueError(f"scoring_func must be 'sqrtsoftplus', but is {scoring!r}")
    router: Callable[..., Router]
    router_args: dict[str, Any] = {
        "norm_topk_prob": True,
        "norm_eps": 1e-20,
        "routed_scaling_factor": config["routed_scaling_factor"],
        "scores_dtype": None,
    }
    if _is_hash_layer(config, layer_idx):
        router = partial(HashRouter, *routing_sizes(config), vocab_size=config["vocab_size"], **router_args)
        tensors = (*router_tensors(), Tensor("router.tid2eid", ("gate.tid2eid",)))
    else:
        router = partial(SqrtSoftplusRouter, *routing_sizes(config), has_correction_bias=True, **router_args)
        tensors = router_tensors(correction_bias="gate.e_score_correction_bias")
    size, bias = config["moe_intermediate_size"], config.get("mlp_bias", False)
    activation = clamped_swiglu(limit=config.get("swiglu_limit", math.inf))
    return Layer(
        router=router,
        experts=grouped_experts(config, size, activation=activation),
        layout=STACKED,
        checkpoint=PER_EXPERT_W123,
        shared_expert=shared_expert(config, size, activation=activation, bias=bias),
        tensors=(*tensors, *shared_expert_tensors("shared_experts", bias=bias)),
    )
