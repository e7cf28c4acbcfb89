"""Samples of permute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.reference import permute
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


def _ids(num_tokens: int, k: int, experts: int = 4, seed: int = 1) -> Tensor:
    """Distinct experts per token; expert 1 gets no token unless all are chosen."""
    values = Values(seed)
    order = [values.normal(experts).argsort() for _ in range(num_tokens)]
    chosen = [row[row != 1][:k] if k < experts else row for row in order]
    return torch.stack(chosen) if chosen else torch.zeros(0, k, dtype=torch.int64)


def _permute_samples() -> list[Sample]:
    def inputs(
        ids: Tensor, h: int = 3, dtype: torch.dtype = F32, layout: Layout = contiguous, **options: Any
    ) -> Inputs:
        return (layout(Values().normal(ids.size(0), h, dtype=dtype)), ids), options

    def sample(id: str, ids: Tensor, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(ids, **options)  # noqa: E731
        return Sample("npu_moe_token_permute", id, make, 4, ("tokens",), with_rows, traced)

    def unpermute_inputs(
        num_tokens: int,
        k: int | None = 2,
        *,
        rows: int | None = None,
        dtype: torch.dtype = F32,
        probs_dtype: torch.dtype | None = None,
        layout: Layout = contiguous,
        zero_weights_of_nan: bool = False,
        **options: Any,
    ) -> Inputs:
        values, pairs = Values(), num_tokens * (k or 1)
        order = values.normal(pairs).argsort().to(torch.int32)
        permuted = values.normal(pairs if rows is None else rows, 3, dtype=dtype)
        probs = None if k is None else layout(values.positive(num_tokens, k, dtype=probs_dtype or dtype))
        if zero_weights_of_nan:
            assert probs is not None
            probs[0, 0] = probs[1, 1] = 0
            permuted[order[0]] = permuted[order[3]] = math.nan
        return (layout(permuted), order, probs), options

    def unpermute(
        id: str, *args: Any, with_rows: Any = None, wrt: bool = True, traced: bool = True, **options: Any
    ) -> Sample:
        make = lambda: unpermute_inputs(*args, **options)  # noqa: E731
        names = ("permuted_tokens", "probs") if wrt else ()
        return Sample("npu_moe_token_unpermute", id, make, 4, names, with_rows, traced)

    return [
        sample("top-two", _ids(5, 2), with_rows=lambda num_rows: inputs(_ids(num_rows, 2))),
        sample("int32-ids", _ids(5, 2).int(), traced=False),
        sample("one-dim-ids", _ids(5, 1).flatten()),
        sample("one-column-of-ids", _ids(5, 1), traced=False),
        sample("all-experts", _ids(3, 4), traced=False),
        sample("one-expert", int64([[0], [0], [0]]), traced=False),
        sample("one-expert-takes-all", int64([[3, 3], [3, 3]]), traced=False),
        sample("no-rows", _ids(0, 2)),
        sample("no-columns", _ids(3, 2), h=0),
        sample("strided-ids-and-tokens", sliced(_ids(4, 2)), layout=sliced),
        sample("transposed-tokens", _ids(4, 2), layout=transposed, traced=False),
        sample("keep-three", _ids(4, 2), num_out_tokens=3, traced=False),
        sample("keep-all-but-three", _ids(4, 2), num_out_tokens=-3),
        sample("keep-zero-is-all", _ids(4, 2), num_out_tokens=0, traced=False),
        sample("keep-more-than-there-are", _ids(4, 2), num_out_tokens=100, traced=False),
        sample("keep-none", _ids(2, 2), num_out_tokens=-4),
        sample("float16", _ids(6, 3), dtype=F16),
        sample("bfloat16", _ids(6, 3), dtype=BF16),
        sample("float64", _ids(2, 2), dtype=F64),
        unpermute("top-two", 4, with_rows=unpermute_inputs),
        unpermute("without-probs", 5, None, with_rows=lambda num_rows: unpermute_inputs(num_rows, None)),
        unpermute("one-prob", 5, 1, traced=False),
        unpermute("missing-rows", 4, rows=5),
        unpermute("missing-rows-without-probs", 5, None, rows=3, traced=False),
        unpermute("all-rows-missing", 2, rows=0),
        unpermute("no-rows", 0),
        unpermute("no-rows-without-probs", 0, None),
        unpermute("sliced", 3, layout=sliced, traced=False),
        unpermute("transposed", 3, layout=transposed, traced=False),
        unpermute("weight-zero-hides-nan", 3, zero_weights_of_nan=True, wrt=False, traced=False),
        unpermute("float16", 6, 3, dtype=F16),
        unpermute("bfloat16", 6, 3, dtype=BF16),
        unpermute("bfloat16-float32-probs", 6, 3, dtype=BF16, probs_dtype=F32),
        unpermute("float32-float16-probs", 6, 3, dtype=F32, probs_dtype=F16, traced=False),
        unpermute("float64", 2, 2, dtype=F64),
    ]


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {}

SAMPLES = _permute_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_moe_token_permute": permute.moe_token_permute,
    "npu_moe_token_unpermute": permute.moe_token_unpermute,
}
