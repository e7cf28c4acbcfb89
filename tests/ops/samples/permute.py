"""Samples of permute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
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


def _pairs(num_tokens: int, k: int, seed: int = 3) -> Tensor:
    """A permutation of the pairs."""
    return Values(seed).normal(num_tokens * k).argsort().to(torch.int32)


def _permute_grad_samples() -> list[Sample]:
    def parts(num_tokens: int, k: int, rows: int | None, h: int, dtype: torch.dtype, layout: Layout) -> list[Tensor]:
        grad = Values(1).normal(num_tokens * k if rows is None else rows, h, dtype=dtype)
        return [layout(grad), _pairs(num_tokens, k)]

    def inputs(
        num_tokens: int,
        k: int = 2,
        *,
        rows: int | None = None,
        h: int = 3,
        dtype: torch.dtype = F32,
        tokens_dtype: torch.dtype | None = None,
        layout: Layout = contiguous,
        flat: bool = False,
    ) -> Inputs:
        grad, order = parts(num_tokens, k, rows, h, dtype, layout)
        indices = torch.zeros((num_tokens,) if flat else (num_tokens, k), dtype=torch.int64)
        tokens = torch.full((num_tokens, h), math.nan, dtype=tokens_dtype or dtype)
        return (tokens, grad, indices, order), {}

    def inputs_v2(
        num_tokens: int,
        k: int = 2,
        *,
        rows: int | None = None,
        h: int = 3,
        dtype: torch.dtype = F32,
        tokens_dtype: torch.dtype | None = None,
        layout: Layout = contiguous,
        flat: bool = False,
    ) -> Inputs:
        grad, order = parts(num_tokens, k, rows, h, dtype, layout)
        return (grad, order, num_tokens, tokens_dtype or dtype, k), {}

    cases: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "top-two": ((4,), {}),
        "one-expert": ((4, 1), {"flat": True}),
        "missing-rows": ((4,), {"rows": 5}),
        "more-rows-than-pairs": ((2,), {"rows": 6}),
        "all-rows-missing": ((3,), {"rows": 0}),
        "no-tokens": ((0,), {}),
        "no-columns": ((3,), {"h": 0}),
        "sliced": ((3,), {"layout": sliced}),
        "transposed": ((3,), {"layout": transposed}),
        "float16": ((6, 3), {"dtype": F16}),
        "bfloat16": ((6, 3), {"dtype": BF16}),
        "float32-of-bfloat16-tokens": ((6, 3), {"tokens_dtype": BF16}),
        "float64": ((2,), {"dtype": F64}),
        "float64-tokens": ((3,), {"tokens_dtype": F64}),
        "float64-tokens-missing-rows": ((3,), {"tokens_dtype": F64, "rows": 4}),
    }
    samples = []
    for id, (args, options) in cases.items():
        is_first, is_traced = id == "top-two", id in ("top-two", "all-rows-missing")
        make = lambda args=args, options=options: inputs(*args, **options)  # noqa: E731
        make_v2 = lambda args=args, options=options: inputs_v2(*args, **options)  # noqa: E731
        # the number of tokens is an int of the second form, so that of the rows changes
        rows_v2 = (lambda num_rows: inputs_v2(4, rows=num_rows)) if is_first else None
        # finite differences need a result in float64, and its dtype is an argument or that of one
        wrt = ("grad_permuted_tokens",) if options.get("dtype") in (F16, BF16) or "float64" in id else ()
        rows = inputs if is_first else None
        samples += [
            Sample("npu_moe_token_permute_grad", id, make, 4, wrt, rows, is_traced),
            Sample("npu_moe_token_permute_grad_v2", id, make_v2, 4, wrt, rows_v2, is_traced),
        ]
    return samples


def _unpermute_grad_samples() -> list[Sample]:
    def parts(
        num_tokens: int,
        k: int | None = 2,
        *,
        rows: int | None = None,
        h: int = 3,
        dtype: torch.dtype = F32,
        probs_dtype: torch.dtype | None = None,
        rows_dtype: torch.dtype | None = None,
        layout: Layout = contiguous,
        zeros: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        values, num_rows = Values(2), num_tokens * (k or 1) if rows is None else rows
        permuted = values.normal(num_rows, h, dtype=rows_dtype or dtype)
        grad = values.normal(num_tokens, h, dtype=dtype)
        probs = None if k is None else values.normal(num_tokens, k, dtype=probs_dtype or dtype)
        order = _pairs(num_tokens, k or 1)
        if zeros:
            # pairs of weight zero: one with its row, one without, one with the row of another
            assert probs is not None
            probs[0, 0] = probs[1, 1] = probs[2, 0] = 0
            order[3], order[4] = -1, order[5]
        return layout(permuted), layout(grad), order, None if probs is None else layout(probs)

    def inputs(*args: Any, **options: Any) -> Inputs:
        return parts(*args, **options), {}

    def inputs_v2(*args: Any, **options: Any) -> Inputs:
        permuted, grad, order, probs = parts(*args, **options)
        rows = None if probs is None else permuted
        return (grad, order, permuted.size(0), permuted.dtype, probs), {"permuted_tokens": rows}

    cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "top-two": ((4,), {}),
        "without-probs": ((4, None), {}),
        "one-prob": ((4, 1), {}),
        "missing-rows": ((4,), {"rows": 5}),
        "missing-rows-without-probs": ((4, None), {"rows": 3}),
        "more-rows-than-pairs": ((2,), {"rows": 6}),
        "all-rows-missing": ((3,), {"rows": 0}),
        "no-tokens": ((0,), {}),
        "no-columns": ((3,), {"h": 0}),
        "weights-of-zero": ((3,), {"zeros": True}),
        "sliced": ((3,), {"layout": sliced}),
        "transposed": ((3,), {"layout": transposed}),
        "float16": ((6, 3), {"dtype": F16}),
        "bfloat16-without-probs": ((6, None), {"dtype": BF16}),
        "bfloat16-float32-probs": ((6, 3), {"dtype": BF16, "probs_dtype": F32}),
        "float64": ((2,), {"dtype": F64}),
        "float64-rows": ((3,), {"rows_dtype": F64, "rows": 5}),
        "float64-rows-without-probs": ((3, None), {"rows_dtype": F64}),
    }
    samples = []
    for id, (args, options) in cases.items():
        is_first, is_traced = id == "top-two", id in ("top-two", "without-probs", "all-rows-missing")
        make = lambda args=args, options=options: inputs(*args, **options)  # noqa: E731
        make_v2 = lambda args=args, options=options: inputs_v2(*args, **options)  # noqa: E731
        # the number of rows is an int of the second form, so that of the tokens changes
        rows_v2 = (lambda num_rows: inputs_v2(num_rows, rows=6)) if is_first else None
        wrt: tuple[str, ...] = ("permuted_tokens", "grad_unpermuted_tokens", "probs")
        if "zero" in id:  # a difference in a weight of zero changes what is skipped
            wrt = ()
        elif args[-1] is None:
            wrt = ("grad_unpermuted_tokens",) if "float" in id else ()
        # finite differences need a result in float64, and its dtype is an argument of the second form
        wrt_v2 = wrt if options.get("dtype") in (F16, BF16) or "float64" in id else ()
        rows = inputs if is_first else None
        samples += [
            Sample("npu_moe_token_unpermute_grad", id, make, 4, wrt, rows, is_traced),
            Sample("npu_moe_token_unpermute_grad_v2", id, make_v2, 4, wrt_v2, rows_v2, is_traced),
        ]
    return samples


def _internal_unpermute_samples(unpermute: list[Sample]) -> list[Sample]:
    """A few of those of `npu_moe_token_unpermute`."""
    chosen = {"top-two", "without-probs", "missing-rows", "no-rows", "weight-zero-hides-nan", "bfloat16-float32-probs"}
    return [
        # of the second result in half precision there is no gradient to compare
        replace(
            sample,
            op_name="_npu_moe_token_unpermute",
            differentiable=() if sample.id.startswith("bfloat16") else sample.differentiable,
        )
        for sample in unpermute
        if sample.op_name == "npu_moe_token_unpermute" and sample.id in chosen
    ]


def draw_permute(draw: st.DrawFn) -> Inputs:
    num_tokens, k, h = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    experts, values = draw(st.integers(1, 5)), Values(draw(st.integers(0, 99)))
    ids = values.integers(0, experts - 1, num_tokens, k, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    if k == 1 and draw(st.booleans()):
        ids = ids.flatten()
    tokens = values.normal(num_tokens, h, dtype=draw(st.sampled_from((F16, BF16, F32))))
    return (tokens, ids), {"num_out_tokens": draw(st.one_of(st.none(), st.integers(-30, 30)))}


def _draw_order(draw: st.DrawFn, num_pairs: int) -> Tensor:
    return torch.tensor(draw(st.permutations(range(num_pairs))), dtype=torch.int32)


def draw_unpermute(draw: st.DrawFn) -> Inputs:
    num_tokens, k, h = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    values, dtypes = Values(draw(st.integers(0, 99))), st.sampled_from((F16, BF16, F32))
    rows = draw(st.integers(0, num_tokens * k + 2))
    permuted, order = values.normal(rows, h, dtype=draw(dtypes)), _draw_order(draw, num_tokens * k)
    if draw(st.booleans()):
        return (permuted, order), {}
    probs = values.normal(num_tokens, k, dtype=draw(dtypes))
    is_zero = values.normal(num_tokens, k) > 1
    probs[is_zero] = 0
    order[is_zero.flatten()] = draw(st.sampled_from((-1, 0, 1000)))
    return (permuted, order, probs), {}


def draw_permute_grad(draw: st.DrawFn) -> Inputs:
    num_tokens, k, h = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    values, dtypes = Values(draw(st.integers(0, 99))), st.sampled_from((F16, BF16, F32))
    grad = values.normal(draw(st.integers(0, num_tokens * k + 2)), h, dtype=draw(dtypes))
    indices, tokens = values.integers(0, 4, num_tokens, k, dtype=torch.int64), values.normal(num_tokens, h)
    return (tokens.to(draw(dtypes)), grad, indices, _draw_order(draw, num_tokens * k)), {}


def draw_permute_grad_v2(draw: st.DrawFn) -> Inputs:
    (tokens, grad, indices, order), _ = draw_permute_grad(draw)
    return (grad, order, tokens.size(0), tokens.dtype, indices.size(1)), {}


def draw_unpermute_grad(draw: st.DrawFn) -> Inputs:
    (permuted, order, *probs), _ = draw_unpermute(draw)
    num_tokens = probs[0].size(0) if probs else order.size(0)
    return (permuted, Values(5).normal(num_tokens, permuted.size(1), dtype=permuted.dtype), order, *probs), {}


def draw_unpermute_grad_v2(draw: st.DrawFn) -> Inputs:
    (permuted, grad, order, *probs), _ = draw_unpermute_grad(draw)
    return (grad, order, permuted.size(0), permuted.dtype, *probs), {"permuted_tokens": permuted}


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "_npu_moe_token_unpermute": draw_unpermute,
    "npu_moe_token_permute": draw_permute,
    "npu_moe_token_permute_grad": draw_permute_grad,
    "npu_moe_token_permute_grad_v2": draw_permute_grad_v2,
    "npu_moe_token_unpermute": draw_unpermute,
    "npu_moe_token_unpermute_grad": draw_unpermute_grad,
    "npu_moe_token_unpermute_grad_v2": draw_unpermute_grad_v2,
}

_FORWARD = _permute_samples()
SAMPLES = [*_FORWARD, *_internal_unpermute_samples(_FORWARD), *_permute_grad_samples(), *_unpermute_grad_samples()]

REFERENCES: dict[str, Callable[..., Any]] = {
    "_npu_moe_token_unpermute": permute.internal_moe_token_unpermute,
    "npu_moe_token_permute": permute.moe_token_permute,
    "npu_moe_token_permute_grad": permute.permute_grad,
    "npu_moe_token_permute_grad_v2": permute.permute_grad_v2,
    "npu_moe_token_unpermute": permute.moe_token_unpermute,
    "npu_moe_token_unpermute_grad": permute.unpermute_grad,
    "npu_moe_token_unpermute_grad_v2": permute.unpermute_grad_v2,
}
