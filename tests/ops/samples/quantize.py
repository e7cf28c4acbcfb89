"""Samples of quantize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import common, quantize
from tests.ops.samples.base import BF16, F16, Inputs, Layout, Sample, Values, contiguous, sliced, transposed


def _quantize_samples() -> list[Sample]:
    def inputs(
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
            options["group_index"] = torch.tensor(groups, dtype=torch.int32)
        return (layout(input),), options

    def sample(id: str, *shape: int, with_rows: Any = None, **options: Any) -> Sample:
        make = lambda: inputs(*shape, **options)  # noqa: E731
        return Sample("npu_dynamic_quant", id, make, 1, (), with_rows, is_traced=id != "nan")

    def packed(id: str, *shape: int, with_rows: Any = None) -> Sample:
        make = lambda: ((Values().integers(-8, 7, *shape, dtype=torch.int32),), {})  # noqa: E731
        return Sample("npu_convert_weight_to_int4pack", id, make, 1, (), with_rows)

    def packed_rows(num_rows: int) -> Inputs:
        return (Values().integers(-8, 7, num_rows, 8, dtype=torch.int32),), {}

    modes = ("pertoken", "perchannel", "pertensor")
    return [
        sample("bfloat16", 5, 9, with_rows=lambda num_rows: inputs(num_rows, 9)),
        sample("float16", 5, 9, dtype=F16),
        *[sample(f"{mode}-three-dims", 2, 3, 5, quant_mode=mode) for mode in modes],
        *[sample(f"{mode}-int4", 3, 16, quant_mode=mode, dst_type=torch.quint4x2) for mode in modes],
        *[sample(f"{mode}-no-rows", 0, 8, quant_mode=mode) for mode in modes],
        *[sample(f"{mode}-no-columns", 3, 0, quant_mode=mode) for mode in modes],
        sample("int4-no-rows", 0, 16, dst_type=torch.quint4x2),
        sample("int4-no-columns", 3, 0, dst_type=torch.quint4x2),
        sample("smooth", 4, 6, smooth=(6,), dtype=F16),
        sample("smooth-perchannel", 2, 4, 6, smooth=(4,), quant_mode="perchannel"),
        sample("smooth-by-group", 6, 5, smooth=(3, 5), groups=(2, 2, 6)),
        sample("smooth-by-group-three-dims", 2, 3, 5, smooth=(2, 5), groups=(1, 6), quant_mode="pertensor"),
        sample("smooth-by-group-no-rows", 0, 5, smooth=(2, 5), groups=(0, 0)),
        sample("sliced", 4, 6, layout=sliced),
        sample("transposed", 4, 6, layout=transposed),
        sample("smallest-values", 3, 6, factor=1e-39),
        sample("nan", 3, 6, first=[1.0, math.nan]),
        sample("infinity", 3, 6, first=[1.0, -math.inf, 0.0]),
        sample("largest-values", 3, 6, dtype=F16, factor=15000.0),
        packed("two-dims", 5, 16, with_rows=packed_rows),
        packed("three-dims", 2, 3, 8),
    ]


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {}

SAMPLES = _quantize_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_dynamic_quant": quantize.dynamic_quant,
    "npu_convert_weight_to_int4pack": common.pack_int4,
}
