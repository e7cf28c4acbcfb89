"""Samples of the distributed operators in a world of one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.gloo import single_rank_group
from tests.helpers.reference import distribute
from tests.ops.samples.base import BF16, F16, F32, F64, Inputs, Layout, Sample, Values, contiguous, sliced, transposed

V1, V2 = "npu_moe_distribute_dispatch", "npu_moe_distribute_dispatch_v2"
COMBINE_V1, COMBINE_V2 = "npu_moe_distribute_combine", "npu_moe_distribute_combine_v2"
NORM = "npu_moe_distribute_combine_add_rms_norm"
TO_EXPERTS, TO_TOKENS = "npu_alltoallv_gmm", "npu_gmm_alltoallv"
BARRIER = "_npu_distribute_barrier"
I32 = torch.int32
SPECIAL = {"zero_expert_num": 1, "copy_expert_num": 1, "const_expert_num": 2}


def spread_ids(num_tokens: int, k: int, experts: int) -> Tensor:
    """Distinct ids in each row, no two rows alike."""
    token, slot = torch.arange(num_tokens).view(-1, 1), torch.arange(k)
    return ((token + slot * (1 + token % 2 * (experts % 2))) % experts).to(I32)


def prefix(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def checkered(num_tokens: int, k: int) -> Tensor:
    """A mask of pairs; the second token is left out altogether."""
    mask = torch.arange(num_tokens * k).view(num_tokens, k) % 3 != 1
    mask[1:2] = False
    return mask


# --- dispatch --------------------------------------------------------------------------------------------------------


def dispatch_inputs(
    num_tokens: int = 4,
    k: int = 2,
    experts: int = 4,
    h: int = 3,
    *,
    dtype: torch.dtype = F32,
    layout: Layout = contiguous,
    special: bool = False,
    scales: tuple[int, ...] | None = None,
    weighted: bool = False,
    zero_row: bool = False,
    **options: Any,
) -> Inputs:
    values = Values()
    x = values.integers(-(2**31), 2**31 - 1, num_tokens, h, dtype=I32) if dtype == I32 else None
    if x is None:
        x = values.normal(num_tokens, h, dtype=dtype)
    if zero_row:
        x[1] = 0
    if special:
        options |= SPECIAL
    ids = spread_ids(num_tokens, k, experts + (4 if special else 0))
    if scales is not None:
        options["scales"] = values.positive(*scales)
    if weighted:
        options["expert_scales"] = values.positive(num_tokens, k)
    return (layout(x), layout(ids), single_rank_group(), 1, 0, experts), options


def _dispatch_samples() -> list[Sample]:
    def sample(
        name: str, id: str, *, wrt: bool = True, traced: bool = True, rows: bool = False, **options: Any
    ) -> Sample:
        with_rows = (lambda num_rows: dispatch_inputs(num_rows, **options)) if rows else None
        names = ("x",) if wrt else ()
        return Sample(name, id, lambda: dispatch_inputs(**options), 1, names, with_rows, traced)

    samples = []
    for name in (V1, V2):
        samples += [
            sample(name, "top-two", rows=True),
            sample(name, "one-expert", k=1, experts=1, traced=False),
            sample(name, "all-experts", k=3, experts=3, traced=False),
            sample(name, "no-tokens", num_tokens=0),
            sample(name, "no-columns", h=0, traced=False),
            sample(name, "cumulative-sums", expert_token_nums_type=0, traced=False),
            sample(name, "room-for-more", global_bs=6),
            sample(name, "sliced", layout=sliced, traced=False),
            sample(name, "transposed", layout=transposed, traced=False),
            sample(name, "weights-travel", weighted=True),
            sample(name, "one-lane", tp_world_size=1, group_tp="ignored", traced=False),
            sample(name, "float16", dtype=F16),
            sample(name, "bfloat16", dtype=BF16, k=3),
            sample(name, "float64", dtype=F64, num_tokens=2),
            sample(name, "int8", dtype=BF16, quant_mode=2, h=6, wrt=False),
            sample(name, "int8-zero-row", dtype=F16, quant_mode=2, h=6, zero_row=True, wrt=False, traced=False),
            sample(name, "int8-smoothed", quant_mode=2, h=6, scales=(4, 6), wrt=False),
            sample(name, "int8-no-columns", quant_mode=2, h=0, wrt=False, traced=False),
        ]
    return [
        *samples,
        sample(V2, "prefix-mask", x_active_mask=prefix(1, 1, 1, 0)),
        sample(V2, "pair-mask", x_active_mask=checkered(4, 2)),
        sample(V2, "nobody-active", x_active_mask=prefix(0, 0, 0, 0), traced=False),
        sample(V2, "special-experts", special=True, k=3, experts=2),
        sample(V2, "int4-words", dtype=I32, wrt=False),
        sample(V2, "int4-words-scales", dtype=I32, scales=(4,), wrt=False),
        sample(V2, "scales-without-effect", dtype=BF16, scales=(2, 5), wrt=False),
        sample(V2, "dtypes-named", dtype=BF16, y_dtype=15, x_dtype=15, scales_dtype=6, wrt=False, traced=False),
        sample(
            V2,
            "hints",
            performance_info=torch.zeros(1, dtype=torch.int64),
            comm_alg="fullmesh_v1",
            shared_expert_num=0,
            traced=False,
        ),
    ]


# --- combine ---------------------------------------------------------------------------------------------------------


def combine_inputs(
    name: str,
    num_tokens: int = 4,
    k: int = 2,
    experts: int = 4,
    h: int = 3,
    *,
    dtype: torch.dtype = F32,
    layout: Layout = contiguous,
    special: bool = False,
    shared: tuple[int, ...] | None = None,
    poisoned: bool = False,
    scales_dtype: torch.dtype = F32,
    exact: bool = False,
    **options: Any,
) -> Inputs:
    values = Values(1)
    (x, ids, group, *_), sent = dispatch_inputs(num_tokens, k, experts, h, special=special)
    sent["x_active_mask"] = options.get("x_active_mask")
    sent["global_bs"] = options.get("global_bs", 0)
    call = {"x": x, "expert_ids": ids, "moe_expert_num": experts, **sent}
    expand_x, _, handle, _, counts, *_ = distribute.dispatch(1 if name == COMBINE_V1 else 2, [call])[0]
    rows = (
        values.normal(*expand_x.shape, dtype=dtype) if dtype != I32 else values.integers(-9, 9, *expand_x.shape).int()
    )
    if poisoned:
        rows[int(counts[-1]) :] = math.nan
    out = BF16 if dtype == I32 else dtype
    if special:
        options |= SPECIAL | {"ori_x": values.normal(num_tokens, h, dtype=out)}
        for tensor in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
            options[tensor] = values.normal(2, h, dtype=out)
    if shared is not None:
        options["shared_expert_x"] = values.normal(*shared, dtype=out)
    norm = (values.normal(num_tokens, 1, h, dtype=out), values.positive(h, dtype=out)) if name == NORM else ()
    weights = values.positive(num_tokens, k, dtype=scales_dtype)
    if exact:  # sums that fit in half precision, whose roundings a reference in float64 does not see
        rows, weights, norm = rows.round(), weights.round(), tuple(tensor.round() for tensor in norm)
        options |= {name: options[name].round() for name in ("shared_expert_x",) if name in options}
    return (layout(rows), layout(ids), handle, counts, layout(weights), *norm, group, 1, 0, experts), options


def _combine_samples() -> list[Sample]:
    def sample(
        name: str, id: str, *, wrt: bool = True, traced: bool = True, rows: bool = False, **options: Any
    ) -> Sample:
        names: tuple[str, ...] = ()
        if wrt:
            names = ("expand_x", "expert_scales")
            names += ("residual_x", "gamma") if name == NORM else ()
            names += ("shared_expert_x",) if options.get("shared") else ()
            if options.get("special"):
                names += ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
        with_rows = (lambda num_rows: combine_inputs(name, num_rows, **options)) if rows else None
        return Sample(name, id, lambda: combine_inputs(name, **options), 4, names, with_rows, traced)

    samples = []
    for name in (COMBINE_V1, COMBINE_V2, NORM):
        samples += [
            sample(name, "top-two", rows=True, experts=6),
            sample(name, "one-expert", k=1, experts=1, traced=False),
            sample(name, "no-tokens", num_tokens=0, traced=False),
            sample(name, "shared-rows", shared=(4, 3)),
            sample(name, "shared-rows-3d", shared=(2, 2, 3), traced=False),
            sample(name, "room-for-more", global_bs=6, poisoned=True, wrt=False),
            sample(name, "sliced", layout=sliced, traced=False),
            sample(name, "transposed", layout=transposed, traced=False),
            sample(name, "float16", dtype=F16, exact=name == NORM),
            sample(name, "bfloat16", dtype=BF16, k=3, shared=(4, 3), exact=name == NORM),
            sample(name, "rounded", dtype=BF16, k=3, shared=(4, 3), wrt=False, traced=False),
            sample(name, "float64", dtype=F64, scales_dtype=F64, num_tokens=2, wrt=False, traced=False),
            sample(name, "integers", dtype=I32, wrt=False, traced=False),
        ]
    for name in (COMBINE_V2, NORM):
        samples += [
            sample(name, "prefix-mask", x_active_mask=prefix(1, 1, 0, 0), shared=(4, 3)),
            sample(name, "pair-mask", x_active_mask=checkered(4, 2)),
            sample(name, "masked-rows-poisoned", x_active_mask=checkered(4, 2), poisoned=True, dtype=BF16, wrt=False),
            sample(name, "special-experts", special=True, k=3, experts=2),
            sample(name, "special-experts-masked", special=True, k=3, experts=2, x_active_mask=checkered(4, 3)),
        ]
    return [
        *samples,
        sample(COMBINE_V1, "no-columns", h=0, traced=False),
        sample(COMBINE_V2, "special-bfloat16", special=True, k=3, experts=2, dtype=BF16, traced=False),
        sample(COMBINE_V2, "unused-ori-x", ori_x=torch.ones(4, 3), comm_alg="hierarchy", comm_quant_mode=2, wrt=False),
        sample(NORM, "epsilon", norm_eps=0.5, traced=False),
    ]


# --- all-to-all with the grouped matmul ------------------------------------------------------------------------------


def exchange_inputs(
    name: str,
    counts: tuple[int, ...] = (2, 0, 3),
    h: int = 4,
    n: int = 3,
    *,
    dtype: torch.dtype = F32,
    layout: Layout = contiguous,
    beside: int | None = None,
    poisoned: bool = False,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    **options: Any,
) -> Inputs:
    values = Values()
    shape = (n, h) if trans_gmm_weight else (h, n)
    mm_shape = (2, 5) if trans_mm_weight else (5, 2)
    x = values.normal(sum(counts), h, dtype=dtype)
    weight = values.normal(len(counts), *shape, dtype=dtype)
    if poisoned:
        weight[[count == 0 for count in counts]] = math.nan
    if beside is not None:
        options |= {"mm_x": values.normal(beside, 5, dtype=dtype), "mm_weight": values.normal(*mm_shape, dtype=dtype)}
    flags = {"trans_gmm_weight": trans_gmm_weight, "trans_mm_weight": trans_mm_weight}
    args = (layout(x), layout(weight), single_rank_group(), 1, list(counts), list(counts))
    return args, {**options, **flags}


def _exchange_samples() -> list[Sample]:
    def sample(
        name: str, id: str, *, wrt: bool = True, traced: bool = True, rows: bool = False, **options: Any
    ) -> Sample:
        names: tuple[str, ...] = ("gmm_x", "gmm_weight") if wrt else ()
        names += ("mm_x", "mm_weight") if wrt and options.get("beside") is not None else ()
        with_rows = (lambda num_rows: exchange_inputs(name, **{**options, "beside": num_rows})) if rows else None
        return Sample(name, id, lambda: exchange_inputs(name, **options), 8, names, with_rows, traced)

    samples = []
    for name in (TO_EXPERTS, TO_TOKENS):
        samples += [
            sample(name, "three-experts"),
            sample(name, "beside", beside=4, h=6, rows=True),
            sample(name, "beside-transposed", beside=2, trans_mm_weight=True, traced=False),
            sample(name, "transposed-weight", trans_gmm_weight=True),
            sample(name, "one-expert", counts=(3,), traced=False),
            sample(name, "no-rows", counts=(0, 0)),
            sample(name, "views", layout=sliced, traced=False),
            sample(name, "view-of-one-element", counts=(1,), h=1, layout=sliced, wrt=False, traced=False),
            sample(name, "transposed-views", layout=transposed, traced=False),
            sample(name, "weight-without-rows-poisoned", poisoned=True, wrt=False, traced=False),
            sample(name, "float16", dtype=F16, beside=3),
            sample(name, "bfloat16", dtype=BF16, trans_gmm_weight=True),
            sample(name, "float64", dtype=F64, wrt=False, traced=False),
            sample(name, "hint", comm_mode="ai_cpu", wrt=False, traced=False),
        ]
    return [
        *samples,
        sample(TO_EXPERTS, "permute-out", permute_out_flag=True),
        sample(TO_EXPERTS, "permute-out-transposed", permute_out_flag=True, trans_gmm_weight=True, beside=1),
        sample(TO_EXPERTS, "permute-out-bfloat16", permute_out_flag=True, dtype=BF16),
    ]


# --- barrier ---------------------------------------------------------------------------------------------------------


def barrier_inputs(*shape: int, dtype: torch.dtype = F32, layout: Layout = contiguous, **options: Any) -> Inputs:
    return (layout(Values().normal(*shape).mul(9).to(dtype)), single_rank_group(), 1), options


def _barrier_samples() -> list[Sample]:
    def sample(
        id: str, *shape: int, wrt: bool = True, rows: bool = False, traced: bool = True, **options: Any
    ) -> Sample:
        with_rows = (lambda num_rows: barrier_inputs(num_rows, 3, **options)) if rows else None
        names = ("x_ref",) if wrt else ()
        return Sample(BARRIER, id, lambda: barrier_inputs(*shape, **options), 1, names, with_rows, traced)

    ids = {"time_out": torch.tensor([9], dtype=I32), "elastic_info": torch.zeros(6, dtype=I32)}
    return [
        sample("matrix", 4, 3, rows=True),
        sample("scalar", wrt=False, traced=False),
        sample("empty", 0, 3, traced=False),
        sample("transposed", 2, 3, layout=transposed),
        sample("bfloat16", 2, 3, dtype=BF16, traced=False),
        sample("int8", 2, 3, dtype=torch.int8, wrt=False, traced=False),
        sample("bool", 5, dtype=torch.bool, wrt=False, traced=False),
        sample("options", 2, wrt=False, traced=False, **ids),
    ]


# --- draws -----------------------------------------------------------------------------------------------------------

FLOATS = st.sampled_from((F16, BF16, F32, F64))


def _draw_mask(draw: st.DrawFn, num_tokens: int, k: int) -> Tensor | None:
    kind = draw(st.sampled_from(("none", "tokens", "pairs")))
    if kind == "none":
        return None
    if kind == "tokens":
        return torch.arange(num_tokens) < draw(st.integers(0, num_tokens))
    flags = draw(st.lists(st.booleans(), min_size=num_tokens * k, max_size=num_tokens * k))
    return torch.tensor(flags, dtype=torch.bool).view(num_tokens, k)


def _draw_sizes(draw: st.DrawFn, is_v2: bool) -> dict[str, Any]:
    special = is_v2 and draw(st.booleans())
    experts = draw(st.integers(1, 5))
    sizes = {
        "num_tokens": draw(st.integers(0, 5)),
        "k": draw(st.integers(1, min(4, experts + 4 * special))),
        "experts": experts,
        "h": draw(st.integers(0, 5)),
        "special": special,
        "layout": draw(st.sampled_from((contiguous, sliced, transposed))),
    }
    sizes["global_bs"] = draw(st.sampled_from((0, sizes["num_tokens"] + 2)))
    if is_v2:
        sizes["x_active_mask"] = _draw_mask(draw, sizes["num_tokens"], sizes["k"])
    return sizes


def _drawn_dispatch(name: str) -> Callable[[st.DrawFn], Inputs]:
    def inputs(draw: st.DrawFn) -> Inputs:
        sizes = _draw_sizes(draw, name == V2)
        quant_mode = draw(st.sampled_from((0, 2)))
        if quant_mode == 2 and draw(st.booleans()):
            sizes["scales"] = (sizes["experts"], sizes["h"])
        return dispatch_inputs(
            **sizes,
            dtype=draw(st.sampled_from((F16, BF16, F32))) if quant_mode else draw(FLOATS),
            quant_mode=quant_mode,
            weighted=draw(st.booleans()),
            expert_token_nums_type=draw(st.integers(0, 1)),
        )

    return inputs


def _drawn_combine(name: str) -> Callable[[st.DrawFn], Inputs]:
    def inputs(draw: st.DrawFn) -> Inputs:
        sizes = _draw_sizes(draw, name != COMBINE_V1)
        shared = (sizes["num_tokens"], sizes["h"]) if draw(st.booleans()) else None
        sizes["h"] = max(sizes["h"], 1)  # the mean over no columns is not defined
        shared = None if shared is None else (sizes["num_tokens"], sizes["h"])
        return combine_inputs(name, **sizes, dtype=draw(FLOATS), shared=shared, poisoned=True)

    return inputs


def _drawn_exchange(name: str) -> Callable[[st.DrawFn], Inputs]:
    def inputs(draw: st.DrawFn) -> Inputs:
        options = {"permute_out_flag": draw(st.booleans())} if name == TO_EXPERTS else {}
        return exchange_inputs(
            name,
            tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))),
            draw(st.integers(1, 5)),
            draw(st.integers(1, 5)),
            dtype=draw(FLOATS),
            beside=draw(st.sampled_from((None, 0, 3))),
            layout=draw(st.sampled_from((contiguous, sliced, transposed))),
            trans_gmm_weight=draw(st.booleans()),
            trans_mm_weight=draw(st.booleans()),
            **options,
        )

    return inputs


def _drawn_barrier(draw: st.DrawFn) -> Inputs:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    return barrier_inputs(*shape, dtype=draw(st.sampled_from((F16, BF16, F32, F64, torch.int8, I32, torch.bool))))


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    V1: _drawn_dispatch(V1),
    V2: _drawn_dispatch(V2),
    COMBINE_V1: _drawn_combine(COMBINE_V1),
    COMBINE_V2: _drawn_combine(COMBINE_V2),
    NORM: _drawn_combine(NORM),
    TO_EXPERTS: _drawn_exchange(TO_EXPERTS),
    TO_TOKENS: _drawn_exchange(TO_TOKENS),
    BARRIER: _drawn_barrier,
}

SAMPLES: list[Sample] = [*_dispatch_samples(), *_combine_samples(), *_exchange_samples(), *_barrier_samples()]

REFERENCES: dict[str, Callable[..., Any]] = {
    V1: distribute.moe_distribute_dispatch,
    V2: distribute.moe_distribute_dispatch_v2,
    COMBINE_V1: distribute.moe_distribute_combine,
    COMBINE_V2: distribute.moe_distribute_combine_v2,
    NORM: distribute.moe_distribute_combine_add_rms_norm,
    TO_EXPERTS: distribute.alltoallv_gmm,
    TO_TOKENS: distribute.gmm_alltoallv,
    BARRIER: distribute.distribute_barrier,
}
