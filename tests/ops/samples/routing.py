"""Samples of counts, re-routing and finalize; those of init_routing have a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import routing
from tests.ops.samples.base import BF16, F16, F32, F64, Inputs, Layout, Sample, Values, contiguous, sliced, transposed

I8, I32, I64 = torch.int8, torch.int32, torch.int64


# --- compute_expert_tokens -------------------------------------------------------------------------------------------


def _count_samples() -> list[Sample]:
    def inputs(ids: Sequence[int], num_expert: int, layout: Layout = contiguous) -> Inputs:
        return (layout(torch.tensor(ids, dtype=I32)), num_expert), {}

    def sample(id: str, *args: Any, with_rows: Any = None, **options: Any) -> Sample:
        return Sample("npu_moe_compute_expert_tokens", id, lambda: inputs(*args, **options), 1, (), with_rows)

    return [
        sample("some", [0, 0, 1, 3, 3, 3], 5, with_rows=lambda num_rows: inputs(sorted([3, 0] * num_rows), 4)),
        sample("first-and-last-empty", [1, 1, 2], 4),
        sample("ids-beyond", [0, 1, 4, 4, 9], 4),
        sample("one-expert", [0, 0, 0], 1),
        sample("all-beyond", [7, 7], 3),
        sample("none", [], 3),
        sample("sliced", [0, 2, 2], 3, layout=sliced),
        sample("many-experts", [5, 2047], 2048),
    ]


def _count_call(draw: st.DrawFn) -> Inputs:
    ids = sorted(draw(st.lists(st.integers(0, 9), max_size=12)))
    return (torch.tensor(ids, dtype=I32), draw(st.integers(1, 12))), {}


# --- re_routing ------------------------------------------------------------------------------------------------------


def _re_routing_samples() -> list[Sample]:
    def inputs(
        counts: Sequence[Sequence[int]],
        *,
        h: Sequence[int] = (3,),
        scales: Sequence[int] | None = None,
        dtype: torch.dtype = BF16,
        count_dtype: torch.dtype = I32,
        layout: Layout = contiguous,
        **options: Any,
    ) -> Inputs:
        values, per_rank = Values(), torch.tensor(counts, dtype=count_dtype)
        total = int(per_rank.sum())
        tokens = (10 * values.normal(total, *h)).to(dtype)
        if scales is not None:
            options["per_token_scales"] = values.positive(total, *scales)
        return (layout(tokens), layout(per_rank)), options

    def sample(id: str, *args: Any, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*args, **options)  # noqa: E731
        has_scales, is_half = options.get("scales") is not None, options.get("dtype", BF16) != I8
        # the scales that are not there are a floating result too
        names = ("tokens",) * (is_half and has_scales) + ("per_token_scales",) * has_scales
        return Sample("npu_moe_re_routing", id, make, 1, names, with_rows, traced)

    def some_rows(num_rows: int) -> Inputs:
        return inputs([[2, 1], [0, num_rows], [1, 1]], scales=())

    return [
        sample("scales", [[2, 1], [0, 3], [1, 2]], scales=(), with_rows=some_rows),
        sample("no-scales", [[2, 1], [0, 3], [1, 2]], dtype=F16, count_dtype=I64),
        sample("scatter", [[2, 1, 1], [0, 3, 1]], scales=(), idx_type=1),
        sample("scatter-no-scales", [[2, 1, 1], [0, 3, 1]], idx_type=1, traced=False),
        sample("int8", [[2, 1], [1, 2]], scales=(), dtype=I8),
        sample("int8-no-scales", [[0, 4], [3, 0]], dtype=I8, traced=False),
        sample("two-dim-scales", [[2, 1], [1, 2]], scales=(2,), dtype=F16),
        sample("three-dim-tokens", [[2, 1], [1, 2]], h=(2, 2), traced=False),
        sample("four-dim-tokens", [[2, 0], [1, 2]], h=(2, 2, 2), traced=False),
        sample("one-rank", [[2, 0, 3]], scales=(), traced=False),
        sample("one-expert", [[2], [0], [3]], scales=(), traced=False),
        sample("no-rows", [[0, 0], [0, 0]], scales=()),
        sample("no-ranks", [[]], traced=False),
        sample("no-columns", [[1, 2]], h=(0,), traced=False),
        sample("sliced", [[2, 1], [0, 3]], layout=sliced, scales=(), traced=False),
        sample("transposed", [[2, 1, 1], [0, 3, 2]], layout=transposed, traced=False),
        sample("own-dtype-number", [[2, 1]], tokens_dtype=15, traced=False),
    ]


def _re_routing_call(draw: st.DrawFn) -> Inputs:
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 3), min_size=ranks * experts, max_size=ranks * experts))
    dtype = draw(st.sampled_from((F16, BF16, I8)))
    tokens = (10 * Values().normal(sum(counts), draw(st.integers(1, 3)))).to(dtype)
    options: dict[str, Any] = {"idx_type": draw(st.integers(0, 1))}
    if draw(st.booleans()):
        options["per_token_scales"] = Values(1).positive(sum(counts))
    per_rank = torch.tensor(counts, dtype=draw(st.sampled_from((I32, I64)))).view(ranks, experts)
    return (tokens, per_rank), options


# --- finalize_routing ------------------------------------------------------------------------------------------------


def _finalize_inputs(
    num_tokens: int,
    top_k: int = 2,
    mode: int = 0,
    *,
    h: int = 3,
    dtype: torch.dtype = F32,
    layout: Layout = contiguous,
    skips: int = 0,
    bias: bool = False,
    scales: bool = True,
    scale_dtype: torch.dtype | None = None,
    dropped: Sequence[int] = (),
    capacity: int = 4,
    experts: int = 3,
    pass_experts: bool = False,
    index: Sequence[int] | None = None,
    **options: Any,
) -> Inputs:
    """Rows that no pair points to are NaN."""
    values = Values()
    pairs = num_tokens * top_k
    num_rows = experts * capacity if mode in (1, 3) else pairs
    chosen = values.normal(num_rows).argsort()[:pairs].to(I32)
    chosen[list(dropped)] = -1
    if index is not None:
        chosen = torch.tensor(index, dtype=I32)
    rows = values.normal(num_rows, h, dtype=dtype)
    unused = torch.ones(num_rows, dtype=torch.bool)
    unused[chosen[chosen >= 0].long()] = False
    rows[unused] = float("nan")
    if mode in (1, 3):
        rows = rows.view(experts, capacity, h)
    residuals = [layout(values.normal(num_tokens, h, dtype=dtype)) for _ in range(skips)]
    per_expert = layout(values.normal(experts, h, dtype=dtype)) if bias else None
    ids = values.integers(0, experts - 1, num_tokens, top_k, dtype=I32) if bias or pass_experts else None
    weights = layout(values.positive(num_tokens, top_k, dtype=scale_dtype or dtype)) if scales else None
    args = (
        layout(rows),
        residuals[0] if skips > 0 else None,
        residuals[1] if skips > 1 else None,
        per_expert,
        weights,
        layout(chosen) if chosen.numel() else chosen,
        ids,
    )
    return args, {"drop_pad_mode": mode, **options}


def _finalize_samples() -> list[Sample]:
    def sample(id: str, *args: Any, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: _finalize_inputs(*args, **options)  # noqa: E731
        given = {
            "expanded_permuted_rows": "nan" not in id,
            "skip1": options.get("skips", 0) > 0,
            "skip2": options.get("skips", 0) > 1,
            "bias": options.get("bias", False),
            "scales": options.get("scales", True),
        }
        names = tuple(name for name, is_given in given.items() if is_given)
        return Sample("npu_moe_finalize_routing", id, make, 4, names, with_rows, traced)

    def all_rows(num_rows: int) -> Inputs:
        return _finalize_inputs(num_rows, 2, 0, skips=2, bias=True)

    def padded_rows(num_rows: int) -> Inputs:
        return _finalize_inputs(num_rows, 2, 3, skips=1, bias=True, dropped=[1, 4], capacity=num_rows)

    everything: dict[str, Any] = {"skips": 2, "bias": True}
    return [
        sample("everything", 4, 2, 0, **everything, with_rows=all_rows),
        sample("row-major", 4, 2, 2, **everything),
        sample("padded", 4, 2, 1, **everything, dropped=[2, 5], traced=False),
        sample("padded-row-major", 4, 2, 3, skips=1, bias=True, dropped=[1, 4], with_rows=padded_rows),
        sample("padded-all-dropped", 2, 2, 3, bias=True, dropped=[0, 1, 2, 3], traced=False),
        sample("dropped-in-dropless", 3, 2, 0, bias=True, dropped=[0, 5], traced=False),
        sample("dropped-in-dropless-row-major", 3, 2, 2, dropped=[1], traced=False),
        sample("weights-only", 5, 3, 0, traced=False),
        sample("experts-unused", 3, 2, 2, pass_experts=True, traced=False),
        sample("no-scales", 6, 1, 0, scales=False),
        sample("no-scales-two", 4, 2, 2, scales=False, k=2),
        sample("no-scales-padded", 4, 2, 1, scales=False, k=2, bias=True, dropped=[3], traced=False),
        sample("k-beside-scales", 3, 2, 0, k=2, traced=False),
        sample("default-numbers", 3, 2, drop_pad_mode=None, k=None, traced=False),
        sample("repeated-rows", 3, 2, 2, index=[0, 0, 3, 0, 1, 3], bias=True, traced=False),
        sample("one-expert", 3, 1, 3, experts=1, bias=True, traced=False),
        sample("no-tokens", 0, 2, 0, **everything),
        sample("no-tokens-no-scales", 0, 2, 2, scales=False, k=2),
        sample("no-tokens-padded", 0, 2, 3, traced=False),
        sample("no-columns", 3, 2, 0, h=0, **everything, traced=False),
        sample("sliced", 3, 2, 2, **everything, layout=sliced, traced=False),
        sample("transposed", 3, 2, 0, **everything, layout=lambda t: transposed(t) if t.dim() > 1 else t, traced=False),
        sample("float16", 6, 3, 0, **everything, dtype=F16),
        sample("bfloat16", 6, 3, 2, **everything, dtype=BF16),
        sample("bfloat16-float32-scales", 4, 2, 3, bias=True, dtype=BF16, scale_dtype=F32, dropped=[0]),
        sample("float64", 2, 2, 0, bias=True, dtype=F64, traced=False),
    ]


def _finalize_call(draw: st.DrawFn) -> Inputs:
    num_tokens, top_k, mode = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    pairs = num_tokens * top_k
    dropped = draw(st.lists(st.integers(0, pairs - 1), max_size=3)) if pairs else []
    dtype, with_scales = draw(st.sampled_from((F16, BF16, F32))), draw(st.booleans())
    return _finalize_inputs(
        num_tokens,
        top_k,
        mode,
        h=draw(st.integers(1, 3)),
        dtype=dtype,
        layout=draw(st.sampled_from((contiguous, sliced))),
        skips=draw(st.integers(0, 2)),
        bias=draw(st.booleans()),
        scales=with_scales,
        scale_dtype=draw(st.sampled_from((dtype, F32))) if dtype == BF16 else None,
        dropped=dropped,
        k=draw(st.sampled_from((1, top_k))) if with_scales else top_k,
    )


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_moe_compute_expert_tokens": _count_call,
    "npu_moe_re_routing": _re_routing_call,
    "npu_moe_finalize_routing": _finalize_call,
}

SAMPLES = _count_samples() + _re_routing_samples() + _finalize_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_moe_compute_expert_tokens": routing.moe_compute_expert_tokens,
    "npu_moe_re_routing": routing.moe_re_routing,
    "npu_moe_finalize_routing": routing.moe_finalize_routing,
}
