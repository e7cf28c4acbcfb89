"""Samples of gating by groups, its gradient, and replica choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.reference import gating_top_k
from tests.ops.samples.base import (
    BF16,
    F16,
    F32,
    F64,
    Inputs,
    Layout,
    Sample,
    Values,
    contiguous,
    sliced,
    transposed,
)
from tests.ops.samples.gating import logits

I32, I64 = torch.int32, torch.int64


def _orders(num_rows: int, size: int) -> Tensor:
    """Rows of 0..size-1, each in an order of its own."""
    values = Values()
    return torch.stack([values.normal(size).argsort() for _ in range(num_rows)] or [torch.empty(size).long()])[
        :num_rows
    ]


def _top_k_samples() -> list[Sample]:
    def inputs(
        num_rows: int = 4,
        experts: int = 8,
        k: int = 2,
        *,
        bias: bool = False,
        keys: int = 0,
        ids: tuple[torch.dtype, torch.dtype] = (I64, I32),
        dtype: torch.dtype = F32,
        layout: Layout = contiguous,
        **options: Any,
    ) -> Inputs:
        values = Values(1)
        # distinct logits that are exact in every dtype, none the negative of another
        x = ((_orders(num_rows, experts) - experts // 2).double() / 4 + 0.0625).to(dtype)
        if bias:
            options["bias"] = layout((values.integers(-9, 5, experts).double() / 8).to(dtype).unsqueeze(0))[0]
        if keys:
            options["input_ids"] = values.integers(0, keys - 1, num_rows, dtype=ids[0])
            options["tid2eid"] = layout(_orders(keys, experts)[:, :k].to(ids[1]))
        return (layout(x), k), options

    def sample(
        id: str, *sizes: int, with_rows: Any = None, traced: bool = False, wrt: bool = True, **options: Any
    ) -> Sample:
        make = lambda: inputs(*sizes, **options)  # noqa: E731
        return Sample("npu_moe_gating_top_k", id, make, 16, ("x",) if wrt else (), with_rows, traced)

    def repeating() -> Inputs:
        args, options = inputs(keys=3, norm_type=1)
        options["tid2eid"] = torch.tensor([[1, 1], [2, 5], [7, 7]], dtype=I32)
        return args, options

    groups: dict[str, Any] = {"bias": True, "group_count": 4, "k_group": 2}
    deepseek: dict[str, Any] = {**groups, "group_select_mode": 1, "norm_type": 1, "routed_scaling_factor": 2.5}
    hashed: dict[str, Any] = {"keys": 3, "norm_type": 2, "routed_scaling_factor": 1.5}
    return [
        sample("softmax"),
        sample("softmax-renorm", renorm=1, out_flag=True, routed_scaling_factor=0.5),
        sample("softmax-bias", bias=True, out_flag=True),
        sample("softmax-groups", 5, 12, 3, **groups),
        sample("sigmoid", norm_type=1, traced=True),
        sample("sigmoid-renorm-has-no-effect", norm_type=1, renorm=1),
        sample("sigmoid-large-eps", norm_type=1, eps=0.5, out_flag=True),
        sample("sigmoid-one-of-k", 4, 8, 1, norm_type=1, eps=0.25),
        sample("softplus", norm_type=2, out_flag=True, traced=True),
        sample("softplus-bias-groups", 5, 12, 3, norm_type=2, **groups),
        sample("groups-by-best", 5, 16, 3, **{**deepseek, "group_select_mode": 0}),
        sample(
            "groups-by-two-best", 5, 16, 5, **deepseek, out_flag=True, with_rows=lambda n: inputs(n, 16, **deepseek)
        ),
        sample("all-groups", 5, 8, 8, bias=True, group_count=2, k_group=2, group_select_mode=1, norm_type=1),
        sample("groups-of-one", 5, 8, 2, group_count=8, k_group=3, bias=True),
        sample("all-of-a-group", 5, 8, 4, group_count=2, k_group=1, bias=True, norm_type=1),
        sample("no-factor", norm_type=1, routed_scaling_factor=0.0, wrt=False),
        sample("hash", 5, **hashed, traced=True, with_rows=lambda n: inputs(n, **hashed)),
        sample("hash-ids-int32", 5, keys=3, ids=(I32, I64), norm_type=1, bias=True, out_flag=True),
        sample("hash-softmax-renorm", 5, keys=4, ids=(I32, I32), renorm=1, layout=sliced),
        sample("hash-all-groups", 5, keys=4, ids=(I64, I64), group_count=2, k_group=2),
        Sample("npu_moe_gating_top_k", "hash-names-an-expert-twice", repeating, 16, ("x",), None, False),
        sample("one-expert", 3, 1, 1, norm_type=1, eps=1),
        sample("all-experts", 3, 5, 5, bias=True, norm_type=1),
        sample("no-rows", 0, 8, 3, **deepseek, traced=True),
        sample("no-rows-hash", 0, keys=2),
        sample("sliced", layout=sliced, bias=True, norm_type=1, out_flag=True),
        sample("transposed", layout=transposed, norm_type=0, out_flag=True),
        sample("float16", 5, 16, 4, dtype=F16, **deepseek),
        sample("float16-softplus", dtype=F16, bias=True, norm_type=2, out_flag=True),
        sample("bfloat16", 5, 16, 4, dtype=BF16, **deepseek, out_flag=True),
        sample("bfloat16-softmax", dtype=BF16, bias=True, renorm=1),
        sample("float64", 3, 4, dtype=F64, bias=True, norm_type=1, out_flag=True),
    ]


def _backward_samples() -> list[Sample]:
    def inputs(
        num_rows: int = 4,
        experts: int = 8,
        k: int = 3,
        *,
        dtype: torch.dtype = F32,
        layout: Layout = contiguous,
        **options: Any,
    ) -> Inputs:
        values = Values()
        x_norm = values.positive(num_rows, experts) - 0.25
        ids = _orders(num_rows, experts)[:, :k].to(I32)
        return (layout(x_norm), layout(values.normal(num_rows, k, dtype=dtype)), layout(ids)), options

    def sample(id: str, *sizes: int, with_rows: Any = None, traced: bool = False, **options: Any) -> Sample:
        make = lambda: inputs(*sizes, **options)  # noqa: E731
        names = ("x_norm", "grad_y")
        return Sample("npu_moe_gating_top_k_backward", id, make, 16, names, with_rows, traced)

    def repeating() -> Inputs:
        (x_norm, grad_y, ids), options = inputs(norm_type=2)
        ids[0, 1] = ids[0, 0]
        return (x_norm, grad_y, ids), options

    sigmoid: dict[str, Any] = {"norm_type": 1, "routed_scaling_factor": 2.5}
    return [
        sample("softmax"),
        sample("softmax-renorm", renorm=1, routed_scaling_factor=0.5, traced=True),
        sample("sigmoid", 5, 8, 3, **sigmoid, traced=True, with_rows=lambda num_rows: inputs(num_rows, **sigmoid)),
        sample("sigmoid-large-eps", norm_type=1, eps=0.5),
        sample("softplus", norm_type=2, routed_scaling_factor=1.5, traced=True),
        Sample("npu_moe_gating_top_k_backward", "expert-twice", repeating, 16, ("x_norm", "grad_y"), None, False),
        sample("one-expert", 3, 1, 1, norm_type=1, eps=0.5),
        sample("all-experts", 3, 4, 4, norm_type=2),
        sample("no-rows", 0, **sigmoid, traced=True),
        sample("no-expert-chosen", 3, 4, 0, norm_type=1),
        sample("sliced", layout=sliced, **sigmoid),
        sample("transposed", layout=transposed, norm_type=2),
        sample("transposed-softmax", layout=transposed),
        sample("float16", dtype=F16, **sigmoid),
        sample("bfloat16", dtype=BF16, norm_type=0),
        sample("bfloat16-softplus", dtype=BF16, norm_type=2),
        sample("float64-incoming", dtype=F64, **sigmoid),
    ]


def _table(experts: int, columns: int, unused: int = -1) -> Tensor:
    """Every number of replicas, physical ids in no order."""
    values = Values(2)
    table = values.integers(0, 99, experts, columns, dtype=I32)
    for expert in range(experts):
        table[expert, 0] = count = expert % (columns - 1) + 1
        table[expert, count + 1 :] = unused
    return table


def _update_samples() -> list[Sample]:
    def inputs(
        num_tokens: int = 5,
        k: int = 3,
        *,
        experts: int = 7,
        columns: int = 5,
        dtype: torch.dtype = I32,
        scales: torch.dtype | None = None,
        threshold_rows: bool = False,
        active: int | None = None,
        layout: Layout = contiguous,
        unused: int = -1,
        **options: Any,
    ) -> Inputs:
        values = Values()
        ids = values.integers(0, experts - 1, num_tokens, k, dtype=dtype)
        if scales is not None:
            weights = values.integers(0, 8, num_tokens, k).sort(1, descending=True).values
            options["expert_scales"] = layout(weights.to(scales) / 8)
            threshold = torch.arange(k).float() / 8
            options["pruning_threshold"] = threshold.unsqueeze(0) if threshold_rows else threshold
        if active is not None:
            options["active_mask"] = torch.arange(num_tokens) < active
        return (layout(ids), layout(_table(experts, columns, unused))), options

    def sample(id: str, *sizes: int, with_rows: Any = None, traced: bool = False, **options: Any) -> Sample:
        make = lambda: inputs(*sizes, **options)  # noqa: E731
        return Sample("npu_moe_update_expert", id, make, with_rows=with_rows, is_traced=traced)

    rank: dict[str, Any] = {"local_rank_id": 5, "world_size": 8}
    token: dict[str, Any] = {"balance_mode": 1}
    pruned: dict[str, Any] = {**token, "scales": F32, "active": 3}
    return [
        sample("by-rank", **rank, with_rows=lambda num_rows: inputs(num_rows, **rank)),
        sample("by-first-rank", local_rank_id=0, world_size=8),
        sample("by-last-rank", local_rank_id=6, world_size=7, dtype=I64),
        sample("by-only-rank", columns=2, local_rank_id=0, world_size=1),
        sample("by-token", 9, **token, traced=True),
        sample("by-token-int64", 9, **token, dtype=I64, unused=2**31 - 1),
        sample("pruned-by-token", **pruned, traced=True, with_rows=lambda num_rows: inputs(num_rows, **pruned)),
        sample("pruned-by-rank", **rank, scales=F32, dtype=I64),
        sample("threshold-of-two-dimensions", **rank, scales=F32, threshold_rows=True, active=5),
        sample("no-active-token", **rank, scales=F32, active=0),
        sample("float16-scales", **rank, scales=F16, active=4),
        sample("bfloat16-scales", **token, scales=BF16),
        sample("no-tokens", 0, **pruned, traced=True),
        sample("no-choices", 3, 0, **rank, scales=F32),
        sample("sliced", **rank, layout=sliced, scales=F32),
        sample("transposed", **token, layout=transposed, scales=F32),
    ]


def _draw_top_k(draw: st.DrawFn) -> Inputs:
    group_count, group_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    mode = draw(st.integers(0, min(1, group_size - 1)))
    k_group = draw(st.integers(1, group_count))
    k = draw(st.integers(1, group_size * k_group))
    experts, num_rows = group_count * group_size, draw(st.integers(0, 4))
    x = logits(draw, num_rows, experts)
    options: dict[str, Any] = {
        "norm_type": draw(st.integers(0, 2)),
        "renorm": draw(st.integers(0, 1)),
        "out_flag": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5, 0.0))),
        "eps": draw(st.sampled_from((1e-20, 0.5))),
    }
    values = Values(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        options["bias"] = (values.integers(-9, 9, experts).double() / 8).to(x.dtype)
    if draw(st.booleans()):
        options |= {"group_count": group_count, "k_group": k_group, "group_select_mode": mode}
    elif draw(st.booleans()):
        keys = draw(st.integers(1, 3))
        options["input_ids"] = values.integers(0, keys - 1, num_rows, dtype=draw(st.sampled_from((I32, I64))))
        options["tid2eid"] = values.integers(0, experts - 1, keys, k, dtype=draw(st.sampled_from((I32, I64))))
    return (x, k), options


def _draw_backward(draw: st.DrawFn) -> Inputs:
    num_rows, experts = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    values = Values(draw(st.integers(0, 99)))
    x_norm = values.positive(num_rows, experts, dtype=draw(st.sampled_from((F32, F64)))) - 0.25
    grad_y = values.normal(num_rows, k, dtype=draw(st.sampled_from((F16, BF16, F32, F64))))
    ids = _orders(num_rows, experts)[:, :k].to(I32)
    options = {
        "norm_type": draw(st.integers(0, 2)),
        "renorm": draw(st.integers(0, 1)),
        "routed_scaling_factor": draw(st.sampled_from((1.0, 2.5, 0.0))),
        "eps": draw(st.sampled_from((1e-20, 0.5))),
    }
    return (x_norm, grad_y, ids), options


def _draw_update(draw: st.DrawFn) -> Inputs:
    num_tokens, k, experts = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    values = Values(draw(st.integers(0, 99)))
    ids = values.integers(0, experts - 1, num_tokens, k, dtype=draw(st.sampled_from((I32, I64))))
    options: dict[str, Any] = {"balance_mode": draw(st.integers(0, 1))}
    columns = draw(st.integers(2, 5))
    if options["balance_mode"] == 0 or draw(st.booleans()):
        # no more replicas than ranks
        world_size = draw(st.integers(columns - 1, 9))
        options |= {"world_size": world_size, "local_rank_id": draw(st.integers(0, world_size - 1))}
    if draw(st.booleans()):
        weights = values.integers(0, 8, num_tokens, k).sort(1, descending=True).values
        options["expert_scales"] = weights.to(draw(st.sampled_from((F16, BF16, F32)))) / 8
        threshold = values.integers(0, 4, *draw(st.sampled_from(((k,), (1, k))))).float() / 8
        options["pruning_threshold"] = threshold
        if draw(st.booleans()):
            options["active_mask"] = torch.arange(num_tokens) < draw(st.integers(0, num_tokens))
    return (ids, _table(experts, columns)), options


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_moe_gating_top_k": _draw_top_k,
    "npu_moe_gating_top_k_backward": _draw_backward,
    "npu_moe_update_expert": _draw_update,
}

SAMPLES: list[Sample] = _top_k_samples() + _backward_samples() + _update_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k": gating_top_k.moe_gating_top_k,
    "npu_moe_gating_top_k_backward": gating_top_k.moe_gating_top_k_backward,
    "npu_moe_update_expert": gating_top_k.moe_update_expert,
}
