"""Every rule of the operators has a call that breaks it, and says so in words."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_npu import ops
from tests.ops.samples import BF16, F16, F32, F64, int64, matmul_inputs, scale_words

I8, I32, I64 = torch.int8, torch.int32, torch.int64

Rule = tuple[str, Callable[[], Any], str]


def zeros(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=I32)


# --- npu_grouped_matmul ----------------------------------------------------------------------------------------------


def matmul(*call: str, x: Any = None, weight: Any = None, **changes: Any) -> Callable[[], Any]:
    """A legal call (scenario and dtype row; float32 with one stacked weight if not given), some arguments changed."""
    scenario, row = call or ("sss", "float32")
    args, kwargs = matmul_inputs(scenario, row, (2, 3), k=changes.pop("k", 8))
    return lambda: ops.npu_grouped_matmul(
        args[0] if x is None else x, args[1] if weight is None else weight, **{**kwargs, **changes}
    )


PAIRS = "mmm", "float32"
LISTS = "mms", "float32"
K_SPLIT = "k-split", "float32"
INTS = "ints-smm", "float32"
W4 = "sss", "int4-weight-float16"
PER_TOKEN = "sss", "per-token-float16"

MATMUL_RULES: list[Rule] = [
    ("x-is-a-tensor", matmul(x=zeros(5, 8)), "x must be a list of tensors, but is Tensor"),
    ("x-is-empty", matmul(x=[]), "neither x nor weight could be empty"),
    ("weight-is-empty", matmul(weight=[]), "neither x nor weight could be empty"),
    ("129-tensors", matmul(*PAIRS, x=[zeros(1, 8)] * 129), "x has 129 tensors; at most 128 are allowed"),
    ("x-holds-a-number", matmul(x=[1.0]), "x[0] must be a tensor, but is float"),
    ("weight-holds-none", matmul(weight=[None]), "weight[0] must be a tensor, but is NoneType"),
    ("bias-is-a-number", matmul(bias=1.0), "bias must be a list of tensors, but is float"),
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
    ("group-list-type-2", matmul(group_list_type=2), "group_list_type must be 0 (cumulative sums) or 1 (counts)"),
    ("offset", matmul(offset=[zeros(2, 16)]), "offset must be None"),
    ("activation-input", matmul(activation_input=[zeros(1)]), "activation_input must be None"),
    ("activation-quant-scale", matmul(activation_quant_scale=[zeros(1)]), "activation_quant_scale must be None"),
    ("activation-quant-offset", matmul(activation_quant_offset=[zeros(1)]), "activation_quant_offset must be None"),
    ("x-dtype", matmul(x_dtype=290), "x_dtype must be None, but is 290"),
    ("per-token-scale-dtype", matmul(per_token_scale_dtype=293), "per_token_scale_dtype must be None"),
    ("negative-tuning-config", matmul(tuning_config=[-1]), "tuning_config[0] must not be negative, but is -1"),
    ("unknown-dtype-number", matmul(output_dtype=23), "output_dtype must be a dtype or the number of one, but is 23"),
    # the overload with a list of ints
    ("group-list-is-a-string", matmul(group_list="2, 5"), "group_list must be a tensor, a list of ints or None"),
    ("ints-group-type", matmul(*INTS, group_type=0), "group_type must be None, but is 0, when group_list is a list"),
    ("ints-counts", matmul(*INTS, group_list_type=1), "group_list_type must be None or 0, but is 1"),
    ("ints-act-type", matmul(*INTS, act_type=1), "act_type must be None or 0, but is 1"),
    ("ints-per-token", matmul(*INTS, per_token_scale=[zeros(5)]), "per_token_scale must be None when group_list"),
    ("ints-are-floats", matmul(*INTS, group_list=[2, 5.0]), "group_list[1] must be an int, but is 5.0"),
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
    ("int8-without-scale", matmul("sss", "int8-to-int8", scale=None), "no kernel for x int8, weight int8, scale None"),
    ("float32-scale-for-bfloat16", matmul("sss", "int8-to-float16", output_dtype=BF16), "no kernel for x int8, weight"),
    ("accumulators-per-token", matmul("sss", "accumulators", per_token_scale=[zeros(5)]), "no kernel for x int8"),
    ("antiquant-offset-missing", matmul(*W4, antiquant_offset=None), "no kernel for x float16, weight int32"),
    (
        "bias-dtype",
        matmul("sss", "bfloat16", bias=[zeros(2, 16, dtype=BF16)]),
        "bias must have dtype float32 for x bfl",
    ),
    (
        "bfloat16-bias-without-per-token",
        matmul("sss", "int8-to-bfloat16", bias=[zeros(2, 16, dtype=BF16)]),
        "bias must have dtype int32",
    ),
    ("activated-float", matmul(act_type=1), "act_type must be 0 for x float32, weight float32 and result float32"),
    ("activated-accumulators", matmul("sss", "accumulators", act_type=5), "only int8 products with a float result"),
    (
        "gradient-of-scale",
        matmul("sss", "int8-to-float16", scale=[torch.ones(2, 16, requires_grad=True)]),
        "scale[0] requires a gradient, but has none for weight of int8; detach it",
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
    # scenarios
    ("int32-group-list", matmul(group_list=ints(2, 5)), "group_list must be a 1-D int64 tensor, but is 1-D int32"),
    ("2d-group-list", matmul(group_list=zeros(2, 2, dtype=I64)), "group_list must be a 1-D int64 tensor, but is 2-D"),
    ("group-list-without-entries", matmul(group_list=int64([])), "group_list must have 1 to 1024 entries, but has 0"),
    ("1025-groups", matmul(group_list=zeros(1025, dtype=I64)), "group_list must have 1 to 1024 entries, but has 1025"),
    ("group-list-elsewhere", matmul(group_list=int64([2, 5]).to("meta")), "group_list is on meta but x[0] is on cpu"),
    ("no-grouping-group-list", matmul(*PAIRS, group_list=int64([2, 5])), "group_list must be None for group_type -1"),
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
        "per_token_scale needs group_type 0, one x and one result",
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
    ("other-k", matmul(x=[zeros(5, 9)]), "x[0] has 9 columns but weight[0] has 8 rows (weight is [..., K, N])"),
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
        "antiquant_scale[0] must cut K = 24 into groups of even length for a transposed weight",
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
    # values of the group list
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


# --- the other operators ---------------------------------------------------------------------------------------------


def grouped_mm(**changes: Any) -> Callable[[], Any]:
    legal = {"x": zeros(5, 3), "weight": zeros(2, 3, 4), "expert_tokens": int64([2, 3])}
    return lambda: ops.grouped_mm(**{**legal, **changes})


def weight_grad(**changes: Any) -> Callable[[], Any]:
    legal = {"x": zeros(5, 3), "dy": zeros(5, 4), "expert_tokens": int64([2, 3])}
    return lambda: ops.grouped_mm_weight_grad(**{**legal, **changes})


def swiglu(input: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu(input, **options)


def swiglu_backward(grad: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_swiglu_backward(grad, zeros(3, 4), **options)


def gating(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_gating_top_k_softmax(x, **options)


def permute(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_token_permute(**{"tokens": zeros(3, 4), "indices": zeros(3, 2, dtype=I64), **changes})


def unpermute(**changes: Any) -> Callable[[], Any]:
    legal = {"permuted_tokens": zeros(6, 4), "sorted_indices": torch.arange(6, dtype=I32), "probs": torch.ones(3, 2)}
    return lambda: ops.npu_moe_token_unpermute(**{**legal, **changes})


def quant(*shape: int, dtype: torch.dtype = F16, **options: Any) -> Callable[[], Any]:
    return lambda: ops.npu_dynamic_quant(zeros(*(shape or (4, 8)), dtype=dtype), **options)


def pack(weight: torch.Tensor) -> Callable[[], Any]:
    return lambda: ops.npu_convert_weight_to_int4pack(weight)


def smooth(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return zeros(*shape, dtype=dtype)


ELSEWHERE = torch.device("meta")

OTHER_RULES: list[Rule] = [
    (
        "mm-bias-elsewhere",
        grouped_mm(bias=torch.zeros(2, 4, device=ELSEWHERE)),
        "bias must be on cpu like the first argument, but is on meta",
    ),
    (
        "gating-finished-elsewhere",
        gating(zeros(3, 4), finished=torch.zeros(3, dtype=torch.bool, device=ELSEWHERE)),
        "finished must be on cpu",
    ),
    ("permute-ids-elsewhere", permute(indices=zeros(3, 2, dtype=I64).to(ELSEWHERE)), "indices must be on cpu"),
    (
        "unpermute-order-elsewhere",
        unpermute(sorted_indices=zeros(6, dtype=I32).to(ELSEWHERE)),
        "sorted_indices must be on cpu",
    ),
    ("unpermute-probs-elsewhere", unpermute(probs=zeros(3, 2).to(ELSEWHERE)), "probs must be on cpu"),
    ("quant-smooth-elsewhere", quant(smooth_scales=smooth(8).to(ELSEWHERE)), "smooth_scales must be on cpu"),
    (
        "quant-groups-elsewhere",
        quant(smooth_scales=smooth(1, 8), group_index=zeros(1, dtype=I32).to(ELSEWHERE)),
        "group_index must be on cpu",
    ),
    (
        "swiglu-gradient-elsewhere",
        lambda: ops.npu_swiglu_backward(zeros(2).to(ELSEWHERE), zeros(4)),
        "grad_output must be on cpu",
    ),
    ("quant-dtype-number", quant(dst_type=23), "dst_type must be a dtype or the number of one, but is 23"),
    ("quant-dtype-bool", quant(dst_type=True), "dst_type must be a dtype or the number of one, but is True"),
    (
        "mm-integers",
        grouped_mm(x=zeros(5, 3, dtype=I8)),
        "grouped_mm: x must have dtype float16, bfloat16, float32, but",
    ),
    (
        "mm-mixed-dtypes",
        grouped_mm(weight=zeros(2, 3, 4, dtype=F16)),
        "x and weight must have one dtype, but are float32",
    ),
    ("mm-3d-x", grouped_mm(x=zeros(1, 5, 3)), "x must have 2 dimensions, but has shape (1, 5, 3)"),
    ("mm-2d-counts", grouped_mm(expert_tokens=int64([[2, 3]])), "expert_tokens must have 1 dimensions"),
    ("mm-int32-counts", grouped_mm(expert_tokens=ints(2, 3)), "expert_tokens must have dtype int64, but has int32"),
    ("mm-no-counts", grouped_mm(expert_tokens=int64([])), "expert_tokens must have one entry per expert, but is empty"),
    ("mm-other-device", grouped_mm(weight=zeros(2, 3, 4, device="meta")), "weight is on meta but x is on cpu"),
    ("mm-2d-weight", grouped_mm(weight=zeros(3, 4)), "weight must have 3 dimensions, but has shape (3, 4)"),
    ("mm-other-experts", grouped_mm(weight=zeros(3, 3, 4)), "weight has 3 experts but expert_tokens has 2 entries"),
    ("mm-other-k", grouped_mm(weight=zeros(2, 9, 4)), "x has 3 columns but each expert's weight has 9 rows"),
    (
        "mm-bias-dtype",
        grouped_mm(bias=zeros(2, 4, dtype=F16)),
        "bias must have the dtype of x, float32, or be float32 for bfloat16 x, but has",
    ),
    ("mm-float64-bias", grouped_mm(bias=zeros(2, 4, dtype=F64)), "but has float64"),
    ("mm-bias-shape", grouped_mm(bias=zeros(4)), "bias must have shape (2, 4), but has (4,)"),
    ("mm-negative-count", grouped_mm(expert_tokens=int64([-1, 3])), "should be larger than or equal to 0"),
    ("mm-beyond-rows", grouped_mm(expert_tokens=int64([3, 3])), "group_list covers 6 rows but there are only 5"),
    ("weight-grad-3d-dy", weight_grad(dy=zeros(1, 5, 4)), "grouped_mm_weight_grad: dy must have 2 dimensions"),
    ("weight-grad-other-rows", weight_grad(dy=zeros(4, 4)), "x has 5 rows but dy has 4"),
    ("swiglu-integers", swiglu(zeros(3, 4, dtype=I32)), "npu_swiglu: input must have dtype float16, bfloat16, float32"),
    ("swiglu-scalar", swiglu(zeros()), "input must have 1 to 8 dimensions, but has shape ()"),
    ("swiglu-nine-dims", swiglu(zeros(*[2] * 9)), "input must have 1 to 8 dimensions"),
    ("swiglu-dim", swiglu(zeros(3, 4), dim=2), "dim 2 is out of range for input of 2 dimensions"),
    ("swiglu-odd", swiglu(zeros(3, 4), dim=0), "must have an even size along dim 0 to be split in halves"),
    ("swiglu-grad-shape", swiglu_backward(zeros(3, 4)), "grad_output must be torch.float32 of shape (3, 2), but is"),
    ("swiglu-grad-dtype", swiglu_backward(zeros(3, 2, dtype=F16)), "but is torch.float16 of shape (3, 2)"),
    ("gating-1d", gating(zeros(4)), "x must have 2 or 3 dimensions, but has shape (4,)"),
    ("gating-integers", gating(zeros(3, 4, dtype=I32)), "x must have dtype float16, bfloat16, float32, but has int32"),
    ("gating-too-many", gating(zeros(3, 4), k=5), "k must be between 0 and the number of experts 4, but is 5"),
    ("gating-negative-k", gating(zeros(3, 4), k=-1), "k must be between 0 and the number of experts 4, but is -1"),
    ("gating-finished-dtype", gating(zeros(3, 4), finished=zeros(3)), "finished must have dtype bool, but has float32"),
    (
        "gating-finished-shape",
        gating(zeros(3, 4), finished=zeros(3, 1, dtype=torch.bool)),
        "finished must have the leading shape of x (3,), but has (3, 1)",
    ),
    ("permute-3d-tokens", permute(tokens=zeros(1, 3, 4)), "tokens must have 2 dimensions, but has shape (1, 3, 4)"),
    ("permute-integers", permute(tokens=zeros(3, 4, dtype=I8)), "tokens must have dtype float16, bfloat16, float32"),
    ("permute-3d-ids", permute(indices=zeros(3, 1, 2, dtype=I64)), "indices must have 1 or 2 dimensions"),
    ("permute-float-ids", permute(indices=zeros(3, 2)), "indices must have dtype int32, int64, but has float32"),
    ("permute-other-rows", permute(indices=zeros(4, 2, dtype=I64)), "one row per token, but has 4 for 3 tokens"),
    ("permute-513-ids", permute(indices=zeros(3, 513, dtype=I64)), "indices must have 1 to 512 columns"),
    ("permute-no-ids", permute(indices=zeros(3, 0, dtype=I64)), "indices must have 1 to 512 columns"),
    (
        "permute-too-many-pairs",
        permute(tokens=zeros(2**15, 0), indices=zeros(1, dtype=I32).expand(2**15, 512)),
        "indices must have fewer than 2**24 elements, but has 16777216",
    ),
    ("permute-padded", permute(padded_mode=True), "padded_mode must be False; no device has the padded form"),
    (
        "permute-negative-id",
        permute(indices=int64([[0, 1], [2, -1], [0, 0]])),
        "expert ids of 0 to 2**24 - 2, but are -1",
    ),
    ("permute-large-id", permute(indices=int64([[0, 1], [2, 2**24 - 1], [0, 0]])), "but are 0 to 16777215"),
    ("unpermute-3d", unpermute(permuted_tokens=zeros(1, 6, 4)), "permuted_tokens must have 2 dimensions"),
    ("unpermute-integers", unpermute(permuted_tokens=zeros(6, 4, dtype=I8)), "permuted_tokens must have dtype float16"),
    ("unpermute-2d-ids", unpermute(sorted_indices=zeros(3, 2, dtype=I32)), "sorted_indices must have 1 dimensions"),
    ("unpermute-int64-ids", unpermute(sorted_indices=zeros(6, dtype=I64)), "sorted_indices must have dtype int32"),
    ("unpermute-1d-probs", unpermute(probs=zeros(6)), "probs must have 2 dimensions, but has shape (6,)"),
    ("unpermute-integer-probs", unpermute(probs=zeros(3, 2, dtype=I32)), "probs must have dtype float16, bfloat16"),
    (
        "unpermute-probs-without-columns",
        unpermute(probs=zeros(3, 0), sorted_indices=zeros(0, dtype=I32)),
        "probs must have at least one column, but has shape (3, 0)",
    ),
    (
        "unpermute-other-probs",
        unpermute(probs=zeros(2, 2)),
        "one weight per entry of sorted_indices, but has shape (2, 2)",
    ),
    ("unpermute-padded", unpermute(padded_mode=True), "padded_mode must be False; no device has the padded form"),
    ("unpermute-negative-id", unpermute(sorted_indices=ints(0, 1, -2, 3, 4, 5)), "sorted_indices has -2 with a weight"),
    ("quant-float32", quant(dtype=F32), "input must have dtype float16, bfloat16, but has float32"),
    ("quant-1d", quant(8), "Input shape dim should be greater than 1, but input has shape (8,)"),
    ("quant-dst-type", quant(dst_type=torch.uint8), "dst_type must be None, torch.int8 or torch.quint4x2"),
    ("quant-int4-of-9", quant(4, 9, dst_type=torch.quint4x2), "must be divded by 8 when int4 quantization, but is 9"),
    ("quant-mode", quant(quant_mode="perrow"), "quant_mode must be one of ('pertoken', 'perchannel', 'pertensor')"),
    ("quant-dst-type-max", quant(dst_type_max=1.0), "dst_type_max must be 0 for integer results, but is 1.0"),
    ("quant-groups-alone", quant(group_index=ints(4)), "group_index needs smooth_scales, which is None"),
    ("quant-smooth-dtype", quant(smooth_scales=smooth(8, dtype=F32)), "smooth_scales must have dtype float16, but has"),
    ("quant-smooth-shape", quant(smooth_scales=smooth(1, 8)), "smooth_scales must have shape (8,), but has (1, 8)"),
    (
        "quant-groups-of-channels",
        quant(smooth_scales=smooth(1, 8), group_index=ints(4), quant_mode="perchannel"),
        "group_index must be None for quant_mode 'perchannel'",
    ),
    (
        "quant-int64-groups",
        quant(smooth_scales=smooth(1, 8), group_index=int64([4])),
        "group_index must have dtype int32",
    ),
    (
        "quant-no-groups",
        quant(smooth_scales=smooth(0, 8), group_index=ints()),
        "group_index must have shape [E] with 1",
    ),
    (
        "quant-other-groups",
        quant(smooth_scales=smooth(2, 8), group_index=ints(4)),
        "smooth_scales must have shape (1, 8)",
    ),
    (
        "quant-uncovered-rows",
        quant(smooth_scales=smooth(1, 8), group_index=ints(3)),
        "the last entry of group_index must be the number of rows 4, but is 3",
    ),
    ("pack-float", pack(zeros(2, 8)), "weight dtype only support int32, but is float32"),
    ("pack-empty", pack(zeros(0, 8, dtype=I32)), "weight must have 2 or 3 dimensions and not be empty"),
    ("pack-transposed", pack(zeros(8, 16, dtype=I32).t()), "weight is Not contiguous, its strides are (1, 16)"),
    ("pack-12-columns", pack(zeros(2, 12, dtype=I32)), "weight last dim should be the multiple of 8, but is 12"),
]

RULES = [*MATMUL_RULES, *OTHER_RULES]


@pytest.mark.parametrize(("call", "message"), [pytest.param(call, text, id=id) for id, call, text in RULES])
def test_a_broken_rule_is_refused_in_words(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ops.OperatorError, match=re.escape(message)) as caught:
        call()
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, ValueError)


def test_the_calls_are_legal_without_the_change() -> None:
    for legal in (matmul, grouped_mm, weight_grad, permute, unpermute, quant):
        legal()()
    for scenario in (PAIRS, LISTS, K_SPLIT, INTS, W4, PER_TOKEN, ("ints-sms", "float32"), ("ints-mms", "float32")):
        matmul(*scenario)()
    scale = [scale_words(torch.ones(2, 16), torch.zeros(2, 16))]
    matmul("sss", "int8-to-int8", scale=scale)()


# --- every rule is broken above --------------------------------------------------------------------------------------

CHECKS = {"require", "reject", "require_dtype", "require_dim", "require_device"}
FOLDER = Path(ops.__file__).parent


def _rule_sites() -> dict[tuple[str, int], int]:
    """File and first line of each call of a check, with its last line."""
    sites = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKS:
                assert node.end_lineno is not None
                sites[path.name, node.lineno] = node.end_lineno
    return sites


def test_every_rule_is_broken_by_some_call() -> None:
    sites = _rule_sites()
    assert len(sites) > 100
    broken = set()
    for _, call, _ in RULES:
        with pytest.raises(ops.OperatorError) as caught:
            call()
        for frame in traceback.extract_tb(caught.value.__traceback__):
            path = Path(frame.filename)
            if path.parent == FOLDER and frame.lineno is not None:
                broken |= {
                    (name, first)
                    for (name, first), last in sites.items()
                    if name == path.name and first <= frame.lineno <= last
                }
    assert sorted(sites.keys() - broken) == []
