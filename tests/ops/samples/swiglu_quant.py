"""Samples of SwiGLU with quantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import swiglu_quant
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

I32 = torch.int32
INT4 = torch.quint4x2


def _quant_inputs(
    *shape: int,
    dtype: torch.dtype = F32,
    layout: Layout = contiguous,
    smooth: tuple[int, ...] = (),
    offset: tuple[int, ...] = (),
    groups: Sequence[int] | None = None,
    first: Sequence[float] = (),
    poisoned_from: int | None = None,
    factor: float = 1.0,
    **options: Any,
) -> Inputs:
    values = Values()
    x = values.normal(*shape, dtype=dtype)
    x.view(-1)[: len(first)] = torch.tensor(first, dtype=dtype)
    if x.size(0) > 1:
        x[1] = 0
    if poisoned_from is not None:
        x[poisoned_from:] = math.nan
    if smooth:
        options["smooth_scales"] = factor * values.positive(*smooth)
    if offset:
        options["offsets"] = 3 * values.normal(*offset)
    if groups is not None:
        options["group_index"] = torch.tensor(groups, dtype=I32)
    return (layout(x),), options


def _quant_samples() -> list[Sample]:
    def sample(id: str, *shape: int, with_rows: Any = None, **options: Any) -> Sample:
        make = lambda: _quant_inputs(*shape, **options)  # noqa: E731
        return Sample("npu_swiglu_quant", id, make, 4, (), with_rows, is_traced=id != "dynamic-nan")

    static = {"factor": 40.0, "quant_mode": 0}
    dynamic = {"quant_mode": 1}
    by_counts = {"groups": (2, 0, 3), "group_list_type": 1}

    def rows_of_groups(num_rows: int) -> Inputs:
        return _quant_inputs(
            num_rows, 12, smooth=(3, 6), groups=three_experts(num_rows - 1), group_list_type=1, quant_mode=1
        )

    return [
        sample("static", 5, 8, smooth=(1, 4), offset=(1, 4), **static),
        sample("static-float16", 5, 8, smooth=(1,), offset=(1,), dtype=F16, activate_left=True, **static),
        sample("static-bare", 5, 8, factor=1.0, quant_mode=0),
        sample("static-smooth-alone", 5, 8, smooth=(1, 4), **static),
        sample("static-offset-alone", 5, 8, offset=(1,)),
        sample("static-by-sums", 5, 6, smooth=(3, 3), offset=(3, 3), groups=(2, 2, 5), **static),
        sample(
            "static-by-counts",
            5,
            6,
            smooth=(3,),
            offset=(3,),
            poisoned_from=4,
            **{**static, **by_counts, "groups": (1, 0, 3)},
        ),
        sample("static-infinities", 3, 4, first=[math.inf, 1.0, 1.0, -math.inf], **static),
        sample("dynamic", 5, 8, with_rows=lambda num_rows: _quant_inputs(num_rows, 8, quant_mode=1), **dynamic),
        sample("dynamic-left", 5, 8, activate_left=True, **dynamic),
        sample("dynamic-bfloat16", 4, 18, dtype=BF16, smooth=(1, 9), **dynamic),
        sample("dynamic-ignores-offsets", 4, 6, smooth=(1, 3), offset=(7,), **dynamic),
        sample(
            "dynamic-by-counts", 6, 8, smooth=(3, 4), poisoned_from=5, with_rows=rows_of_groups, **dynamic, **by_counts
        ),
        sample("dynamic-by-sums", 6, 8, smooth=(2,), groups=(4, 6), **dynamic),
        sample("dynamic-groups-alone", 6, 8, groups=(1, 3), poisoned_from=3, **dynamic),
        sample("dynamic-three-dims-by-group", 2, 3, 4, smooth=(2, 2), groups=(1, 5), **dynamic),
        sample("dynamic-nan", 3, 4, first=[math.nan, 1.0, 2.0, 3.0], **dynamic),
        sample("dynamic-infinity", 3, 4, first=[math.inf, 1.0, 2.0, 3.0], **dynamic),
        sample("dynamic-no-groups", 3, 4, groups=(), poisoned_from=0, **dynamic),
        sample("int4-dynamic", 5, 8, dst_type=INT4, activate_left=True, **dynamic),
        sample("int4-static", 5, 12, dst_type=INT4, smooth=(1, 6), offset=(1, 6), factor=2.0),
        sample("int4-by-group", 5, 8, dst_type=16, smooth=(2,), groups=(2, 4), poisoned_from=4, dtype=F16, **dynamic),
        sample("static-no-rows", 0, 8, smooth=(1, 4), offset=(1, 4), **static),
        sample("dynamic-no-rows", 0, 2, 8, **dynamic),
        sample("dynamic-no-columns", 3, 0, **dynamic),
        sample("static-no-columns", 3, 0, **static),
        sample("int4-no-columns", 3, 0, dst_type=INT4, **dynamic),
        sample("sliced", 4, 8, layout=sliced, **dynamic),
        sample("transposed", 4, 8, layout=transposed, smooth=(1, 4), **static),
    ]


def _dequant_inputs(
    *shape: int,
    dtype: torch.dtype = I32,
    layout: Layout = contiguous,
    weight: tuple[int, ...] = (),
    rows: tuple[int, ...] = (),
    bias: tuple[tuple[int, ...], torch.dtype] | None = None,
    quant: tuple[int, ...] = (),
    quant_dtype: torch.dtype = F32,
    divisor: float = 1.0,
    zero_divisor: bool = False,
    offset: tuple[int, ...] = (),
    counts: Sequence[int] | None = None,
    poisoned_from: int | None = None,
    largest: int = 60,
    **options: Any,
) -> Inputs:
    values = Values()
    x = (
        values.integers(-largest, largest, *shape, dtype=I32)
        if dtype == I32
        else 2 * values.normal(*shape, dtype=dtype)
    )
    if x.size(0) > 1:
        x[1] = 0
    if poisoned_from is not None:
        x[poisoned_from:] = math.nan if x.is_floating_point() else 2**31 - 1
    if weight:
        options["weight_scale"] = values.positive(*weight) * (2.0 / largest)
    if rows:
        options["activation_scale"] = values.positive(*rows)
    if poisoned_from is not None and rows:
        options["activation_scale"][poisoned_from:] = math.nan
    if bias is not None:
        bias_shape, bias_dtype = bias
        is_integer = bias_dtype == I32
        options["bias"] = values.integers(-90, 90, *bias_shape, dtype=I32) if is_integer else values.normal(*bias_shape)
        options["bias"] = options["bias"].to(bias_dtype)
    if quant:
        options["quant_scale"] = (values.positive(*quant) * divisor).to(quant_dtype)
        if zero_divisor:
            options["quant_scale"].view(-1)[0] = 0.0
    if offset:
        options["quant_offset"] = 3 * values.normal(*offset)
    if counts is not None:
        options["group_index"] = int64(counts)
    return (layout(x),), options


def _dequant_samples() -> list[Sample]:
    def sample(id: str, *shape: int, with_rows: Any = None, **options: Any) -> Sample:
        return Sample("npu_dequant_swiglu_quant", id, lambda: _dequant_inputs(*shape, **options), 4, (), with_rows)

    dynamic, left = {"quant_mode": 1}, {"activate_left": True}
    static = {"quant_mode": 0, "divisor": 0.05}
    groups = {"weight": (3, 8), "rows": (6, 1), "counts": (2, 0, 3), "poisoned_from": 5}
    alone = {"weight": (8,), "rows": (5,)}
    half = {"dtype": BF16}

    def rows_of_groups(num_rows: int) -> Inputs:
        counts = three_experts(num_rows - 1)
        return _dequant_inputs(
            num_rows, 12, weight=(3, 12), rows=(num_rows, 1), counts=counts, quant=(3, 6), quant_mode=1
        )

    return [
        sample("groups-dynamic", 6, 8, quant=(3, 4), with_rows=rows_of_groups, **groups, **dynamic, **left),
        sample("groups-dynamic-unsmoothed", 6, 8, **groups, **dynamic),
        sample("groups-dynamic-half-scale", 6, 8, quant=(3, 4), quant_dtype=BF16, **groups, **dynamic),
        sample("groups-static", 6, 8, quant=(3, 4), offset=(3, 4), **groups, **static, **left),
        sample("groups-static-one-number", 6, 8, quant=(3,), offset=(3,), zero_divisor=True, **groups, **static),
        sample("groups-static-one-column", 6, 8, quant=(3, 1), offset=(3, 1), zero_divisor=True, **groups, **static),
        sample("groups-static-mixed", 6, 8, quant=(3,), offset=(3, 4), **groups, **static),
        sample("groups-static-zero-divisor", 6, 8, quant=(3, 4), zero_divisor=True, **groups, **static),
        sample("groups-bfloat16", 4, 8, quant=(2, 4), counts=(1, 2), poisoned_from=3, **half, **dynamic),
        sample("one-group", 4, 8, weight=(8,), quant=(4,), counts=(3,), poisoned_from=3, **dynamic),
        sample("one-group-static", 4, 8, weight=(1, 8), rows=(4,), quant=(1,), counts=(4,), **static),
        sample("no-groups", 2, 4, weight=(0, 4), rows=(2, 1), counts=(), poisoned_from=0, **dynamic),
        sample("alone", 5, 8, quant=(4,), **alone, **dynamic),
        sample("alone-static", 5, 8, quant=(1,), offset=(1,), **alone, **static),
        sample("alone-static-row", 5, 8, quant=(1, 4), offset=(1, 4), **alone, **static),
        sample("alone-static-bare", 5, 8, **alone),
        sample("alone-static-offset-alone", 5, 8, offset=(1, 4), **alone),
        sample("three-dims", 2, 3, 8, weight=(1, 8), rows=(2, 3, 1), quant=(1, 4), **dynamic),
        sample("three-dims-flat-rows", 2, 3, 8, weight=(8,), rows=(6, 1), **dynamic),
        sample("int32-bias", 5, 8, bias=((8,), I32), **alone, **dynamic),
        sample("int32-bias-of-large-sums", 5, 8, bias=((1, 8), I32), largest=2**29, **alone, **dynamic),
        sample("float32-bias", 5, 8, bias=((8,), F32), **alone, **dynamic),
        sample("float16-bias", 5, 8, bias=((8,), F16), **alone, **dynamic),
        sample("bfloat16-bias", 5, 8, bias=((1, 8), BF16), **alone, **dynamic, **left),
        sample("float16", 5, 8, dtype=F16, quant=(4,), quant_dtype=F16, **dynamic),
        sample("bfloat16", 3, 2, 8, quant=(1, 4), **half, **static, with_rows=lambda n: _dequant_inputs(n, 8, **half)),
        sample("scales-of-halves-are-ignored", 3, 8, weight=(5,), rows=(7,), bias=((1,), F32), **half, **dynamic),
        sample("dynamic-ignores-offsets", 3, 8, offset=(9,), **half, **dynamic),
        sample("interleaved", 6, 8, swiglu_mode=1, quant=(3, 4), clamp_limit=1.5, **groups, **dynamic, **left),
        sample(
            "interleaved-right", 4, 8, swiglu_mode=1, clamp_limit=1.0, glu_alpha=0.5, glu_bias=-0.5, **half, **dynamic
        ),
        sample("clipped-halves", 5, 8, swiglu_mode=2, clamp_limit=0.75, glu_bias=0.0, **alone, **dynamic, **left),
        sample("clipped-halves-right", 5, 8, swiglu_mode=2, clamp_limit=0.75, **alone, **static),
        sample("ignored-options", 3, 8, dst_type=torch.int8, round_mode=0, activate_dim=-1, **half, **dynamic),
        sample("no-rows", 0, 8, weight=(8,), rows=(0, 1), quant=(4,), **dynamic),
        sample("no-rows-of-groups", 0, 8, weight=(2, 8), rows=(0,), counts=(0, 0), **static),
        sample("no-columns", 3, 0, weight=(0,), **dynamic),
        sample("sliced", 5, 8, layout=sliced, **alone, **dynamic),
        sample("transposed", 5, 8, layout=transposed, **alone, **dynamic),
    ]


def _draw_counts(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))


def _draw_swiglu_quant(draw: st.DrawFn) -> Inputs:
    options: dict[str, Any] = {"quant_mode": draw(st.integers(0, 1)), "activate_left": draw(st.booleans())}
    options["dst_type"] = draw(st.sampled_from((None, torch.int8, INT4)))
    columns = draw(st.integers(0, 4)) * 2
    counts = _draw_counts(draw) if draw(st.booleans()) else None
    groups = 1 if counts is None else len(counts)
    shape = [draw(st.integers(0, 5)), columns * 2]
    if counts is not None:
        options["group_list_type"] = draw(st.integers(0, 1))
        sums = torch.tensor(counts).cumsum(0)
        options["groups"] = counts if options["group_list_type"] else sums.tolist()
        shape = [sum(counts) + draw(st.integers(0, 2)), columns * 2]
    elif draw(st.booleans()):
        shape.insert(0, 2)
    factors = draw(st.sampled_from(((groups,), (groups, columns))))
    has_smooth, has_offset = draw(st.booleans()), draw(st.booleans())
    return _quant_inputs(
        *shape,
        dtype=draw(st.sampled_from((F16, BF16, F32))),
        layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        smooth=factors if has_smooth else (),
        offset=factors if has_offset else (),
        factor=draw(st.sampled_from((1.0, 30.0))),
        **options,
    )


def _draw_dequant_swiglu_quant(draw: st.DrawFn) -> Inputs:
    options: dict[str, Any] = {
        name: draw(st.integers(0, 2 if name == "swiglu_mode" else 1)) for name in ("quant_mode", "swiglu_mode")
    }
    options["activate_left"] = draw(st.booleans())
    columns = draw(st.integers(0, 4))
    counts = _draw_counts(draw) if draw(st.booleans()) else None
    groups = 1 if counts is None else len(counts)
    num_rows = draw(st.integers(0, 5)) if counts is None else sum(counts) + draw(st.integers(0, 2))
    dtype = draw(st.sampled_from((I32, I32, F16, BF16)))
    if dtype == I32:
        options["weight"] = (2 * columns,) if groups == 1 and draw(st.booleans()) else (groups, 2 * columns)
        options["rows"] = draw(st.sampled_from(((), (num_rows,), (num_rows, 1))))
        if counts is None and draw(st.booleans()):
            options["bias"] = ((2 * columns,), draw(st.sampled_from((I32, F32, F16, BF16))))
    if draw(st.booleans()):
        one_number = draw(st.sampled_from(((groups,), (groups, 1), (groups, columns))))
        options["quant"] = one_number if options["quant_mode"] == 0 else (groups, columns)
        options["divisor"] = draw(st.sampled_from((0.05, 1.0)))
    if draw(st.booleans()):
        options["offset"] = draw(st.sampled_from(((groups,), (groups, columns))))
    if draw(st.booleans()):
        options["clamp_limit"] = draw(st.sampled_from((0.5, 2.0)))
    layout = draw(st.sampled_from((contiguous, sliced, transposed)))
    return _dequant_inputs(num_rows, 2 * columns, dtype=dtype, layout=layout, counts=counts, **options)


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_swiglu_quant": _draw_swiglu_quant,
    "npu_dequant_swiglu_quant": _draw_dequant_swiglu_quant,
}

SAMPLES = [*_quant_samples(), *_dequant_samples()]

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_swiglu_quant": swiglu_quant.swiglu_quant,
    "npu_dequant_swiglu_quant": swiglu_quant.dequant_swiglu_quant,
}
