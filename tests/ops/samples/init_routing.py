"""Samples of the three generations of init_routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.reference import routing
from tests.ops.samples.base import BF16, F16, F32, F64, Inputs, Layout, Sample, Values, contiguous, sliced, transposed

I8, I32 = torch.int8, torch.int32


def ids(num_tokens: int, k: int = 2, experts: int = 4, seed: int = 1) -> Tensor:
    """Experts of each token, which may repeat; expert 2 gets none."""
    chosen = Values(seed).integers(0, experts - 1, num_tokens, k, dtype=I32)
    return torch.where(chosen == 2, 0, chosen).to(I32)


def row_idx(expert_idx: Tensor) -> Tensor:
    num_tokens, k = expert_idx.shape
    return torch.arange(num_tokens * k, dtype=I32).view(k, num_tokens).t().contiguous()


def rows(num_tokens: int, h: int = 3, dtype: torch.dtype = F32) -> Tensor:
    """Values that no quantization rounds from a tie; the second row is zero."""
    values = Values().normal(num_tokens, h)
    values[1:2] = 0
    return (10 * values).to(dtype)


# --- first generation ------------------------------------------------------------------------------------------------


def _first_samples() -> list[Sample]:
    def inputs(
        expert_idx: Tensor,
        active_num: int = 100,
        *,
        h: int = 3,
        dtype: torch.dtype = F32,
        layout: Layout = contiguous,
        sources: Tensor | None = None,
    ) -> Inputs:
        x = Values().normal(expert_idx.size(0), h, dtype=dtype)
        index = row_idx(expert_idx) if sources is None else sources
        return (layout(x), layout(index), layout(expert_idx), active_num), {}

    def sample(id: str, *args: Any, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*args, **options)  # noqa: E731
        return Sample("npu_moe_init_routing", id, make, 4, ("x",), with_rows, traced)

    return [
        sample("top-two", ids(5), with_rows=lambda num_rows: inputs(ids(num_rows))),
        sample("three-tokens-of-five", ids(5, 3), 3, with_rows=lambda num_rows: inputs(ids(num_rows, 3), 3)),
        sample("no-token-kept", ids(3), 0),
        sample("top-one", ids(4, 1), traced=False),
        sample("one-expert", ids(4, 3, 1), traced=False),
        sample("finished-tokens", torch.tensor([[9, 9], [0, 3], [9, 9]], dtype=I32), traced=False),
        sample("no-tokens", ids(0)),
        sample("no-experts", ids(3, 0)),
        sample("no-columns", ids(3), h=0),
        sample("sliced", ids(4), layout=sliced, traced=False),
        sample("transposed", ids(4, 3), layout=transposed, traced=False),
        sample("other-sources", ids(3), 2, sources=torch.tensor([[5, 1], [1, 3], [0, 0]], dtype=I32)),
        sample("float16", ids(6, 3), dtype=F16),
        sample("bfloat16", ids(6, 3), 4, dtype=BF16),
        sample("float64", ids(2), dtype=F64, traced=False),
    ]


# --- second generation -----------------------------------------------------------------------------------------------


def _second_samples() -> list[Sample]:
    def inputs(
        num_tokens: int,
        k: int = 2,
        *,
        h: int = 3,
        dtype: torch.dtype = F32,
        layout: Layout = contiguous,
        scale: tuple[int, ...] | None = None,
        offset: float | None = None,
        nan_outside: bool = False,
        experts: int = 4,
        **options: Any,
    ) -> Inputs:
        x, expert_idx = rows(num_tokens, h, dtype), ids(num_tokens, k, experts)
        if nan_outside:  # tokens without an active pair are not read
            start, end = options["active_expert_range"]
            x[~((expert_idx >= start) & (expert_idx < end)).any(1)] = math.nan
        if scale is not None:
            options["scale"] = Values(2).positive(*scale)
        if offset is not None:
            options["offset"] = torch.tensor([offset])
        return (layout(x), layout(expert_idx)), {"expert_num": experts, **options}

    def sample(id: str, *args: Any, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*args, **options)  # noqa: E731
        is_float = options.get("dtype", F32) != I8 and not {"nan_outside", "x_dtype"} & options.keys()
        names: tuple[str, ...] = ()
        if options.get("quant_mode", -1) == -1:
            has_scale = options.get("scale") is not None
            names = ("x",) * is_float + ("scale",) * has_scale
        if options.get("dtype") in (F16, BF16) and "scale" not in names:
            names = ()  # the scale that is not there is a floating result too
        return Sample("npu_moe_init_routing_v2", id, make, 4, names, with_rows, traced)

    def some_rows(num_rows: int) -> Inputs:
        return inputs(num_rows, scale=(num_rows,), **some, **counted(1))

    def quantized_rows(num_rows: int) -> Inputs:
        return inputs(num_rows, quant_mode=1, experts=6, scale=(6, 3), **counted(0), row_idx_type=1)

    def padded_rows(num_rows: int) -> Inputs:
        return inputs(num_rows, scale=(num_rows,), expert_capacity=2, drop_pad_mode=1, **counted(1))

    def counted(type: int) -> dict[str, Any]:
        return {"expert_tokens_num_flag": True, "expert_tokens_num_type": type}

    some = {"active_expert_range": [1, 3]}
    nobody = {"active_expert_range": [2, 3]}
    padded = {"drop_pad_mode": 1}
    return [
        sample("all", 5),
        sample("all-scale", 5, scale=(5,), **counted(0)),
        sample("range-scale", 5, scale=(5,), **some, **counted(1), with_rows=some_rows),
        sample("range-pairs", 5, **some, **counted(2), traced=False),
        sample("range-sums", 5, 3, active_expert_range=(0, 3), **counted(0), traced=False),
        sample("range-scatter", 6, 3, scale=(6,), **some, row_idx_type=1),
        sample("range-nan-elsewhere", 7, **some, nan_outside=True, traced=False),
        sample("range-of-nobody", 5, scale=(5,), **nobody, **counted(2), traced=False),
        sample("range-of-nobody-scatter", 5, **nobody, row_idx_type=1, traced=False),
        sample("range-without-number", 5, **{**some, "expert_num": -1}, **counted(2), traced=False),
        sample("range-active", 5, 3, scale=(5,), active_expert_range=[0, 2], active_num=4, **counted(1)),
        sample("scatter-active", 5, 3, active_num=4, row_idx_type=1),
        sample("active-zero-is-all", 3, active_num=0, traced=False),
        sample("active-more-than-all", 3, active_num=100, traced=False),
        sample("ids-beyond", 5, experts=6, expert_num=3, **counted(1), traced=False),
        sample("one-expert", 3, 4, experts=1, **counted(2), traced=False),
        sample("own-dtype-number", 3, x_dtype=6, traced=False),
        sample("padded", 5, scale=(5,), expert_capacity=2, **padded, **counted(1), with_rows=padded_rows),
        sample("padded-one", 5, 3, expert_capacity=1, **padded, traced=False),
        sample("padded-wide", 3, expert_capacity=3, active_num=1, **padded, traced=False),
        sample("padded-no-tokens", 0, expert_capacity=2, **padded, **counted(1)),
        sample("no-tokens", 0, **counted(2)),
        sample("no-tokens-scale", 0, quant_mode=1, scale=(0,), **counted(1)),
        sample("no-tokens-static", 0, quant_mode=0, traced=False),
        sample("no-experts", 3, 0, **counted(0)),
        sample("no-columns", 3, h=0, traced=False),
        sample("no-columns-dynamic", 3, h=0, quant_mode=1, traced=False),
        sample("sliced", 4, layout=sliced, scale=(4,), traced=False),
        sample("transposed", 4, 3, layout=transposed, **some, traced=False),
        sample("float16", 6, 3, dtype=F16, scale=(6,), **some),
        sample("bfloat16-padded", 6, 3, dtype=BF16, scale=(6,), expert_capacity=3, **padded),
        sample("bfloat16-scatter", 6, 3, dtype=BF16, scale=(6,), row_idx_type=1, active_num=10, traced=False),
        sample("float64", 2, dtype=F64, traced=False),
        sample("int8", 5, dtype=I8, scale=(5,), **some),
        sample("int8-alone", 5, dtype=I8, traced=False),
        sample("static", 5, quant_mode=0, scale=(1,), offset=-3.25, **some, **counted(1)),
        sample("static-float16", 5, 3, dtype=F16, quant_mode=0, scale=(1,), offset=100.0, traced=False),
        sample("static-bfloat16", 5, dtype=BF16, quant_mode=0, scale=(1,), offset=0.0, h=9, traced=False),
        sample("static-padded", 5, quant_mode=0, scale=(1,), offset=20.0, expert_capacity=2, **padded),
        sample("dynamic", 5, quant_mode=1, **counted(1)),
        sample("dynamic-scale", 5, quant_mode=1, scale=(4, 3), row_idx_type=1, with_rows=quantized_rows),
        sample("dynamic-one-scale", 5, quant_mode=1, scale=(1, 3), **some, active_num=2, traced=False),
        sample("dynamic-range-scale", 6, 3, dtype=F16, quant_mode=1, scale=(2, 3), **some, **counted(2)),
        sample("dynamic-padded", 6, 3, dtype=BF16, quant_mode=1, scale=(4, 3), expert_capacity=2, **padded),
        sample("dynamic-nan-elsewhere", 7, quant_mode=1, **some, nan_outside=True, traced=False),
    ]


# --- quantized -------------------------------------------------------------------------------------------------------


def _quant_samples() -> list[Sample]:
    def inputs(
        num_tokens: int,
        k: int = 2,
        *,
        h: int = 3,
        dtype: torch.dtype = F32,
        layout: Layout = contiguous,
        scale: tuple[int, ...] | None = None,
        offset: float | None = None,
        **options: Any,
    ) -> Inputs:
        if scale is not None:
            options["scale"] = Values(2).positive(*scale)
        if offset is not None:
            options["offset"] = torch.tensor([offset])
        return (layout(rows(num_tokens, h, dtype)), layout(ids(num_tokens, k))), {"expert_num": 4, **options}

    def sample(id: str, *args: Any, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*args, **options)  # noqa: E731
        return Sample("npu_moe_init_routing_quant", id, make, 1, (), with_rows, traced)

    def some_rows(num_rows: int) -> Inputs:
        return inputs(num_rows, scale=(6, 3), expert_num=6, expert_tokens_num_mode=1)

    def static_rows(num_rows: int) -> Inputs:
        return inputs(num_rows, scale=(1,), offset=2.0, quant_mode=0, active_num=6, expert_tokens_num_mode=2)

    flag = {"expert_tokens_before_capacity_flag": True}
    padded = {"drop_pad_mode": 1}
    return [
        sample("dynamic", 5, scale=(4, 3), expert_tokens_num_mode=1, with_rows=some_rows),
        sample("dynamic-counts", 5, 3, active_num=0, expert_tokens_num_mode=2, **flag),
        sample("dynamic-one-scale", 5, scale=(1, 3), active_num=4, expert_tokens_num_mode=1, traced=False),
        sample("dynamic-padded", 5, scale=(4, 3), expert_capacity=2, expert_tokens_num_mode=1, **padded),
        sample("dynamic-padded-counts", 5, 3, expert_capacity=5, active_num=1, **padded, **flag),
        sample("static", 5, scale=(1,), offset=2.0, quant_mode=0, active_num=6, with_rows=static_rows),
        sample("static-padded", 5, scale=(1,), offset=-7.0, quant_mode=0, expert_capacity=1, **padded, **flag),
        sample("no-tokens", 0, expert_tokens_num_mode=2),
        sample("no-tokens-static", 0, quant_mode=0, traced=False),
        sample("no-tokens-padded", 0, expert_capacity=2, **padded, **flag),
        sample("no-experts", 3, 0, expert_tokens_num_mode=1),
        sample("sliced", 4, layout=sliced, traced=False),
        sample("transposed", 4, 3, layout=transposed, traced=False),
        sample("cut-by-default", 400, 3, h=2, traced=False),
        sample("fewer-experts", 5, expert_num=2, expert_tokens_num_mode=2, traced=False),
        sample("float16", 6, 3, dtype=F16, scale=(4, 3), active_num=-1, traced=False),
        sample("bfloat16", 6, 3, dtype=BF16, expert_tokens_num_mode=2, traced=False),
    ]


# --- random legal calls ----------------------------------------------------------------------------------------------


def _drawn_ids(draw: st.DrawFn, experts: int) -> Tensor:
    num_tokens, k = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    count = num_tokens * k
    chosen = draw(st.lists(st.integers(0, experts - 1), min_size=count, max_size=count))
    return torch.tensor(chosen, dtype=I32).view(num_tokens, k)


def _drawn_rows(draw: st.DrawFn, num_tokens: int) -> Tensor:
    dtype, layout = draw(st.sampled_from((F16, BF16, F32))), draw(st.sampled_from((contiguous, sliced, transposed)))
    return layout(rows(num_tokens, draw(st.integers(1, 5)), dtype))


def _first_call(draw: st.DrawFn) -> Inputs:
    expert_idx = _drawn_ids(draw, 5)
    x = _drawn_rows(draw, expert_idx.size(0))
    return (x, row_idx(expert_idx), expert_idx, draw(st.integers(0, 8))), {}


def _quantization(draw: st.DrawFn, mode: int, x: Tensor, experts: int) -> dict[str, Any]:
    values = Values(draw(st.integers(0, 9)))
    if mode == 0:
        return {"scale": values.positive(1), "offset": values.normal(1) * 20}
    shapes = {-1: [(x.size(0),)], 1: [(1, x.size(1)), (experts, x.size(1))]}[mode]
    shape = draw(st.sampled_from([None, *shapes]))
    return {} if shape is None else {"scale": values.positive(*shape)}


def _second_call(draw: st.DrawFn) -> Inputs:
    experts = draw(st.integers(1, 5))
    expert_idx = _drawn_ids(draw, experts)
    x = _drawn_rows(draw, expert_idx.size(0))
    mode, is_padded = draw(st.integers(-1, 1)), draw(st.booleans())
    options: dict[str, Any] = {
        "expert_num": experts,
        "quant_mode": mode,
        "active_num": draw(st.integers(-1, 20)),
        "expert_tokens_num_flag": draw(st.booleans()),
    }
    start, end = 0, experts
    if is_padded:
        capacity = draw(st.integers(1, max(x.size(0), 1)))
        options |= {"drop_pad_mode": 1, "expert_capacity": capacity, "expert_tokens_num_type": 1}
    else:
        start = draw(st.integers(0, experts - 1))
        end = draw(st.integers(start + 1, experts))
        options |= {"row_idx_type": draw(st.integers(0, 1)), "expert_tokens_num_type": draw(st.integers(0, 2))}
    if (start, end) != (0, experts) or draw(st.booleans()):
        options["active_expert_range"] = [start, end]
    return (x, expert_idx), {**options, **_quantization(draw, mode, x, end - start)}


def _quant_call(draw: st.DrawFn) -> Inputs:
    experts = draw(st.integers(1, 5))
    expert_idx = _drawn_ids(draw, experts)
    x = _drawn_rows(draw, expert_idx.size(0))
    mode = draw(st.integers(0, 1))
    options = {
        "expert_num": experts,
        "quant_mode": mode,
        "active_num": draw(st.integers(-1, 20)),
        "expert_capacity": draw(st.integers(1, max(x.size(0), 1))),
        "drop_pad_mode": draw(st.integers(0, 1)),
        "expert_tokens_num_mode": draw(st.integers(0, 2)),
        "expert_tokens_before_capacity_flag": draw(st.booleans()),
    }
    return (x, expert_idx), {**options, **_quantization(draw, mode, x, experts)}


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_moe_init_routing": _first_call,
    "npu_moe_init_routing_v2": _second_call,
    "npu_moe_init_routing_quant": _quant_call,
}

SAMPLES = _first_samples() + _second_samples() + _quant_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_moe_init_routing": routing.moe_init_routing,
    "npu_moe_init_routing_v2": routing.moe_init_routing_v2,
    "npu_moe_init_routing_quant": routing.moe_init_routing_quant,
}
