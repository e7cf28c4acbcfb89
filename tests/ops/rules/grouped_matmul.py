"""Rules of grouped matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, F16, F32, I8, I32, I64, Rule, int64, ints, zeros
from tests.ops.samples.grouped_matmul import matmul_inputs, scale_words


def matmul(*call: str, x: Any = None, weight: Any = None, **changes: Any) -> Callable[[], Any]:
    """A legal call (scenario and dtype row; float32 with one stacked weight if not given), some arguments changed."""
    scenario, row = call or ("sss", "float32")
    args, kwargs = matmul_inputs(scenario, row, (2, 3), k=changes.pop("k", None))
    return lambda: ops.npu_grouped_matmul(
        args[0] if x is None else x, args[1] if weight is None else weight, **{**kwargs, **changes}
    )


PAIRS = "mmm", "float32"
LISTS = "mms", "float32"
K_SPLIT = "k-split", "float32"
INTS = "ints-smm", "float32"
W4 = "sss", "int4-weight-float16"
PER_TOKEN = "sss", "per-token-float16"
ACCUMULATORS = "sss", "accumulators"
A4W4 = "sss", "a4w4-float16"
A8W4 = "sss", "a8w4-float16"
ASYMMETRIC = "sss", "a8w4-asymmetric"


def tiled(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Zeros in the format FRACTAL_NZ."""
    return ops.npu_format_cast(zeros(*shape, dtype=dtype), 29)


def pairs(*group_list: list[int], **changes: Any) -> Callable[[], Any]:
    """Int8 products of pairs of group and size, of five rows."""
    return matmul(*ACCUMULATORS, group_list=int64(group_list), group_list_type=2, **changes)


