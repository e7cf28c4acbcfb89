"""Llama 4: the weights scale what the experts read."""

from __future__ import annotations

from functools import partial

from moe_npu.layers.families.base import (
    STACKED_TRANSPOSED,
    Config,
    Layer,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import Llama4Router


def _is_moe_layer(config: Config, layer_idx: int) -> bool:
    layers = config.get("moe_layers", None)
    if layers is not None:
        return layer_idx in layers
    return bool((layer_idx + 1) % config.get("interleave_moe_layer_step", 1) == 0)


@register_family("llama4_text", is_moe_layer=_is_moe_layer)
def llama4(config: Config, layer_idx: int | None) -> Layer:
    """The shared expert has the size of the others."""
    size = config["intermediate_size"]
    return Layer(
        router=partial(Llama4Router, *routing_sizes(config)),
        experts=grouped_experts(config, size),
        layout=STACKED_TRANSPOSED,
        shared_expert=shared_expert(config, size),
        tensors=(*router_tensors("router"), *shared_expert_tensors("shared_expert")),
    )
