"""Training of a transformers model with ``experts_implementation="moe_npu"``, whole or sharded by FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moe_npu.layers.hf  # noqa: F401 - registers the implementation
from tests.helpers.gloo import World

NUM_STEPS = 3
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "eos_token_id": None,
}


def make(name: str, experts: str) -> PreTrainedModel:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    if name == "gpt_oss":  # biases, and experts whose number the ranks do not divide
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=5, rope_parameters=rope))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_experts_implementation(experts)
    return model


def train(model: PreTrainedModel, ids: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of the gradient and final weights of a few steps on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    norms = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return norms, weights


def train_sharded(world: World, name: str, ids: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """The same with the weights on two ranks, each with a part of the batch."""
    group = dist.distributed_c10d._resolve_process_group(world.groups["pair"])
    mesh = DeviceMesh.from_group(group, "cpu")
    model = make(name, "moe_npu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = model.model.layers[0].mlp.experts.down_proj.to_local()
    assert local.size(0) < model.model.layers[0].mlp.experts.num_experts
    return train(model, ids.chunk(2)[world.rank])
