"""The ``"moe_npu"`` experts implementation of transformers.

``from_pretrained(..., experts_implementation="moe_npu")`` makes every MoE layer that transformers decorates with
``use_experts_implementation`` run through :func:`moe_npu_experts_forward`. Importing this module registers it;
``import moe_npu`` does so whenever transformers is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_npu import ops
from moe_npu.layers._precision import grouped_linear, half_precision
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.quantized_experts import quantized_mlp, quantized_weight
from moe_npu.quant import QuantizedRows, QuantScheme

NAME = "moe_npu"
SCHEME_ATTRIBUTE = "moe_npu_scheme"


def moe_npu_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of a transformers experts module by two grouped matmuls.

    Honours the flags of transformers' interface: ``is_transposed``, ``has_bias``, ``has_gate``, ``is_concatenated``,
    ``has_post_expert_norm``, a module's own ``_apply_gate``, and expert ids beyond ``num_experts`` under expert
    parallelism.

    Args:
        self: the experts module.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]`` expert ids.
        top_k_weights: ``[T, K]``, of any float dtype.

    Returns:
        ``[T, H]``, dtype of ``hidden_states``. The K results of a token are summed in float32. Quantized experts of a
        float32 model compute in bfloat16.
    """
    scheme: QuantScheme | None = getattr(self, SCHEME_ATTRIBUTE, None)
    is_swiglu = _is_swiglu(self)
    dispatcher = LocalDispatcher(self.num_experts, has_absent_experts=self._is_expert_parallel)
    quantize = is_swiglu and scheme is not None and scheme.takes_quantized_rows
    dispatched = dispatcher.dispatch(hidden_states, top_k_index, top_k_weights, quantize=quantize)
    rows, expert_tokens = dispatched.rows, dispatched.expert_tokens
    if is_swiglu and scheme is not None:
        rows = quantized_mlp(self, scheme, rows, expert_tokens)
    else:
        assert not isinstance(rows, QuantizedRows)
        rows = _linear(self, "gate_up_proj" if self.has_gate else "up_proj", rows, expert_tokens, scheme)
        if not self.has_gate:
            rows = self.act_fn(rows)
        elif is_swiglu:
            rows = ops.npu_swiglu(rows)
        else:
            rows = self._apply_gate(rows)
        rows = _linear(self, "down_proj", rows, expert_tokens, scheme)
    if self.has_post_expert_norm:
        if self._is_expert_parallel:  # undefined rows would reach the gradient of the norm's weight
            is_undefined = torch.arange(rows.size(0), device=rows.device) >= expert_tokens.sum()
            rows = rows.masked_fill(is_undefined.unsqueeze(1), 0)
        rows = self.post_expert_norm(rows)
    return dispatcher.combine(rows, dispatched.state).to(hidden_states.dtype)


def _is_swiglu(experts: Any) -> bool:
    return (
        bool(experts.has_gate)
        and type(experts)._apply_gate is _default_apply_gate
        and experts.is_concatenated
        and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))
    )


def _linear(
    experts: Any, name: str, rows: torch.Tensor, expert_tokens: torch.Tensor, scheme: QuantScheme | None
) -> torch.Tensor:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if scheme is not None:
        return scheme.grouped_mm(half_precision(rows), quantized_weight(experts, name), expert_tokens, bias=bias)
    weight = getattr(experts, name)
    # rows follow the weight, as norms may compute in float32
    rows, weight = rows.to(weight.dtype), weight if experts.is_transposed else weight.mT
    return grouped_linear(rows, weight, expert_tokens, bias)


ALL_EXPERTS_FUNCTIONS.register(NAME, moe_npu_experts_forward)
