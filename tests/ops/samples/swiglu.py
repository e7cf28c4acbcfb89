"""Samples of swiglu."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import swiglu
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


def _clipped_samples() -> list[Sample]:
    def inputs(
        *shape: int,
        dtype: torch.dtype = F32,
        layout: Layout = contiguous,
        counts: Sequence[int] | None = None,
        poisoned_from: int | None = None,
        **options: Any,
    ) -> Inputs:
        x = 2 * Values().normal(*shape, dtype=dtype)
        if poisoned_from is not None:
            x[poisoned_from:] = math.nan
        if counts is not None:
            options["group_index"] = int64(counts)
        return (layout(x),), {"limit": 1.5, **options}

    def sample(id: str, *shape: int, with_rows: Callable[[int], Inputs] | None = None, **options: Any) -> Sample:
        traced = id in ("interleaved", "halves-by-group", "no-rows", "middle-dim")
        return Sample("npu_clipped_swiglu", id, lambda: inputs(*shape, **options), 4, ("x",), with_rows, traced)

    def rows_of_groups(num_rows: int) -> Inputs:
        return inputs(num_rows, 8, counts=[1, 0, num_rows - 2], poisoned_from=num_rows - 1, interleaved=False)

    plain = {"limit": 7.0, "alpha": 1.702, "bias": 1.0}
    return [
        sample("interleaved", 4, 6, with_rows=lambda num_rows: inputs(num_rows, 6)),
        sample("halves", 4, 6, interleaved=False),
        sample("other-numbers", 3, 8, alpha=0.75, limit=0.8, bias=-0.25),
        sample("plain-numbers", 3, 8, **plain),
        sample("halves-by-group", 5, 8, counts=[1, 0, 3], poisoned_from=4, interleaved=False, with_rows=rows_of_groups),
        sample("interleaved-by-group", 5, 4, counts=[2], poisoned_from=2),
        sample("counts-past-the-rows", 3, 4, counts=[2, 5]),
        sample("counts-of-nothing", 3, 4, counts=[0, 0], poisoned_from=0),
        sample("no-counts", 3, 4, counts=[]),
        sample("middle-dim", 2, 4, 3, dim=1),
        sample("middle-dim-halves", 2, 4, 3, dim=-2, interleaved=False),
        sample("middle-dim-by-group", 2, 3, 2, 3, dim=-2, counts=[1, 3]),
        sample("first-dim", 4, 3, dim=0),
        sample("first-dim-by-group", 4, 3, dim=-2, counts=[1]),
        sample("no-rows", 0, 6),
        sample("no-columns", 3, 0),
        sample("no-trailing-columns", 3, 2, 0, dim=1),
        sample("sliced", 3, 4, layout=sliced),
        sample("transposed", 3, 4, layout=transposed),
        sample("expanded", 3, 4, layout=lambda x: x[:1].expand_as(x)),
        sample("float16", 5, 18, dtype=F16),
        sample("bfloat16", 5, 18, dtype=BF16, interleaved=False, counts=[2, 1], poisoned_from=3),
        sample("float64", 2, 4, dtype=F64),
    ]


def _drawn(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A tensor and a dim of it with an even size."""
    shape = draw(st.lists(st.integers(0, 4), min_size=2, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] *= 2
    dtype = draw(st.sampled_from((F16, BF16, F32)))
    input = 2 * Values(draw(st.integers(0, 1000))).normal(*shape, dtype=dtype)
    layout = draw(st.sampled_from((contiguous, sliced, transposed)))
    return layout(input), draw(st.sampled_from((dim, dim - len(shape))))


def _draw_swiglu(draw: st.DrawFn) -> Inputs:
    input, dim = _drawn(draw)
    return (input,), {"dim": dim}


def _draw_swiglu_backward(draw: st.DrawFn) -> Inputs:
    input, dim = _drawn(draw)
    return (input.narrow(dim, 0, input.size(dim) // 2).cos(), input), {"dim": dim}


def _draw_clipped_swiglu(draw: st.DrawFn) -> Inputs:
    x, dim = _drawn(draw)
    options: dict[str, Any] = {"dim": dim, "interleaved": draw(st.booleans())}
    if draw(st.booleans()):
        options["group_index"] = int64(draw(st.lists(st.integers(0, 6), max_size=3)))
    for name, values in {"alpha": (0.0, 0.5, 1.702), "limit": (0.5, 2.0, 7.0), "bias": (-1.5, 0.0, 1.0)}.items():
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from(values))
    return (x,), options


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_swiglu": _draw_swiglu,
    "npu_swiglu_backward": _draw_swiglu_backward,
    "npu_clipped_swiglu": _draw_clipped_swiglu,
}

SAMPLES = [*_swiglu_samples(), *_clipped_samples()]

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_swiglu": swiglu.swiglu,
    "npu_swiglu_backward": swiglu.swiglu_backward,
    "npu_clipped_swiglu": swiglu.clipped_swiglu,
}
