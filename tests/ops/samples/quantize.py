"""Samples of quantization, packing and formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import common, quantize
from tests.ops.samples.base import BF16, F16, F32, Inputs, Layout, Sample, Values, contiguous, sliced, transposed

I8, U8, I32 = torch.int8, torch.uint8, torch.int32
INT4 = torch.quint4x2
MODES = ("pertoken", "perchannel", "pertensor")

# --- by the own range ------------------------------------------------------------------------------------------------


def _dynamic_inputs(
    *shape: int,
    dtype: torch.dtype = BF16,
    layout: Layout = contiguous,
    smooth: tuple[int, ...] = (),
    groups: Sequence[int] = (),
    factor: float = 1.0,
    first: Sequence[float] = (),
    **options: Any,
) -> Inputs:
    values = Values()
    input = values.normal(*shape, dtype=dtype) * factor
    input.view(-1)[: len(first)] = torch.tensor(first, dtype=dtype)
    if input.dim() and input.size(0) > 1:
        input[1] = 0
    if smooth:
        options["smooth_scales"] = values.positive(*smooth, dtype=dtype)
    if groups:
        options["group_index"] = torch.tensor(groups, dtype=I32)
    return (layout(input),), options


def _dynamic_samples() -> list[Sample]:
    samples = []

    def sample(id: str, *shape: int, with_rows: Any = None, **options: Any) -> None:
        make = lambda: _dynamic_inputs(*shape, **options)  # noqa: E731
        names = ("npu_dynamic_quant", "npu_dynamic_quant_asymmetric")
        samples.extend(Sample(name, id, make, 1, (), with_rows, is_traced=id != "nan") for name in names)

    sample("bfloat16", 5, 9, with_rows=lambda num_rows: _dynamic_inputs(num_rows, 9))
    sample("float16", 5, 9, dtype=F16)
    for mode in MODES:
        sample(f"{mode}-three-dims", 2, 3, 5, quant_mode=mode)
        sample(f"{mode}-int4", 3, 16, quant_mode=mode, dst_type=INT4)
        sample(f"{mode}-no-rows", 0, 8, quant_mode=mode)
        sample(f"{mode}-no-columns", 3, 0, quant_mode=mode)
    sample("int4-no-rows", 0, 16, dst_type=INT4)
    sample("int4-no-columns", 3, 0, dst_type=INT4)
    sample("smooth", 4, 6, smooth=(6,), dtype=F16)
    sample("smooth-perchannel", 2, 4, 6, smooth=(4,), quant_mode="perchannel")
    sample("smooth-by-group", 6, 5, smooth=(3, 5), groups=(2, 2, 6))
    sample("smooth-by-group-three-dims", 2, 3, 5, smooth=(2, 5), groups=(1, 6), quant_mode="pertensor")
    sample("smooth-by-group-no-rows", 0, 5, smooth=(2, 5), groups=(0, 0))
    sample("sliced", 4, 6, layout=sliced)
    sample("transposed", 4, 6, layout=transposed)
    sample("smallest-values", 3, 6, factor=1e-39)
    sample("nan", 3, 6, first=[1.0, math.nan])
    sample("infinity", 3, 6, first=[1.0, -math.inf, 0.0])
    sample("largest-values", 3, 6, dtype=F16, factor=15000.0)
    return samples


def _draw_dynamic(draw: st.DrawFn) -> Inputs:
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    options: dict[str, Any] = {"quant_mode": draw(st.sampled_from(MODES))}
    if draw(st.booleans()):
        shape[-1] = 8 * draw(st.integers(1, 2))
        options["dst_type"] = INT4
    is_per_channel = options["quant_mode"] == "perchannel"
    if draw(st.booleans()):
        options["smooth"] = (shape[-2] if is_per_channel else shape[-1],)
        if draw(st.booleans()) and not is_per_channel:
            rows = math.prod(shape[:-1])
            ends = [*sorted(draw(st.lists(st.integers(0, rows), max_size=3))), rows]
            options["groups"], options["smooth"] = ends, (len(ends), shape[-1])
    return _dynamic_inputs(
        *shape,
        dtype=draw(st.sampled_from((BF16, F16))),
        layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        **options,
    )


# --- with given scales -----------------------------------------------------------------------------------------------


def _quantize_inputs(
    *shape: int,
    scales: tuple[int, ...],
    dtype: Any,
    axis: int | None = None,
    div_mode: bool | None = None,
    input_dtype: torch.dtype = F32,
    scale_dtype: torch.dtype | None = None,
    zero: torch.dtype | None = None,
    factor: float = 5.0,
    first: Sequence[float] = (),
    layout: Layout = contiguous,
) -> Inputs:
    values = Values()
    input = factor * values.normal(*shape, dtype=input_dtype)
    input.view(-1)[: len(first)] = torch.tensor(first, dtype=input_dtype)
    scale = values.positive(*scales, dtype=scale_dtype or (F32 if div_mode in (None, True) else input_dtype))
    zeros = None
    if zero is not None:
        zeros = (
            3 * values.normal(*scales, dtype=zero)
            if zero.is_floating_point
            else values.integers(0, 9, *scales, dtype=zero)
        )
        if zero.is_floating_point and div_mode in (None, True):
            zeros = zeros.round()
    options: dict[str, Any] = {} if axis is None else {"axis": axis}
    if div_mode is not None:
        options["div_mode"] = div_mode
    return (layout(input), scale, zeros, dtype), options


def _quantize_samples() -> list[Sample]:
    def sample(id: str, *shape: int, with_rows: Any = None, **options: Any) -> Sample:
        make = lambda: _quantize_inputs(*shape, **options)  # noqa: E731
        return Sample("npu_quantize", id, make, 1, (), with_rows)

    by = {"div_mode": False}
    return [
        sample(
            "divided",
            5,
            6,
            scales=(6,),
            zero=I32,
            dtype=torch.qint8,
            with_rows=lambda num_rows: _quantize_inputs(num_rows, 6, scales=(6,), zero=I32, dtype=torch.qint8),
        ),
        sample("divided-per-tensor", 7, scales=(1,), dtype=torch.quint8, zero=U8),
        sample("divided-scalar", scales=(), dtype=I8),
        sample("divided-axis-0", 3, 4, scales=(3,), dtype=U8, axis=0, zero=I8, input_dtype=F16),
        sample("divided-last-axis-of-three", 2, 3, 4, scales=(4,), dtype=12, axis=-1),
        sample("divided-int32", 3, 4, scales=(4,), dtype=I32, zero=I32, factor=1e8),
        sample("divided-qint32-overflow", 3, 4, scales=(4,), dtype=torch.qint32, zero=I32, factor=1e12),
        sample("divided-bfloat16", 3, 4, scales=(4,), dtype=I8, input_dtype=BF16, scale_dtype=BF16, zero=BF16),
        sample("divided-special", 2, 4, scales=(4,), dtype=I8, first=[math.nan, math.inf, -math.inf, 2.5]),
        sample("divided-empty", 0, 4, scales=(4,), dtype=I8),
        sample("divided-transposed", 4, 6, scales=(6,), dtype=I8, layout=transposed),
        sample(
            "multiplied",
            5,
            6,
            scales=(6,),
            zero=F32,
            dtype=torch.qint8,
            with_rows=lambda num_rows: _quantize_inputs(num_rows, 6, scales=(6,), zero=F32, dtype=torch.qint8, **by),
            **by,
        ),
        sample("multiplied-saturates", 3, 4, scales=(1,), dtype=1, factor=200.0, axis=7, **by),
        sample("multiplied-axis-second-to-last", 2, 3, 4, scales=(3,), dtype=I8, axis=-2, zero=F32, **by),
        sample("multiplied-same-rank", 2, 3, 4, scales=(1, 1, 4), dtype=I8, axis=0, zero=BF16, input_dtype=BF16, **by),
        sample("multiplied-same-rank-axis-2", 2, 3, 4, scales=(1, 3, 1), dtype=I8, axis=-2, input_dtype=F16, **by),
        sample("multiplied-int4", 3, 16, scales=(16,), dtype=INT4, zero=F16, input_dtype=F16, **by),
        sample("multiplied-int4-as-int32", 2, 3, 8, scales=(1,), dtype=I32, input_dtype=BF16, **by),
        sample("multiplied-int4-empty", 0, 8, scales=(8,), dtype=INT4, **by),
        sample("multiplied-vector-sliced", 6, scales=(6,), dtype=I8, layout=sliced, **by),
        sample("multiplied-special", 2, 4, scales=(4,), dtype=I8, first=[math.nan, math.inf, -math.inf, 2.5], **by),
    ]


def _draw_quantize(draw: st.DrawFn) -> Inputs:
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    input_dtype = draw(st.sampled_from((F32, F16, BF16)))
    div_mode = draw(st.booleans())
    if div_mode:
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        dtype = draw(st.sampled_from((I8, U8, I32, torch.qint8, torch.quint8, torch.qint32, 0, 1, 3, 13)))
        zero = draw(st.sampled_from((None, I8, U8, I32)))
        scales = (shape[axis],)
    else:
        axis = draw(st.integers(-2 if len(shape) > 1 else -1, 4))
        dtype = draw(st.sampled_from((I8, torch.qint8, INT4, I32, 3, 16)))
        if dtype in (INT4, I32, 3, 16):
            shape[-1] = 8
        zero = draw(st.sampled_from((None, input_dtype)))
        effective = -2 if axis == -2 else -1
        scales = (shape[effective],)
        if draw(st.booleans()):
            scales = tuple(shape[effective] if dim == len(shape) + effective else 1 for dim in range(len(shape)))
    if draw(st.booleans()):
        scales = (1,)
    return _quantize_inputs(
        *shape, scales=scales, dtype=dtype, axis=axis, div_mode=div_mode, input_dtype=input_dtype, zero=zero
    )


def _anti_inputs(
    *shape: int,
    channels: int,
    dtype: torch.dtype = I8,
    scale_dtype: torch.dtype = F32,
    has_offset: bool = True,
    layout: Layout = contiguous,
    **options: Any,
) -> Inputs:
    values = Values()
    x = values.integers(-128, 127, *shape)
    if dtype == I32:
        x = common.pack_int4(values.integers(-8, 7, *shape))
    scale = values.positive(channels, dtype=scale_dtype)
    if has_offset:
        options["offset"] = 3 * values.normal(channels, dtype=scale_dtype)
    return (layout(x), scale), options


def _anti_samples() -> list[Sample]:
    def sample(id: str, *shape: int, with_rows: Any = None, has_offset: bool = True, **options: Any) -> Sample:
        make = lambda: _anti_inputs(*shape, has_offset=has_offset, **options)  # noqa: E731
        differentiable = ("scale", "offset") if has_offset else ("scale",)
        return Sample("npu_anti_quant", id, make, math.prod(shape), differentiable, with_rows)

    return [
        sample("int8", 4, 6, channels=6, with_rows=lambda num_rows: _anti_inputs(num_rows, 6, channels=6)),
        sample("per-tensor", 2, 3, 4, channels=1, dst_dtype=BF16),
        sample("vector-no-offset", 5, channels=5, has_offset=False, src_dtype=I8),
        sample("eight-dims", 1, 2, 1, 1, 2, 1, 1, 3, channels=3, scale_dtype=BF16, dst_dtype=BF16),
        sample("int4", 3, 16, channels=16, dtype=I32, src_dtype=INT4),
        sample("int4-per-tensor", 2, 2, 8, channels=1, dtype=I32, dst_dtype=15),
        sample("empty", 0, 4, channels=4),
        sample("transposed", 4, 6, channels=6, layout=transposed),
    ]


def _draw_anti(draw: st.DrawFn) -> Inputs:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dtype = draw(st.sampled_from((I8, I32)))
    if dtype == I32:
        shape[-1] *= 8
    options: dict[str, Any] = {"dst_dtype": draw(st.sampled_from((None, F16, BF16, 5, 15)))}
    if draw(st.booleans()):
        options["src_dtype"] = I8 if dtype == I8 else INT4
    return _anti_inputs(
        *shape,
        channels=draw(st.sampled_from((1, shape[-1]))),
        dtype=dtype,
        scale_dtype=draw(st.sampled_from((F32, BF16))),
        has_offset=draw(st.booleans()),
        **options,
    )


# --- words and formats -----------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -0.5, 0.1, 0.3, math.inf, -math.inf, 1e-40, -1e-40, 3.4e38, 1.00048828125, 1.99951171875]


def _word_inputs(
    scale: tuple[int, ...], offset: tuple[int, ...] | None = None, first: Sequence[float] = (), **options: Any
) -> Inputs:
    values = Values()
    scales = values.normal(*scale)
    scales.view(-1)[: len(first)] = torch.tensor(first, dtype=F32)
    if offset is not None:
        options["offset"] = 150 * values.normal(*offset)
    return (scales,), options


def _word_samples() -> list[Sample]:
    def words(id: str, *args: Any, with_rows: Any = None, **options: Any) -> Sample:
        make = lambda: _word_inputs(*args, **options)  # noqa: E731
        return Sample("npu_trans_quant_param", id, make, 1, (), with_rows)

    def packed(id: str, *shape: int, with_rows: Any = None) -> Sample:
        make = lambda: ((Values().integers(-8, 7, *shape, dtype=I32),), {})  # noqa: E731
        return Sample("npu_convert_weight_to_int4pack", id, make, 1, (), with_rows)

    def packed_rows(num_rows: int) -> Inputs:
        return (Values().integers(-8, 7, num_rows, 8, dtype=I32),), {}

    return [
        words("vector", (5,), with_rows=lambda num_rows: _word_inputs((num_rows,))),
        words("special", (len(SPECIAL),), first=SPECIAL),
        words("special-rounded", (len(SPECIAL),), first=SPECIAL, round_mode=1),
        words("rounded", (64,), round_mode=1),
        words("offset", (5,), (5,), round_mode=None),
        words("one-scale", (1,), (4,)),
        words("one-offset", (4,), (1,), round_mode=1),
        words("one-row", (1, 5), (1, 5)),
        words("rows", (3, 5)),
        words("column", (3, 1), round_mode=1),
        words("rows-offset", (3, 5), (3, 5)),
        packed("two-dims", 5, 16, with_rows=packed_rows),
        packed("three-dims", 2, 3, 8),
    ]


def _draw_words(draw: st.DrawFn) -> Inputs:
    n = draw(st.integers(1, 6))
    forms: list[tuple[Any, Any]] = [((n,), None), ((n,), (n,)), ((1,), (n,)), ((n,), (1,)), ((1, n), None)]
    scale, offset = draw(st.sampled_from([*forms, ((1, n), (1, n)), ((2, n), None)]))
    return _word_inputs(scale, offset, round_mode=draw(st.sampled_from((None, 0, 1))))


def _draw_packed(draw: st.DrawFn) -> Inputs:
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    return (Values().integers(-20, 20, *shape, 8 * draw(st.integers(1, 3)), dtype=I32),), {}


def _format_inputs(*shape: int, dtype: torch.dtype = F32, acl_format: int = 29) -> Inputs:
    return (Values().normal(*shape, dtype=dtype), acl_format), {}


def _format_samples() -> list[Sample]:
    def both(id: str, *shape: int, with_rows: Any = None, **options: Any) -> list[Sample]:
        make = lambda: _format_inputs(*shape, **options)  # noqa: E731
        return [
            Sample("npu_format_cast", id, make, 1, ("input",), with_rows),
            Sample("npu_format_cast_", id, make, 1, (), with_rows, mutates=("input",)),
        ]

    return [
        *both("nz", 4, 6, with_rows=lambda num_rows: _format_inputs(num_rows, 6)),
        *both("nd-vector", 5, acl_format=2),
        *both("bfloat16", 2, 3, 4, dtype=BF16),
        *both("empty", 0, 4),
    ]


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_dynamic_quant": _draw_dynamic,
    "npu_dynamic_quant_asymmetric": _draw_dynamic,
    "npu_quantize": _draw_quantize,
    "npu_anti_quant": _draw_anti,
    "npu_trans_quant_param": _draw_words,
    "npu_convert_weight_to_int4pack": _draw_packed,
}

SAMPLES = [
    *_dynamic_samples(),
    *_quantize_samples(),
    *_anti_samples(),
    *_word_samples(),
    *_format_samples(),
]

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_dynamic_quant": quantize.dynamic_quant,
    "npu_dynamic_quant_asymmetric": quantize.dynamic_quant_asymmetric,
    "npu_quantize": quantize.quantize,
    "npu_anti_quant": quantize.anti_quant,
    "npu_trans_quant_param": quantize.trans_quant_param,
    "npu_convert_weight_to_int4pack": quantize.int4pack,
    "npu_format_cast": quantize.format_cast,
    "npu_format_cast_": quantize.format_cast,
}
