"""Sample inputs: one named entry per operator and scenario. `test_battery.py` runs everything it has over this table.

Inputs are small and the same at every call. Weights of experts without rows and rows that no group covers are NaN
where a sample says so, since neither may reach a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers.reference import pack_int4

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Sample:
    """One call of a public operator."""

    op_name: str
    id: str
    make: Callable[[], Inputs]
    # terms of the longest sum
    reduction: int = 1
    # names of the arguments that have a gradient
    differentiable: tuple[str, ...] = ()
    # the same call with some number of rows: these samples are compiled and exported with a dynamic number of rows
    with_rows: Callable[[int], Inputs] | None = None
    # whether it differs from other samples in what a compiler sees, rather than in a dtype, a mode or a number
    is_traced: bool = True

    @property
    def name(self) -> str:
        return f"{self.op_name}-{self.id}"


def relayout(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in another dtype with the strides it has, gaps and overlaps included."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    return memory.to(dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class _Values:
    """Random tensors with a seed of their own."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=F64).to(dtype)

    def positive(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return (torch.rand(shape, generator=self._generator, dtype=F64) + 0.5).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        """Uniform in ``low..high``, both ends included."""
        return torch.randint(low, high + 1, shape, generator=self._generator).to(dtype)


def int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def sliced(tensor: Tensor) -> Tensor:
    """The same values as a view of every second column of wider rows."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1))
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    """The same values as a transposed view of contiguous memory."""
    return tensor.mT.contiguous().mT


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


Layout = Callable[[Tensor], Tensor]


# --- grouped_mm ------------------------------------------------------------------------------------------------------


def _grouped_mm(
    counts: Sequence[int],
    *,
    rows: int | None = None,
    k: int = 3,
    n: int = 5,
    dtype: torch.dtype = F32,
    bias: torch.dtype | None = None,
    x_layout: Layout = contiguous,
    weight_layout: Layout = contiguous,
    poison: bool = False,
) -> Inputs:
    values, covered = _Values(), sum(counts)
    x = values.normal(covered if rows is None else rows, k, dtype=dtype)
    weight = values.normal(len(counts), k, n, dtype=dtype)
    if poison:
        x[covered:] = math.nan
        weight[[index for index, count in enumerate(counts) if count == 0]] = math.nan
    options = {} if bias is None else {"bias": values.normal(len(counts), n, dtype=bias)}
    return (x_layout(x), weight_layout(weight), int64(counts)), options


def _grouped_mm_weight_grad(
    counts: Sequence[int], *, rows: int | None = None, dtype: torch.dtype = F32, layout: Layout = contiguous
) -> Inputs:
    values, covered = _Values(), sum(counts)
    x, dy = (values.normal(covered if rows is None else rows, size, dtype=dtype) for size in (3, 5))
    x[covered:] = math.nan
    return (layout(x), layout(dy), int64(counts)), {}


def _three_experts(num_rows: int) -> list[int]:
    return [1, 0, num_rows - 1]


def _grouped_mm_samples() -> list[Sample]:
    wrt = ("x", "weight", "bias")

    def sample(
        id: str, *counts: int, reduction: int = 5, with_rows: Any = None, traced: bool = True, **options: Any
    ) -> Sample:
        return Sample("grouped_mm", id, lambda: _grouped_mm(counts, **options), reduction, wrt, with_rows, traced)

    def with_rows(num_rows: int) -> Inputs:
        return _grouped_mm(_three_experts(num_rows), bias=F32)

    def weight_grad(id: str, *counts: int, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: _grouped_mm_weight_grad(counts, **options)  # noqa: E731
        return Sample("grouped_mm_weight_grad", id, make, 8, ("x", "dy"), with_rows, traced)

    return [
        sample("empty-expert-bias", 2, 0, 3, bias=F32, with_rows=with_rows),
        sample("one-expert", 4),
        sample("all-rows-to-one-expert", 0, 4, 0, traced=False),
        sample("no-rows", 0, 0, bias=F32),
        sample("uncovered-rows-and-unused-weight-are-nan", 2, 0, 1, rows=5, poison=True, traced=False),
        sample("nothing-covered", 0, 0, rows=2, traced=False),
        sample("transposed-weight", 1, 3, weight_layout=transposed, bias=F32),
        sample("sliced-x-and-weight", 1, 3, x_layout=sliced, weight_layout=sliced),
        sample("transposed-x", 1, 3, x_layout=transposed, traced=False),
        sample("one-shared-weight", 1, 2, weight_layout=lambda w: w[:1].expand_as(w), traced=False),
        sample("one-row-one-column", 1, k=1, n=1, bias=F32),
        sample("zero-reduction", 2, 1, k=0, bias=F32, traced=False),
        sample("zero-columns", 2, 1, n=0, bias=F32),
        sample("float16", 2, 0, 5, dtype=F16, bias=F16),
        sample("bfloat16", 2, 0, 5, dtype=BF16, bias=BF16),
        sample("bfloat16-transposed-weight", 2, 0, 5, dtype=BF16, bias=F32, weight_layout=transposed),
        sample("float64", 2, 0, 3, dtype=F64, bias=F64),
        sample("float16-long-reduction-few-rows", 1, 2, 3, 4, 70, k=301, dtype=F16, reduction=301),
        sample("bfloat16-long-reduction-few-rows", 1, 2, 3, 4, 70, k=301, dtype=BF16, reduction=301),
        weight_grad("empty-expert", 2, 0, 3, with_rows=lambda n: _grouped_mm_weight_grad(_three_experts(n))),
        weight_grad("one-expert", 4, traced=False),
        weight_grad("no-rows", 0, 0),
        weight_grad("uncovered-rows-are-nan", 1, 2, rows=5, traced=False),
        weight_grad("sliced", 1, 2, layout=sliced),
        weight_grad("transposed", 1, 2, layout=transposed),
        weight_grad("float16", 4, 0, 7, dtype=F16),
        weight_grad("bfloat16", 4, 0, 7, dtype=BF16),
    ]


# --- npu_grouped_matmul ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatmulRow:
    """One legal combination of dtypes; `scale` and `antiquant` name how the parameters are made."""

    x: torch.dtype
    weight: str  # float, int8, int4
    bias: torch.dtype
    scale: torch.dtype | None = None
    per_token_scale: bool = False
    output_dtype: torch.dtype | None = None


ROWS = {
    "float16": MatmulRow(F16, "float", F16),
    "bfloat16": MatmulRow(BF16, "float", F32),
    "float32": MatmulRow(F32, "float", F32),
    "float64": MatmulRow(F64, "float", F64),
    "int8-to-int8": MatmulRow(torch.int8, "int8", torch.int32, torch.int64),
    "int8-to-bfloat16": MatmulRow(torch.int8, "int8", torch.int32, BF16, output_dtype=BF16),
    "int8-to-float16": MatmulRow(torch.int8, "int8", torch.int32, F32, output_dtype=F16),
    "per-token-bfloat16": MatmulRow(torch.int8, "int8", torch.int32, BF16, True, BF16),
    "per-token-bfloat16-bias": MatmulRow(torch.int8, "int8", BF16, BF16, True, BF16),
    "per-token-float16": MatmulRow(torch.int8, "int8", torch.int32, F32, True, F16),
    "accumulators": MatmulRow(torch.int8, "int8", torch.int32, output_dtype=torch.int32),
    "accumulators-scale-ignored": MatmulRow(torch.int8, "int8", torch.int32, F32, output_dtype=torch.int32),
    "int8-weight-float16": MatmulRow(F16, "int8", F16),
    "int8-weight-bfloat16": MatmulRow(BF16, "int8", F32),
    "int4-weight-float16": MatmulRow(F16, "int4", F16),
    "int4-weight-bfloat16": MatmulRow(BF16, "int4", F32),
}


def scale_words(scale: Tensor, offset: Tensor) -> Tensor:
    """Packed int64 parameters: all 32 bits of the scale, a 9-bit offset at bit 37, the flag at bit 46."""
    bits = scale.float().view(torch.int32).long() & 0xFFFFFFFF
    return bits | ((offset.long() & 0x1FF) << 37) | (1 << 46)


class _Matmul:
    """Draws the tensors of one row of the table."""

    def __init__(self, row: MatmulRow, *, bias: bool, layout: Layout = contiguous, group_length: int = 0) -> None:
        self.row, self.bias, self.layout, self.group_length = row, bias, layout, group_length
        self.values = _Values()

    def x(self, *shape: int) -> Tensor:
        if self.row.x == torch.int8:
            return self.values.integers(-128, 127, *shape)
        return self.values.normal(*shape, dtype=self.row.x)

    def weight(self, *shape: int) -> Tensor:
        if self.row.weight == "int8":
            return self.layout(self.values.integers(-128, 127, *shape))
        if self.row.weight == "int4":
            codes = self.values.integers(-8, 7, *shape)
            return pack_int4(codes.mT.contiguous()).mT if self.layout is transposed else pack_int4(codes)
        return self.layout(self.values.normal(*shape, dtype=self.row.x))

    def parameters(self, shapes: Sequence[tuple[int, ...]], num_rows: int) -> dict[str, Any]:
        """The keyword arguments that go with weights of these logical shapes."""
        row, values = self.row, self.values
        channels = [(*shape[:-2], shape[-1]) for shape in shapes]
        options: dict[str, Any] = {}
        if self.bias and row.bias == torch.int32:
            options["bias"] = [values.integers(-5000, 5000, *shape, dtype=torch.int32) for shape in channels]
        elif self.bias:
            options["bias"] = [values.normal(*shape, dtype=row.bias) for shape in channels]
        if row.scale == torch.int64:
            options["scale"] = [
                scale_words(values.positive(*shape) / 200, values.integers(-9, 9, *shape)) for shape in channels
            ]
        elif row.scale is not None:
            options["scale"] = [(values.positive(*shape) / 20000).to(row.scale) for shape in channels]
        if row.x != torch.int8 and row.weight != "float":
            if self.group_length:
                channels = [(*shape[:-2], shape[-2] // self.group_length, shape[-1]) for shape in shapes]
            options["antiquant_scale"] = [values.positive(*shape, dtype=row.x) for shape in channels]
            options["antiquant_offset"] = [values.normal(*shape, dtype=row.x) for shape in channels]
        if row.per_token_scale:
            options["per_token_scale"] = [values.positive(num_rows)]
        if row.output_dtype is not None:
            options["output_dtype"] = row.output_dtype
        return options


def _ends(counts: Sequence[int]) -> list[int]:
    return [sum(counts[: index + 1]) for index in range(len(counts))]


def matmul_inputs(
    scenario: str,
    row: str,
    counts: Sequence[int] = (2, 0, 3),
    *,
    rows: int | None = None,
    k: int = 8,
    n: int = 16,
    bias: bool = False,
    layout: Layout = contiguous,
    group_length: int = 0,
    rank: int = 2,
    **options: Any,
) -> Inputs:
    """A call of npu_grouped_matmul: x, weight and result are one tensor (s) or a list (m), as named in `scenario`.

    ``ints-`` in front passes the group list as a list of ints. Sizes vary between the tensors of a list where they may.
    """
    draw = _Matmul(ROWS[row], bias=bias, layout=layout, group_length=group_length)
    num_rows, experts = sum(counts) if rows is None else rows, len(counts)
    ints, forms = scenario.startswith("ints-"), scenario.removeprefix("ints-")
    if forms == "k-split":
        x = draw.x(num_rows, k).t()
        weights = [draw.weight(num_rows, n)]
        options = {"split_item": 3, "group_type": 2, "group_list_type": 1, **options}
        return ([x], weights), {"group_list": int64(counts), **options}
    if forms in ("sss", "sms", "smm"):
        x = [draw.x(num_rows, k)]
        shapes = [(k, n + 8 * (forms == "smm") * index) for index in range(experts)]
        if forms == "sss":
            shapes = [(experts, k, n)]
    else:
        factors = [1 if rank > 2 else 2 - index % 2 for index in range(experts)]  # quantisation groups divide K
        shapes = [(k * factor, n + 8 * (forms == "mmm") * index) for index, factor in enumerate(factors)]
        middle = [2, 1, 3, 1][: rank - 2]
        x = [draw.x(count, *middle, shape[0]) for count, shape in zip(counts, shapes, strict=True)]
    weights = [draw.weight(*shape) for shape in shapes]
    given = {**draw.parameters(shapes, num_rows), "split_item": 0 if forms in ("mmm", "smm") else 2, **options}
    if ints:
        return (x, weights), {"group_list": [] if forms == "mmm" else _ends(counts), "group_type": None, **given}
    if forms == "mmm":
        return (x, weights), {"group_type": -1, **given}
    kind = given.setdefault("group_list_type", 0)
    group_list = given.pop("group_list", int64(_ends(counts) if kind == 0 else counts))
    return (x, weights), {"group_list": group_list, "group_type": 0, **given}


def _matmul_samples() -> list[Sample]:
    def sample(
        id: str, scenario: str, row: str, *counts: int, with_rows: bool = False, traced: bool = True, **options: Any
    ) -> Sample:
        make = lambda: matmul_inputs(scenario, row, counts or (2, 0, 3), **options)  # noqa: E731
        resize = None
        if with_rows:
            resize = lambda num_rows: matmul_inputs(scenario, row, _three_experts(num_rows), **options)  # noqa: E731
        wrt = {"float": ("x", "weight", "bias"), "int8": ("x", "bias"), "int4": ("x", "bias")}[ROWS[row].weight]
        if ROWS[row].x == torch.int8:
            wrt = ()
        return Sample("npu_grouped_matmul", id, make, 2 * options.get("k", 8), wrt, resize, traced)

    floats = ("float16", "bfloat16", "float32", "float64")
    integers = [row for row in ROWS if row not in floats]
    compiled = ("int8-to-int8", "per-token-bfloat16-bias", "int8-weight-bfloat16", "int4-weight-bfloat16")
    lists = [row for row in ROWS if not ROWS[row].per_token_scale]  # per-token needs one x and one result
    return [
        # every scenario
        sample("sss-cumsum", "sss", "float32", bias=True, with_rows=True),
        sample("sss-counts-split-3", "sss", "float32", group_list_type=1, split_item=3, traced=False),
        sample("sms", "sms", "float32", bias=True, with_rows=True),
        sample("sms-counts", "sms", "float32", group_list_type=1, traced=False),
        sample("mms", "mms", "float32", bias=True),
        sample("mms-counts", "mms", "float32", 2, 1, group_list_type=1, traced=False),
        sample("mms-without-group-list", "mms", "float32", group_list=None, traced=False),
        sample("mmm", "mmm", "float32", bias=True, k=3),
        sample("mmm-split-1", "mmm", "float32", split_item=1, traced=False),
        sample("mmm-rank-3", "mmm", "float32", 2, 1, k=2, n=3, rank=3, bias=True, traced=False),
        sample("mmm-rank-6", "mmm", "float32", 2, 1, k=2, n=3, rank=6, traced=False),
        sample("k-split-counts", "k-split", "float32", k=3, n=5, with_rows=True),
        sample(
            "k-split-cumsum",
            "k-split",
            "float32",
            1,
            0,
            3,
            k=3,
            group_list=int64([1, 1, 4]),
            group_list_type=0,
            traced=False,
        ),
        sample("ints-sms", "ints-sms", "float32", bias=True, traced=False),
        sample("ints-smm", "ints-smm", "float32", bias=True),
        sample("ints-smm-split-1", "ints-smm", "float32", split_item=1, traced=False),
        sample("ints-mms", "ints-mms", "float32", bias=True, split_item=3),
        sample("ints-mmm", "ints-mmm", "float32", bias=True),
        sample("ints-mmm-rank-3", "ints-mmm", "float32", 2, 1, k=2, n=3, rank=3, group_list=(), traced=False),
        # awkward sizes
        sample("one-expert", "sss", "float32", 4, traced=False),
        sample("one-expert-counts", "sss", "float32", 4, group_list_type=1, traced=False),
        sample("one-expert-2d-weight", "sms", "float32", 4, traced=False),
        sample("one-pair", "mms", "float32", 4, group_list=None, traced=False),
        sample("one-pair-no-grouping", "mmm", "float32", 4, traced=False),
        sample("all-rows-to-one-expert", "sss", "float32", 0, 5, 0, traced=False),
        sample("no-rows", "sss", "float32", 0, 0, bias=True),
        sample("no-rows-in-lists", "mms", "float32", 0, 0, bias=True, traced=False),
        sample("no-rows-no-grouping", "mmm", "float32", 0, 0, bias=True),
        sample("ints-no-rows", "ints-smm", "float32", 0, 0),
        sample("no-rows-k-split", "k-split", "float32", 0, 0, traced=False),
        sample("uncovered-rows", "sss", "float32", 2, 1, rows=5, traced=False),
        sample("uncovered-rows-sms", "sms", "float32", 2, 1, rows=5, traced=False),
        sample("uncovered-rows-ints-smm", "ints-smm", "float32", 2, 1, rows=5, bias=True),
        sample("uncovered-columns-k-split", "k-split", "float32", 2, 1, rows=5, traced=False),
        sample("nothing-covered", "sss", "float32", 0, 0, rows=2, traced=False),
        sample("odd-sizes", "sss", "float16", 3, 0, 4, k=7, n=5, bias=True, traced=False),
        sample("one-row-one-column", "sss", "float32", 1, k=1, n=1),
        sample("zero-reduction", "sss", "float32", k=0, bias=True, traced=False),
        sample("zero-columns", "sss", "float32", n=0),
        sample("float16-long-reduction", "sss", "float16", 1, 2, 3, 70, k=301),
        sample("accumulators-long-reduction", "sss", "accumulators", 1, 3, k=2500, n=3, traced=False),
        # layouts
        sample("sss-transposed", "sss", "float32", 2, 1, layout=transposed, bias=True),
        sample("sms-transposed", "sms", "float32", 2, 1, layout=transposed, k=3, traced=False),
        sample("mms-transposed", "mms", "float32", 2, 1, layout=transposed, traced=False),
        sample("mmm-transposed", "mmm", "float32", 2, 1, layout=transposed, k=3, traced=False),
        sample("ints-smm-transposed", "ints-smm", "float32", 2, 1, layout=transposed, k=3, traced=False),
        sample("sss-sliced", "sss", "float32", 2, 1, layout=sliced, traced=False),
        sample("mms-sliced", "mms", "float32", 2, 1, layout=sliced, traced=False),
        sample("mms-mixed-layouts", "mms", "float32", 2, 1, layout=lambda w: sliced(w) if w.size(0) == 8 else w),
        sample(
            "mmm-mixed-layouts",
            "mmm",
            "float32",
            2,
            1,
            layout=lambda w: sliced(w) if w.size(0) == 8 else w,
            traced=False,
        ),
        sample("int8-transposed", "sss", "per-token-float16", 2, 1, layout=transposed, bias=True, traced=False),
        sample("int8-weight-transposed", "sss", "int8-weight-bfloat16", 2, 1, layout=transposed, traced=False),
        # every row of the dtype table, where one weight is enough and in lists
        *[sample(f"sss-{row}", "sss", row, bias=True, traced=False) for row in floats if row != "float32"],
        *[sample(f"k-split-{row}", "k-split", row, traced=False) for row in floats if row != "float32"],
        *[
            sample(f"sss-{row}", "sss", row, bias=True, with_rows=row in compiled, traced=row in compiled)
            for row in integers
        ],
        *[sample(f"sms-{row}", "sms", row, traced=False) for row in integers],
        *[sample(f"mms-{row}", "mms", row, bias=True, traced=False) for row in lists if row != "float32"],
        *[sample(f"mmm-{row}", "mmm", row, 2, 1, rank=3, bias=True, traced=False) for row in lists if row != "float32"],
        *[sample(f"ints-smm-{row}", "ints-smm", row, bias=True, traced=False) for row in lists if row != "float32"],
        *[
            sample(f"{row}-act-{act_type}", "sss", row, act_type=act_type, traced=False)
            for row in ("int8-to-bfloat16", "int8-to-float16", "per-token-float16", "per-token-bfloat16-bias")
            for act_type in (1, 2, 4, 5)
        ],
        # int4: packed along N (the samples above) and along K, scales per column and per group of K
        *[
            sample(f"{row}-{id}", scenario, row, bias=True, traced=False, **options)
            for row in ("int4-weight-float16", "int4-weight-bfloat16")
            for id, scenario, options in (
                ("packed-along-k", "sss", {"k": 16, "n": 5, "layout": transposed}),
                ("packed-along-k-list", "sms", {"k": 16, "n": 5, "layout": transposed}),
                ("per-group", "sss", {"k": 6, "group_length": 2}),
                ("per-group-list", "mms", {"k": 6, "group_length": 2}),
                ("per-group-packed-along-k", "sss", {"k": 16, "n": 5, "layout": transposed, "group_length": 4}),
                ("one-group", "sss", {"group_length": 8}),
                ("one-word-along-k", "sss", {"k": 8, "n": 3, "layout": transposed}),
                ("one-word-along-n", "sss", {"k": 3, "n": 8}),
            )
        ],
        sample("tuning-config", "sss", "accumulators", tuning_config=[4, 0], traced=False),
        sample("output-dtype-as-number", "sss", "accumulators", output_dtype=3, traced=False),
        sample(
            "empty-lists-are-none",
            "sss",
            "float32",
            scale=[],
            bias=False,
            per_token_scale=[torch.zeros(0)],
            traced=False,
        ),
    ]


# --- swiglu, gating, permute, quantisation ---------------------------------------------------------------------------


def _swiglu_samples() -> list[Sample]:
    def inputs(*shape: int, dim: int = -1, dtype: torch.dtype = F32, layout: Layout = contiguous) -> Inputs:
        return (layout(_Values().normal(*shape, dtype=dtype)),), {"dim": dim}

    def backward_inputs(*shape: int, dim: int = -1, dtype: torch.dtype = F32, layout: Layout = contiguous) -> Inputs:
        input = _Values().normal(*shape, dtype=dtype)
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


def _gating_samples() -> list[Sample]:
    def inputs(
        *shape: int, k: int = 2, finished: bool = False, dtype: torch.dtype = F32, layout: Layout = contiguous
    ) -> Inputs:
        values = _Values()
        # distinct logits that are exact in every dtype: neither the order nor a finite difference depends on rounding
        x = torch.stack([values.normal(shape[-1]).argsort() for _ in range(math.prod(shape[:-1]))] or [int64([])])
        x = (x.to(dtype) / 4).reshape(shape)
        mask = values.integers(0, 1, *shape[:-1], dtype=torch.bool)
        return (layout(x), mask if finished else None, k), {}

    def sample(id: str, *shape: int, with_rows: Any = None, traced: bool = True, **options: Any) -> Sample:
        make = lambda: inputs(*shape, **options)  # noqa: E731
        return Sample("npu_moe_gating_top_k_softmax", id, make, shape[-1], ("x",), with_rows, traced)

    return [
        sample("two-dims", 5, 7, with_rows=lambda num_rows: inputs(num_rows, 7)),
        sample("finished", 5, 7, k=3, finished=True, with_rows=lambda num_rows: inputs(num_rows, 7, finished=True)),
        sample("three-dims", 2, 3, 5),
        sample("three-dims-finished", 2, 3, 5, finished=True),
        sample("all-experts", 3, 4, k=4, traced=False),
        sample("best-expert", 3, 4, k=1),
        sample("one-expert", 3, 1, k=1, traced=False),
        sample("no-expert-chosen", 3, 4, k=0),
        sample("no-rows", 0, 4),
        sample("sliced", 3, 4, layout=sliced, traced=False),
        sample("transposed", 3, 4, layout=transposed, traced=False),
        sample("float16", 6, 9, dtype=F16),
        sample("bfloat16", 6, 9, dtype=BF16),
        sample("float64", 2, 3, dtype=F64),
    ]


def _ids(num_tokens: int, k: int, experts: int = 4, seed: int = 1) -> Tensor:
    """Distinct experts per token; expert 1 gets no token unless all are chosen."""
    values = _Values(seed)
    order = [values.normal(experts).argsort() for _ in range(num_tokens)]
    chosen = [row[row != 1][:k] if k < experts else row for row in order]
    return torch.stack(chosen) if chosen else torch.zeros(0, k, dtype=torch.int64)


def _permute_samples() -> list[Sample]:
    def inputs(
        ids: Tensor, h: int = 3, dtype: torch.dtype = F32, layout: Layout = contiguous, **options: Any
    ) -> Inputs:
        return (layout(_Values().normal(ids.size(0), h, dtype=dtype)), ids), options

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
        values, pairs = _Values(), num_tokens * (k or 1)
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
        values = _Values()
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
        make = lambda: ((_Values().integers(-8, 7, *shape, dtype=torch.int32),), {})  # noqa: E731
        return Sample("npu_convert_weight_to_int4pack", id, make, 1, (), with_rows)

    def packed_rows(num_rows: int) -> Inputs:
        return (_Values().integers(-8, 7, num_rows, 8, dtype=torch.int32),), {}

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


SAMPLES = [
    *_grouped_mm_samples(),
    *_matmul_samples(),
    *_swiglu_samples(),
    *_gating_samples(),
    *_permute_samples(),
    *_quantize_samples(),
]
