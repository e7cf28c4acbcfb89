"""DBRX: the matrices of all experts one below the other, sizes in ``ffn_config``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from moe_npu.layers.activations import get_activation
from moe_npu.layers.families.base import (
    Config,
    Layer,
    every_layer,
    grouped_experts,
    register_family,
    router_tensors,
)
from moe_npu.layers.routers import SoftmaxTopKRouter
from moe_npu.layers.weight_layouts import ExpertLayout


@register_family("dbrx", is_moe_layer=every_layer)
def dbrx(config: Config, layer_idx: int | None) -> Layer:
    """Softmax in the dtype of the model, normalized by the sum or not at all."""
    ffn = Config(config["ffn_config"])
    order = ffn.get("moe_normalize_expert_weights", None)
    if order not in (None, 1):
        raise ValueError(
            f"ffn_config.moe_normalize_expert_weights must be 1 or None, the order of the norm, but is {order}"
        )
    act = ffn.get("ffn_act_fn", {"name": "silu"})
    activation = act.get("name", "silu") if isinstance(act, Mapping) else act
    get_activation(activation)
    return Layer(
        router=partial(
            SoftmaxTopKRouter,
            ffn["hidden_size"],
            ffn["num_experts"],
            ffn["num_experts_per_tok"],
            norm_topk_prob=order is not None,
            scores_dtype=None,
        ),
        experts=grouped_experts(ffn, ffn["ffn_hidden_size"], activation=activation),
        layout=ExpertLayout(
            gate="experts.mlp.w1", up="experts.mlp.v1", down="experts.mlp.w2", is_down_transposed=True, is_flat=True
        ),
        tensors=router_tensors("router.layer"),
    )
