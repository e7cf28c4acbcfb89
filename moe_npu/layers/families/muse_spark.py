"""Muse Spark: experts on a normalized projection of the token, and a norm behind each expert."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.families.base import (
    STACKED,
    Config,
    Layer,
    Tensor,
    activation_of,
    after_dense_layers,
    register_family,
    router_tensors,
    routing_sizes,
)
from moe_npu.layers.routers import SigmoidTopKRouter


class CenteredRMSNorm(nn.Module):
    """``rms_norm(x) * (1 + weight)``, computed in float32.

    Args:
        size: size of the last dim.
        eps: added to the mean square.
        device: device of the weight.
        dtype: dtype of the weight.
    """

    def __init__(
        self, size: int, *, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]``, rounded once."""
        return (_rms_norm(hidden_states.float(), self.eps) * (1 + self.weight).float()).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """The size and eps."""
        return f"{self.weight.size(0)}, eps={self.eps}"


class InputScaledRMSNorm(CenteredRMSNorm):
    """``rms_norm((1 + weight) * x)``: the weight comes before the norm.

    Args:
        size: size of the last dim.
        eps: added to the mean square.
        device: device of the weight.
        dtype: dtype of the weight.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]``; rounded to its dtype between the product and the norm."""
        scaled = (hidden_states.float() * (1 + self.weight).float()).to(hidden_states.dtype)
        return _rms_norm(scaled.float(), self.eps).to(hidden_states.dtype)


def _rms_norm(rows: torch.Tensor, eps: float) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)


def _experts(config: Config, *, device: torch.device | str | None, dtype: torch.dtype | None) -> GroupedExperts:
    size = config["moe_hidden_size"]
    return GroupedExperts(
        config["num_experts"],
        size,
        config["moe_intermediate_size"],
        activation=activation_of(config),
        post_norm=InputScaledRMSNorm(size, eps=config["post_norm_eps"], device=device, dtype=dtype),
        device=device,
        dtype=dtype,
    )


def _latent_down_proj(config: Config, *, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Sequential:
    size = config["moe_hidden_size"]
    return nn.Sequential(
        nn.Linear(config["hidden_size"], size, bias=False, device=device, dtype=dtype),
        CenteredRMSNorm(size, eps=config["rms_norm_eps"], device=device, dtype=dtype),
    )


@register_family("muse_spark_text", is_moe_layer=after_dense_layers(0))
def muse_spark(config: Config, layer_idx: int | None) -> Layer:
    """Sigmoid of scaled logits with a correction bias."""
    return Layer(
        router=partial(
            SigmoidTopKRouter,
            *routing_sizes(config),
            norm_topk_prob=True,
            norm_eps=1e-15,
            has_correction_bias=True,
            routed_scaling_factor=config["routed_scaling_factor"],
            logit_scale=config["output_multiplier"],
            logits_dtype=torch.float32,
        ),
        experts=partial(_experts, config),
        layout=STACKED,
        latent_down_proj=partial(_latent_down_proj, config),
        latent_up_proj=partial(nn.Linear, config["moe_hidden_size"], config["hidden_size"], bias=False),
        tensors=(
            *router_tensors(correction_bias="gate.e_score_correction_bias"),
            Tensor("latent_down_proj.0.weight", ("pre_expert_proj.weight",)),
            Tensor("latent_down_proj.1.weight", ("pre_expert_norm.weight",)),
            Tensor("latent_up_proj.weight", ("post_expert_proj.weight",)),
            Tensor("experts.post_norm.weight", ("experts.post_expert_norm.weight",)),
        ),
    )
