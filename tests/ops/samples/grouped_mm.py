"""Samples of grouped mm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import matmul
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
    int64,
    sliced,
    three_experts,
    transposed,
)


def _grouped_mm(
    counts: Sequence[int],
    *,
    rows: int | None = None,
    k: int = 3,
    n: int = 5,
    dtype: torch.dtype = F32,
    bias: torch.dtype | None = None,
    x_layout: Layout = contiguous,
    weight_layout: Layout = contiguous,
    poison: bool = False,
) -> Inputs:
    values, covered = Values(), sum(counts)
    x = values.normal(covered if rows is None else rows, k, dtype=dtype)
    weight = values.normal(len(counts), k, n, dtype=dtype)
    if poison:
        x[covered:] = math.nan
        weight[[index for index, count in enumerate(counts) if count == 0]] = math.nan
    options = {} if bias is None else {"bias": values.normal(len(counts), n, dtype=bias)}
    return (x_layout(x), weight_layout(weight), int64(counts)), options


def _grouped_mm_weight_grad(
    counts: Sequence[int], *, rows: int | None = None, dtype: torch.dtype = F32, layout: Layout = contiguous
) -> Inputs:
    values, covered = Values(), sum(counts)
    x, dy = (values.normal(covered if rows is None else rows, size, dtype=dtype) for size in (3, 5))
    x[covered:] = math.nan
    return (layout(x), layout(dy), int64(counts)), {}


def _grouped_mm_samples() -> list[Sample]:
    wrt = ("x", "weight", "bias")

    def sample(
        id: str, *counts: int, reduction: int = 5, with_rows: Any = None, traced: bool = True, **options: Any
    ) -> Sample:
        return Sample("grouped_mm", id, lambda: _grouped_mm(counts, **options), reduction, wrt, with_rows, traced)

    def with_rows(num_rows: int) -> Inputs:
        return _grouped_mm(three_experts(num_rows), bias=F32)

    def weight_grad(id: str, *counts: int, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: _grouped_mm_weight_grad(counts, **options)  # noqa: E731
        return Sample("grouped_mm_weight_grad", id, make, 8, ("x", "dy"), with_rows, traced)

    return [
        sample("empty-expert-bias", 2, 0, 3, bias=F32, with_rows=with_rows),
        sample("one-expert", 4),
        sample("all-rows-to-one-expert", 0, 4, 0, traced=False),
        sample("no-rows", 0, 0, bias=F32),
        sample("uncovered-rows-and-unused-weight-are-nan", 2, 0, 1, rows=5, poison=True, traced=False),
        sample("nothing-covered", 0, 0, rows=2, traced=False),
        sample("transposed-weight", 1, 3, weight_layout=transposed, bias=F32),
        sample("sliced-x-and-weight", 1, 3, x_layout=sliced, weight_layout=sliced),
        sample("transposed-x", 1, 3, x_layout=transposed, traced=False),
        sample("one-shared-weight", 1, 2, weight_layout=lambda w: w[:1].expand_as(w), traced=False),
        sample("one-row-one-column", 1, k=1, n=1, bias=F32),
        sample("zero-reduction", 2, 1, k=0, bias=F32, traced=False),
        sample("zero-columns", 2, 1, n=0, bias=F32),
        sample("float16", 2, 0, 5, dtype=F16, bias=F16),
        sample("bfloat16", 2, 0, 5, dtype=BF16, bias=BF16),
        sample("bfloat16-transposed-weight", 2, 0, 5, dtype=BF16, bias=F32, weight_layout=transposed),
        sample("float64", 2, 0, 3, dtype=F64, bias=F64),
        sample("float16-long-reduction-few-rows", 1, 2, 3, 4, 70, k=301, dtype=F16, reduction=301),
        sample("bfloat16-long-reduction-few-rows", 1, 2, 3, 4, 70, k=301, dtype=BF16, reduction=301),
        weight_grad("empty-expert", 2, 0, 3, with_rows=lambda n: _grouped_mm_weight_grad(three_experts(n))),
        weight_grad("one-expert", 4, traced=False),
        weight_grad("no-rows", 0, 0),
        weight_grad("uncovered-rows-are-nan", 1, 2, rows=5, traced=False),
        weight_grad("sliced", 1, 2, layout=sliced),
        weight_grad("transposed", 1, 2, layout=transposed),
        weight_grad("float16", 4, 0, 7, dtype=F16),
        weight_grad("bfloat16", 4, 0, 7, dtype=BF16),
    ]


def _draw_grouped_mm(draw: st.DrawFn) -> Inputs:
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dtype = draw(st.sampled_from((F16, BF16, F32)))
    return _grouped_mm(
        counts,
        rows=sum(counts) + draw(st.integers(0, 2)),
        k=draw(st.integers(0, 9)),
        n=draw(st.integers(0, 9)),
        dtype=dtype,
        bias=draw(st.sampled_from((None, dtype))),
        x_layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        weight_layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        poison=draw(st.booleans()),
    )


def _draw_weight_grad(draw: st.DrawFn) -> Inputs:
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dtype = draw(st.sampled_from((F16, BF16, F32)))
    layout = draw(st.sampled_from((contiguous, sliced, transposed)))
    return _grouped_mm_weight_grad(counts, rows=sum(counts) + draw(st.integers(0, 2)), dtype=dtype, layout=layout)


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "grouped_mm": _draw_grouped_mm,
    "grouped_mm_weight_grad": _draw_weight_grad,
}

SAMPLES = _grouped_mm_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "grouped_mm": matmul.grouped_mm,
    "grouped_mm_weight_grad": matmul.grouped_mm_weight_grad,
}
