"""References of the gating operators."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.reference.common import Float


def moe_gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """spec: npu_moe_gating_top_k_softmax 1.1. y, expert_idx, row_idx.

    Selection is a stable descending sort of the float32 probabilities, which float16 logits first round to float16.
    """
    experts = x.shape[-1]
    logits = x.reshape(x.shape[:-1].numel(), experts).double()
    rows = logits.shape[0]
    done = [False] * rows if finished is None else finished.reshape(-1).tolist()
    y = torch.zeros(rows, k, dtype=torch.float64)
    expert_idx = torch.zeros(rows, k, dtype=torch.int32)
    row_idx = torch.zeros(rows, k, dtype=torch.int32)
    for row in range(rows if experts else 0):
        exponentials = torch.exp(logits[row] - logits[row].max())
        probabilities = exponentials / exponentials.sum()
        rounded = probabilities.float().to(torch.float16 if x.dtype == torch.float16 else torch.float32)
        keys = [-key for key in rounded.tolist()]
        order = sorted(range(experts), key=keys.__getitem__)
        for slot in range(k):
            y[row, slot] = probabilities[order[slot]]
            expert_idx[row, slot] = experts if done[row] else order[slot]
            row_idx[row, slot] = slot * rows + row
    shape = (*x.shape[:-1], k)
    return y.reshape(shape), expert_idx.reshape(shape), row_idx.reshape(shape)


def moe_gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Float]:
    """spec: npu_moe_gating_top_k_softmax_v2 1.2. y, expert_idx, softmax_result.

    With renorm the raw logits are sorted, without it the float32 probabilities (float64 for float64).
    """
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    experts = x.shape[-1]
    logits = x.reshape(x.shape[:-1].numel(), experts).double()
    rows = logits.shape[0]
    done = [False] * rows if finished is None else finished.reshape(-1).tolist()
    y = torch.zeros(rows, k, dtype=torch.float64)
    expert_idx = torch.zeros(rows, k, dtype=torch.int32)
    everything = torch.zeros(rows, experts, dtype=torch.float64)
    for row in range(rows if experts else 0):
        exponentials = torch.exp(logits[row] - logits[row].max())
        everything[row] = probabilities = exponentials / exponentials.sum()
        keys = logits[row].tolist() if renorm == 1 else probabilities.to(precision).tolist()
        order = sorted(range(experts), key=lambda expert: -keys[expert])[:k]
        weights = exponentials[order] / exponentials[order].sum() if renorm == 1 else probabilities[order]
        for slot, expert in enumerate(order):
            y[row, slot] = weights[slot]
            expert_idx[row, slot] = experts if done[row] else expert
    softmax_result = everything.reshape(x.shape) if not renorm and output_softmax else torch.zeros(0).double()
    shape = (*x.shape[:-1], k)
    return y.reshape(shape), expert_idx.reshape(shape), Float(softmax_result, precision)
