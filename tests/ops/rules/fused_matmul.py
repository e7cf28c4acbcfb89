"""Rules of the grouped matmuls fused with what follows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F64, I8, I32, I64, Rule, int64, ints, zeros
from tests.ops.samples.base import Inputs
from tests.ops.samples.fused_matmul import add_inputs, dequant_inputs, finalize_inputs, swiglu_inputs


def changed(name: str, inputs: Inputs, changes: dict[str, Any]) -> Callable[[], Any]:
    """A legal call, some arguments changed."""
    operator = getattr(ops, name)
    arguments = inspect.signature(operator).bind(*inputs[0], **inputs[1])
    arguments.arguments.update(changes)
    return lambda: operator(*arguments.args, **arguments.kwargs)


def v1(weight: str = "int8", /, **changes: Any) -> Callable[[], Any]:
    """Two experts, 3 rows, K 8, N 16."""
    return changed("npu_grouped_matmul_swiglu_quant", swiglu_inputs([1, 2], weight=weight, n=16), changes)


def v1_tiles(weight: str = "int8", /, **changes: Any) -> Callable[[], Any]:
    """Two experts, 3 rows, K 16, N 64, the weight in tiles."""
    inputs = swiglu_inputs([1, 2], weight=weight, k=16, n=64, in_tiles=True)
    return changed("npu_grouped_matmul_swiglu_quant", inputs, changes)


def v2(x: str = "int8", weight: str = "int8", /, **changes: Any) -> Callable[[], Any]:
    """Two experts, 3 rows, K 16, N 16."""
    inputs = swiglu_inputs([1, 2], version=2, x=x, weight=weight, k=16, n=16)
    return changed("npu_grouped_matmul_swiglu_quant_v2", inputs, changes)


def finalize(weight: str = "int8", /, **changes: Any) -> Callable[[], Any]:
    """Two experts, 3 rows, K 8, N 8, two tokens, one shared row."""
    inputs = finalize_inputs([1, 2], weight=weight, tokens=2, shared=1)
    return changed("npu_grouped_matmul_finalize_routing", inputs, changes)


def add(**changes: Any) -> Callable[[], Any]:
    """Two groups, 3 rows, M 3, N 5."""
    return changed("npu_grouped_matmul_add", add_inputs([1, 2]), changes)


def add_(**changes: Any) -> Callable[[], Any]:
    return changed("npu_grouped_matmul_add_", add_inputs([1, 2]), changes)


def dequant(**changes: Any) -> Callable[[], Any]:
    """Two experts, 3 rows, K 8, N 5."""
    return changed("npu_quant_grouped_matmul_dequant", dequant_inputs([1, 2]), changes)


def grad(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


V1, V2 = "npu_grouped_matmul_swiglu_quant", "npu_grouped_matmul_swiglu_quant_v2"
MANY = zeros(3, 65536, dtype=I8)

RULES: list[Rule] = [
    # what all of them check of one tensor
    ("v1-elsewhere", v1(x_scale=zeros(3).to(ELSEWHERE)), "x_scale must be on cpu like the first argument, but is on"),
    ("v1-weight-elsewhere", v1(weight=zeros(2, 8, 16, dtype=I8).to(ELSEWHERE)), "weight must be on cpu"),
    ("v1-x-scale-dtype", v1(x_scale=zeros(3, dtype=F64)), f"{V1}: x_scale must have dtype float32, but has float64"),
    ("v1-x-scale-shape", v1(x_scale=zeros(3, 1)), "x_scale must have shape [3], but has [3, 1]"),
    ("v1-x-shape", v1(x=zeros(24, dtype=I8)), "x must have shape [M, K], but has [24]"),
    ("v1-group-list-dtype", v1(group_list=ints(1, 3)), "group_list must have dtype int64, but has int32"),
    ("v1-group-list-shape", v1(group_list=int64([1, 2, 3])), "group_list must have shape [2], but has [3]"),
    (
        "v1-no-experts",
        v1(weight=zeros(0, 8, 16, dtype=I8), weight_scale=zeros(0, 16), group_list=int64([])),
        "group_list must have at least one entry, but is empty",
    ),
    ("v1-decreasing", v1(group_list=int64([2, 1])), f"{V1}: each difference of group_list should be larger than"),
    ("v1-beyond-rows", v1(group_list=int64([2, 4])), "group_list covers 4 rows but there are only 3"),
    # the weight
    ("v1-weight-rank", v1(weight=zeros(16, 16, dtype=I8), weight_scale=zeros(16, 16)), "weight must have 3 or 5 dim"),
    ("v1-weight-scalar", v1(weight=zeros(dtype=I8)), "weight_scale must have shape [0, 16]"),
    (
        "v1-weight-k",
        v1(weight=zeros(2, 7, 16, dtype=I8)),
        "weight must have shape [2, 8, 16], K from x and N = 16 from",
    ),
    ("v1-weight-n", v1(weight_scale=zeros(2, 14)), "weight must have shape [2, 8, 14], K from x and N = 14 from its"),
    (
        "v1-tiles-of-other-k",
        v1_tiles(x=zeros(3, 32, dtype=I8)),
        "weight in tiles must have shape [2, 2, 2, 16, 32] for K = 32 and N = 64, but has [2, 2, 1, 16, 32]",
    ),
    ("v1-tiles-cut-k", v1_tiles(x=zeros(3, 17, dtype=I8)), "weight in tiles must have shape"),
    ("v1-tiles-cut-n", v1_tiles(weight_scale=zeros(2, 66)), "weight in tiles must have shape"),
    ("v1-int4-tiles-of-int8", v1_tiles("int4", weight=zeros(2, 2, 1, 16, 32, dtype=I32)), "weight in tiles must have"),
    (
        "v1-int4-n",
        v1("int4", weight_scale=zeros(2, 12, dtype=I64)),
        "weight holds int4 values, so N must be a multiple of 8, but is 12",
    ),
    (
        "v1-k",
        v1(x=MANY, weight=zeros(2, 65536, 16, dtype=I8)),
        "x must have at most 65535 columns, but has 65536; more could overflow",
    ),
    # swiglu and quantization
    ("v1-dtypes", v1(weight=zeros(2, 8, 16)), "x and weight must be int8 and int8, int8 and int32 (int4 weights) or"),
    ("v1-int4-x", v1(x=zeros(3, 1, dtype=I32)), f"{V1}: x must have dtype int8, but has int32"),
    ("v2-int4-x-int8-weight", v2(x=zeros(3, 2, dtype=I32)), "but are int32 and int8"),
    ("v1-offset", v1(offset=zeros(1)), f"{V1}: offset must be None"),
    (
        "v1-scale-rank",
        v1(weight_scale=zeros(2, 1, 16)),
        "weight_scale must have 2 dimensions, but has shape (2, 1, 16)",
    ),
    ("v1-scale-dtype", v1(weight_scale=zeros(2, 16, dtype=I64)), "weight_scale must have dtype float32, float16, bf"),
    ("v1-int4-scale-dtype", v1("int4", weight_scale=zeros(2, 16)), "weight_scale must have dtype int64"),
    ("v1-odd-n", v1(weight_scale=zeros(2, 15)), "output_n is half of n. it must be greater than 0, and n even, but n"),
    ("v1-no-n", v1(weight_scale=zeros(2, 0)), "output_n is half of n. it must be greater than 0"),
    (
        "v1-groups",
        v1("int4", weight_scale=zeros(2, 3, 16, dtype=I64)),
        "weight_scale must cut K = 8 into groups of one even length, but has 3 groups",
    ),
    ("v1-odd-groups", v1("int4", weight_scale=zeros(2, 8, 16, dtype=I64)), "groups of one even length, but has 8"),
    ("v1-no-groups", v1("int4", weight_scale=zeros(2, 0, 16, dtype=I64)), "groups of one even length, but has 0"),
    ("v1-int4-without-bias", v1("int4", bias=None), "bias must be given for int4 weights and int8 x: 8 * sum over K"),
    ("v1-int8-with-bias", v1(bias=zeros(2, 16)), "bias must be None except for int4 weights and int8 x"),
    ("v1-gradient", v1(weight_scale=grad(2, 16)), "weight_scale requires a gradient, but has none"),
    ("v1-gradient-bias", v1("int4", bias=grad(2, 16)), "bias requires a gradient, but has none"),
    (
        "v2-two-weights",
        v2(weight=[zeros(2, 16, 16, dtype=I8)] * 2),
        "The size of weight should be 1, current size is 2",
    ),
    ("v2-no-scales", v2(weight_scale=[]), "The size of weight_scale should be 1, current size is 0"),
    (
        "v2-two-assists",
        v2("int8", "int4", weight_assist_matrix=[zeros(2, 16)] * 2),
        "The size of weight_assist_matrix should be 1",
    ),
    (
        "v2-no-assist",
        v2("int8", "int4", weight_assist_matrix=[]),
        "weight_assist_matrix must be given for int4 weights",
    ),
    (
        "v2-int4-int4-assist",
        v2("int4", "int4", weight_assist_matrix=[zeros(2, 16)]),
        "weight_assist_matrix must be None except for int4 weights and int8 x",
    ),
    (
        "v2-int4-int4-groups",
        v2("int4", "int4", weight_scale=[zeros(2, 2, 16, dtype=I64)]),
        "weight_scale must have 2 d",
    ),
    (
        "v2-many-experts",
        v2(
            weight=[zeros(1025, 16, 16, dtype=I8)],
            weight_scale=[zeros(1025, 16)],
            group_list=zeros(1025, dtype=I64),
        ),
        "weight must have at most 1024 experts and N = 10240, but has 1025 and 16",
    ),
    (
        "v2-long-int4",
        v2(
            "int4",
            "int4",
            x=zeros(3, 2500, dtype=I32),
            weight=[zeros(2, 20000, 2, dtype=I32)],
            weight_scale=[zeros(2, 16, dtype=I64)],
        ),
        "K must be less than 20000 for int4 weights, but is 20000",
    ),
    ("v2-bias", v2(bias=zeros(2, 16)), f"{V2}: bias must be None"),
    ("v2-quant-mode", v2(quant_mode=1), "quant_mode must be 0, one scale per row, but is 1"),
    ("v2-dequant-dtype", v2(dequant_dtype=torch.bfloat16), "dequant_dtype must be torch.float32 (6), but is torch.bfl"),
    ("v2-dequant-dtype-0", v2(dequant_dtype=0), "dequant_dtype must be"),
    ("v2-quant-dtype", v2(quant_dtype=16), "quant_dtype must be torch.int8 (1), but is 16"),
    ("v2-x-dtype", v2(x_dtype=290), "x_dtype must be None, but is 290"),
    (
        "v2-group-list-type",
        v2(group_list_type=2),
        "group_list_type must be 0 (cumulative sums) or 1 (counts), but is 2",
    ),
    ("v2-dequant-mode", v2(dequant_mode=1), "dequant_mode must be one of (0,) for these dtypes, but is 1"),
    ("v2-int4-dequant-mode", v2("int8", "int4", dequant_mode=2), "dequant_mode must be one of (0, 1)"),
    ("v2-smooth-int8", v2(smooth_scale=zeros(2, 8)), "smooth_scale must be None unless x and weight both hold int4"),
    ("v2-smooth-rank", v2("int4", "int4", smooth_scale=zeros(2, 8, 1)), "smooth_scale must have 1 or 2 dimensions"),
    ("v2-smooth-shape", v2("int4", "int4", smooth_scale=zeros(2, 16)), "smooth_scale must have shape [2, 8]"),
    ("v2-smooth-gradient", v2("int4", "int4", smooth_scale=grad(2)), "smooth_scale requires a gradient"),
    # with the sum of the experts of a token
    ("finalize-x-rank", finalize(x=zeros(3, 8, 1, dtype=I8)), "x_dim should be 2 and w_dim should be 3, but are 3 and"),
    (
        "finalize-tiles",
        finalize(w=zeros(2, 1, 1, 16, 32, dtype=I8)),
        "x_dim should be 2 and w_dim should be 3, but are",
    ),
    ("finalize-x-dtype", finalize(x=zeros(3, 8)), "x must have dtype int8, but has float32"),
    ("finalize-w-dtype", finalize(w=zeros(2, 8, 8)), "w must have dtype int8, int32, but has float32"),
    ("finalize-w-shape", finalize(w=zeros(2, 7, 8, dtype=I8)), "w must have shape [2, 8, 8], K from x"),
    ("finalize-x-dtype-code", finalize(w_dtype=290), "w_dtype must be None, but is 290"),
    ("finalize-dtype", finalize(dtype=F16), "Not supportted output dtype is torch.float16"),
    ("finalize-dtype-code", finalize(dtype=15), "Not supportted output dtype is torch.bfloat16"),
    ("finalize-group-list-type", finalize(group_list_type=2), "group_list_type must be 0"),
    ("finalize-negative", finalize(group_list=int64([-1, 2])), "group_list counts should be larger than or equal to 0"),
    ("finalize-beyond-rows", finalize(group_list=int64([2, 2])), "group_list covers 4 rows but there are only 3"),
    ("finalize-no-scale", finalize(scale=None), "scale must be given"),
    ("finalize-no-row-index", finalize(row_index=None), "row_index must be given"),
    (
        "finalize-scale-dtype",
        finalize(scale=zeros(2, 8, dtype=F16)),
        "scale must have dtype float32, bfloat16, but has",
    ),
    ("finalize-bias-dtype", finalize(bias=zeros(2, 8)), "bias must have dtype bfloat16, but has float32"),
    ("finalize-offset", finalize(offset=zeros(2, 1, 8)), "offset must be None unless w holds int4 values"),
    ("finalize-int4-scale", finalize("int4", scale=zeros(2, 8, dtype=I64)), "scale must have shape [2, 1, 8]"),
    ("finalize-int4-bias", finalize("int4", bias=None), "bias must be given for int4 weights: 8 * sum over K"),
    ("finalize-int4-bias-dtype", finalize("int4", bias=zeros(2, 8, dtype=BF16)), "bias must have dtype float32"),
    ("finalize-int4-offset", finalize("int4", offset=zeros(2, 8)), "offset must have shape [2, 1, 8]"),
    ("finalize-row-index", finalize(row_index=ints(0, 1)), "row_index must have shape [3], but has [2]"),
    ("finalize-row-index-range", finalize(row_index=ints(0, 2, 1)), "row_index must be rows 0 to 1 of the result, but"),
    ("finalize-row-index-negative", finalize(row_index=ints(0, -1, 1)), "of the result, but are -1 to 1"),
    ("finalize-pertoken", finalize(pertoken_scale=zeros(3, 1)), "pertoken_scale must have shape [3], but has [3, 1]"),
    ("finalize-logit", finalize(logit=zeros(2)), "logit must have shape [3], but has [2]"),
    ("finalize-logit-dtype", finalize(logit=zeros(3, dtype=BF16)), "logit must have dtype float32, but has bfloat16"),
    ("finalize-logit-elsewhere", finalize(logit=zeros(3).to(ELSEWHERE)), "logit must be on cpu"),
    ("finalize-output-bs", finalize(output_bs=4), "output_bs must be 0 to the number of rows of x, 3, but is 4"),
    (
        "finalize-negative-output-bs",
        finalize(output_bs=-1),
        "output_bs must be 0 to the number of rows of x, 3, but is",
    ),
    ("finalize-shared-dtype", finalize(shared_input=zeros(1, 8)), "shared_input must have dtype bfloat16, but has"),
    (
        "finalize-shared-columns",
        finalize(shared_input=zeros(1, 4, dtype=BF16)),
        "shared_input must have shape [S, 8], but has [1, 4]",
    ),
    (
        "finalize-shared-offset",
        finalize(shared_input_offset=2),
        "shared_input_offset + the 1 rows of shared_input must be within the 2 rows of the result, but shared_input_o",
    ),
    ("finalize-negative-shared-offset", finalize(shared_input_offset=-1), "must be within the 2 rows of the result"),
    ("finalize-gradient", finalize(pertoken_scale=grad(3)), "pertoken_scale requires a gradient, but has none"),
    # accumulated weight gradients
    ("add-group-type", add(group_type=0), "npu_grouped_matmul_add: group_type only supports 2, but got 0"),
    ("add-inplace-group-type", add_(group_type=-1), "npu_grouped_matmul_add_: group_type only supports 2, but got -1"),
    ("add-transpose-x", add(transpose_x=False), "transpose_x must be True"),
    ("add-transpose-weight", add(transpose_weight=True), "transpose_weight must be False"),
    ("add-counts", add(group_list_type=1), "group_list_type must be 0, group_list holds cumulative sums, but is 1"),
    ("add-x-dtype", add(x=zeros(3, 3)), "x must have dtype float16, bfloat16, but has float32"),
    ("add-weight-dtype", add(weight=zeros(3, 5, dtype=F16)), "weight must have dtype bfloat16, but has float16"),
    ("add-weight-rows", add(weight=zeros(2, 5, dtype=BF16)), "weight must have shape [3, N], but has [2, 5]"),
    ("add-group-list-rank", add(group_list=int64([[1, 3]])), "group_list must have 1 dimensions"),
    ("add-input-rank", add(input=zeros(30)), "input must have 2 or 3 dimensions, but has shape (30,)"),
    ("add-input-dtype", add(input=zeros(2, 3, 5, dtype=BF16)), "input must have dtype float32, but has bfloat16"),
    ("add-input-shape", add(input=zeros(3, 3, 5)), "input must have shape [2, 3, 5], but has [3, 3, 5]"),
    ("add-flat-input-shape", add(input=zeros(5, 5)), "input must have shape [6, 5], but has [5, 5]"),
    ("add-decreasing", add_(group_list=int64([2, 1])), "npu_grouped_matmul_add_: each difference of group_list"),
    ("add-beyond-rows", add(group_list=int64([2, 4])), "npu_grouped_matmul_add: group_list covers 4 rows but"),
    ("add-gradient", add(weight=grad(3, 5, dtype=BF16)), "weight requires a gradient, but has none; detach it"),
    ("add-input-gradient", add_(input=grad(2, 3, 5)), "input requires a gradient, but has none; detach it"),
    # quantized on the way in
    ("dequant-bias", dequant(bias=zeros(2, 5)), "npu_quant_grouped_matmul_dequant: bias must be None"),
    ("dequant-x-offset", dequant(x_offset=zeros(1)), "x_offset must be None"),
    ("dequant-mode", dequant(quant_mode="perchannel"), "quant_mode must be one of ('pertoken', 'pertensor'), but is"),
    ("dequant-x-rank", dequant(x=zeros(1, 3, 8, dtype=F16)), "the x dim support only 2, but x has shape [1, 3, 8]"),
    ("dequant-x-dtype", dequant(x=zeros(3, 8, dtype=BF16)), "the x dtype support only float16, but is torch.bfloat16"),
    ("dequant-weight-rank", dequant(quantized_weight=zeros(5, 8, dtype=I8)), "quantized_weight must have 3 dimensions"),
    (
        "dequant-weight-shape",
        dequant(quantized_weight=zeros(2, 8, 5, dtype=I8)),
        "quantized_weight must have shape [E, N, 8], but has [2, 8, 5]",
    ),
    ("dequant-weight-scale", dequant(weight_scale=zeros(2, 8)), "weight_scale must have shape [2, 5], but has [2, 8]"),
    ("dequant-row-scale", dequant(x_scale=zeros(1)), "x_scale must have shape [3], but has [1]"),
    ("dequant-scale", dequant(x_scale=zeros(3), quant_mode="pertensor"), "x_scale must have shape [1], but has [3]"),
    ("dequant-smooth", dequant(smooth_scale=zeros(8)), "smooth_scale must have dtype float16, but has float32"),
    ("dequant-gradient", dequant(x=grad(3, 8, dtype=F16)), "x requires a gradient, but has none; detach it"),
    ("dequant-beyond-rows", dequant(group_list=int64([2, 4])), "group_list covers 4 rows but there are only 3"),
]

LEGAL = [
    v1(),
    v1("int4"),
    v1_tiles(),
    v1_tiles("int4"),
    v2(),
    v2("int8", "int4"),
    v2("int4", "int4"),
    finalize(),
    finalize("int4"),
    add(),
    add_(),
    dequant(),
]
