"""Low-rank adapters on the simulated device, against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moe_npu
from moe_npu import sim
from moe_npu.layers.lora import add_lora, lora_parameters, merge_lora, unmerge_lora

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

E, H, INTER, K, RANK = 6, 32, 16, 2, 4


def moe(dtype: torch.dtype, *, quantized: bool = False) -> moe_npu.MoE:
    torch.manual_seed(0)
    experts: nn.Module = moe_npu.GroupedExperts(E, H, INTER, dtype=dtype)
    if quantized:
        experts = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme("w4a16"))
    layer = moe_npu.MoE(moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=dtype), experts)
    add_lora(layer, rank=RANK, alpha=8)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return layer


def outcome(layer: nn.Module, x: Tensor, device: str) -> list[Tensor]:
    layer.to(device)
    inputs = x.to(device).requires_grad_()
    with sim.trace() as record:
        result = layer(inputs)
        grads = torch.autograd.grad(result, [inputs, *lora_parameters(layer)], torch.ones_like(result))
    if device == "npu":
        assert record.num_synchronizations == 0
        assert record.num_copies_to_host == 0
    return [result.detach().cpu(), *(grad.cpu() for grad in grads)]


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize(
    ("dtype", "quantized"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_trains(dtype: torch.dtype, quantized: bool, num_tokens: int) -> None:
    layer = moe(dtype, quantized=quantized)
    x = torch.randn(num_tokens, H, dtype=dtype)
    actual, expected = outcome(layer, x, "npu"), outcome(layer, x, "cpu")
    assert len(actual) == 6
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_merges() -> None:
    layer = moe(torch.bfloat16).to("npu")
    before = {name: value.cpu() for name, value in layer.state_dict().items()}
    merge_lora(layer)
    assert not torch.equal(layer.experts.down_proj.cpu(), before["experts.down_proj"])
    unmerge_lora(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(value.cpu(), before[name]), name
