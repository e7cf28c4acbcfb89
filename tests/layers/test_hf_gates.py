"""Gates that look like a SwiGLU and are not: a module's own code must run."""

from __future__ import annotations

import types

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_npu.layers.hf  # noqa: F401 - registers the implementation


class ClampedFarOut(Qwen3MoeExperts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=1000)) * up.clamp(-1000, 1000)


def check_equals_batched_mm(experts: Qwen3MoeExperts, scale: float) -> None:
    """transformers' own implementation for any gate: "eager" has the formula of the class written out."""
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    args = (torch.randn(4, 32) * scale, torch.randint(8, (4, 2)), torch.rand(4, 2))
    results = {}
    for implementation in ("batched_mm", "moe_npu"):
        experts.config._experts_implementation = implementation
        results[implementation] = experts(*args)
    expected = results["batched_mm"]
    assert (results["moe_npu"] - expected).norm() <= 1e-5 * expected.norm()


def config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=8)


def test_a_clamp_at_large_values() -> None:
    check_equals_batched_mm(ClampedFarOut(config()), scale=3000)


def test_a_gate_of_one_instance() -> None:
    experts = Qwen3MoeExperts(config())
    experts._apply_gate = types.MethodType(lambda self, gate_up: gate_up.chunk(2, -1)[1], experts)
    check_equals_batched_mm(experts, scale=1)
