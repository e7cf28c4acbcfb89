"""What the low-rank adapter of a weight of experts adds to its rows: the part of `lora.py` that forwards call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from moe_npu import ops

ATTRIBUTE = "moe_npu_lora"  # of an experts module: the settings of its adapters by the name of their weight


@dataclass(frozen=True)
class LoraSettings:
    """How the adapter of one weight is applied.

    Attributes:
        rank: r, inner size of the product of A and B.
        alpha: numerator of :attr:`scaling`.
        use_rslora: whether the denominator is ``sqrt(rank)``.
        dropout: share of the input of A that is dropped in training.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, but is {self.rank!r}")
        is_number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not is_number or not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, but is {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, but is {self.dropout!r}")

    @property
    def scaling(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def lora_settings(experts: nn.Module) -> dict[str, LoraSettings]:
    """The settings of the adapters of an experts module, by the name of their weight; empty where there are none."""
    # not getattr: nn.Module takes microseconds to say that it has no such attribute
    settings: dict[str, LoraSettings] = experts.__dict__.get(ATTRIBUTE, {})
    return settings


def base_name(weight: str) -> str:
    """Name of the buffer that keeps a weight as it was before its adapter was merged into it."""
    return f"{weight}_lora_base"


def with_lora(
    experts: nn.Module, weight: str, rows: torch.Tensor, expert_tokens: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The rows times a weight and its adapter: ``y + scaling * B @ A @ rows``, by two grouped matmuls.

    Args:
        experts: the module that has the weight.
        weight: its name.
        rows: ``[R, in]``, what was multiplied by the weight.
        expert_tokens: ``[E]`` int64, rows of each expert.
        y: ``[R, out]``, the rows times the weight. The adapter computes in this dtype, whatever its own is.

    Returns:
        ``[R, out]``, dtype of y; y itself where the weight has no adapter or one that is merged into it.
    """
    settings = lora_settings(experts).get(weight)
    if settings is None or hasattr(experts, base_name(weight)):
        return y
    lora_a, lora_b = (getattr(experts, f"{weight}_lora_{side}").to(y.dtype) for side in "AB")  # [E, r, in], [E, out, r]
    rows = rows.to(y.dtype)
    if settings.dropout:
        rows = nn.functional.dropout(rows, settings.dropout, experts.training)
    low = ops.grouped_mm(rows, lora_a.mT, expert_tokens) * settings.scaling  # [R, r]
    return y + ops.grouped_mm(low, lora_b.mT, expert_tokens)
