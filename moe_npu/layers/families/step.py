"""Step 3.7: the activation is bounded after the gate's function, differently in every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from moe_npu.layers.activations import Activation, get_activation
from moe_npu.layers.families.base import (
    STACKED,
    Config,
    Layer,
    activation_of,
    after_dense_layers,
    grouped_experts,
    register_family,
    router_tensors,
    routing_sizes,
    shared_expert,
    shared_expert_tensors,
)
from moe_npu.layers.routers import SigmoidTopKRouter


@dataclass(frozen=True)
class BoundedGate:
    """``min(function(gate), limit) * clamp(up, -limit, limit)``."""

    function: Activation
    limit: float

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``[R, 2I] -> [R, I]``."""
        gate, up = gate_up.chunk(2, -1)  # [R, I]
        return self.function(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def _activation(config: Config, limits: str, layer_idx: int | None) -> str | Activation:
    activation = activation_of(config)
    if not any(config.get(limits, None) or ()):
        return activation
    if layer_idx is None:
        raise ValueError("layer_idx is needed: the config bounds activations differently in every layer")
    limit = config.at(limits, layer_idx) or math.inf
    return activation if math.isinf(limit) else BoundedGate(get_activation(activation, has_gate=False), limit)


def _is_moe_layer(config: Config, layer_idx: int) -> bool:
    listed = config.get("moe_layers_enum", None)
    if config.get("mlp_layer_types", None) is not None or listed is None:
        return _after_three(config, layer_idx)
    return layer_idx in [int(index) for index in (listed.split(",") if isinstance(listed, str) else listed)]


_after_three = after_dense_layers(3)


@register_family("step3p5", is_moe_layer=_is_moe_layer)
def step3p5(config: Config, layer_idx: int | None) -> Layer:
    """Sigmoid with a correction bias; the sum of the experts is scaled."""
    bias = config.get("mlp_bias", False)
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=True,
            has_correction_bias=True,
            weights_dtype=torch.float32,
        ),
        experts=grouped_experts(
            config,
            config["moe_intermediate_size"],
            activation=_activation(config, "swiglu_limits", layer_idx),
        ),
        layout=STACKED,
        shared_expert=shared_expert(
            config,
            config["share_expert_dim"],
            activation=_activation(config, "swiglu_limits_shared", layer_idx),
            bias=bias,
        ),
        tensors=(
            *router_tensors(correction_bias="gate.e_score_correction_bias"),
            *shared_expert_tensors("shared_experts", bias=bias),
        ),
        routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
    )
