"""Training steps of transformers' experts on the simulated device: no byte of a weight is copied in any layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_npu import sim
from moe_npu.sim.trace import Launch, Region
from tests.helpers.hf_experts import build, decorated_classes, inputs, results

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

LAYOUTS = {
    "concatenated": "qwen3_moe.Qwen3MoeExperts",
    "transposed": "aria.AriaExperts",
    "interleaved-biased": "gpt_oss.GptOssExperts",
    "clipped": "deepseek_v4.DeepseekV4Experts",
    "ungated": "nemotron_h.NemotronHExperts",
    "post-norm": "muse_spark.MuseSparkExperts",
}
MATMUL = "aclnnGroupedMatmul"
NUM_TOKENS = 8  # few, so that weights are the largest tensors


def on_npu(experts: nn.Module, arguments: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    return experts.to("npu"), [each.detach().to("npu").requires_grad_(each.requires_grad) for each in arguments]


def weights(experts: nn.Module) -> list[Region]:
    return [Region(each.data_ptr(), each.nbytes) for each in experts.parameters() if each.dim() == 3]


def of_weights(launches: list[Launch], weights: list[Region]) -> list[Launch]:
    """The launches that read from a weight, or that write as much as one."""

    def overlap(region: Region, weight: Region) -> bool:
        return region.address < weight.address + weight.num_bytes and weight.address < region.address + region.num_bytes

    smallest = min(weight.num_bytes for weight in weights)
    return [
        launch
        for launch in launches
        if any(overlap(region, weight) for region in launch.reads for weight in weights)
        or any(region.num_bytes >= smallest for region in launch.writes)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [layout for layout, name in LAYOUTS.items() if name in decorated_classes()])
def test_only_matmuls_touch_weights(layout: str, dtype: torch.dtype) -> None:
    experts, arguments = on_npu(build(LAYOUTS[layout], dtype), inputs(dtype, num_tokens=NUM_TOKENS))
    results(experts, arguments, "moe_npu")  # the first step may prepare
    with sim.trace() as trace:
        grads = results(experts, arguments, "moe_npu")
    touching = of_weights(trace.launches, weights(experts))
    # forward, gradient of the rows, gradient of the weight; for each of two weights
    assert len(touching) == 6
    assert all(launch.name.startswith(MATMUL) for launch in touching), touching
    assert trace.num_synchronizations == trace.num_copies_to_device == 1  # the gradient of the result, made on the host
    for name, parameter in experts.named_parameters():
        assert grads[name].stride() == parameter.stride()


def test_a_copy_would_be_seen() -> None:
    experts, _ = on_npu(build(LAYOUTS["concatenated"]), [])
    with sim.trace() as trace:
        experts.gate_up_proj.detach().mT.contiguous()
        experts.down_proj.detach()[0].clone()
    assert len(of_weights(trace.launches, weights(experts))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [layout for layout, name in LAYOUTS.items() if name in decorated_classes()])
def test_the_device_computes_what_the_cpu_does(layout: str, dtype: torch.dtype) -> None:
    arguments = inputs(dtype, num_tokens=NUM_TOKENS)
    expected = results(build(LAYOUTS[layout], dtype), arguments, "moe_npu")
    actual = results(*on_npu(build(LAYOUTS[layout], dtype), arguments), "moe_npu")
    for key in expected:
        torch.testing.assert_close(actual[key].cpu(), expected[key])


def test_new_weights_are_used_at_the_next_call() -> None:
    experts, arguments = on_npu(build(LAYOUTS["interleaved-biased"]), inputs(torch.float32))
    experts.config._experts_implementation = "moe_npu"
    before = experts(*arguments)
    for parameter in experts.parameters():
        parameter.data.copy_(parameter.data * 0.5)
    after = experts(*arguments)
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(after, experts(*arguments))
    assert not torch.allclose(after, before)
