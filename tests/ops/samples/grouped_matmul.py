"""Samples of grouped matmul."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.reference import common, matmul
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
    three_experts,
    transposed,
)


@dataclass(frozen=True)
class MatmulRow:
    """One legal combination of dtypes; `scale` and `antiquant` name how the parameters are made."""

    x: torch.dtype  # int32 holds int4
    weight: str  # float, int8, int4
    bias: torch.dtype | None
    scale: torch.dtype | None = None
    per_token_scale: bool = False
    output_dtype: torch.dtype | None = None
    offset: bool = False

    @property
    def is_int4_product(self) -> bool:
        return self.weight == "int4" and not self.x.is_floating_point

    @property
    def needs_bias(self) -> bool:
        return self.is_int4_product and self.x == torch.int8

    @property
    def group_list_types(self) -> tuple[int, ...]:
        if self.needs_bias:
            return (1,)
        return (0, 1, 2) if (self.x, self.weight) == (torch.int8, "int8") else (0, 1)


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
    "a4w4-float16": MatmulRow(torch.int32, "int4", None, torch.int64, False, F16),
    "a4w4-bfloat16": MatmulRow(torch.int32, "int4", None, torch.int64, True, BF16),
    "a8w4-float16": MatmulRow(torch.int8, "int4", F32, torch.int64, True, F16),
    "a8w4-bfloat16": MatmulRow(torch.int8, "int4", F32, torch.int64, True, BF16),
    "a8w4-asymmetric": MatmulRow(torch.int8, "int4", F32, torch.int64, True, F16, True),
}


def scale_words(scale: Tensor, offset: Tensor) -> Tensor:
    """Packed int64 parameters: all 32 bits of the scale, a 9-bit offset at bit 37, the flag at bit 46."""
    bits = scale.float().view(torch.int32).long() & 0xFFFFFFFF
    return bits | ((offset.long() & 0x1FF) << 37) | (1 << 46)


def raw_words(scale: Tensor) -> Tensor:
    """The scale words of int4 weights: the bits of float32 values and nothing else."""
    return scale.float().view(torch.int32).long() & 0xFFFFFFFF


class _Matmul:
    """Draws the tensors of one row of the table."""

    def __init__(self, row: MatmulRow, *, bias: bool, layout: Layout = contiguous, group_length: int = 0) -> None:
        self.row, self.bias, self.layout, self.group_length = row, bias, layout, group_length
        self.values = Values()

    def x(self, *shape: int) -> Tensor:
        if self.row.x == torch.int32:
            return common.pack_int4(self.values.integers(-8, 7, *shape))
        if self.row.x == torch.int8:
            return self.values.integers(-128, 127, *shape)
        return self.values.normal(*shape, dtype=self.row.x)

    def weight(self, *shape: int) -> Tensor:
        if self.row.weight == "int8":
            return self.layout(self.values.integers(-128, 127, *shape))
        if self.row.weight == "int4":
            codes = self.values.integers(-8, 7, *shape)
            return common.pack_int4(codes.mT.contiguous()).mT if self.layout is transposed else common.pack_int4(codes)
        return self.layout(self.values.normal(*shape, dtype=self.row.x))

    def parameters(self, shapes: Sequence[tuple[int, ...]], num_rows: int) -> dict[str, Any]:
        """The keyword arguments that go with weights of these logical shapes."""
        row, values = self.row, self.values
        channels = [(*shape[:-2], shape[-1]) for shape in shapes]
        options: dict[str, Any] = {}
        if row.bias is None:
            pass
        elif self.bias and row.bias == torch.int32:
            options["bias"] = [values.integers(-5000, 5000, *shape, dtype=torch.int32) for shape in channels]
        elif self.bias or row.needs_bias:
            options["bias"] = [values.normal(*shape, dtype=row.bias) for shape in channels]
        groups = [(*shape[:-2], shape[-2] // (self.group_length or shape[-2] or 1), shape[-1]) for shape in shapes]
        if row.is_int4_product:
            scales = channels if row.x == torch.int32 and not self.group_length else groups
            options["scale"] = [raw_words(values.positive(*shape) / 100) for shape in scales]
        elif row.scale == torch.int64:
            options["scale"] = [
                scale_words(values.positive(*shape) / 200, values.integers(-9, 9, *shape)) for shape in channels
            ]
        elif row.scale is not None:
            options["scale"] = [(values.positive(*shape) / 20000).to(row.scale) for shape in channels]
        if row.offset:
            options["offset"] = [values.normal(*shape[:-2], 1, shape[-1]) for shape in shapes]
        if row.x.is_floating_point and row.weight != "float":
            antiquant = groups if self.group_length else channels
            options["antiquant_scale"] = [values.positive(*shape, dtype=row.x) for shape in antiquant]
            options["antiquant_offset"] = [values.normal(*shape, dtype=row.x) for shape in antiquant]
        if row.per_token_scale:
            options["per_token_scale"] = [values.positive(num_rows, 1) if row.offset else values.positive(num_rows)]
        if row.output_dtype is not None:
            options["output_dtype"] = row.output_dtype
        return options


def _ends(counts: Sequence[int]) -> list[int]:
    return [sum(counts[: index + 1]) for index in range(len(counts))]


def _pairs(counts: Sequence[int]) -> Tensor:
    """Groups in descending order, then zeros as the routing operators pad with."""
    pairs = [[group, count] for group, count in enumerate(counts) if count][::-1]
    return int64([*pairs, *[[0, 0]] * (len(counts) - len(pairs))])


def matmul_inputs(
    scenario: str,
    row: str,
    counts: Sequence[int] = (2, 0, 3),
    *,
    rows: int | None = None,
    k: int | None = None,
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
    if k is None:
        k = 64 if ROWS[row].needs_bias else 8
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
        factors = [1 if rank > 2 else 2 - index % 2 for index in range(experts)]  # quantization groups divide K
        shapes = [(k * factor, n + 8 * (forms == "mmm") * index) for index, factor in enumerate(factors)]
        middle = [2, 1, 3, 1][: rank - 2]
        x = [draw.x(count, *middle, shape[0]) for count, shape in zip(counts, shapes, strict=True)]
    weights = [draw.weight(*shape) for shape in shapes]
    given = {**draw.parameters(shapes, num_rows), "split_item": 0 if forms in ("mmm", "smm") else 2, **options}
    if ints:
        return (x, weights), {"group_list": [] if forms == "mmm" else _ends(counts), "group_type": None, **given}
    if forms == "mmm":
        return (x, weights), {"group_type": -1, **given}
    kind = given.setdefault("group_list_type", ROWS[row].group_list_types[0])
    by_kind = (int64(_ends(counts)), int64(counts), _pairs(counts))
    group_list = given.pop("group_list", by_kind[kind or 0])
    return (x, weights), {"group_list": group_list, "group_type": 0, **given}


def _matmul_samples() -> list[Sample]:
    def sample(
        id: str, scenario: str, row: str, *counts: int, with_rows: bool = False, traced: bool = True, **options: Any
    ) -> Sample:
        counts = options.pop("counts_", counts or (2, 0, 3))
        make = lambda: matmul_inputs(scenario, row, counts, **options)  # noqa: E731
        resize = None
        if with_rows:
            resize = lambda num_rows: matmul_inputs(scenario, row, three_experts(num_rows), **options)  # noqa: E731
        wrt = {"float": ("x", "weight", "bias"), "int8": ("x", "bias"), "int4": ("x", "bias")}[ROWS[row].weight]
        if not ROWS[row].x.is_floating_point:
            wrt = ()
        return Sample("npu_grouped_matmul", id, make, 2 * options.get("k", 8), wrt, resize, traced)

    floats = ("float16", "bfloat16", "float32", "float64")
    integers = [row for row in ROWS if row not in floats]
    compiled = ("int8-to-int8", "per-token-bfloat16-bias", "int8-weight-bfloat16", "int4-weight-bfloat16")
    compiled += ("a4w4-bfloat16", "a8w4-asymmetric")
    stacks = [row for row in integers if not ROWS[row].is_int4_product]  # products of int4 take one 3-D weight
    lists = [row for row in ROWS if not ROWS[row].per_token_scale and not ROWS[row].is_int4_product]
    pairs = [row for row in integers if 2 in ROWS[row].group_list_types]
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
        sample("k-split-sliced-weight", "k-split", "float32", k=3, n=5, layout=sliced, traced=False),
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
        *[sample(f"sms-{row}", "sms", row, traced=False) for row in stacks],
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
        # pairs of group and size
        *[
            sample(f"sss-pairs-{row}", "sss", row, bias=True, group_list_type=2, rows=6, traced=row == "accumulators")
            for row in pairs
        ],
        sample("sms-pairs", "sms", "per-token-float16", 2, 0, 3, group_list_type=2, traced=False),
        sample("mms-pairs", "mms", "accumulators", 2, 1, 3, group_list_type=2, traced=False),
        sample("one-pair-of-group-and-size", "sss", "accumulators", 3, rows=4, group_list_type=2, traced=False),
        sample("pairs-without-rows", "sss", "accumulators", 0, 0, rows=2, group_list_type=2, traced=False),
        sample(
            "pairs-behind-the-first-size-of-zero",
            "sss",
            "per-token-bfloat16",
            *(2, 0, 3),
            group_list=int64([[2, 2], [7, 0], [1, 9]]),
            group_list_type=2,
            traced=False,
        ),
        # products of int4: scales per column and per group of K
        *[
            sample(f"{row}-{id}", "sss", row, traced=False, **options)
            for row in ROWS
            if ROWS[row].is_int4_product
            for id, options in (
                ("no-rows", {"counts_": (0, 0)}),
                ("uncovered-rows", {"counts_": (2, 1), "rows": 5}),
                ("one-expert", {"counts_": (3,)}),
                ("zero-columns", {"n": 0}),
                ("several-words", {"k": 128, "n": 24}),
            )
        ],
        *[
            sample(f"{row}-per-group-{length}", "sss", row, k=128, group_length=length, traced=length == 2)
            for row in ("a4w4-float16", "a4w4-bfloat16", "a8w4-float16", "a8w4-bfloat16")
            for length in (2, 64)
        ],
        sample("a4w4-counts", "sss", "a4w4-bfloat16", group_list_type=1, traced=False),
        sample("a4w4-one-word", "sss", "a4w4-float16", 2, k=8, n=8, traced=False),
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


# --- random legal calls ----------------------------------------------------------------------------------------------

SCENARIOS = ("sss", "sms", "mms", "mmm", "k-split", "ints-sms", "ints-smm", "ints-mms", "ints-mmm")
counts_of = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@st.composite
def matmul_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `matmul_inputs` for a legal call."""
    row_name = draw(st.sampled_from(list(ROWS)))
    row = ROWS[row_name]
    scenario = draw(st.sampled_from(SCENARIOS))
    if row.is_int4_product:
        scenario = "sss"
    elif row.per_token_scale:
        scenario = draw(st.sampled_from(("sss", "sms")))
    elif row.weight != "float":
        scenario = draw(st.sampled_from([name for name in SCENARIOS if name != "k-split"]))
    is_ints = scenario.startswith("ints-")
    call: dict[str, Any] = {"scenario": scenario, "row": row_name, "counts": draw(counts_of)}
    call |= {"k": draw(st.integers(1, 12)), "n": draw(st.integers(1, 12)), "bias": draw(st.booleans())}
    if row.is_int4_product:
        k = draw(st.sampled_from((64, 128) if row.needs_bias else (8, 24)))
        lengths = (0,) if row.offset else (0, *(length for length in (2, 4, 8, 64) if k % length == 0))
        call |= {"k": k, "n": draw(st.sampled_from((8, 16))), "group_length": draw(st.sampled_from(lengths))}
    elif row.weight == "int4":
        call["layout"] = draw(st.sampled_from((contiguous, transposed)))
        # words along K: at least two, or one per row and several columns, since [1, 1] does not tell along which axis
        call |= {"k": 16} if call["layout"] is transposed else {"n": draw(st.sampled_from((8, 16)))}
        lengths = [n for n in range(1, call["k"] + 1) if call["k"] % n == 0 and (n % 2 == 0 or call["k"] != 16)]
        call["group_length"] = draw(st.sampled_from((0, *lengths)))
    elif scenario != "k-split":
        call["layout"] = draw(st.sampled_from((contiguous, transposed, sliced)))
    if scenario == "ints-mmm" and call.get("layout") is transposed:
        call["layout"] = contiguous  # such pairs take no transposed weights
        call["n"] = 8 if row.weight == "int4" else call["n"]
    if scenario == "k-split":
        call["bias"] = False
    if scenario in ("sss", "sms") and draw(st.booleans()):
        call["rows"] = sum(call["counts"]) + draw(st.integers(0, 3))
    if not is_ints and scenario not in ("mmm", "k-split"):
        call["group_list_type"] = draw(st.sampled_from(row.group_list_types))
    if not is_ints and row.weight == "int8" and row.scale is not None and row.output_dtype not in (None, torch.int32):
        call["act_type"] = draw(st.sampled_from((0, 1, 2, 4, 5, None)))
    if scenario in ("mmm", "ints-mmm", "ints-smm"):
        call["split_item"] = draw(st.sampled_from((0, 1, None)))
    else:
        call["split_item"] = draw(st.sampled_from((2, 3)))
    return call


def _draw_matmul(draw: st.DrawFn) -> Inputs:
    return matmul_inputs(**draw(matmul_calls()))


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {"npu_grouped_matmul": _draw_matmul}

SAMPLES = _matmul_samples()

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_grouped_matmul": matmul.grouped_matmul,
}
