"""JetMoE: a bias behind the sum of the experts."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from moe_npu.layers.families.base import (
    Config,
    Layer,
    Tensor,
    activation_of,
    every_layer,
    grouped_experts,
    register_family,
    register_unsupported,
    router_tensors,
    routing_sizes,
)
from moe_npu.layers.routers import TopKSoftmaxRouter
from moe_npu.layers.weight_layouts import ExpertLayout


class Bias(nn.Module):
    """Adds a learned vector.

    Args:
        size: size of the last dim.
        device: device of the bias.
        dtype: dtype of the bias.
    """

    def __init__(
        self, size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]``, plus the bias."""
        return hidden_states + self.bias


@register_family("jetmoe", is_moe_layer=every_layer)
def jetmoe(config: Config, layer_idx: int | None) -> Layer:
    """The softmax of the best logits."""
    activation = activation_of(config, "activation_function")
    return Layer(
        router=partial(TopKSoftmaxRouter, *routing_sizes(config), weights_dtype="input"),
        experts=grouped_experts(config, config["intermediate_size"], activation=activation),
        layout=ExpertLayout(gate_up="input_linear.weight", down="output_linear.weight"),
        output_transform=partial(Bias, config["hidden_size"]),
        tensors=(*router_tensors("router.layer"), Tensor("output_transform.bias", ("bias",))),
    )


register_unsupported(
    "its experts are projections before and after attention, not feed-forward networks.", blocks=("JetMoeMoA",)
)
