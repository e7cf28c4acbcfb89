"""Experts that are modules of their own, in a list: one grouped matmul takes their matrices as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts
from transformers.models.vitpose_backbone.modeling_vitpose_backbone import VitPoseNaiveMoe

from moe_npu import ops
from moe_npu.layers._precision import autocast_dtype
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.hf_adapters.base import Adapter, dispatch_rows

_MAX_WEIGHTS = 128  # of one npu_grouped_matmul


def _linear_layers(experts: Sequence[nn.Module], name: str) -> list[nn.Module]:
    return [expert.get_submodule(name) for expert in experts]


def _obstacle(linears: Sequence[nn.Module]) -> str | None:
    """Why the weights of these cannot be multiplied directly: whatever else the module does would be passed over."""
    if len(linears) > _MAX_WEIGHTS:
        return f"it has {len(linears)} experts, and a grouped matmul takes at most {_MAX_WEIGHTS} separate weights"
    for linear in linears:
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            return f"an expert holds {type(linear).__name__} where the grouped matmul needs a plain nn.Linear"
    return None


def _grouped_linear(rows: torch.Tensor, linears: Sequence[nn.Module], expert_tokens: torch.Tensor) -> torch.Tensor:
    """Each row through the linear layer of its expert, ``[R, in]`` to ``[R, out]``, in the dtype of a linear layer.

    Raises:
        TypeError: a layer was replaced, e.g. by that of an adapter, since the module was adapted.
    """
    obstacle = _obstacle(linears)
    if obstacle is not None:
        raise TypeError(f"moe_npu.accelerate must come after layers of the experts are replaced: {obstacle}")
    weights = [linear.get_parameter("weight") for linear in linears]  # E of [out, in]
    biases = None if linears[0].bias is None else [linear.get_parameter("bias") for linear in linears]
    dtype = autocast_dtype(rows) or weights[0].dtype
    bias_dtype = torch.float32 if dtype == torch.bfloat16 else dtype  # the only one for bfloat16
    (y,) = ops.npu_grouped_matmul(
        [rows.to(dtype)],
        [weight.to(dtype).mT for weight in weights],
        bias=None if biases is None else [bias.to(bias_dtype) for bias in biases],
        group_list=expert_tokens,
        group_type=0,
        group_list_type=1,
        split_item=3,
    )
    return y


class GroupedSwitchTransformersExperts(Adapter, SwitchTransformersExperts):
    """``SwitchTransformersExperts`` by two grouped matmuls over the experts' own matrices.

    Dropout draws for all rows at once, so in training other elements are dropped than the original would.
    """

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """See :func:`_obstacle`."""
        experts = list(module.children())
        return _obstacle(_linear_layers(experts, "wi")) or _obstacle(_linear_layers(experts, "wo"))

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """``[T, H]``, choices as one-hot rows ``[T, 1, E]`` (zeros: dropped) and weights ``[T, 1]``; ``[T, H]``."""
        experts = list(self.children())
        is_dropped = selected_experts.sum(dim=-1) == 0  # [T, 1]
        topk_ids = selected_experts.argmax(dim=-1).masked_fill(is_dropped, len(experts))  # [T, 1]
        dispatcher = LocalDispatcher(len(experts), has_absent_experts=True)
        rows, expert_tokens, state = dispatch_rows(dispatcher, hidden_states, topk_ids, routing_weights)
        rows = _grouped_linear(rows, _linear_layers(experts, "wi"), expert_tokens)  # [R, I]
        rows = experts[0].dropout(experts[0].act(rows))
        rows = _grouped_linear(rows, _linear_layers(experts, "wo"), expert_tokens)  # [R, H]
        return dispatcher.combine(rows, state).to(hidden_states.dtype)


class GroupedVitPoseNaiveMoe(Adapter, VitPoseNaiveMoe):
    """``VitPoseNaiveMoe``: one expert per image, that of its dataset, instead of all."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """See :func:`_obstacle`."""
        return _obstacle(list(module.children()))

    def forward(self, hidden_state: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """``[B, S, H]`` and the expert of each image ``[B, 1, 1]`` (none: zeros) to ``[B, S, part_features]``."""
        experts = list(self.children())
        batch, length, hidden = hidden_state.shape
        exists = (indices >= 0) & (indices < len(experts))
        topk_ids = indices.masked_fill(~exists, len(experts)).expand(batch, length, 1).reshape(-1, 1)  # [T, 1]
        dispatcher = LocalDispatcher(len(experts), has_absent_experts=True)
        ones = hidden_state.new_ones(topk_ids.shape)
        tokens = hidden_state.reshape(-1, hidden)
        rows, expert_tokens, state = dispatch_rows(dispatcher, tokens, topk_ids, ones)
        rows = _grouped_linear(rows, experts, expert_tokens)  # [R, part_features]
        output = dispatcher.combine(rows, state).to(hidden_state.dtype)
        return output.view(batch, length, self.part_features)
