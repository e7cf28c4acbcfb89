"""Nemotron-H: experts without a gate, which may work on a projection of the token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.families.base import (
    Config,
    Layer,
    Tensor,
    activation_of,
    grouped_sigmoid_router,
    register_family,
    router_tensors,
    shared_expert_tensors,
)
from moe_npu.layers.shared_expert import SharedExpert
from moe_npu.layers.weight_layouts import ExpertLayout


def _is_moe_layer(config: Config, layer_idx: int) -> bool:
    name = "layers_block_type"
    if config.get(name, None) is None:
        name = "hybrid_override_pattern"
    return config.at(name, layer_idx) in ("moe", "E")


@register_family("nemotron_h", is_moe_layer=_is_moe_layer)
def nemotron_h(config: Config, layer_idx: int | None) -> Layer:
    """The router of DeepSeek-V3, squared ReLU."""
    hidden, latent, bias = config["hidden_size"], config.get("moe_latent_size", None), config.get("mlp_bias", False)
    activation = activation_of(config, "mlp_hidden_act", has_gate=False)
    tensors = (
        *router_tensors(correction_bias="gate.e_score_correction_bias"),
        *shared_expert_tensors("shared_experts", bias=bias, has_gate=False),
    )
    down: Callable[..., nn.Module] | None = None
    up: Callable[..., nn.Module] | None = None
    if latent is not None:
        down, up = partial(nn.Linear, hidden, latent, bias=bias), partial(nn.Linear, latent, hidden, bias=bias)
        tensors += tuple(
            Tensor(f"{ours}.{kind}", (f"{theirs}.{kind}",))
            for ours, theirs in (("latent_down_proj", "fc1_latent_proj"), ("latent_up_proj", "fc2_latent_proj"))
            for kind in (("weight", "bias") if bias else ("weight",))
        )
    return Layer(
        router=grouped_sigmoid_router(config),
        experts=partial(
            GroupedExperts,
            config["num_experts"],
            hidden if latent is None else latent,
            config["moe_intermediate_size"],
            activation=activation,
            has_gate=False,
        ),
        layout=ExpertLayout(up="experts.up_proj", down="experts.down_proj"),
        checkpoint=ExpertLayout(up="experts.{expert}.up_proj.weight", down="experts.{expert}.down_proj.weight"),
        shared_expert=partial(
            SharedExpert,
            hidden,
            config["moe_shared_expert_intermediate_size"],
            activation=activation,
            has_gate=False,
            bias=bias,
        ),
        latent_down_proj=down,
        latent_up_proj=up,
        tensors=tensors,
    )
