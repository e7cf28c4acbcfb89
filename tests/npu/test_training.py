"""Models of transformers trained on the simulated device: the same numbers as on CPU, from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moe_npu.layers.hf  # noqa: F401 - registers the implementation

pytestmark = [
    pytest.mark.npu,
    pytest.mark.usefixtures("npu"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format:UserWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            output_router_logits=True,  # with the loss that balances the experts
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_scaling={"rope_type": "default", "rope_theta": 10000.0},
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
EXPERTS = ["eager", "grouped_mm", "moe_npu"]


def make(name: str, experts: str, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    return model


def train(model: PreTrainedModel, device: str, num_steps: int) -> tuple[PreTrainedModel, list[float]]:
    """A copy of the model after training on one batch, and its losses."""
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def generate(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    return model.eval().generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0).cpu()


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_by_bit(name: str, experts: str) -> None:
    model = make(name, experts)
    num_steps = 20 if name == "qwen3_moe" else 3
    on_host, expected = train(model, "cpu", num_steps)
    on_device, losses = train(model, "npu", num_steps)
    assert losses == expected
    assert losses[-1] < losses[0]
    for (parameter, wanted), result in zip(on_host.named_parameters(), on_device.parameters(), strict=True):
        assert torch.equal(result.cpu(), wanted), parameter
    prompt = torch.randint(0, 64, (2, 5))
    tokens = generate(on_device, prompt.npu())
    assert torch.equal(tokens, generate(on_host, prompt))
    assert tokens.unique().numel() > 3


@pytest.mark.parametrize("experts", EXPERTS)
def test_training_with_the_devices_attention(experts: str) -> None:
    """Which adds in another order, so that the losses agree but for rounding."""
    model = make("qwen3_moe", experts, "sdpa")
    on_host, expected = train(model, "cpu", 20)
    _, losses = train(model, "npu", 20)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    prompt = torch.randint(0, 64, (2, 5))
    tokens = generate(on_host, prompt)
    assert torch.equal(generate(on_host.to("npu"), prompt.npu()), tokens)


def test_training_in_bfloat16_with_autocast() -> None:
    model = make("qwen3_moe", "moe_npu").to("npu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    ids = torch.randint(0, 64, (2, 12)).npu()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("npu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
