"""The ``"moe_npu"`` experts implementation of transformers.

``from_pretrained(..., experts_implementation="moe_npu")`` makes every MoE layer that transformers decorates with
``use_experts_implementation`` run through :func:`moe_npu_experts_forward`. Importing this module registers it;
``import moe_npu`` does so whenever transformers is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_npu.layers._fp8 import fp8_grouped_linear
from moe_npu.layers._lora import lora_settings, with_lora
from moe_npu.layers._precision import grouped_linear, half_precision
from moe_npu.layers._routed_layers import IMPLEMENTATION, SCHEME_ATTRIBUTE
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.experts import zero_undefined_rows
from moe_npu.layers.hf_gates import SWIGLU, FusedGate, apply_fused_gate, fused_gate
from moe_npu.layers.quantized_experts import quantized_mlp, quantized_weight
from moe_npu.quant import QuantizedRows, QuantScheme

__all__ = ["NAME", "SCHEME_ATTRIBUTE", "flag", "moe_npu_experts_forward"]

NAME = IMPLEMENTATION

# What it means where a release of transformers does not set a flag yet. Releases without _is_expert_parallel may send
# ids of experts that live elsewhere to any module
_DEFAULTS = {
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "is_transposed": False,
    "_is_expert_parallel": True,
}


def flag(experts: Any, name: str) -> bool:
    """A flag of transformers' experts interface, whatever the release.

    Args:
        experts: an experts module of transformers.
        name: an argument of ``use_experts_implementation``, or ``"_is_expert_parallel"``.
    """
    return bool(getattr(experts, name, _DEFAULTS[name]))


def moe_npu_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of a transformers experts module by two grouped matmuls.

    Honours the flags of transformers' interface (``is_transposed``, ``has_bias``, ``has_gate``,
    ``has_post_expert_norm``), a module's own ``_apply_gate``, and expert ids beyond ``num_experts`` under expert
    parallelism. Weights are multiplied in the dtype and the memory they have, also where a model's own code casts
    them to float32 first; only float8 weights are dequantized, for the time of a matmul.

    Args:
        self: the experts module.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` expert ids.
        top_k_weights: ``[T, K]``, of any float dtype.

    Returns:
        ``[T, H]``, dtype of ``hidden_states``. The K results of a token are summed in float32. Quantized experts of a
        float32 model compute in bfloat16.

    Raises:
        ValueError: weights of one byte that are no float8 in blocks.
    """
    scheme: QuantScheme | None = getattr(self, SCHEME_ATTRIBUTE, None)
    gate = fused_gate(self) if flag(self, "has_gate") else None
    has_absent_experts = flag(self, "_is_expert_parallel")
    dispatcher = LocalDispatcher(self.num_experts, has_absent_experts=has_absent_experts)
    # adapters add to each projection
    is_quantized_mlp = scheme is not None and gate == SWIGLU and not lora_settings(self)
    quantize = is_quantized_mlp and scheme is not None and scheme.takes_quantized_rows
    dispatched = dispatcher.dispatch(hidden_states, top_k_index, top_k_weights, quantize=quantize)
    rows, expert_tokens = dispatched.rows, dispatched.expert_tokens
    if is_quantized_mlp:
        assert scheme is not None
        rows = quantized_mlp(self, scheme, rows, expert_tokens)
    else:
        assert not isinstance(rows, QuantizedRows)
        rows = _mlp(self, rows, expert_tokens, scheme, gate)
    if flag(self, "has_post_expert_norm"):
        if has_absent_experts:
            rows = zero_undefined_rows(rows, expert_tokens)
        rows = self.post_expert_norm(rows)
    return dispatcher.combine(rows, dispatched.state).to(hidden_states.dtype)


def _mlp(
    experts: Any,
    rows: torch.Tensor,
    expert_tokens: torch.Tensor,
    scheme: QuantScheme | None,
    gate: FusedGate | None,
) -> torch.Tensor:
    has_gate = flag(experts, "has_gate")
    rows = _linear(experts, "gate_up_proj" if has_gate else "up_proj", rows, expert_tokens, scheme)  # [R, 2I] or [R, I]
    if not has_gate:
        rows = experts.act_fn(rows)
    elif gate is not None:
        rows = apply_fused_gate(gate, rows)
    else:
        rows = experts._apply_gate(rows)  # [R, I]
    return _linear(experts, "down_proj", rows, expert_tokens, scheme)  # [R, H]


def _linear(
    experts: Any, name: str, rows: torch.Tensor, expert_tokens: torch.Tensor, scheme: QuantScheme | None
) -> torch.Tensor:
    y = _base_linear(experts, name, rows, expert_tokens, scheme)
    return with_lora(experts, name, rows, expert_tokens, y)


def _base_linear(
    experts: Any, name: str, rows: torch.Tensor, expert_tokens: torch.Tensor, scheme: QuantScheme | None
) -> torch.Tensor:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if scheme is not None:
        return scheme.grouped_mm(half_precision(rows), quantized_weight(experts, name), expert_tokens, bias=bias)
    weight = getattr(experts, name)
    if weight.element_size() == 1:
        scale_inv, num_stacked = getattr(experts, f"{name}_scale_inv"), 2 if name == "gate_up_proj" else 1
        return fp8_grouped_linear(
            name, rows, weight, scale_inv, experts.block_size, expert_tokens, num_stacked=num_stacked
        )
    # rows follow the weight, as norms may compute in float32
    rows, weight = rows.to(weight.dtype), weight if experts.is_transposed else weight.mT
    return grouped_linear(rows, weight, expert_tokens, bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, moe_npu_experts_forward)
