"""Inkling 2: smoothly bounded SwiGLU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe_npu.layers.activations import softcapped_swiglu
from moe_npu.layers.families.base import (
    STACKED,
    Config,
    Layer,
    every_layer,
    grouped_experts,
    register_family,
    register_unsupported,
    router_tensors,
    routing_sizes,
)
from moe_npu.layers.routers import SigmoidTopKRouter, SqrtSoftplusRouter
from moe_npu.layers.weight_layouts import ExpertLayout

_ROUTERS: dict[str, Any] = {"sigmoid": SigmoidTopKRouter, "sqrtsoftplus": SqrtSoftplusRouter}


@register_family("inkling2_text", "inkling2_loop_text", is_moe_layer=every_layer)
def inkling2(config: Config, layer_idx: int | None) -> Layer:
    """A correction bias, weights normalized and scaled."""
    scoring = config.get("scoring_func", "sigmoid")
    if scoring not in _ROUTERS:
        raise ValueError(f"scoring_func must be one of {', '.join(_ROUTERS)}, but is {scoring!r}")
    activation = softcapped_swiglu(gate_softcap=config["mlp_gate_softcap"], up_softcap=config["mlp_up_softcap"])
    return Layer(
        router=partial(
            _ROUTERS[scoring],
            *routing_sizes(config),
            norm_topk_prob=True,
            norm_eps=1e-20,
            has_correction_bias=True,
            routed_scaling_factor=config["routed_scaling_factor"],
            logits_dtype=torch.float32,
        ),
        experts=grouped_experts(config, config["moe_intermediate_size"], activation=activation),
        layout=STACKED,
        checkpoint=ExpertLayout(gate_up="experts.w13_weight", down="experts.w2_weight", order="interleaved"),
        tensors=router_tensors(correction_bias="gate.e_score_correction_bias"),
    )


register_unsupported(
    "its router weighs the shared experts together with the chosen ones, and a shared expert takes no weights here.",
    model_types=("inkling_text",),
    blocks=("InklingMoE",),
)
