"""Samples of gating."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

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
        sample("no-experts", 3, 0, k=0, traced=False),
        sample("float64", 2, 3, dtype=F64),
    ]


def _v2_samples() -> list[Sample]:
    def inputs(
        *shape: int, finished: bool = False, dtype: torch.dtype = F32, layout: Layout = contiguous, **options: Any
    ) -> Inputs:
        values = Values()
        x = torch.stack([values.normal(shape[-1]).argsort() for _ in range(math.prod(shape[:-1]))] or [int64([])])
        x = (x.to(dtype) / 4).reshape(shape)
        if finished:
            options["finished"] = values.integers(0, 1, *shape[:-1], dtype=torch.bool)
        return (layout(x),), {"k": 2, **options}

    def sample(id: str, *shape: int, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*shape, **options)  # noqa: E731
        return Sample("npu_moe_gating_top_k_softmax_v2", id, make, shape[-1], ("x",), with_rows, traced)

    whole, chosen = {"output_softmax": True}, {"renorm": 1}
    return [
        sample("two-dims", 5, 7),
        sample("softmax", 5, 7, **whole, with_rows=lambda num_rows: inputs(num_rows, 7, finished=True, **whole)),
        sample("renorm", 5, 7, **chosen, with_rows=lambda num_rows: inputs(num_rows, 7, **chosen)),
        sample("renorm-without-softmax", 3, 4, renorm=1, output_softmax=True, traced=False),
        sample("defaults-by-none", 3, 4, renorm=None, output_softmax=None, traced=False),
        sample("finished", 5, 7, k=3, finished=True),
        sample("finished-renorm", 5, 7, k=3, finished=True, **chosen, traced=False),
        sample("three-dims", 2, 3, 5, **whole),
        sample("three-dims-finished", 2, 3, 5, finished=True, **whole),
        sample("three-dims-renorm", 2, 3, 5, finished=True, **chosen),
        sample("all-experts", 3, 4, k=4, **whole, traced=False),
        sample("all-experts-renorm", 3, 4, k=4, **chosen, traced=False),
        sample("one-expert", 3, 1, k=1, traced=False),
        sample("no-expert-chosen", 3, 4, k=0, **whole),
        sample("no-expert-chosen-renorm", 3, 4, k=0, **chosen),
        sample("no-rows", 0, 4, **whole),
        sample("no-rows-renorm", 0, 4, **chosen, traced=False),
        sample("no-experts", 3, 0, k=0, traced=False),
        sample("sliced", 3, 4, layout=sliced, **whole, traced=False),
        sample("transposed", 3, 4, layout=transposed, **whole, traced=False),
        sample("transposed-renorm", 3, 4, layout=transposed, **chosen, traced=False),
        sample("float16", 6, 9, dtype=F16, **whole),
        sample("bfloat16", 6, 9, dtype=BF16),
        sample("bfloat16-softmax", 6, 9, dtype=BF16, **whole),
        sample("bfloat16-renorm", 6, 9, k=4, dtype=BF16, **chosen),
        sample("float64", 2, 3, dtype=F64, **whole),
    ]


def logits(draw: st.DrawFn, *shape: int) -> Tensor:
    """With ties, and exact in every dtype; none is another's negative, so that sums of scores tie exactly or not."""
    dtype = draw(st.sampled_from((F16, BF16, F32, F64)))
    return (Values(draw(st.integers(0, 99))).integers(0, 12, *shape).double() / 4 - 1.0625).to(dtype)


def _draw(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    shape = (*draw(st.lists(st.integers(0, 4), min_size=1, max_size=2)), draw(st.integers(1, 9)))
    x = logits(draw, *shape)
    finished = Values().integers(0, 1, *shape[:-1], dtype=torch.bool) if draw(st.booleans()) else None
    return x, finished, draw(st.integers(0, shape[-1]))


def _draw_v1(draw: st.DrawFn) -> Inputs:
    x, finished, k = _draw(draw)
    return (x, finished, k), {}


def _draw_v2(draw: st.DrawFn) -> Inputs:
    x, finished, k = _draw(draw)
    renorm, output_softmax = draw(st.sampled_from((None, 0, 1))), draw(st.sampled_from((None, False, True)))
    return (x,), {"k": k, "finished": finished, "renorm": renorm, "output_softmax": output_softmax}


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_moe_gating_top_k_softmax": _draw_v1,
    "npu_moe_gating_top_k_softmax_v2": _draw_v2,
}

SAMPLES = _gating_samples() + _v2_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_moe_gating_top_k_softmax": gating.moe_gating_top_k_softmax,
    "npu_moe_gating_top_k_softmax_v2": gating.moe_gating_top_k_softmax_v2,
}
