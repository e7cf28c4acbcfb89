"""Train a small Qwen3-MoE language model on the corpus, resumable at any step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from moe_npu.demo.corpus import VOCAB_SIZE, Corpus
from moe_npu.demo.evaluation import bits_per_byte

CHECKPOINT_EVERY = 100
EVALUATE_EVERY = 100
_STATE = "training.safetensors"
_HISTORY = "training.json"


@dataclass(frozen=True)
class Settings:
    """What a run is made of; a folder holds one run."""

    steps: int = 600
    seed: int = 0
    batch_size: int = 8
    sequence_length: int = 128
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 16
    top_k: int = 4
    intermediate_size: int = 128
    learning_rate: float = 1.5e-3
    aux_loss_coef: float = 0.01

    def model_config(self) -> Qwen3MoeConfig:
        """The transformers config of the model."""
        return Qwen3MoeConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.intermediate_size,
            moe_intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads // 2,
            head_dim=self.hidden_size // self.num_heads,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,  # the trainer balances each layer by itself
            max_position_embeddings=4 * self.sequence_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


@dataclass
class History:
    """Losses of a run: training, in bits per byte, of every step, and held-out at some."""

    train: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


class Trainer:
    """A model, its optimiser and its history; continues what ``folder`` holds.

    Args:
        settings: the run.
        corpus: its text.
        folder: where the state is kept.
        device: where it computes.
    """

    def __init__(self, settings: Settings, corpus: Corpus, folder: Path, device: str) -> None:
        self.settings = settings
        self.corpus = corpus
        self.folder = folder
        self.device = device
        torch.manual_seed(settings.seed)
        self.model = Qwen3MoeForCausalLM._from_config(settings.model_config(), experts_implementation="moe_npu")
        self.model.to(device).train()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.history = History()
        self._load()

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.history.train)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the run, then a cosine to a tenth."""
        warmup = max(1, self.settings.steps // 20)
        if step < warmup:
            return self.settings.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.settings.steps - warmup)
        return self.settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))

    def balance_loss(self, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Mean over the layers of each layer's load-balancing loss (Switch Transformer, eq. 4), top-k if all is even.

        The loss that the model itself would add takes all layers together, where an expert that is idle in one layer
        makes up for one that is overloaded in another.
        """
        settings = self.settings
        losses = [load_balancing_loss_func((logits,), settings.num_experts, settings.top_k) for logits in router_logits]
        return torch.stack(losses).mean()

    def train(self, on_step: Callable[[Trainer], None]) -> None:
        """Run the remaining steps; ``on_step`` is called after each."""
        settings = self.settings
        held_out = self.corpus.held_out_windows(16, settings.sequence_length).to(self.device)
        start = time.perf_counter() - self.history.seconds
        while self.step < settings.steps:
            ids = self.corpus.batch(
                settings.batch_size, settings.sequence_length, seed=settings.seed, step=self.step
            ).to(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            output = self.model(input_ids=ids, labels=ids, output_router_logits=True)
            balance = self.balance_loss(output.router_logits)
            self.optimizer.zero_grad(set_to_none=True)
            (output.loss + settings.aux_loss_coef * balance).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.history.train.append(output.loss.item() / math.log(2))
            self.history.balance.append(balance.item() / settings.top_k)
            self.history.seconds = time.perf_counter() - start
            is_last = self.step == settings.steps
            if is_last or self.step % EVALUATE_EVERY == 0:
                self.history.held_out[self.step] = bits_per_byte(self.model, held_out)
            if is_last or self.step % CHECKPOINT_EVERY == 0:
                self._save()
            on_step(self)

    def _save(self) -> None:
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        partial = self.folder / f".{_STATE}.partial"
        history = json.dumps({"settings": asdict(self.settings), "history": asdict(self.history)})
        # history and tensors in one file: what is renamed into place is one consistent state
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, partial, {_HISTORY: history})
        partial.replace(self.folder / _STATE)

    def _load(self) -> None:
        path = self.folder / _STATE
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            stored: dict[str, Any] = json.loads(file.metadata()[_HISTORY])
        history = stored["history"]
        self.history = History(
            history["train"],
            history["balance"],
            {int(step): value for step, value in history["held_out"].items()},
            history["seconds"],
        )
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{key: tensors[f"{key}.{name}"].to(self.device) for key in ("exp_avg", "exp_avg_sq")},
                }
