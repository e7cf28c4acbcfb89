"""Samples of permute and unpermute by a routing map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.reference import routing_map as reference
from tests.ops.samples.base import BF16, F16, F32, F64, Inputs, Layout, Sample, Values, contiguous, sliced, transposed

PERMUTE = "npu_moe_token_permute_with_routing_map"
PERMUTE_GRAD = "npu_moe_token_permute_with_routing_map_grad"
UNPERMUTE = "npu_moe_token_unpermute_with_routing_map"
INTERNAL = "_npu_moe_token_unpermute_with_routing_map"
UNPERMUTE_GRAD = "npu_moe_token_unpermute_with_routing_map_grad"

Case = tuple[Any, ...]
_FEW = [[1, 0, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]]  # expert 0 has all tokens, expert 1 one, expert 2 two
_UNEVEN = [[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 1, 1]]  # eight ones, but not two per token


def top_k_map(num_tokens: int, k: int, experts: int = 4, seed: int = 1) -> Tensor:
    """K distinct experts per token."""
    values = Values(seed)
    routing_map = torch.zeros(num_tokens, experts, dtype=torch.bool)
    for row in routing_map:
        row[values.normal(experts).argsort()[:k]] = True
    return routing_map


def as_map(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def permute_inputs(
    routing_map: Tensor,
    num_out_tokens: int | None = None,
    *,
    drop: bool = False,
    with_probs: bool = True,
    h: int = 3,
    dtype: torch.dtype = F32,
    probs_dtype: torch.dtype | None = None,
    layout: Layout = contiguous,
) -> Inputs:
    values = Values()
    tokens = layout(values.normal(routing_map.size(0), h, dtype=dtype))
    probs = layout(values.normal(*routing_map.shape, dtype=probs_dtype or dtype)) if with_probs else None
    return (tokens, layout(routing_map)), {"probs": probs, "num_out_tokens": num_out_tokens, "drop_and_pad": drop}


def permute_grad_inputs(routing_map: Tensor, num_out_tokens: int | None = None, **options: Any) -> Inputs:
    layout, drop = options.pop("layout", contiguous), options.get("drop", False)
    (tokens, _), rest = permute_inputs(routing_map, num_out_tokens, **options)
    _, _, sorted_indices = reference.permute(tokens, routing_map, None, num_out_tokens, drop)
    values, num_rows, probs = Values(4), sorted_indices.size(0), rest["probs"]
    grad = layout(values.normal(num_rows, tokens.size(1), dtype=tokens.dtype))
    probs_grad = None if probs is None else layout(values.normal(num_rows, dtype=probs.dtype))
    num_tokens, experts = routing_map.shape
    return (grad, probs_grad, sorted_indices, layout(routing_map), experts, num_tokens, drop), {}


def unpermute_inputs(
    routing_map: Tensor,
    num_out_tokens: int | None = None,
    *,
    drop: bool = False,
    with_map: bool | None = None,
    extra_rows: int = 0,
    **options: Any,
) -> Inputs:
    layout = options.pop("layout", contiguous)
    (tokens, _), rest = permute_inputs(routing_map, num_out_tokens, drop=drop, **options)
    _, _, sorted_indices = reference.permute(tokens, routing_map, None, num_out_tokens, drop)
    sorted_indices = torch.cat([sorted_indices, torch.zeros(extra_rows, dtype=torch.int32)])
    permuted = layout(Values(6).normal(sorted_indices.size(0), tokens.size(1), dtype=tokens.dtype))
    needs_map = rest["probs"] is not None and not drop if with_map is None else with_map
    given = {"probs": rest["probs"], "routing_map": layout(routing_map) if needs_map else None, "drop_and_pad": drop}
    if given["probs"] is not None:
        given["probs"] = layout(given["probs"])
    return (permuted, sorted_indices, list(tokens.shape)), given


def unpermute_grad_inputs(*args: Any, **options: Any) -> Inputs:
    (permuted, sorted_indices, shape), given = unpermute_inputs(*args, **options)
    probs, drop, layout = given["probs"], given["drop_and_pad"], options.get("layout", contiguous)
    out_index = token = sorted_indices
    if drop:
        token, order = sorted_indices.sort(stable=True)
        out_index = order.int()
    grad = layout(Values(7).normal(*shape, dtype=permuted.dtype))
    rows = None if probs is None else permuted
    return (grad, out_index, token, given["routing_map"], rows, probs, drop, shape), {}


CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "top-two": ((top_k_map(4, 2), 8), {}),
    "without-probs": ((top_k_map(4, 2), 8), {"with_probs": False}),
    "one-expert-each": ((top_k_map(5, 1),), {}),
    "all-experts": ((top_k_map(3, 4), 12), {}),
    "int8-map": ((top_k_map(4, 2).to(torch.int8), 8), {}),
    "rounded-down": ((top_k_map(4, 2), 11), {}),
    "uneven": ((as_map(_UNEVEN), 8), {}),
    "no-rows": ((top_k_map(3, 0), 2), {}),
    "no-tokens": ((top_k_map(0, 2), 0), {}),
    "no-columns": ((top_k_map(3, 2), 6), {"h": 0}),
    "sliced": ((top_k_map(4, 2), 8), {"layout": sliced}),
    "float16": ((top_k_map(6, 3), 18), {"dtype": F16}),
    "bfloat16": ((top_k_map(6, 3), 18), {"dtype": BF16}),
    "bfloat16-float32-probs": ((top_k_map(6, 2), 12), {"dtype": BF16, "probs_dtype": F32}),
    "float64": ((top_k_map(2, 2), 4), {"dtype": F64}),
    "drop": ((as_map(_FEW), 6), {"drop": True}),
    "drop-without-probs": ((as_map(_FEW), 6), {"drop": True, "with_probs": False}),
    "drop-by-default": ((as_map(_FEW),), {"drop": True}),
    "drop-none": ((as_map(_FEW), 12), {"drop": True}),
    "drop-all": ((as_map(_FEW), 2), {"drop": True}),
    "drop-nothing-routed": ((top_k_map(3, 0), 8), {"drop": True}),
    "drop-int8-map": ((as_map(_FEW).to(torch.int8), 9), {"drop": True}),
    "drop-no-tokens": ((top_k_map(0, 2), 0), {"drop": True}),
    "drop-float16": ((as_map(_FEW), 6), {"drop": True, "dtype": F16}),
    "drop-bfloat16-float32-probs": ((as_map(_FEW), 6), {"drop": True, "dtype": BF16, "probs_dtype": F32}),
    "drop-transposed": ((as_map(_FEW), 6), {"drop": True, "layout": lambda t: transposed(t) if t.dim() > 1 else t}),
}
# what a compiler sees differently
TRACED = {"top-two", "without-probs", "no-rows", "drop", "drop-without-probs"}


def _with_rows() -> dict[str, dict[str, Callable[[int], Inputs]]]:
    """Calls of any number of tokens, or of any number of rows where the number of tokens is an int of the call."""

    def rows_of_two_tokens(make: Callable[..., Inputs], **options: Any) -> Callable[[int], Inputs]:
        return lambda num_rows: make(top_k_map(2, num_rows, experts=num_rows), 2 * num_rows, **options)

    def rows_of_one_expert(make: Callable[..., Inputs]) -> Callable[[int], Inputs]:
        return lambda num_rows: make(torch.ones(8, 1, dtype=torch.bool), num_rows, drop=True)

    return {
        PERMUTE: {
            "one-expert-each": lambda num_rows: permute_inputs(top_k_map(num_rows, 1, experts=3)),
            "drop": lambda num_rows: permute_inputs(top_k_map(num_rows, 2, experts=3), 6, drop=True),
        },
        PERMUTE_GRAD: {"drop": rows_of_one_expert(permute_grad_inputs)},
        UNPERMUTE: {
            "without-probs": rows_of_two_tokens(unpermute_inputs, with_probs=False),
            "drop": rows_of_one_expert(unpermute_inputs),
        },
        INTERNAL: {"drop": rows_of_one_expert(unpermute_inputs)},
        UNPERMUTE_GRAD: {
            "without-probs": rows_of_two_tokens(unpermute_grad_inputs, with_probs=False),
            "drop": rows_of_one_expert(unpermute_grad_inputs),
        },
    }


def _samples() -> list[Sample]:
    rows, samples = _with_rows(), []

    def add(op: str, id: str, make: Callable[[], Inputs], wrt: tuple[str, ...]) -> None:
        samples.append(Sample(op, id, make, 8, wrt, rows[op].get(id), id in TRACED or id in rows[op]))

    for id, (args, options) in CASES.items():
        mixed = "probs_dtype" in options

        def make(builder: Callable[..., Inputs], args: Case = args, options: Any = options, **more: Any) -> Any:
            return lambda: builder(*args, **options, **more)

        with_probs = options.get("with_probs", True)
        one = lambda names, with_probs=with_probs: tuple(names) if with_probs else tuple(names[:1])  # noqa: E731
        add(PERMUTE, id, make(permute_inputs), one(("tokens", "probs")))
        add(PERMUTE_GRAD, id, make(permute_grad_inputs), one(("permuted_token_out_grad", "probs_grad")))
        # the gradient of probs comes rounded to the dtype of the rows: that of mixed dtypes has a test of its own
        add(UNPERMUTE, id, make(unpermute_inputs), ("permuted_tokens",) if mixed else one(("permuted_tokens", "probs")))
        wrt = one(("unpermuted_tokens_grad", "permuted_tokens", "probs"))
        add(UNPERMUTE_GRAD, id, make(unpermute_grad_inputs), () if mixed else wrt)
        if id in ("top-two", "without-probs", "uneven", "bfloat16", "no-rows") or id.startswith("drop"):
            # the last result has the dtype of probs and no gradient
            wrt = () if "dtype" in options else one(("permuted_tokens", "probs"))
            add(INTERNAL, id, make(unpermute_inputs), wrt)
    extra = make(unpermute_inputs, *CASES["top-two"], extra_rows=3)
    add(UNPERMUTE, "rows-left-over", extra, ("permuted_tokens", "probs"))
    add(INTERNAL, "rows-left-over", extra, ("permuted_tokens", "probs"))
    extra_grad = make(unpermute_grad_inputs, *CASES["top-two"], extra_rows=3)
    add(UNPERMUTE_GRAD, "rows-left-over", extra_grad, ("unpermuted_tokens_grad", "permuted_tokens", "probs"))
    unused = make(unpermute_inputs, (top_k_map(4, 2), 8), {"with_probs": False}, with_map=True)
    add(UNPERMUTE, "unused-map", unused, ("permuted_tokens",))
    add(UNPERMUTE, "drop-unused-map", make(unpermute_inputs, *CASES["drop"], with_map=True), ("permuted_tokens",))
    return samples


def _draw(draw: st.DrawFn) -> tuple[Case, dict[str, Any]]:
    num_tokens, experts, drop = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.booleans())
    k = draw(st.integers(0, experts))
    routing_map = top_k_map(num_tokens, k, experts, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):
        routing_map = routing_map.to(torch.int8)
    wanted = draw(st.integers(0, num_tokens * experts)) if drop else num_tokens * k
    dtype = draw(st.sampled_from((F16, BF16, F32)))
    options = {"drop": drop, "with_probs": draw(st.booleans()), "h": draw(st.integers(0, 3)), "dtype": dtype}
    if dtype == BF16 and draw(st.booleans()):
        options["probs_dtype"] = F32
    return (routing_map, wanted), options


def _drawing(builder: Callable[..., Inputs]) -> Callable[[st.DrawFn], Inputs]:
    def draw_call(draw: st.DrawFn) -> Inputs:
        args, options = _draw(draw)
        return builder(*args, **options)

    return draw_call


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    INTERNAL: _drawing(unpermute_inputs),
    PERMUTE: _drawing(permute_inputs),
    PERMUTE_GRAD: _drawing(permute_grad_inputs),
    UNPERMUTE: _drawing(unpermute_inputs),
    UNPERMUTE_GRAD: _drawing(unpermute_grad_inputs),
}

SAMPLES: list[Sample] = _samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    INTERNAL: reference.internal_unpermute,
    PERMUTE: reference.permute,
    PERMUTE_GRAD: reference.permute_grad,
    UNPERMUTE: reference.unpermute,
    UNPERMUTE_GRAD: reference.unpermute_grad,
}
