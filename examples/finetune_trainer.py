"""Fine-tune a MoE model with the Trainer of transformers on real text, and draw its loss.

python examples/finetune_trainer.py --compare eager
python examples/finetune_trainer.py --model path/to/checkpoint --sequence-length 1024 --batch-size 1
python examples/finetune_trainer.py --device npu

The text is the sources of the Python standard library. Without --model, the model is a small Qwen3-MoE with random
weights that reads bytes. With --compare, the same training runs again with another experts implementation. The Trainer
needs accelerate: pip install accelerate.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

import moe_npu  # noqa: F401 - makes experts_implementation="moe_npu" known
from moe_npu.demo.corpus import Corpus, decode


class Windows(torch.utils.data.Dataset):
    """Consecutive pieces of the text; the Trainer shuffles them."""

    def __init__(self, ids: torch.Tensor, length: int) -> None:
        self.windows = ids[: ids.numel() // length * length].view(-1, length)  # [n, length]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def load_model(path: str | None, experts: str) -> PreTrainedModel:
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, experts_implementation=experts, dtype=torch.float32)
    config = Qwen3MoeConfig(
        vocab_size=384,  # of ByT5: bytes and some more
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        output_router_logits=True,  # adds the load-balancing loss
        router_aux_loss_coef=0.01,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation=experts)


def load_text(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> torch.Tensor:
    """The first tokens of the text, int64 ``[n]``."""
    text = decode(Corpus.load().train[: 4 * num_tokens])  # a token is rarely longer than four bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a text longer than what the model sees at once
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:num_tokens])


def train(experts: str, ids: torch.Tensor, args: argparse.Namespace, folder: str) -> tuple[list[float], float]:
    """The loss of every step, and seconds."""
    training_args = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        bf16=args.bf16,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 10),
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
        use_cpu=args.device == "cpu",  # otherwise the Trainer takes the accelerator that it finds
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=load_model(args.model, experts),
        args=training_args,
        train_dataset=Windows(ids, args.sequence_length),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.model.device.type != args.device.split(":")[0]:
        raise SystemExit(f"the Trainer runs on {trainer.model.device}, not on --device {args.device}")
    print(f"{experts}: {trainer.model.num_parameters() / 1e6:.1f} M parameters on {trainer.model.device}")
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


def plot(losses: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # the second curve lies on the first: thick and pale below, thin and dashed above
    styles = [{"linewidth": 5, "alpha": 0.35}, {"linewidth": 1.5, "linestyle": "--", "color": "black"}]
    for (experts, values), style in zip(losses.items(), styles, strict=False):
        axes.plot(range(1, len(values) + 1), values, label=f"experts_implementation={experts!r}", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss [nats per token]")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("Trainer on the Python standard library")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="folder or name of a MoE checkpoint")
    parser.add_argument("--compare", metavar="EXPERTS", help="also train with this implementation, for example eager")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--picture", type=Path, default=Path("loss.png"))
    args = parser.parse_args()
    logging.set_verbosity_error()

    tokenizer = ByT5Tokenizer() if args.model is None else AutoTokenizer.from_pretrained(args.model)
    ids = load_text(tokenizer, args.steps * args.batch_size * args.accumulate * args.sequence_length)
    losses, seconds = {}, {}
    for experts in dict.fromkeys(["moe_npu", args.compare or "moe_npu"]):
        with tempfile.TemporaryDirectory() as folder:
            losses[experts], seconds[experts] = train(experts, ids, args, folder)

    print(f"\n{'step':>5}" + "".join(f"{experts:>12}" for experts in losses))
    for step in sorted({*range(0, args.steps, 10), args.steps - 1}):
        print(f"{step + 1:5d}" + "".join(f"{values[step]:12.5f}" for values in losses.values()))
    print(f"{'sec.':>5}" + "".join(f"{value:12.1f}" for value in seconds.values()))
    if len(losses) == 2:
        ours, theirs = losses.values()
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        print(f"\nlargest difference of the losses over {args.steps} steps: {difference:.1e}")
    plot(losses, args.picture)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
