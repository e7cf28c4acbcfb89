"""Samples of gating."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import gating
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
    transposed,
)


def _gating_samples() -> list[Sample]:
    def inputs(
        *shape: int, k: int = 2, finished: bool = False, dtype: torch.dtype = F32, layout: Layout = contiguous
    ) -> Inputs:
        values = Values()
        # distinct logits that are exact in every dtype: neither the order nor a finite difference depends on rounding
        x = torch.stack([values.normal(shape[-1]).argsort() for _ in range(math.prod(shape[:-1]))] or [int64([])])
        x = (x.to(dtype) / 4).reshape(shape)
        mask = values.integers(0, 1, *shape[:-1], dtype=torch.bool)
        return (layout(x), mask if finished else None, k), {}

    def sample(id: str, *shape: int, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*shape, **options)  # noqa: E731
        return Sample("npu_moe_gating_top_k_softmax", id, make, shape[-1], ("x",), with_rows, traced)

    return [
        sample("two-dims", 5, 7, with_rows=lambda num_rows: inputs(num_rows, 7)),
        sample("finished", 5, 7, k=3, finished=True, with_rows=lambda num_rows: inputs(num_rows, 7, finished=True)),
        sample("three-dims", 2, 3, 5),
        sample("three-dims-finished", 2, 3, 5, finished=True),
        sample("all-experts", 3, 4, k=4, traced=False),
        sample("best-expert", 3, 4, k=1),
        sample("one-expert", 3, 1, k=1, traced=False),
        sample("no-expert-chosen", 3, 4, k=0),
        sample("no-rows", 0, 4),
        sample("sliced", 3, 4, layout=sliced, traced=False),
        sample("transposed", 3, 4, layout=transposed, traced=False),
        sample("float16", 6, 9, dtype=F16),
        sample("bfloat16", 6, 9, dtype=BF16),
        sample("float64", 2, 3, dtype=F64),
    ]


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {}

SAMPLES = _gating_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k_softmax": gating.moe_gating_top_k_softmax,
}
