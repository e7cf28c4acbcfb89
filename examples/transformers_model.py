"""Plug the grouped experts into a transformers MoE model: same outputs, same gradients, one argument.

python examples/transformers_model.py [--device npu]
"""

import argparse

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_npu  # noqa: F401 - makes experts_implementation="moe_npu" known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
    )
    # a real checkpoint: AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_npu")
    model = Qwen3MoeForCausalLM(config).to(args.device)
    ids = torch.randint(1000, (2, 32), device=args.device)

    results = {}
    for implementation in ("eager", "moe_npu"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results[implementation] = (output.logits.detach(), model.model.layers[0].mlp.experts.gate_up_proj.grad.clone())

    for name, eager, ours in zip(("logits", "gradient of gate_up_proj"), *results.values(), strict=True):
        print(f"{name}: largest difference {(eager - ours).abs().max():.1e}, largest value {eager.abs().max():.1e}")


if __name__ == "__main__":
    main()
