"""Teach a model with 4-bit experts something new: low-rank adapters over frozen, quantized weights.

python examples/lora_over_w4a16.py [--device npu]

A small MoE model learns to read Python code. Its experts are quantized to int4, and adapters on them learn the prose of
Python's documentation. Only the adapters are trained and saved.
"""

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moe_npu
from moe_npu.demo.corpus import VOCAB_SIZE, Corpus, encode
from moe_npu.layers import add_lora, lora_parameters, lora_state_dict

LENGTH = 128


def load_texts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Byte ids of two kinds of text, each for training and held out, int64 ``[n]``."""
    corpus = Corpus.load()
    prose = encode("\n".join(topics[name] for name in sorted(topics)).encode())
    end = prose.numel() * 9 // 10
    # the sources before those of the documentation
    return {"code": (corpus.train[:2_000_000], corpus.held_out), "prose": (prose[:end], prose[end:])}


def batch(text: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Random windows ``[size, LENGTH]``."""
    starts = torch.randint(text.numel() - LENGTH, (size,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(LENGTH)]


def train(
    model: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    text: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    # up over a tenth of the steps, and down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    for step in range(steps):
        ids = batch(text, batch_size, seed=step).to(model.device)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def loss_on(model: PreTrainedModel, text: torch.Tensor) -> float:
    """Mean cross entropy of fixed windows, nats per byte."""
    model.eval()
    ids = batch(text, 32, seed=-1).to(model.device)
    return model(input_ids=ids, labels=ids).loss.item()


def experts_megabytes(model: PreTrainedModel) -> float:
    tensors = [tensor for name, tensor in model.state_dict().items() if ".experts." in name]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=150, help="of the training of the float model")
    parser.add_argument("--lora-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    texts = load_texts()
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        output_router_logits=True,  # adds the load-balancing loss in training
        router_aux_loss_coef=0.01,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="moe_npu").to(args.device)

    print(f"{'model':<22}{'trainable':>10}{'experts':>10}{'loss on code':>14}{'on prose':>10}{'sec.':>7}")

    def report(name: str, model: PreTrainedModel, num_trainable: int, seconds: float) -> None:
        model.config.output_router_logits = False  # the loss of the text alone
        losses = [loss_on(model, held_out) for _, held_out in texts.values()]
        memory = f"{experts_megabytes(model):.2f} MB"
        print(f"{name:<22}{num_trainable:>10,}{memory:>10}{losses[0]:14.3f}{losses[1]:10.3f}{seconds:7.1f}")
        model.config.output_router_logits = True

    start = time.perf_counter()
    code, prose = texts["code"][0], texts["prose"][0]
    train(model, list(model.parameters()), code, steps=args.steps, batch_size=args.batch_size, learning_rate=3e-3)
    report("float, on code", model, model.num_parameters(), time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model.to(torch.bfloat16).save_pretrained(Path(folder, "float"))
        moe_npu.quantize_checkpoint(Path(folder, "float"), Path(folder, "w4a16"), moe_npu.get_scheme("w4a16"))
        model = AutoModelForCausalLM.from_pretrained(Path(folder, "w4a16")).to(args.device)
    report("w4a16", model, 0, time.perf_counter() - start)

    start = time.perf_counter()
    add_lora(model, rank=args.rank, alpha=2 * args.rank)  # freezes all else
    adapters = lora_parameters(model)
    train(model, adapters, prose, steps=args.lora_steps, batch_size=args.batch_size, learning_rate=1e-2)
    report("w4a16 + LoRA, on prose", model, sum(p.numel() for p in adapters), time.perf_counter() - start)
    saved = lora_state_dict(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    print(f"\nto be saved: {len(saved)} tensors of adapters, {size / 1e6:.2f} MB, for example {next(iter(saved))}")


if __name__ == "__main__":
    main()
