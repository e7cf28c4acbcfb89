"""Experts whose weights and arithmetic a quantization scheme gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_npu import ops
from moe_npu.layers._lora import lora_settings, with_lora
from moe_npu.layers._precision import half_precision
from moe_npu.layers.activations import Activation, get_activation
from moe_npu.layers.experts import GroupedExperts
from moe_npu.quant import QuantizedRows, QuantizedWeight, QuantScheme

WEIGHTS = ("gate_up_proj", "down_proj")


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
        activation: str | Activation = "silu",
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
            set_quantized_weight(self, name, scheme.prepare(scheme.empty(shape, dtype=dtype, device=device)))
        self.register_load_state_dict_post_hook(_prepare_again)

    @classmethod
    def from_float(cls, experts: GroupedExperts, scheme: QuantScheme) -> QuantizedExperts:
        """The quantized twin of ``experts``.

        Raises:
            ValueError: the experts have a bias, no gate, or a norm, or weights that the scheme cannot store.
        """
        obstacles = {
            "a bias": experts.down_proj_bias is not None,
            "no gate": not experts.has_gate,
            "a post_norm": experts.post_norm is not None,
        }
        found = [obstacle for obstacle, is_there in obstacles.items() if is_there]
        if found:
            raise ValueError(f"experts with {' and '.join(found)} cannot be quantized to QuantizedExperts")
        quantized = cls(
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
            scheme=scheme,
            activation=experts.activation,
            device="meta",
            dtype=experts.down_proj.dtype,
        )
        for name in WEIGHTS:
            weight: torch.Tensor = getattr(experts, name).detach()
            set_quantized_weight(quantized, name, scheme.prepare(scheme.quantize(weight)))
        return quantized

    @property
    def takes_quantized_rows(self) -> bool:
        """Whether a dispatcher may quantize the rows, so that they are copied as int8."""
        return self.scheme.takes_quantized_rows and self._is_one_mlp

    @property
    def _is_one_mlp(self) -> bool:
        # adapters add to each projection
        return self.activation is ops.npu_swiglu and not lora_settings(self)

    def forward(self, hidden_states: torch.Tensor | QuantizedRows, expert_tokens: torch.Tensor) -> torch.Tensor:
        """Apply each expert to its rows.

        Args:
            hidden_states: ``[R, H]``, rows sorted by expert, also quantized ones if :attr:`takes_quantized_rows`.
                float32 rows are computed in bfloat16.
            expert_tokens: ``[E]`` int64, rows of each expert.

        Returns:
            ``[R, H]``, dtype of ``hidden_states``.
        """
        if self._is_one_mlp:
            return quantized_mlp(self, self.scheme, hidden_states, expert_tokens).to(hidden_states.dtype)
        assert not isinstance(hidden_states, QuantizedRows)
        rows = half_precision(hidden_states)  # [R, H]
        rows = self.activation(self._linear("gate_up_proj", rows, expert_tokens))  # [R, I]
        rows = self._linear("down_proj", rows, expert_tokens)  # [R, H]
        return rows.to(hidden_states.dtype)

    def _linear(self, name: str, rows: torch.Tensor, expert_tokens: torch.Tensor) -> torch.Tensor:
        y = self.scheme.grouped_mm(rows, quantized_weight(self, name), expert_tokens)
        return with_lora(self, name, rows, expert_tokens, y)

    def extra_repr(self) -> str:
        """The sizes and the scheme."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, scheme={self.scheme}"
        )


def set_quantized_weight(module: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Store a quantized weight as parameters ``name`` and ``name + "_scale"`` and a buffer ``name + "_offset"``."""
    for parameter, value in ((name, quantized.weight), (f"{name}_scale", quantized.scale)):
        module.register_parameter(parameter, nn.Parameter(value, requires_grad=False))
    module.register_buffer(f"{name}_offset", quantized.offset, persistent=False)


def quantized_weight(module: nn.Module, name: str) -> QuantizedWeight:
    """The quantized weight that :func:`set_quantized_weight` stored."""
    return QuantizedWeight(*(getattr(module, f"{name}{suffix}") for suffix in ("", "_scale", "_offset")))


def quantized_mlp(
    module: nn.Module, scheme: QuantScheme, hidden_states: torch.Tensor | QuantizedRows, expert_tokens: torch.Tensor
) -> torch.Tensor:
    """Rows through the SwiGLU experts of ``module``: :meth:`QuantScheme.gated_mlp` of its quantized weights."""
    rows = hidden_states if isinstance(hidden_states, QuantizedRows) else half_precision(hidden_states)
    gate_up_proj, down_proj = (quantized_weight(module, name) for name in WEIGHTS)
    return scheme.gated_mlp(rows, gate_up_proj, down_proj, expert_tokens)


def prepare_quantized_weights(module: nn.Module, scheme: QuantScheme) -> None:
    """Put the weights that were loaded into ``module`` in the form that is multiplied."""
    for name in WEIGHTS:
        set_quantized_weight(module, name, scheme.prepare(quantized_weight(module, name)))


def _prepare_again(module: QuantizedExperts, _: Any) -> None:
    """After a state dict was loaded, which holds no offsets: on a module that was on ``meta`` they are undefined."""
    prepare_quantized_weights(module, module.scheme)
