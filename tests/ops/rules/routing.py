"""Rules of routing on one device: init, re-routing, finalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F64, I8, I32, I64, Rule, int64, ints, zeros


def first(**changes: Any) -> Callable[[], Any]:
    row_idx = torch.arange(6, dtype=I32).view(2, 3).t()
    legal = {"x": zeros(3, 4), "row_idx": row_idx, "expert_idx": zeros(3, 2, dtype=I32), "active_num": 3}
    return lambda: ops.npu_moe_init_routing(**{**legal, **changes})


def second(**changes: Any) -> Callable[[], Any]:
    legal = {"x": zeros(3, 4), "expert_idx": zeros(3, 2, dtype=I32), "expert_num": 4}
    return lambda: ops.npu_moe_init_routing_v2(**{**legal, **changes})


def padded(**changes: Any) -> Callable[[], Any]:
    return second(**{"drop_pad_mode": 1, "expert_capacity": 2, **changes})


def static(**changes: Any) -> Callable[[], Any]:
    return second(**{"quant_mode": 0, "scale": zeros(1), "offset": zeros(1), **changes})


def quant(**changes: Any) -> Callable[[], Any]:
    legal = {"x": zeros(3, 4), "expert_idx": zeros(3, 2, dtype=I32), "expert_num": 4}
    return lambda: ops.npu_moe_init_routing_quant(**{**legal, **changes})


def count(ids: Any = None, num_expert: int = 3) -> Callable[[], Any]:
    return lambda: ops.npu_moe_compute_expert_tokens(ints(0, 0, 1) if ids is None else ids, num_expert)


def reroute(**changes: Any) -> Callable[[], Any]:
    legal = {"tokens": zeros(3, 4, dtype=F16), "expert_token_num_per_rank": int64([[1, 0], [1, 1]])}
    return lambda: ops.npu_moe_re_routing(**{**legal, **changes})


def finalize(**changes: Any) -> Callable[[], Any]:
    legal = {
        "expanded_permuted_rows": zeros(6, 4),
        "skip1": zeros(3, 4),
        "skip2": zeros(3, 4),
        "bias": zeros(5, 4),
        "scales": zeros(3, 2),
        "expanded_src_to_dst_row": torch.arange(6, dtype=I32),
        "export_for_source_row": zeros(3, 2, dtype=I32),
    }
    return lambda: ops.npu_moe_finalize_routing(**{**legal, **changes})


_FIRST: list[Rule] = [
    ("init-sources-elsewhere", first(row_idx=zeros(3, 2, dtype=I32).to(ELSEWHERE)), "row_idx must be on cpu"),
    ("init-experts-elsewhere", first(expert_idx=zeros(3, 2, dtype=I32).to(ELSEWHERE)), "expert_idx must be on cpu"),
    ("init-3d", first(x=zeros(1, 3, 4)), "x must have 2 dimensions, but has shape (1, 3, 4)"),
    ("init-int8", first(x=zeros(3, 4, dtype=I8)), "x must have dtype float16, bfloat16, float32, but has int8"),
    ("init-1d-sources", first(row_idx=zeros(6, dtype=I32)), "row_idx must have 2 dimensions"),
    ("init-int64-sources", first(row_idx=zeros(3, 2, dtype=I64)), "row_idx must have dtype int32, but has int64"),
    ("init-1d-experts", first(expert_idx=zeros(6, dtype=I32)), "expert_idx must have 2 dimensions"),
    ("init-int64-experts", first(expert_idx=zeros(3, 2, dtype=I64)), "expert_idx must have dtype int32, but has int64"),
    (
        "init-other-sources",
        first(row_idx=zeros(3, 1, dtype=I32)),
        "row_idx must have the shape of expert_idx (3, 2), but has (3, 1)",
    ),
    ("init-other-rows", first(x=zeros(4, 4)), "expert_idx must have one row per row of x, but has 3 for 4"),
    ("init-active", first(active_num=-1), "active_num must not be negative, but is -1"),
    (
        "init-source-too-large",
        first(row_idx=torch.tensor([[0, 3], [1, 4], [2, 6]], dtype=I32)),
        "row_idx must be in 0 to 5, but is 0 to 6",
    ),
    ("init-source-negative", first(row_idx=zeros(3, 2, dtype=I32) - 1), "row_idx must be in 0 to 5, but is -1 to -1"),
]

_SECOND: list[Rule] = [
    ("init-v2-experts-elsewhere", second(expert_idx=zeros(3, 2, dtype=I32).to(ELSEWHERE)), "expert_idx must be on cpu"),
    ("init-v2-scale-elsewhere", second(scale=zeros(3).to(ELSEWHERE)), "scale must be on cpu"),
    ("init-v2-offset-elsewhere", static(offset=zeros(1).to(ELSEWHERE)), "offset must be on cpu"),
    ("init-v2-3d", second(x=zeros(1, 3, 4)), "the x shape support only 2d, but is (1, 3, 4)"),
    (
        "init-v2-dtype",
        second(x=zeros(3, 4, dtype=I32)),
        "x must have dtype float16, bfloat16, float32, int8, but has int32",
    ),
    ("init-v2-1d-experts", second(expert_idx=zeros(6, dtype=I32)), "the expert_idx shape support only 2d, but is (6,)"),
    (
        "init-v2-int64-experts",
        second(expert_idx=zeros(3, 2, dtype=I64)),
        "expert_idx must have dtype int32, but has int64",
    ),
    (
        "init-v2-other-rows",
        second(x=zeros(4, 4)),
        "the first dim of expert_idx and x should be the same, but they are 3 and 4",
    ),
    (
        "init-v2-no-experts",
        second(expert_num=-1),
        "expert_num or active_expert_range must be given, but both are missing",
    ),
    ("init-v2-range-of-one", second(active_expert_range=[1]), "active_expert_range is None or invalid. must be int[2]"),
    ("init-v2-range-empty", second(active_expert_range=[2, 2]), "active_expert_range is invalid. must be increasing"),
    ("init-v2-zero-experts", second(expert_num=0), "active_expert_range is invalid. must be increasing, but is [0, 0]"),
    ("init-v2-range-negative", second(active_expert_range=[-1, 2]), "active_expert_range must be within [0, 10240]"),
    (
        "init-v2-range-large",
        second(expert_num=20000, active_expert_range=[0, 10241]),
        "active_expert_range must be within [0, 10240], but is [0, 10241]",
    ),
    (
        "init-v2-range-past-experts",
        second(active_expert_range=[1, 5]),
        "active_expert_range must not end past expert_num 4, but is [1, 5]",
    ),
    ("init-v2-drop-pad", second(drop_pad_mode=2), "drop_pad_mode is None or invalid. must be in [0, 1], but is 2"),
    (
        "init-v2-counts",
        second(expert_tokens_num_type=3),
        "expert_tokens_num_type is None or invalid. must be in [0, 1, 2]",
    ),
    ("init-v2-index", second(row_idx_type=2), "row_idx_type is None or invalid. must be in [0, 1], but is 2"),
    (
        "init-v2-mode-10",
        second(quant_mode=10),
        "quant_mode is None or invalid. must be in [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8",
    ),
    ("init-v2-mode-18", second(quant_mode=18), "12, 13, 16, 17, 14, 15], but is 18"),
    ("init-v2-mode-2", second(quant_mode=2), "quant_mode 2 exists on devices of generation 950 only"),
    (
        "init-v2-dynamic-int4",
        second(quant_mode=1, x_dtype=285),
        "INT4 dynamic quantization uses quant_mode=13. quant_mode=1 only supports INT8 dynamic quantization",
    ),
    ("init-v2-x-dtype", second(x_dtype=5), "x_dtype must be None or the number of the dtype of x, but is 5"),
    ("init-v2-static-int8", static(x=zeros(3, 4, dtype=I8)), "x must not be int8 with quant_mode 0"),
    ("init-v2-dynamic-int8", second(x=zeros(3, 4, dtype=I8), quant_mode=1), "x must not be int8 with quant_mode 1"),
    ("init-v2-half-scale", second(scale=zeros(3, dtype=F16)), "scale must have dtype float32, but has float16"),
    ("init-v2-static-no-scale", static(scale=None), "scale and offset must be given with quant_mode 0"),
    ("init-v2-static-no-offset", static(offset=None), "scale and offset must be given with quant_mode 0"),
    ("init-v2-half-offset", static(offset=zeros(1, dtype=F16)), "offset must have dtype float32, but has float16"),
    (
        "init-v2-static-scale",
        static(scale=zeros(1, 1)),
        "the shape of scale should be 1 with quant_mode 0, but is (1, 1)",
    ),
    (
        "init-v2-static-offset",
        static(offset=zeros(2)),
        "the shape of offset should be 1 with quant_mode 0, but is (2,)",
    ),
    ("init-v2-offset", second(offset=zeros(1)), "offset must be None with quant_mode -1"),
    ("init-v2-dynamic-offset", second(offset=zeros(1), quant_mode=1), "offset must be None with quant_mode 1"),
    (
        "init-v2-scale-rows",
        second(scale=zeros(4)),
        "the scale shape support only 1D in no quant mode, one value for each of 3",
    ),
    ("init-v2-scale-2d", second(scale=zeros(3, 1)), "the scale shape support only 1D in no quant mode"),
    (
        "init-v2-dynamic-scale",
        second(scale=zeros(4, 4), quant_mode=1, active_expert_range=[1, 3]),
        "the scale shape support only 2D in dynamic quant mode, (2, 4) or (1, 4), but is (4, 4)",
    ),
    (
        "init-v2-dynamic-1d",
        second(scale=zeros(4), quant_mode=1),
        "the scale shape support only 2D in dynamic quant mode",
    ),
    (
        "init-v2-dynamic-columns",
        second(scale=zeros(4, 3), quant_mode=1),
        "the scale shape support only 2D in dynamic quant mode, (4, 4) or (1, 4), but is (4, 3)",
    ),
    (
        "init-v2-no-capacity",
        padded(expert_capacity=-1),
        "expert_capacity must be between 1 and the number of rows 3 with",
    ),
    ("init-v2-capacity-zero", padded(expert_capacity=0), "with drop_pad_mode 1, but is 0"),
    ("init-v2-capacity-large", padded(expert_capacity=4), "with drop_pad_mode 1, but is 4"),
    (
        "init-v2-padded-range",
        padded(active_expert_range=[0, 3]),
        "active_expert_range must be [0, expert_num] with drop_pad",
    ),
    ("init-v2-padded-scatter", padded(row_idx_type=1), "row_idx_type must be 0 with drop_pad_mode 1"),
    (
        "init-v2-padded-sums",
        padded(expert_tokens_num_flag=True),
        "expert_tokens_num_type must be 1 with drop_pad_mode 1",
    ),
]

_QUANT: list[Rule] = [
    ("quant-init-int8", quant(x=zeros(3, 4, dtype=I8)), "x must have dtype float16, bfloat16, float32, but has int8"),
    ("quant-init-rows", quant(x=zeros(4, 4)), "the first dim of expert_idx and x should be the same"),
    ("quant-init-drop-pad", quant(drop_pad_mode=2), "drop_pad_mode must be 0 or 1, but is 2"),
    ("quant-init-counts", quant(expert_tokens_num_mode=3), "expert_tokens_num_mode must be 0, 1 or 2, but is 3"),
    ("quant-init-mode", quant(quant_mode=-1), "quant_mode must be 0 or 1, but is -1"),
    ("quant-init-experts", quant(expert_num=0), "expert_num must be positive, but is 0"),
    ("quant-init-scale", quant(scale=zeros(3, 4)), "in dynamic quant mode, (4, 4) or (1, 4), but is (3, 4)"),
    ("quant-init-static", quant(quant_mode=0), "scale and offset must be given with quant_mode 0"),
    ("quant-init-capacity", quant(drop_pad_mode=1), "expert_capacity must be between 1 and the number of rows 3"),
]

_COUNT: list[Rule] = [
    ("count-2d", count(zeros(2, 3, dtype=I32)), "sorted_expert_for_source_row must have 1 dimensions"),
    ("count-int64", count(int64([0, 1])), "sorted_expert_for_source_row must have dtype int32, but has int64"),
    ("count-many", count(zeros(1, dtype=I32).expand(2**24)), "must have fewer than 2**24 elements, but has 16777216"),
    ("count-no-experts", count(num_expert=0), "num_expert must be between 1 and 2048, but is 0"),
    ("count-many-experts", count(num_expert=2049), "num_expert must be between 1 and 2048, but is 2049"),
    ("count-unsorted", count(ints(0, 2, 1)), "sorted_expert_for_source_row must be in ascending order"),
]

_RE_ROUTING: list[Rule] = [
    (
        "reroute-counts-elsewhere",
        reroute(expert_token_num_per_rank=int64([[3]]).to(ELSEWHERE)),
        "expert_token_num_per_rank must be on cpu",
    ),
    ("reroute-scales-elsewhere", reroute(per_token_scales=zeros(3).to(ELSEWHERE)), "per_token_scales must be on cpu"),
    ("reroute-1d", reroute(tokens=zeros(3, dtype=F16)), "tokens must have at least 2 dimensions, but has shape (3,)"),
    ("reroute-float32", reroute(tokens=zeros(3, 4)), "tokens must have dtype float16, bfloat16, int8, but has float32"),
    ("reroute-float64", reroute(tokens=zeros(3, 4, dtype=F64)), "tokens must have dtype float16, bfloat16, int8"),
    (
        "reroute-1d-counts",
        reroute(expert_token_num_per_rank=int64([1, 2])),
        "expert_token_num_per_rank must have 2 dimensions",
    ),
    (
        "reroute-float-counts",
        reroute(expert_token_num_per_rank=zeros(2, 2)),
        "expert_token_num_per_rank must have dtype int32, int64",
    ),
    ("reroute-3d-scales", reroute(per_token_scales=zeros(3, 1, 1)), "per_token_scales must have 1 or 2 dimensions"),
    ("reroute-half-scales", reroute(per_token_scales=zeros(3, dtype=F16)), "per_token_scales must have dtype float32"),
    ("reroute-scales", reroute(per_token_scales=zeros(4)), "one row per row of tokens, but has 4 for 3"),
    ("reroute-sums", reroute(expert_token_num_type=0), "expert_token_num_type must be 1 (counts), but is 0"),
    ("reroute-index", reroute(idx_type=2), "idx_type must be 0 or 1, but is 2"),
    ("reroute-dtype", reroute(tokens_dtype=1), "tokens_dtype must be None or the number of the dtype of tokens, but"),
    (
        "reroute-negative",
        reroute(expert_token_num_per_rank=int64([[4, -1]])),
        "expert_token_num_per_rank must not be negative, but has -1",
    ),
    (
        "reroute-other-sum",
        reroute(expert_token_num_per_rank=int64([[4, 1]])),
        "expert_token_num_per_rank must add up to the rows of tokens, 3, but adds up to 5",
    ),
]

_FINALIZE: list[Rule] = [
    ("finalize-elsewhere", finalize(bias=zeros(5, 4).to(ELSEWHERE)), "bias must be on cpu"),
    ("finalize-mode", finalize(drop_pad_mode=4), "drop_pad_mode must be 0, 1, 2 or 3, but is 4"),
    ("finalize-3d", finalize(expanded_permuted_rows=zeros(2, 3, 4)), "expanded_permuted_rows must have 2 dimensions"),
    ("finalize-2d", finalize(drop_pad_mode=3), "expanded_permuted_rows must have 3 dimensions, but has shape (6, 4)"),
    ("finalize-int8", finalize(expanded_permuted_rows=zeros(6, 4, dtype=I8)), "expanded_permuted_rows must have dtype"),
    (
        "finalize-2d-index",
        finalize(expanded_src_to_dst_row=zeros(3, 2, dtype=I32)),
        "expanded_src_to_dst_row must have 1 dimensions",
    ),
    (
        "finalize-int64-index",
        finalize(expanded_src_to_dst_row=zeros(6, dtype=I64)),
        "expanded_src_to_dst_row must have dtype int32, but has int64",
    ),
    ("finalize-1d-scales", finalize(scales=zeros(6)), "scales must have 2 dimensions"),
    (
        "finalize-half-scales",
        finalize(scales=zeros(3, 2, dtype=F16)),
        "scales must have dtype float32, but has float16",
    ),
    (
        "finalize-mixed",
        finalize(expanded_permuted_rows=zeros(6, 4, dtype=F16)),
        "scales must have dtype float16, but has float32",
    ),
    (
        "finalize-mixed-bfloat16",
        finalize(expanded_permuted_rows=zeros(6, 4, dtype=BF16), scales=zeros(3, 2, dtype=F16)),
        "scales must have dtype bfloat16, float32, but has float16",
    ),
    ("finalize-scales", finalize(scales=zeros(2, 2)), "one weight per entry of expanded_src_to_dst_row, but has shape"),
    (
        "finalize-scales-without-columns",
        finalize(scales=zeros(3, 0), expanded_src_to_dst_row=ints()),
        "scales must have at least one column",
    ),
    ("finalize-k", finalize(k=3), "k must be 1 or the number of columns of scales 2, but is 3"),
    (
        "finalize-k-zero",
        finalize(scales=None, k=0),
        "k must be positive and divide the 6 entries of the index, but is 0",
    ),
    ("finalize-k-of-six", finalize(scales=None, k=4), "k must be positive and divide the 6 entries of the index"),
    ("finalize-skip2", finalize(skip1=None), "skip2 needs skip1, which is None"),
    ("finalize-half-skip", finalize(skip1=zeros(3, 4, dtype=F16)), "skip1 must have dtype float32, but has float16"),
    ("finalize-skip1", finalize(skip1=zeros(4, 4)), "skip1 must have shape (3, 4), but has (4, 4)"),
    ("finalize-skip2-columns", finalize(skip2=zeros(3, 5)), "skip2 must have shape (3, 4), but has (3, 5)"),
    ("finalize-bias-alone", finalize(export_for_source_row=None), "bias needs export_for_source_row, which is None"),
    ("finalize-half-bias", finalize(bias=zeros(5, 4, dtype=F16)), "bias must have dtype float32, but has float16"),
    ("finalize-bias", finalize(bias=zeros(5, 3)), "bias must have shape [E, 4], but has (5, 3)"),
    (
        "finalize-int64-experts",
        finalize(export_for_source_row=zeros(3, 2, dtype=I64)),
        "export_for_source_row must have dtype int32, but has int64",
    ),
    (
        "finalize-experts",
        finalize(export_for_source_row=zeros(2, 3, dtype=I32)),
        "export_for_source_row must have shape (3, 2), but has (2, 3)",
    ),
    (
        "finalize-index-large",
        finalize(expanded_src_to_dst_row=ints(0, 1, 2, 3, 4, 6)),
        "expanded_src_to_dst_row must be in -1 to 5, but is 0 to 6",
    ),
    (
        "finalize-index-negative",
        finalize(expanded_src_to_dst_row=ints(0, 1, 2, 3, 4, -2)),
        "expanded_src_to_dst_row must be in -1 to 5, but is -2 to 4",
    ),
    (
        "finalize-expert-large",
        finalize(export_for_source_row=zeros(3, 2, dtype=I32) + 5),
        "export_for_source_row must be in 0 to 4, but is 5 to 5",
    ),
]

RULES = [*_FIRST, *_SECOND, *_QUANT, *_COUNT, *_RE_ROUTING, *_FINALIZE]

LEGAL: list[Callable[[], Any]] = [
    first(),
    second(),
    second(scale=zeros(3)),
    second(quant_mode=1, x_dtype=6),
    padded(),
    padded(expert_tokens_num_flag=True, expert_tokens_num_type=1),
    static(),
    quant(),
    quant(drop_pad_mode=1, expert_capacity=3),
    count(),
    reroute(),
    reroute(per_token_scales=zeros(3, 1), tokens_dtype=5),
    finalize(),
    finalize(expanded_permuted_rows=zeros(6, 4, dtype=BF16), skip1=None, skip2=None, bias=None, scales=zeros(3, 2)),
    finalize(scales=None, k=2, export_for_source_row=zeros(3, 2, dtype=I32)),
]
