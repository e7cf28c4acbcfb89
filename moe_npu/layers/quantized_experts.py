"""Experts whose weights and arithmetic a quantization scheme gives."""

from __future__ import annotations

import torch
from torch import nn

from moe_npu.layers._precision import half_precision
from moe_npu.layers.activations import GatedActivation, get_activation
from moe_npu.layers.experts import GroupedExperts
from moe_npu.quant import QuantizedWeight, QuantScheme


class QuantizedExperts(nn.Module):
    """E gated feed-forward networks with quantized weights, multiplied as integers, never dequantized at load.

    Parameters, none of them trainable: ``gate_up_proj`` and ``down_proj``, the integers of ``[E, 2I, H]`` and
    ``[E, H, I]`` as the scheme stores them, and ``gate_up_proj_scale``, ``down_proj_scale``.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        scheme: e.g. ``get_scheme("w8a8")``.
        activation: name of a gated activation, or a callable ``[R, 2I] -> [R, I]``.
        device: device of the parameters.
        dtype: dtype of the model, which the dtype of the scales follows: bfloat16 or float16.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        scheme: QuantScheme,
        activation: str | GatedActivation = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.scheme = scheme
        self.activation = get_activation(activation)
        shapes = {
            "gate_up_proj": (num_experts, 2 * intermediate_size, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
        }
        for name, shape in shapes.items():
            set_quantized_weight(self, name, scheme.empty(shape, dtype=dtype, device=device))

    @classmethod
    def from_float(cls, experts: GroupedExperts, scheme: QuantScheme) -> QuantizedExperts:
        """The quantized twin of ``experts``.

        Raises:
            ValueError: the experts have a bias, or weights that the scheme cannot store.
        """
        if experts.gate_up_proj_bias is not None:
            raise ValueError("experts with a bias cannot be quantized yet")
        quantized = cls(
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
            scheme=scheme,
            activation=experts.activation,
            device="meta",
            dtype=experts.down_proj.dtype,
        )
        for name in ("gate_up_proj", "down_proj"):
            set_quantized_weight(quantized, name, scheme.quantize(getattr(experts, name).detach()))
        return quantized

    def forward(self, hidden_states: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows.

        Args:
            hidden_states: ``[R, H]``, rows sorted by expert. float32 rows are computed in bfloat16.
            expert_tokens: ``[E]`` int64, rows of each expert.

        Returns:
            ``[R, H]``, dtype of ``hidden_states``.
        """
        rows = half_precision(hidden_states)  # [R, H]
        gate_up = self.scheme.grouped_mm(rows, quantized_weight(self, "gate_up_proj"), expert_tokens)  # [R, 2I]
        rows = self.activation(gate_up)  # [R, I]
        rows = self.scheme.grouped_mm(rows, quantized_weight(self, "down_proj"), expert_tokens)  # [R, H]
        return rows.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """The sizes and the scheme."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, scheme={self.scheme}"
        )


def set_quantized_weight(module: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Store a quantized weight as the parameters ``name`` and ``name + "_scale"`` of ``module``."""
    for parameter, value in ((name, quantized.weight), (f"{name}_scale", quantized.scale)):
        module.register_parameter(parameter, nn.Parameter(value, requires_grad=False))


def quantized_weight(module: nn.Module, name: str) -> QuantizedWeight:
    """The quantized weight that :func:`set_quantized_weight` stored."""
    return QuantizedWeight(getattr(module, name), getattr(module, f"{name}_scale"))
