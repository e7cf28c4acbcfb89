"""Samples of the grouped matmuls fused with what follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.reference import common, fused_matmul
from tests.ops.samples.base import (
    BF16,
    F16,
    F32,
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


def words(scale: Tensor) -> Tensor:
    """Int64 words whose low half is the bits of a float32; the high half is noise that nobody reads."""
    return scale.view(torch.int32).to(torch.int64).bitwise_and(0xFFFFFFFF) + (5 << 37)


def tiles(weight: Tensor) -> Tensor:
    """`[E, K, N]` in the tile order of FRACTAL_NZ: 32 int8 columns or 8 words per tile."""
    width = 32 if weight.dtype == torch.int8 else 8
    experts, k, columns = weight.shape
    return weight.view(experts, k // 16, 16, columns // width, width).permute(0, 3, 1, 2, 4).contiguous()


def column(matrix: Tensor) -> Tensor:
    """A single row as the transposed view of a column, with strides that dense memory does not have."""
    return matrix.flatten().unsqueeze(1).t() if matrix.dim() == 2 and matrix.size(0) == 1 else matrix


def group_list_of(counts: Sequence[int], group_list_type: int) -> Tensor:
    return int64(counts) if group_list_type == 1 else int64(counts).cumsum(0)


def poisoned(factors: Tensor, covered: int) -> Tensor:
    """NaN for the rows that no group covers."""
    factors[covered:] = math.nan
    return factors


# --- with SwiGLU and quantization ------------------------------------------------------------------------------------


def swiglu_inputs(
    counts: Sequence[int],
    *,
    version: int = 1,
    x: str = "int8",
    weight: str = "int8",
    k: int = 8,
    n: int = 6,
    extra_rows: int = 0,
    in_tiles: bool = False,
    groups: int | None = None,
    scale_dtype: torch.dtype = F32,
    group_list_type: int = 0,
    smooth: str | None = None,
    layout: Layout = contiguous,
    zero_row: bool = False,
    **options: Any,
) -> Inputs:
    values, experts, rows = Values(), len(counts), sum(counts) + extra_rows
    activations = values.integers(-128, 127, rows, k) if x == "int8" else values.integers(-8, 7, rows, k)
    if zero_row:
        activations[0] = 0
    matrices = values.integers(-128, 127, experts, k, n) if weight == "int8" else values.integers(-8, 7, experts, k, n)
    # c of a few units
    size = 1 / (math.sqrt(max(k, 1)) * (70 if x == "int8" else 4.5) * (70 if weight == "int8" else 4.5))
    scale = values.positive(experts, *(() if groups is None else (groups,)), n) * size * 2
    assist = None
    if weight == "int4" and x == "int8":
        per_row = (scale.unsqueeze(1) if groups is None else scale).repeat_interleave(k // (groups or 1), 1)
        assist = (8 * (matrices * per_row).sum(1)).float()
    packed = matrices if weight == "int8" else common.pack_int4(matrices)
    packed = tiles(packed) if in_tiles else packed
    scale = scale.to(scale_dtype) if weight == "int8" else words(scale)
    for expert, count in enumerate(counts):
        if count == 0 and scale.is_floating_point():
            scale[expert] = math.nan
    x_scale = poisoned(values.positive(rows), sum(counts))
    rows_of_x = layout(activations if x == "int8" else common.pack_int4(activations))
    group_list = group_list_of(counts, group_list_type)
    if version == 1:
        return (rows_of_x, packed, group_list, layout(scale), x_scale), {**options, "bias": assist}
    if smooth is not None:
        options["smooth_scale"] = values.positive(experts, n // 2) if smooth == "columns" else values.positive(experts)
    options["weight_assist_matrix"] = None if assist is None else [assist]
    return (rows_of_x, [packed], [layout(scale)], x_scale, group_list), {**options, "group_list_type": group_list_type}


W4: dict[str, Any] = {"weight": "int4", "n": 16}
A4W4: dict[str, Any] = {"x": "int4", "weight": "int4", "k": 16, "n": 16}


def _swiglu_samples() -> list[Sample]:
    def sample(
        id: str,
        counts: Sequence[int],
        *,
        version: int,
        with_rows: bool = False,
        is_traced: bool = False,
        **options: Any,
    ) -> Sample:
        def make(counts: Sequence[int] = counts) -> Inputs:
            return swiglu_inputs(counts, version=version, **options)

        resized = (lambda num_rows: make(three_experts(num_rows))) if with_rows else None
        name = "npu_grouped_matmul_swiglu_quant" + ("" if version == 1 else "_v2")
        return Sample(name, id, make, 8, (), resized, is_traced)

    return [
        sample("int8", [1, 0, 3], version=1, with_rows=True, is_traced=True),
        sample("float16-scale", [2, 3], version=1, scale_dtype=F16),
        sample("bfloat16-scale", [2, 3], version=1, scale_dtype=BF16),
        sample("one-expert", [3], version=1, extra_rows=2),
        sample("uncovered", [0, 2, 0], version=1, extra_rows=3),
        sample("no-rows", [0, 0], version=1),
        sample("all-empty", [0, 0], version=1, extra_rows=2),
        sample("no-columns-of-x", [1, 2], version=1, k=0),
        sample("two-columns", [1, 2], version=1, n=2),
        sample("one-column-of-x", [1, 2], version=1, k=1),
        sample("one-row", [0, 1], version=1, layout=column),
        sample("zero-row", [1, 2], version=1, zero_row=True),
        sample("sliced", [1, 2], version=1, layout=sliced),
        sample("transposed", [2, 2], version=1, layout=transposed),
        sample("long", [2, 2], version=1, k=2050),
        sample("tiles", [1, 2], version=1, k=32, n=64, in_tiles=True),
        sample("int4", [1, 0, 2], version=1, **W4, is_traced=True),
        sample("int4-groups", [1, 2], version=1, **W4, groups=4),
        sample("int4-tiles", [1, 2], version=1, weight="int4", k=32, n=128, in_tiles=True, groups=1),
        sample("int8", [1, 0, 3], version=2, with_rows=True, is_traced=True),
        sample("counts", [2, 0, 1], version=2, group_list_type=1, extra_rows=1, tuning_config=[4]),
        sample("one-expert-counts", [2], version=2, group_list_type=1),
        sample("tiles", [1, 2], version=2, k=16, n=32, in_tiles=True, scale_dtype=BF16),
        sample("no-rows", [0, 0], version=2),
        sample(
            "modes-by-dtype",
            [1, 2],
            version=2,
            dequant_dtype=torch.float32,
            quant_dtype=torch.int8,
            quant_mode=None,
            dequant_mode=None,
            weight_assist_matrix=[],
        ),
        sample("int4", [1, 0, 2], version=2, **W4, is_traced=True),
        sample("int4-groups", [1, 2], version=2, **W4, groups=2, dequant_mode=1, group_list_type=1),
        sample("int4-tiles", [1, 2], version=2, weight="int4", k=16, n=64, in_tiles=True),
        sample("int4-int4", [1, 0, 2], version=2, **A4W4, extra_rows=1, is_traced=True),
        sample("int4-int4-smooth-columns", [1, 2], version=2, **A4W4, smooth="columns"),
        sample("int4-int4-smooth-experts", [1, 2], version=2, **A4W4, smooth="experts", group_list_type=1),
        sample("int4-int4-tiles", [1, 2], version=2, x="int4", weight="int4", k=16, n=64, in_tiles=True),
    ]


# --- with the sum of the experts of a token --------------------------------------------------------------------------


def finalize_inputs(
    counts: Sequence[int],
    *,
    weight: str = "int8",
    k: int = 8,
    n: int = 8,
    extra_rows: int = 0,
    tokens: int = 0,
    shared: int | None = None,
    scale_dtype: torch.dtype = F32,
    with_bias: bool = False,
    with_offset: bool = False,
    factors: Sequence[str] = ("pertoken_scale", "logit"),
    index_dtype: torch.dtype = torch.int64,
    group_list_type: int = 1,
    layout: Layout = contiguous,
    **options: Any,
) -> Inputs:
    values, experts, covered = Values(), len(counts), sum(counts)
    rows = covered + extra_rows
    x = values.integers(-128, 127, rows, k)
    matrices = values.integers(-128, 127, experts, k, n) if weight == "int8" else values.integers(-8, 7, experts, k, n)
    scale = values.positive(experts, n) * (1 / (math.sqrt(max(k, 1)) * 70 * (70 if weight == "int8" else 4.5)))
    if weight == "int8":
        options["scale"] = scale.to(scale_dtype)
        options["bias"] = values.normal(experts, n, dtype=BF16) if with_bias else None
    else:
        options["scale"] = words(scale).unsqueeze(1)
        options["bias"] = 8 * (matrices * scale.unsqueeze(1)).sum(1)
        matrices = common.pack_int4(matrices)
        options["offset"] = values.normal(experts, 1, n) * scale.unsqueeze(1) if with_offset else None
    for name in factors:
        options[name] = layout(poisoned(values.positive(rows), covered).unsqueeze(1)).squeeze(1)
    options["row_index"] = values.integers(0, max((tokens or rows) - 1, 0), rows, dtype=index_dtype)
    options["row_index"][covered:] = -7
    if shared is not None:
        options["shared_input"] = layout(values.normal(shared, n, dtype=BF16))
    options["output_bs"] = tokens
    if group_list_type != 1:
        options["group_list_type"] = group_list_type
    return (layout(x), layout(matrices), group_list_of(counts, group_list_type)), options


def _finalize_samples() -> list[Sample]:
    def sample(
        id: str, counts: Sequence[int], *, with_rows: bool = False, is_traced: bool = False, **options: Any
    ) -> Sample:
        def make(counts: Sequence[int] = counts) -> Inputs:
            return finalize_inputs(counts, **options)

        resized = (lambda num_rows: make(three_experts(num_rows))) if with_rows else None
        given = finalize_inputs(counts, **options)[1]
        differentiable = tuple(name for name in ("shared_input", "logit") if given.get(name) is not None)
        reduction = 16 * options.get("n", 8)  # sums over tokens cancel; the gradient of logit sums over columns
        return Sample("npu_grouped_matmul_finalize_routing", id, make, reduction, differentiable, resized, is_traced)

    return [
        sample(
            "shared",
            [1, 0, 3],
            tokens=3,
            shared=2,
            shared_input_offset=1,
            shared_input_weight=0.5,
            with_rows=True,
            is_traced=True,
        ),
        sample("cumsum", [2, 0, 3], group_list_type=0, tokens=4, extra_rows=2),
        sample("no-tokens-given", [2, 3], shared=5, index_dtype=torch.int32),
        sample("bias", [2, 3], with_bias=True, scale_dtype=BF16, tokens=1, shared=1),
        sample("no-factors", [2, 3], factors=(), with_bias=True, is_traced=True),
        sample("logit-only", [2, 1], factors=("logit",), with_bias=True),
        sample("pertoken-only", [2, 1], factors=("pertoken_scale",), dtype=torch.float32),
        sample("one-expert", [4], tokens=2, dtype=6, tuning_config=[4]),
        sample(
            "uncovered", [0, 2], extra_rows=3, tokens=4, shared=3, shared_input_weight=2.0, shared_input_offset=None
        ),
        sample("all-empty", [0, 0], extra_rows=3, shared=1, shared_input_weight=None),
        sample("no-rows", [0, 0]),
        sample("one-row", [0, 1], layout=column),
        sample("no-shared-rows", [2, 1], shared=0, shared_input_offset=3),
        sample("long", [1, 2], k=2050, tokens=2),
        sample("sliced", [1, 2], layout=sliced, shared=2),
        sample("transposed", [1, 2], layout=transposed, shared=2),
        sample("int4", [1, 0, 3], weight="int4", tokens=3, shared=2, is_traced=True),
        sample("int4-offset", [2, 3], weight="int4", tokens=4, with_offset=True, n=16),
        sample("int4-cumsum-no-factors", [2, 1], weight="int4", factors=(), group_list_type=0, extra_rows=1),
    ]


# --- accumulated weight gradients ------------------------------------------------------------------------------------


def add_inputs(
    counts: Sequence[int],
    *,
    m: int = 3,
    n: int = 5,
    extra_rows: int = 0,
    flat: bool = False,
    dtype: torch.dtype = BF16,
    layout: Layout = contiguous,
    input_layout: Layout = contiguous,
    **options: Any,
) -> Inputs:
    values, covered = Values(), sum(counts)
    x = poisoned(values.normal(covered + extra_rows, m, dtype=dtype), covered)
    weight = poisoned(values.normal(covered + extra_rows, n, dtype=dtype), covered)
    input = values.normal(*((len(counts) * m,) if flat else (len(counts), m)), n)
    return (input_layout(input), layout(x), layout(weight), int64(counts).cumsum(0)), options


def _add_samples() -> list[Sample]:
    def sample(
        id: str, counts: Sequence[int], *, with_rows: bool = False, is_traced: bool = False, **options: Any
    ) -> list[Sample]:
        def make(counts: Sequence[int] = counts) -> Inputs:
            return add_inputs(counts, **options)

        resized = (lambda num_rows: make(three_experts(num_rows))) if with_rows else None
        # the one in place returns its input, which need not be contiguous
        names = ["npu_grouped_matmul_add"] + (["npu_grouped_matmul_add_"] if "input_layout" not in options else [])
        return [Sample(name, id, make, 8, (), resized, is_traced, ("input",)) for name in names]

    return [
        *sample("bfloat16", [1, 0, 3], with_rows=True, is_traced=True),
        *sample("float16", [2, 2], dtype=F16),
        *sample("flat", [1, 0, 2], flat=True, is_traced=True),
        *sample("one-expert", [4], flat=True),
        *sample("uncovered", [0, 2, 0], extra_rows=3, group_list_type=None),
        *sample("no-rows", [0, 0]),
        *sample("no-columns", [1, 2], m=0),
        *sample("sliced", [1, 2], layout=sliced),
        *sample("transposed", [2, 2], layout=transposed),
        *sample("input-sliced", [1, 2], input_layout=sliced, is_traced=True),
        *sample("input-transposed", [1, 2], input_layout=transposed, flat=True),
    ]


# --- quantized on the way in -----------------------------------------------------------------------------------------


def dequant_inputs(
    counts: Sequence[int],
    *,
    k: int = 8,
    n: int = 5,
    extra_rows: int = 0,
    scale: bool = False,
    smooth: bool = False,
    quant_mode: str | None = "pertoken",
    layout: Layout = contiguous,
    first: Sequence[float] = (),
) -> Inputs:
    values, covered = Values(), sum(counts)
    rows = covered + extra_rows
    x = values.normal(rows, k, dtype=F16)
    x.view(-1)[: len(first)] = torch.tensor(first, dtype=F16)
    if quant_mode != "pertensor" or scale:
        poisoned(x, covered)
    if rows > 1:
        x[1] = 0
    weight = values.integers(-128, 127, len(counts), n, k)
    weight_scale = values.positive(len(counts), n) / 100
    options: dict[str, Any] = {"quant_mode": quant_mode}
    if scale:
        options["x_scale"] = values.positive(1 if quant_mode == "pertensor" else rows) / 60
    if smooth:
        options["smooth_scale"] = values.positive(k, dtype=F16)
    return (layout(x), weight, weight_scale, int64(counts).cumsum(0)), options


def _dequant_samples() -> list[Sample]:
    def sample(
        id: str, counts: Sequence[int], *, with_rows: bool = False, is_traced: bool = False, **options: Any
    ) -> Sample:
        def make(counts: Sequence[int] = counts) -> Inputs:
            return dequant_inputs(counts, **options)

        resized = (lambda num_rows: make(three_experts(num_rows))) if with_rows else None
        return Sample("npu_quant_grouped_matmul_dequant", id, make, 1, (), resized, is_traced)

    return [
        sample("pertoken", [1, 0, 3], with_rows=True, is_traced=True),
        sample("pertensor", [1, 0, 3], quant_mode="pertensor", extra_rows=1, is_traced=True),
        sample("pertoken-scale", [2, 2], scale=True, extra_rows=2),
        sample("pertensor-scale", [2, 2], scale=True, quant_mode="pertensor", extra_rows=2),
        sample("smooth", [2, 2], smooth=True, quant_mode=None),
        sample("smooth-scale", [2, 2], smooth=True, scale=True, quant_mode="pertensor"),
        sample("one-expert", [3], extra_rows=1),
        sample("one-column-of-x", [1, 2], k=1),
        sample("no-rows", [0, 0]),
        sample("no-rows-pertensor", [0, 0], quant_mode="pertensor"),
        sample("all-empty", [0, 0], extra_rows=2),
        sample("no-columns-of-x", [1, 2], k=0),
        sample("no-columns", [1, 2], n=0),
        sample("sliced", [1, 2], layout=sliced),
        sample("transposed", [2, 2], layout=transposed),
        sample("infinity", [1, 2], first=[1.0, -math.inf]),
        sample("nan", [1, 2], first=[1.0, math.nan]),
        sample("smallest-and-largest", [1, 2], first=[6e-8, -6e-8, 0, 0, 0, 0, 0, 0]),
    ]


# --- random calls ----------------------------------------------------------------------------------------------------


@st.composite
def _counts(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))


def _draw_swiglu(version: int) -> Callable[[st.DrawFn], Inputs]:
    def draw_inputs(draw: st.DrawFn) -> Inputs:
        kinds = [("int8", "int8"), ("int8", "int4"), ("int4", "int4")][: 2 if version == 1 else 3]
        x, weight = draw(st.sampled_from(kinds))
        in_tiles = draw(st.booleans())
        options: dict[str, Any] = {"x": x, "weight": weight, "in_tiles": in_tiles, "version": version}
        if in_tiles:
            options |= {"k": 16 * draw(st.integers(1, 2)), "n": 32 if weight == "int8" else 64}
        else:
            step = 8 if x == "int4" else 2
            options["k"] = step * draw(st.integers(1, 3))
            options["n"] = (2 if weight == "int8" else 8) * draw(st.integers(1, 3))
        if (x, weight) == ("int8", "int4"):
            lengths = [groups for groups in (1, 2, 3, 4) if options["k"] % (2 * groups) == 0]
            options["groups"] = draw(st.sampled_from([None, *lengths]))
        if weight == "int8":
            options["scale_dtype"] = draw(st.sampled_from((F32, F16, BF16)))
        if version == 2:
            options["group_list_type"] = draw(st.sampled_from((0, 1)))
            if x == "int4":
                options["smooth"] = draw(st.sampled_from((None, "columns", "experts")))
        return swiglu_inputs(draw(_counts()), extra_rows=draw(st.integers(0, 2)), **options)

    return draw_inputs


def _draw_finalize(draw: st.DrawFn) -> Inputs:
    counts, extra_rows = draw(_counts()), draw(st.integers(0, 2))
    rows = sum(counts) + extra_rows
    tokens = draw(st.integers(0, rows))
    batch = tokens or rows
    shared = draw(st.one_of(st.none(), st.integers(0, batch)))
    weight = draw(st.sampled_from(("int8", "int4")))
    return finalize_inputs(
        counts,
        extra_rows=extra_rows,
        tokens=tokens,
        weight=weight,
        k=draw(st.integers(1, 20)),
        n=8 * draw(st.integers(1, 2)),
        shared=shared,
        shared_input_offset=draw(st.integers(0, batch - (shared or 0))),
        shared_input_weight=draw(st.sampled_from((0.5, 1.0, -2.0, 0.1))),
        scale_dtype=draw(st.sampled_from((F32, BF16))),
        with_bias=draw(st.booleans()),
        with_offset=draw(st.booleans()),
        factors=draw(st.sampled_from(((), ("logit",), ("pertoken_scale",), ("pertoken_scale", "logit")))),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        group_list_type=draw(st.sampled_from((0, 1))),
    )


def _draw_add(draw: st.DrawFn) -> Inputs:
    return add_inputs(
        draw(_counts()),
        m=draw(st.integers(1, 4)),
        n=draw(st.integers(1, 4)),
        extra_rows=draw(st.integers(0, 2)),
        flat=draw(st.booleans()),
        dtype=draw(st.sampled_from((F16, BF16))),
    )


def _draw_dequant(draw: st.DrawFn) -> Inputs:
    return dequant_inputs(
        draw(_counts()),
        k=draw(st.integers(1, 20)),
        n=draw(st.integers(1, 4)),
        extra_rows=draw(st.integers(0, 2)),
        scale=draw(st.booleans()),
        smooth=draw(st.booleans()),
        quant_mode=draw(st.sampled_from(("pertoken", "pertensor", None))),
    )


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_grouped_matmul_swiglu_quant": _draw_swiglu(1),
    "npu_grouped_matmul_swiglu_quant_v2": _draw_swiglu(2),
    "npu_grouped_matmul_finalize_routing": _draw_finalize,
    "npu_grouped_matmul_add": _draw_add,
    "npu_grouped_matmul_add_": _draw_add,
    "npu_quant_grouped_matmul_dequant": _draw_dequant,
}

SAMPLES = [*_swiglu_samples(), *_finalize_samples(), *_add_samples(), *_dequant_samples()]

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_grouped_matmul_swiglu_quant": fused_matmul.grouped_matmul_swiglu_quant,
    "npu_grouped_matmul_swiglu_quant_v2": fused_matmul.grouped_matmul_swiglu_quant_v2,
    "npu_grouped_matmul_finalize_routing": fused_matmul.grouped_matmul_finalize_routing,
    "npu_grouped_matmul_add": fused_matmul.grouped_matmul_add,
    "npu_grouped_matmul_add_": fused_matmul.grouped_matmul_add,
    "npu_quant_grouped_matmul_dequant": fused_matmul.quant_grouped_matmul_dequant,
}
