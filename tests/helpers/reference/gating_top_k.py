"""References of gating by groups, its gradient, and replica choice."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import Float, sigmoid


def scores_of(x: Tensor, norm_type: int) -> Tensor:
    """spec: npu_moe_gating_top_k 1.3, step 1, in float64."""
    logits = x.double()
    if norm_type == 0:
        exponentials = torch.exp(logits - logits.max(-1, keepdim=True).values) if logits.numel() else logits
        return exponentials / exponentials.sum(-1, keepdim=True)
    return sigmoid(logits) if norm_type == 1 else torch.sqrt(torch.log1p(torch.exp(logits)))


def _descending(keys: list[float]) -> list[int]:
    return sorted(range(len(keys)), key=lambda index: -keys[index])


def _choose(
    scores: Tensor, bias: Tensor | None, k: int, k_group: int, group_count: int, group_select_mode: int
) -> list[int]:
    """spec: npu_moe_gating_top_k 1.3, steps 2 to 4, of one row in the dtype of the scores."""
    biased = scores if bias is None else scores + bias.to(scores.dtype)
    keys = biased.tolist()
    size = len(keys) // group_count
    groups = [biased[group * size : (group + 1) * size].sort().values for group in range(group_count)]
    best = [(group[-1] if group_select_mode == 0 else group[-1] + group[-2]).item() for group in groups]
    for group in _descending(best)[k_group:]:
        keys[group * size : (group + 1) * size] = [-math.inf] * size
    return _descending(keys)[:k]


def moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Float]:
    """spec: npu_moe_gating_top_k 1.3. y, expert_idx, norm_out. Selection adds and compares in float32."""
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = scores_of(x, norm_type)
    rows = x.shape[0]
    y = torch.zeros(rows, k, dtype=torch.float64)
    expert_idx = torch.zeros(rows, k, dtype=torch.int32)
    for row in range(rows):
        if input_ids is not None and tid2eid is not None:
            chosen = tid2eid[int(input_ids[row])].tolist()
        else:
            keys = scores[row].detach().to(precision)
            chosen = _choose(keys, bias, k, k_group, group_count, group_select_mode)
        weights = [scores[row, expert] for expert in chosen]
        total = sum(weights) + eps if norm_type in (1, 2) or renorm == 1 else 1.0
        for slot, expert in enumerate(chosen):
            y[row, slot] = weights[slot] / total * routed_scaling_factor
            expert_idx[row, slot] = expert
    return y, expert_idx, Float(scores.detach() if out_flag else torch.zeros(x.shape).double(), precision)


def moe_gating_top_k_backward(
    x_norm: Tensor,
    grad_y: Tensor,
    expertIdx: Tensor,  # noqa: N803
    *,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> Float:
    """spec: npu_moe_gating_top_k_backward 1.4: row by row, the product of the Jacobians of weights and scores."""
    rows, experts = x_norm.shape
    grad_x = np.zeros((rows, experts))
    for row in range(rows):
        s = x_norm[row].double().numpy()
        chosen = expertIdx[row].tolist()
        total = sum(s[expert] for expert in chosen) + eps
        # dy[slot] / ds[expert]
        weights = np.zeros((len(chosen), experts))
        for slot, expert in enumerate(chosen):
            if norm_type == 0 and renorm == 0:
                weights[slot, expert] += 1
                continue
            for place, other in enumerate(chosen):
                weights[slot, other] += ((total if place == slot else 0) - s[expert]) / total**2
        # ds[expert] / dx[logit]
        if norm_type == 0:
            jacobian = np.diag(s) - np.outer(s, s)
        elif norm_type == 1:
            jacobian = np.diag(s * (1 - s))
        else:
            exponential = np.exp(s**2) - 1  # of the logit
            jacobian = np.diag(exponential / (1 + exponential) / (2 * s))
        grad_x[row] = grad_y[row].double().numpy() * routed_scaling_factor @ weights @ jacobian
    return Float(torch.from_numpy(grad_x), grad_y.dtype)


def moe_update_expert(
    expert_ids: Tensor,
    eplb_table: Tensor,
    *,
    expert_scales: Tensor | None = None,
    pruning_threshold: Tensor | None = None,
    active_mask: Tensor | None = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    """spec: npu_moe_update_expert 5.8. balanced_expert_ids, balanced_active_mask."""
    tokens, top_k = expert_ids.shape
    table = eplb_table.tolist()
    balanced = torch.zeros_like(expert_ids, memory_format=torch.contiguous_format)
    keep = torch.ones(tokens, top_k, dtype=torch.bool)
    for token in range(tokens):
        for slot in range(top_k):
            count, *replicas = table[int(expert_ids[token, slot])]
            if count == 1:
                replica = 0
            elif balance_mode == 0:
                replica = local_rank_id // math.ceil(world_size / count)
            else:
                replica = token % count
            balanced[token, slot] = replicas[replica]
        if expert_scales is not None and pruning_threshold is not None:
            scales = expert_scales[token].float().numpy()
            for slot, threshold in enumerate(pruning_threshold.reshape(-1).float().numpy()):
                active = active_mask is None or bool(active_mask[token])
                keep[token, slot] = active and bool(scales[slot] >= threshold * scales.sum(dtype=np.float32))
    return balanced, keep
