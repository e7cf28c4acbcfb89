"""What the demo measures on a model: bits per byte, expert load, and the speed of generation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moe_npu.demo.corpus import decode, encode
from moe_npu.layers.stats import ExpertLoad, track_expert_load


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model.

    Attributes:
        scheme: how its experts are stored.
        num_bytes: size of its folder on disk.
        bits_per_byte: cross entropy of the held-out text, base 2; a byte is a token.
        tokens_per_second: of generation, one sequence.
        text: what it generated after the prompt.
    """

    scheme: str
    num_bytes: int
    bits_per_byte: float
    tokens_per_second: float
    text: str


@torch.inference_mode()
def bits_per_byte(model: Any, windows: torch.Tensor, *, batch_size: int = 16) -> float:
    """Mean cross entropy, base 2, of the bytes of ``windows [n, L]`` after each window's first."""
    was_training = model.training
    model.eval()
    total = 0.0
    for ids in windows.split(batch_size):
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (windows.size(0) * (windows.size(1) - 1)) / math.log(2)


@torch.inference_mode()
def expert_load(model: Any, windows: torch.Tensor, *, batch_size: int = 16) -> dict[str, ExpertLoad]:
    """The tokens that each expert got, by layer."""
    with track_expert_load(model) as loads:
        for ids in windows.split(batch_size):
            model(input_ids=ids)
    return loads


@torch.inference_mode()
def generate(model: Any, prompt: str, num_tokens: int) -> tuple[str, float]:
    """Continuation of ``prompt``, sampled with a fixed seed, and its speed in tokens per second."""
    ids = encode(prompt.encode()).unsqueeze(0).to(model.device)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 40, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, **options)  # first calls allocate and plan
    torch.manual_seed(0)
    start = time.perf_counter()
    output = model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **options)
    seconds = time.perf_counter() - start
    return decode(output[0, ids.size(1) :]), num_tokens / seconds


def evaluate(scheme: str, model: Any, folder: Path, windows: torch.Tensor, prompt: str, num_tokens: int) -> Evaluation:
    """All figures of a model that was loaded from ``folder``."""
    text, tokens_per_second = generate(model, prompt, num_tokens)
    return Evaluation(
        scheme=scheme,
        num_bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        bits_per_byte=bits_per_byte(model, windows),
        tokens_per_second=tokens_per_second,
        text=text,
    )
