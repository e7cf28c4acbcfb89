"""Losses, counters, capacity and forced routing on the simulated device, against the CPU and without host reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_npu
from moe_npu import sim
from moe_npu.layers.dispatch import CapacityDispatcher
from moe_npu.layers.losses import (
    load_balancing_loss,
    router_z_loss,
    sequence_balance_loss,
    update_correction_bias,
)
from moe_npu.layers.replay import force_balanced, record_routing, replay_routing
from moe_npu.layers.stats import ExpertLoad, load_report, track_expert_load

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

T, E, H, K = 12, 6, 32, 2
BF16 = torch.bfloat16


def on_both(compute: Callable[[str], list[Tensor]]) -> None:
    """What is computed on the device is that of the CPU, and nothing waits for the device."""
    with sim.trace() as record:
        actual = compute("npu")
    assert record.num_synchronizations == 0
    assert record.num_copies_to_host == 0
    for a, b in zip(actual, compute("cpu"), strict=True):
        assert a.device.type == "npu"
        torch.testing.assert_close(a.cpu(), b)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "batch": load_balancing_loss,
    "sequence": lambda logits, ids, mask: sequence_balance_loss(logits, ids, num_sequences=3, mask=mask),
    "z": lambda logits, ids, mask: router_z_loss(logits, mask=mask),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(loss: Callable[..., Tensor]) -> None:
    logits, mask = torch.randn(T, E, dtype=BF16), torch.arange(T) % 4 != 3
    ids = logits.topk(K, -1).indices.int()
    on_device = {name: (logits.to(name), ids.to(name), mask.to(name)) for name in ("npu", "cpu")}

    def compute(device: str) -> list[Tensor]:
        logits, ids, mask = on_device[device]
        value = loss(logits.requires_grad_(), ids, mask=mask)
        return [value.detach(), *torch.autograd.grad(value, logits)]

    on_both(compute)


def test_counters_and_bias() -> None:
    ids = {name: torch.randint(0, E, (T, K)).int().to(name) for name in ("npu",)}
    ids["cpu"] = ids["npu"].cpu()
    loads = {name: ExpertLoad(E, device=name) for name in ids}
    biases = {name: torch.zeros(E, device=name) for name in ids}

    def compute(device: str) -> list[Tensor]:
        loads[device](ids[device])
        update_correction_bias(biases[device], loads[device].counts, rate=0.001)
        return [loads[device].counts, biases[device]]

    on_both(compute)


@pytest.mark.parametrize("drop", ["last", "lightest"])
@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_capacity(scheme: str | None, drop: Any) -> None:
    layer = moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=BF16),
        moe_npu.GroupedExperts(E, H, 16, dtype=BF16),
        dispatcher=CapacityDispatcher(E, capacity_factor=1.0, drop=drop),
    )
    if scheme is not None:
        layer.experts = moe_npu.QuantizedExperts.from_float(layer.experts, moe_npu.get_scheme(scheme))
    x = torch.randn(T, H, dtype=BF16)
    inputs = {name: x.to(name).requires_grad_(scheme is None) for name in ("npu", "cpu")}

    def compute(device: str) -> list[Tensor]:
        y = layer.to(device)(inputs[device])
        if scheme is not None:
            return [y.detach()]
        return [y.detach(), *torch.autograd.grad(y, [inputs[device], *layer.parameters()], torch.ones_like(y))]

    with torch.set_grad_enabled(scheme is None):
        layer.to("npu")
        on_both(compute)


def test_record_replay_and_counts() -> None:
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=16, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "moe_npu"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, T, H)
    with record_routing(block) as record, torch.no_grad():
        expected = block(x)
    block.to("npu")
    on_device = x.to("npu")
    with sim.trace() as trace, record_routing(block) as again, track_expert_load(block) as loads:
        block(on_device)
        assert (trace.num_synchronizations, trace.num_copies_to_host) == (0, 0)
    assert torch.equal(again.layers[""].topk_ids[0].cpu(), record.layers[""].topk_ids[0])
    assert load_report(loads).layers[0].num_pairs == T * K
    for weights in ("recorded", "router"):
        with replay_routing(block, record, weights=weights):  # type: ignore[arg-type]
            torch.testing.assert_close(block(on_device).cpu(), expected)
    with force_balanced(block, weights="router"), track_expert_load(block) as loads:
        block(on_device).sum().backward()
    assert loads[""].counts.tolist() == [T * K // E] * E
    assert block.gate.weight.grad is not None
