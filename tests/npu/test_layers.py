"""Layers, quantized experts, the transformers integration and the demo on the simulated device, against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moe_npu
from moe_npu import sim
from moe_npu.demo import run_demo
from moe_npu.demo.corpus import Corpus
from moe_npu.quant import scheme_names
from tests.helpers.assertions import assert_bits_equal
from tests.quant.test_convert import qwen
from tests.test_demo import TINY

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

E, H, INTER, K = 6, 32, 16, 2
BF16, F32 = torch.bfloat16, torch.float32


def moe(dtype: torch.dtype, **options: Any) -> moe_npu.MoE:
    return moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=dtype),
        moe_npu.GroupedExperts(E, H, INTER, dtype=dtype, **options),
        shared_expert=moe_npu.SharedExpert(H, INTER, dtype=dtype),
    )


def on_both(layer: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Result and gradients of all inputs and parameters, on the device and on the CPU."""
    outcomes = []
    for device in ("npu", "cpu"):
        layer = layer.to(device)
        moved = [x.to(device).requires_grad_(x.is_floating_point()) for x in inputs]
        with sim.trace() as record:
            result = layer(*moved)
        if device == "npu":
            assert record.num_synchronizations == 0
            assert record.num_copies_to_host == 0
        wanted = [x for x in (*moved, *layer.parameters()) if x.requires_grad]
        grads = torch.autograd.grad(result, wanted, torch.ones_like(result)) if result.requires_grad else ()
        outcomes.append([result.detach().cpu(), *(grad.cpu() for grad in grads)])
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_moe_layer(dtype: torch.dtype, bias: bool, activation: str) -> None:
    actual, expected = on_both(moe(dtype, bias=bias, activation=activation), torch.randn(3, 5, H, dtype=dtype))
    assert len(actual) == 7 + 2 * bias  # result, input, router, two weights, two of the shared expert
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)  # the layouts of weight gradients differ, hence orders of additions


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("scheme", scheme_names())
def test_quantized_experts(scheme: str, dtype: torch.dtype, num_tokens: int) -> None:
    layer = moe(dtype)
    layer.experts = moe_npu.QuantizedExperts.from_float(layer.experts, moe_npu.get_scheme(scheme))
    x = torch.randn(num_tokens, H, dtype=dtype)
    with torch.no_grad():
        (actual,), (expected,) = on_both(layer, x)
    assert_bits_equal(actual, expected)


def test_absent_experts() -> None:
    class Part(nn.Module):
        """Four of the six experts: pairs of the others contribute nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = moe_npu.GroupedExperts(4, H, INTER, dtype=BF16)
            self.dispatcher = moe_npu.LocalDispatcher(4, has_absent_experts=True)

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            dispatched = self.dispatcher.dispatch(x, ids, weights)
            return self.dispatcher.combine(self.experts(dispatched.rows, dispatched.expert_tokens), dispatched.state)

    ids = torch.stack([torch.randperm(6)[:K] for _ in range(9)]).clamp(max=4).int()
    actual, expected = on_both(Part(), torch.randn(9, H, dtype=BF16), ids, torch.rand(9, K, dtype=BF16))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scheme", scheme_names())
def test_a_quantized_checkpoint_in_transformers(scheme: str, tmp_path: Path) -> None:
    qwen().to(BF16).save_pretrained(tmp_path / "float")
    moe_npu.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", moe_npu.get_scheme(scheme))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", attn_implementation="eager").eval()
    ids = torch.randint(model.config.vocab_size, (2, 12))
    with torch.no_grad():
        expected, tokens = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
        model, ids = model.to("npu"), ids.to("npu")
        torch.testing.assert_close(model(ids).logits.cpu(), expected)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False).cpu(), tokens)


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"module_{number}.py").write_text(f"def function_{number}(x):\n    return x\n" * 600)
    corpus = Corpus.load(text)
    monkeypatch.setattr(Corpus, "load", classmethod(lambda cls: corpus))
    results = {
        device: run_demo(
            tmp_path / device,
            settings=TINY,
            device=device,
            num_windows=4,
            num_tokens=6,
            console=Console(width=120, record=True, force_terminal=False),
        )
        for device in ("cpu", "npu")
    }
    for on_npu, on_cpu in zip(results["npu"], results["cpu"], strict=True):
        assert (on_npu.scheme, on_npu.num_bytes) == (on_cpu.scheme, on_cpu.num_bytes)
        assert on_npu.bits_per_byte == pytest.approx(on_cpu.bits_per_byte, rel=1e-3)
