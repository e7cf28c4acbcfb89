"""Samples of swiglu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import swiglu
from tests.ops.samples.base import BF16, F16, F32, F64, Inputs, Layout, Sample, Values, contiguous, sliced, transposed


def _swiglu_samples() -> list[Sample]:
    def inputs(*shape: int, dim: int = -1, dtype: torch.dtype = F32, layout: Layout = contiguous) -> Inputs:
        return (layout(Values().normal(*shape, dtype=dtype)),), {"dim": dim}

    def backward_inputs(*shape: int, dim: int = -1, dtype: torch.dtype = F32, layout: Layout = contiguous) -> Inputs:
        input = Values().normal(*shape, dtype=dtype)
        grad = input.narrow(dim, 0, input.size(dim) // 2).flip(0)
        return (layout(grad), layout(input)), {"dim": dim}

    shapes: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "last-dim": ((4, 6), {}),
        "first-dim": ((4, 3), {"dim": 0}),
        "vector": ((6,), {}),
        "middle-dim": ((2, 4, 3), {"dim": -2}),
        "eight-dims": ((1, 2, 1, 2, 1, 1, 2, 2), {"dim": 3}),
        "no-rows": ((0, 6), {}),
        "no-columns": ((3, 0), {}),
        "sliced": ((3, 4), {"layout": sliced}),
        "transposed": ((3, 4), {"layout": transposed}),
        "channels-last": ((2, 4, 3, 2), {"layout": lambda t: t.to(memory_format=torch.channels_last), "dim": 1}),
        "expanded": ((3, 4), {"layout": lambda t: t[:1].expand_as(t)}),
        "float16": ((5, 18), {"dtype": F16}),
        "bfloat16": ((5, 18), {"dtype": BF16}),
        "float64": ((2, 4), {"dtype": F64}),
    }
    samples, traced = [], ("last-dim", "no-rows", "channels-last")
    for id, (shape, options) in shapes.items():
        rows = (lambda num_rows: inputs(num_rows, 6)) if id == "last-dim" else None
        grad_rows = (lambda num_rows: backward_inputs(num_rows, 6)) if id == "last-dim" else None
        make = lambda shape=shape, options=options: inputs(*shape, **options)  # noqa: E731
        make_backward = lambda shape=shape, options=options: backward_inputs(*shape, **options)  # noqa: E731
        samples += [
            Sample("npu_swiglu", id, make, 1, ("input",), rows, id in traced),
            Sample("npu_swiglu_backward", id, make_backward, 4, ("grad_output", "input"), grad_rows, id in traced),
        ]
    return samples


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {}

SAMPLES = _swiglu_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_swiglu": swiglu.swiglu,
    "npu_swiglu_backward": swiglu.swiglu_backward,
}