RULES: list[Rule] = [
    ("x-is-a-tensor", matmul(x=zeros(5, 8)), "x must be a list of tensors, but is Tensor"),
    ("x-is-empty", matmul(x=[]), "neither x nor weight could be empty"),
    ("weight-is-empty", matmul(weight=[]), "neither x nor weight could be empty"),
    ("129-tensors", matmul(*PAIRS, x=[zeros(1, 8)] * 129), "x has 129 tensors; at most 128 are allowed"),
    ("x-holds-a-number", matmul(x=[1.0]), "x[0] must be a tensor, but is float"),
    ("weight-holds-none", matmul(weight=[None]), "weight[0] must be a tensor, but is NoneType"),
    ("bias-is-a-number", matmul(bias=1.0), "bias must be a list of tensors or None, but is float"),
    ("bias-holds-none", matmul(bias=[None]), "bias[0] must be a tensor"),
    # modes
    ("group-type-none", matmul(group_type=None), "Requires manual passing group_type, current is None"),
    ("group-type-none-no-list", matmul(*PAIRS, group_type=None), "Requires manual passing group_type, current is None"),
    ("group-type-1", matmul(group_type=1), "The group type must be -1, 0 or 2, but now is 1"),
    (
        "group-type-100-before-dtypes",
        matmul(group_type=100, x=[zeros(1)]),
        "The group type must be -1, 0 or 2, but now",
    ),
    ("split-item-4", matmul(split_item=4), "should only be one of 0/1/2/3"),
    ("act-type-3", matmul(*PER_TOKEN, act_type=3), "act_type must be 0, 1, 2, 4 or 5, but is 3"),
    ("group-list-type-3", matmul(group_list_type=3), "group_list_type must be 0 (cumulative sums), 1 (counts) or 2"),
    ("129-biases", matmul(bias=[zeros(16)] * 129), "bias has 129 tensors; at most 128 are allowed"),
    ("activation-input", matmul(activation_input=[zeros(1)]), "activation_input must be None"),
    ("activation-quant-scale", matmul(activation_quant_scale=[zeros(1)]), "activation_quant_scale must be None"),
    ("activation-quant-offset", matmul(activation_quant_offset=[zeros(1)]), "activation_quant_offset must be None"),
    ("x-dtype", matmul(x_dtype=290), "x_dtype must be None, but is 290"),
    ("per-token-scale-dtype", matmul(per_token_scale_dtype=293), "per_token_scale_dtype must be None"),
    ("negative-tuning-config", matmul(tuning_config=[-1]), "tuning_config[0] must not be negative, but is -1"),
    ("unknown-dtype-number", matmul(output_dtype=23), "output_dtype must be a dtype or the number of one, but is 23"),
    # the overload with a list of ints
    ("group-list-is-a-string", matmul(group_list="2, 5"), "group_list must be a tensor or a list of ints or None"),
    ("ints-group-type", matmul(*INTS, group_type=0), "group_type must be None, but is 0, when group_list is a list"),
    ("ints-counts", matmul(*INTS, group_list_type=1), "group_list_type must be None or 0, but is 1"),
    ("ints-act-type", matmul(*INTS, act_type=1), "act_type must be None or 0, but is 1"),
    ("ints-per-token", matmul(*INTS, per_token_scale=[zeros(5)]), "per_token_scale must be None when group_list"),
    ("ints-tuning-config", matmul(*INTS, tuning_config=[1]), "tuning_config must be None when group_list is a list"),
    (
        "ints-transposed-pairs",
        matmul("ints-mmm", "float32", weight=[zeros(16, 16).t(), zeros(24, 8).t()]),
        "weight must not be transposed when group_list is a list of ints and each x has its own weight",
    ),
    ("ints-are-floats", matmul(*INTS, group_list=[2, 5.0]), "group_list[1] must be an int, but is float"),
    ("ints-negative", matmul(*INTS, group_list=[-1, 5]), "should be larger than or equal to 0"),
    ("ints-decrease", matmul(*INTS, group_list=[3, 2]), "should be larger than or equal to 0"),
    ("ints-beyond-rows", matmul(*INTS, group_list=[2, 6]), "group_list covers 6 rows but there are only 5"),
    ("ints-last-is-not-rows", matmul("ints-sms", "float32", group_list=[2, 4]), "the last entry of group_list must be"),
    ("ints-stacked-weight", matmul(*INTS, weight=[zeros(2, 8, 16)]), "weight must be 2-D tensors when group_list is"),
    ("ints-with-pairs", matmul("ints-mmm", "float32", group_list=[2, 5]), "each x has its own weight and result"),
    (
        "ints-other-rows",
        matmul("ints-mms", "float32", group_list=[3, 5]),
        "cumulative row counts of x [2, 5], but is [3",
    ),
    # dtypes
    ("mixed-dtypes", matmul(*LISTS, x=[zeros(2, 16), zeros(3, 8, dtype=F16)]), "all tensors of x must have one dtype"),
    ("other-device", matmul(weight=[zeros(2, 8, 16, device="meta")]), "weight[0] is on meta but x[0] is on cpu"),
    ("float-x-half-weight", matmul(weight=[zeros(2, 8, 16, dtype=F16)]), "x of float32 with weight of float16 is not"),
    ("float-with-scale", matmul(scale=[zeros(2, 16)]), "no kernel for x float32, weight float32, scale float32"),
    ("int8-without-scale", matmul("sss", "int8-to-int8", scale=None), "no kernel for x int8, weight int8, scale -"),
    ("float32-scale-for-bfloat16", matmul("sss", "int8-to-float16", output_dtype=BF16), "no kernel for x int8, weight"),
    ("accumulators-per-token", matmul("sss", "accumulators", per_token_scale=[zeros(5)]), "no kernel for x int8"),
    ("antiquant-offset-missing", matmul(*W4, antiquant_offset=None), "no kernel for x float16, weight int4"),
    (
        "offset-of-floats",
        matmul(offset=[zeros(2, 16)]),
        "no kernel for x float32, weight float32, scale -, offset float",
    ),
    ("a4w4-without-output-dtype", matmul(*A4W4, output_dtype=None), "no kernel for x int4, weight int4"),
    ("a4w4-without-scale", matmul(*A4W4, scale=None), "no kernel for x int4, weight int4, scale -"),
    ("a8w4-without-per-token", matmul(*A8W4, per_token_scale=None), "no kernel for x int8, weight int4"),
    ("a8w4-float32-scale", matmul(*A8W4, scale=[zeros(2, 1, 16)]), "no kernel for x int8, weight int4, scale float32"),
    ("asymmetric-to-bfloat16", matmul(*ASYMMETRIC, output_dtype=BF16), "no kernel for x int8, weight int4"),
    ("a8w4-without-bias", matmul(*A8W4, bias=None), "bias must have dtype float32 for x int8, weight int4"),
    ("a4w4-bias", matmul(*A4W4, bias=[zeros(2, 16)]), "bias must have dtype - for x int4, weight int4"),
    ("activated-a8w4", matmul(*A8W4, act_type=1), "act_type must be 0 for x int8, weight int4 and result float16"),
    (
        "bias-dtype",
        matmul("sss", "bfloat16", bias=[zeros(2, 16, dtype=BF16)]),
        "bias must have dtype - or float32 for x bfloat16",
    ),
    (
        "bfloat16-bias-without-per-token",
        matmul("sss", "int8-to-bfloat16", bias=[zeros(2, 16, dtype=BF16)]),
        "bias must have dtype - or int32",
    ),
    ("activated-float", matmul(act_type=1), "act_type must be 0 for x float32, weight float32 and result"),
    ("activated-accumulators", matmul("sss", "accumulators", act_type=5), "only int8 products with a float result"),
    (
        "gradient-of-scale",
        matmul("sss", "int8-to-float16", scale=[torch.ones(2, 16, requires_grad=True)]),
        "scale[0] requires a gradient, but has none; detach it",
    ),
    (
        "gradient-of-int8-bias",
        matmul("sss", "per-token-bfloat16", bias=[torch.ones(2, 16, dtype=BF16, requires_grad=True)]),
        "bias[0] requires a gradient",
    ),
    (
        "gradient-of-antiquant-offset",
        matmul(*W4, antiquant_offset=[torch.ones(2, 16, dtype=F16, requires_grad=True)]),
        "antiquant_offset[0] requires a gradient",
    ),
    (
        "gradient-of-a8w4-bias",
        matmul(*A8W4, bias=[torch.ones(2, 16, requires_grad=True)]),
        "bias[0] requires a gradient, but has none",
    ),
    (
        "gradient-of-offset",
        matmul(*ASYMMETRIC, offset=[torch.ones(2, 1, 16, requires_grad=True)]),
        "offset[0] requires a gradient, but has none",
    ),
    # scenarios
    ("int32-group-list", matmul(group_list=ints(2, 5)), "group_list must be a 1-D int64 tensor for group_list_type 0"),
    ("2d-group-list", matmul(group_list=zeros(2, 2, dtype=I64)), "group_list must be a 1-D int64 tensor for group_li"),
    (
        "1d-pairs",
        matmul(*ACCUMULATORS, group_list_type=2),
        "group_list must be a 2-D int64 tensor for group_list_type 2",
    ),
    ("triples", pairs([0, 1, 2], [1, 1, 2]), "group_list must hold pairs of group and size, but has shape (2, 3)"),
    ("pairs-of-floats", matmul(group_list_type=2), "group_list_type must be 0 or 1 for float products, but is 2"),
    (
        "pairs-without-grouping",
        matmul("mmm", "int8-to-int8", group_list_type=2),
        "group_list_type must be 0 or 1 unless group_type is 0",
    ),
    ("a4w4-pairs", matmul(*A4W4, group_list_type=2), "group_list_type must be 0 or 1 for A4W4 products, but is 2"),
    ("a8w4-sums", matmul(*A8W4, group_list_type=0), "group_list_type must be 1 for A8W4 products, but is 0"),
    (
        "a4w4-weight-list",
        matmul(*A4W4, weight=[zeros(8, 2, dtype=I32)] * 2, scale=[zeros(16, dtype=I64)] * 2),
        "A4W4 products need x, weight and result, each one tensor (s) or a list (m), to be sss, but they are sms",
    ),
    ("group-list-without-entries", matmul(group_list=int64([])), "group_list must have 1 to 1024 entries, but has 0"),
    ("1025-groups", matmul(group_list=zeros(1025, dtype=I64)), "group_list must have 1 to 1024 entries, but has 1025"),
    ("group-list-elsewhere", matmul(group_list=int64([2, 5]).to("meta")), "group_list is on meta but x[0] is on cpu"),
    (
        "no-grouping-group-list",
        matmul(*PAIRS, group_list=int64([2, 5])),
        "-1, the default. Requires manual passing group_type",
    ),
    ("no-grouping-split-2", matmul(*PAIRS, split_item=2), "split_item must be 0 or 1 for group_type -1, but is 2"),
    ("rows-split-0", matmul(split_item=0), "split_item must be 2 or 3 for group_type 0, but is 0"),
    ("rows-split-none", matmul(split_item=None), "split_item must be 2 or 3 for group_type 0, but is 0"),
    ("mixed-ranks", matmul(*PAIRS, x=[zeros(2, 8), zeros(1, 3, 8)]), "all x must have one rank of 2 to 6"),
    (
        "rank-1",
        matmul(*PAIRS, x=[zeros(8), zeros(8)]),
        "one rank of 2 to 6 when each has its own weight, but have ranks",
    ),
    ("rank-7", matmul(*PAIRS, x=[zeros(1, 1, 1, 1, 1, 1, 8)] * 2), "one rank of 2 to 6"),
    ("joint-result-rank-3", matmul(*LISTS, x=[zeros(1, 2, 16), zeros(1, 3, 8)]), "all x must be 2-D for one joint"),
    ("two-x-one-stack", matmul(x=[zeros(2, 8), zeros(3, 8)]), "len(x) must be 1 or len(weight) with 2-D weights"),
    ("grouped-rank-3", matmul(x=[zeros(1, 5, 8)]), "x must be 2-D when its rows are grouped"),
    ("no-group-list", matmul(group_list=None), "group_list must be given when one x is multiplied by 1 weight tensor"),
    ("fewer-groups-than-weights", matmul(group_list=int64([5])), "one entry per weight, 2, but has 1"),
    ("more-groups-than-weights", matmul(*INTS, group_list=[2, 3, 5]), "one entry per weight, 2, but has 3"),
    ("group-list-per-x", matmul(*LISTS, group_list=int64([5])), "group_list must have one entry per x, 2, but has 1"),
    (
        "other-row-counts",
        matmul(*LISTS, group_list=int64([3, 5])),
        "group_list must describe the rows of x [2, 3], but",
    ),
    ("stack-among-weights", matmul(*PAIRS, weight=[zeros(8, 16), zeros(1, 8, 16)]), "weight[1] must be 2-D"),
    (
        "per-token-without-grouping",
        matmul("mmm", "int8-to-float16", per_token_scale=[zeros(5)]),
        "per token products need x, weight and result, each one tensor (s) or a list (m), to be sss or sms, but they",
    ),
    # K split
    ("k-split-split-0", matmul(*K_SPLIT, split_item=0), "split_item must be 2 or 3 for group_type 2"),
    (
        "k-split-int8",
        matmul(*K_SPLIT, x=[zeros(5, 8, dtype=I8).t()], weight=[zeros(5, 16, dtype=I8)], output_dtype=I32),
        "x and weight must be float for group_type 2",
    ),
    ("k-split-bias", matmul(*K_SPLIT, bias=[zeros(16)]), "bias must be None for group_type 2"),
    (
        "k-split-no-group-list",
        matmul(*K_SPLIT, group_list=None),
        "group_list must be given as a tensor for group_type 2",
    ),
    (
        "k-split-two-weights",
        matmul(*K_SPLIT, weight=[zeros(5, 16)] * 2),
        "x and weight must be one tensor each for group",
    ),
    ("k-split-stack", matmul(*K_SPLIT, weight=[zeros(1, 5, 16)]), "x and weight must be 2-D for group_type 2"),
    ("k-split-contiguous-x", matmul(*K_SPLIT, x=[zeros(8, 5)]), "x must be the transposed view of a contiguous [K, M]"),
    (
        "k-split-transposed-weight",
        matmul(*K_SPLIT, weight=[zeros(16, 5).t()]),
        "weight must not be transposed for group",
    ),
    # sizes
    (
        "one-transposed-weight",
        matmul(*PAIRS, weight=[zeros(8, 16), zeros(16, 8).t()]),
        "must be transposed views, or none",
    ),
    ("transposed-x", matmul(x=[zeros(8, 5).t()]), "x[0] must not be a transposed view"),
    ("other-k", matmul(x=[zeros(5, 9)]), "x[0] has 9 columns but weight[0] has 8 rows (weight is [..., K, N]"),
    ("other-k-in-a-list", matmul(*PAIRS, x=[zeros(2, 16), zeros(3, 9)]), "x[1] has 9 columns but weight[1] has 8 rows"),
    ("int8-without-k", matmul("sss", "int8-to-int8", k=0), "k must be a positive integer for int8 products, but is 0"),
    (
        "other-n",
        matmul(*LISTS, weight=[zeros(16, 8), zeros(8, 9)]),
        "all weights must have one number of columns for one",
    ),
    (
        "65536-columns-of-x",
        matmul(x=[zeros(1).expand(5, 65536)], weight=[zeros(1).expand(2, 65536, 16)]),
        "the inner axis of x[0] must be at most 65535, but is 65536",
    ),
    (
        "65536-columns-of-weight",
        matmul(weight=[zeros(1).expand(2, 8, 65536)]),
        "the inner axis of weight[0] must be at most 65535, but is 65536",
    ),
    ("two-biases-for-a-stack", matmul(bias=[zeros(16)] * 2), "bias must have one tensor per weight, 1, but has 2"),
    ("bias-without-experts", matmul(bias=[zeros(16)]), "bias[0] must have shape [2, 16], but has (16,)"),
    ("scale-shape", matmul("sss", "int8-to-float16", scale=[zeros(2, 1)]), "scale[0] must have shape [2, 16]"),
    (
        "antiquant-shapes-differ",
        matmul(*W4, antiquant_offset=[zeros(2, 2, 16, dtype=F16)]),
        "antiquant_scale[0] and antiquant_offset[0] must have one shape",
    ),
    (
        "groups-of-3-in-8",
        matmul(*W4, antiquant_scale=[zeros(2, 3, 16, dtype=F16)]),
        "antiquant_scale[0] must have shape [2, 'G', 16] with G dividing K = 8",
    ),
    (
        "odd-groups-along-packed-k",
        matmul(
            *W4,
            k=24,
            weight=[zeros(2, 16, 3, dtype=I32).mT],
            antiquant_scale=[zeros(2, 8, 16, dtype=F16)],
            antiquant_offset=[zeros(2, 8, 16, dtype=F16)],
        ),
        "antiquant_scale[0] must cut K = 24 into groups of even length for int4 products and transposed weights",
    ),
    (
        "groups-of-two-lengths",
        matmul(
            "mms",
            "int4-weight-float16",
            antiquant_scale=[zeros(2, 16, dtype=F16)] * 2,
            antiquant_offset=[zeros(2, 16, dtype=F16)] * 2,
        ),
        "antiquant_scale must cut K into groups of one length for all weights, but has lengths [8, 4]",
    ),
    (
        "int8-weight-in-groups",
        matmul("sss", "int8-weight-float16", antiquant_scale=[zeros(2, 2, 16, dtype=F16)]),
        "antiquant_scale[0] must have shape [2, 16], but has (2, 2, 16)",
    ),
    (
        "two-per-token-scales",
        matmul(*PER_TOKEN, per_token_scale=[zeros(5)] * 2),
        "per_token_scale must hold one tensor",
    ),
    (
        "per-token-scale-column",
        matmul(*PER_TOKEN, per_token_scale=[zeros(5, 1)]),
        "per_token_scale must have shape [5]",
    ),
    # products of int4
    (
        "a4w4-other-k",
        matmul(*A4W4, x=[zeros(5, 2, dtype=I32)]),
        "x[0] has 16 columns but weight[0] has 8 rows (weight is [..., K, N], int4 values count one by one)",
    ),
    ("a4w4-packed-along-k", matmul(*A4W4, weight=[zeros(2, 16, 8, dtype=I32).mT]), "weight must not be a transposed"),
    (
        "a4w4-odd-groups",
        matmul(*A4W4, scale=[zeros(2, 8, 16, dtype=I64)]),
        "scale[0] must cut K = 8 into groups of even",
    ),
    ("a4w4-column-per-token", matmul(*A4W4, per_token_scale=[zeros(5, 1)]), "per_token_scale must have shape [5], one"),
    ("a8w4-k-of-72", matmul(*A8W4, k=72), "K must be a multiple of 64 up to 18432 for A8W4, but is 72"),
    (
        "a8w4-long-k",
        matmul(*A8W4, x=[zeros(5, 18496, dtype=I8)], weight=[zeros(2, 18496, 2, dtype=I32)]),
        "K must be a multiple of 64 up to 18432 for A8W4, but is 18496",
    ),
    (
        "asymmetric-groups",
        matmul(*ASYMMETRIC, scale=[zeros(2, 2, 16, dtype=I64)]),
        "scale[0] must have one group of K for A8W4 asymmetric, but has 2",
    ),
    (
        "asymmetric-offset-groups",
        matmul(*ASYMMETRIC, offset=[zeros(2, 2, 16)]),
        "offset[0] must have one group of K for",
    ),
    (
        "asymmetric-per-token-row",
        matmul(*ASYMMETRIC, per_token_scale=[zeros(5)]),
        "per_token_scale must have shape [5, 1] for A8W4 asymmetric, but has (5,)",
    ),
    # formats
    ("tiled-x", matmul(x=[tiled(5, 8)]), "x[0] must not have the format FRACTAL_NZ; cast it to ND"),
    (
        "one-tiled-weight",
        matmul(*PAIRS, weight=[zeros(16, 16), tiled(8, 24)]),
        "all weights must have the format FRACTAL",
    ),
    (
        "tiled-float32",
        matmul(weight=[tiled(2, 8, 16)]),
        "weight must not have the format FRACTAL_NZ for float in scenario",
    ),
    (
        "tiled-int8-result",
        matmul("sss", "int8-to-int8", weight=[tiled(2, 8, 16, dtype=I8)]),
        "weight must not have the format FRACTAL_NZ for int8 result in scenario sss",
    ),
    (
        "tiled-int4",
        matmul(*W4, weight=[tiled(2, 8, 2, dtype=I32)]),
        "weight must not have the format FRACTAL_NZ for A16W4 in scenario sss",
    ),
    (
        "tiled-k-split",
        matmul("k-split", "float16", weight=[tiled(5, 16, dtype=F16)]),
        "weight must not have the format FRACTAL_NZ for float in scenario k-split",
    ),
    (
        "tiled-a8w4-groups-of-128",
        matmul(*A8W4, k=512, weight=[tiled(2, 512, 2, dtype=I32)], scale=[zeros(2, 4, 16, dtype=I64)]),
        "scale must have one group of K, or groups of 256 rows, for weight of the format FRACTAL_NZ, but has 4 groups",
    ),
    # values of the group list
    ("negative-size", pairs([0, -1], [1, 2]), "group_list sizes should be larger than or equal to 0"),
    ("pair-of-no-group", pairs([2, 1], [1, 2]), "group_list must name each of the groups 0 to 1 once at most"),
    ("negative-group", pairs([-1, 1], [1, 2]), "group_list must name each of the groups 0 to 1 once at most"),
    ("repeated-group", pairs([1, 1], [1, 2]), "group_list must name each of the groups 0 to 1 once at most"),
    ("pairs-beyond-rows", pairs([1, 3], [0, 3]), "group_list covers 6 rows but there are only 5"),
    ("negative-count", matmul(group_list=int64([-1, 3]), group_list_type=1), "should be larger than or equal to 0"),
    ("decreasing", matmul(group_list=int64([3, 2])), "should be larger than or equal to 0"),
    ("negative-end", matmul(group_list=int64([-1, 2])), "should be larger than or equal to 0"),
    ("beyond-rows", matmul(group_list=int64([2, 6])), "group_list covers 6 rows but there are only 5"),
    (
        "counts-beyond-rows",
        matmul(group_list=int64([3, 3]), group_list_type=1),
        "group_list covers 6 rows but there are",
    ),
]

LEGAL = [
    matmul(),
    *[matmul(*call) for call in (PAIRS, LISTS, K_SPLIT, INTS, W4, PER_TOKEN, A4W4, A8W4, ASYMMETRIC)],
    pairs([1, 2], [0, 3]),
    matmul("sss", "float16", weight=[tiled(2, 8, 16, dtype=F16)]),
    matmul(*ACCUMULATORS, weight=[tiled(2, 8, 16, dtype=I8)]),
    matmul(*A8W4, k=512, weight=[tiled(2, 512, 2, dtype=I32)], scale=[zeros(2, 2, 16, dtype=I64)]),
    matmul("ints-mmm", "float32"),
    matmul("k-split", "float16"),
    matmul("ints-sms", "float32"),
    matmul("ints-mms", "float32"),
    matmul("sss", "int8-to-int8", scale=[scale_words(torch.ones(2, 16), torch.zeros(2, 16))]),
]
