"""Rules of the quantized dense matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, F16, F32, I8, I32, I64, Rule, zeros


def weight_quant(
    x: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    **options: Any,
) -> Callable[[], Any]:
    """x [4, 64], weight [64, 8] and a scale of shape [8], or what is given."""
    return lambda: ops.npu_weight_quant_batchmatmul(
        zeros(4, 64, dtype=F16) if x is None else x,
        zeros(64, 8, dtype=I8) if weight is None else weight,
        zeros(8, dtype=F16) if scale is None else scale,
        **options,
    )


def quant(
    x1: torch.Tensor | None = None,
    x2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    **options: Any,
) -> Callable[[], Any]:
    """x1 [4, 6], x2 [6, 3] and a float32 scale of shape [3], or what is given."""
    return lambda: ops.npu_quant_matmul(
        zeros(4, 6, dtype=I8) if x1 is None else x1,
        zeros(6, 3, dtype=I8) if x2 is None else x2,
        zeros(3) if scale is None else scale,
        **options,
    )


def grouped(scale: torch.Tensor | None = None, offset: torch.Tensor | None = None, **options: Any) -> Callable[[], Any]:
    """int4 operands [4, 16] and [16, 8] with scales and offsets [2, 8], or what is given."""
    scale = zeros(2, 8) if scale is None else scale
    offset = zeros(2, 8, dtype=F16) if offset is None else offset
    options = {"output_dtype": BF16, "pertoken_scale": zeros(4), "offset": offset, **options}
    return quant(zeros(4, 2, dtype=I32), zeros(16, 1, dtype=I32), scale, **options)


def needing_gradient(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return zeros(*shape, dtype=dtype).requires_grad_()


PER_TOKEN = {"output_dtype": F16, "pertoken_scale": zeros(4)}

RULES: list[Rule] = [
    (
        "weight-quant-weight-elsewhere",
        weight_quant(weight=zeros(64, 8, dtype=I8, device="meta")),
        "weight must be on cpu",
    ),
    ("weight-quant-bias-elsewhere", weight_quant(bias=zeros(8, dtype=F16, device="meta")), "bias must be on cpu"),
    ("weight-quant-float32", weight_quant(zeros(4, 64)), "x must have dtype float16, bfloat16, but has float32"),
    ("weight-quant-float-weight", weight_quant(weight=zeros(64, 8, dtype=F16)), "weight must have dtype int8, int32"),
    ("weight-quant-3d", weight_quant(zeros(1, 4, 64, dtype=F16)), "x must have 2 dimensions, but has shape (1, 4, 64)"),
    ("weight-quant-3d-weight", weight_quant(weight=zeros(1, 64, 8, dtype=I8)), "weight must have 2 dimensions"),
    (
        "weight-quant-empty",
        weight_quant(zeros(0, 64, dtype=F16)),
        "x and weight must not be empty, but have shapes (0, 64)",
    ),
    ("weight-quant-k", weight_quant(zeros(4, 32, dtype=F16)), "with K = 32 of x, but has shape (64, 8)"),
    (
        "weight-quant-int4-k-contiguous",
        weight_quant(weight=zeros(8, 8, dtype=I32)),
        "or the transposed view of [N, K / 8], with K = 64 of x, but has shape (8, 8)",
    ),
    (
        "weight-quant-long",
        weight_quant(zeros(1, 65536, dtype=F16), zeros(65536, 1, dtype=I8), zeros(1, dtype=F16)),
        "K and N must be at most 65535, but are 65536 and 1",
    ),
    (
        "weight-quant-scale-dtype",
        weight_quant(scale=zeros(8)),
        "antiquant_scale must have dtype float16, but has float32",
    ),
    ("weight-quant-scale-words", weight_quant(scale=zeros(8, dtype=I64)), "antiquant_scale must have dtype float16"),
    (
        "weight-quant-group-size",
        weight_quant(antiquant_group_size=33),
        "must be 0 or a multiple of 32 in 32..K - 1 = 63",
    ),
    ("weight-quant-group-of-all", weight_quant(antiquant_group_size=64), "K - 1 = 63, but is 64"),
    (
        "weight-quant-scale-shape",
        weight_quant(scale=zeros(2, 8, dtype=F16)),
        "antiquant_scale must have one of the shapes",
    ),
    (
        "weight-quant-groups",
        weight_quant(scale=zeros(3, 8, dtype=F16), antiquant_group_size=32),
        "with antiquant_group_size 32, but has (3, 8)",
    ),
    (
        "weight-quant-offset",
        weight_quant(antiquant_offset=zeros(1, dtype=F16)),
        "antiquant_offset must be torch.float16 of shape (8,) like antiquant_scale, but is torch.float16 of shape (1,)",
    ),
    ("weight-quant-bias-dtype", weight_quant(bias=zeros(8)), "bias must have dtype float16, but has float32"),
    (
        "weight-quant-bfloat16-bias",
        weight_quant(zeros(4, 64, dtype=BF16), scale=zeros(8, dtype=BF16), bias=zeros(8, dtype=BF16)),
        "bias must have dtype float32, but has bfloat16",
    ),
    ("weight-quant-bias-shape", weight_quant(bias=zeros(4, dtype=F16)), "bias must have one of the shapes"),
    ("weight-quant-offset-alone", weight_quant(quant_offset=zeros(8)), "quant_offset needs quant_scale, which is None"),
    (
        "weight-quant-quant-dtype",
        weight_quant(quant_scale=zeros(8, dtype=F16)),
        "quant_scale must have dtype float32, int64",
    ),
    ("weight-quant-quant-shape", weight_quant(quant_scale=zeros(4)), "quant_scale must have one of the shapes"),
    (
        "weight-quant-words-and-offset",
        weight_quant(quant_scale=zeros(8, dtype=I64), quant_offset=zeros(8)),
        "quant_offset must be None with int64 words, which hold an offset",
    ),
    (
        "weight-quant-quant-offset",
        weight_quant(quant_scale=zeros(8), quant_offset=zeros(1)),
        "quant_offset must be float32 of shape (8,) like quant_scale, but is float32 of shape (1,)",
    ),
    ("weight-quant-precision", weight_quant(inner_precise=2), "inner_precise must be 0 or 1, but is 2"),
    ("weight-quant-weight-dtype", weight_quant(weight_dtype=285), "weight_dtype must be None; only later devices"),
    (
        "weight-quant-scale-gradient",
        weight_quant(scale=needing_gradient(8, dtype=F16)),
        "antiquant_scale requires a gradient, but has none; detach it",
    ),
    (
        "weight-quant-offset-gradient",
        weight_quant(antiquant_offset=needing_gradient(8, dtype=F16)),
        "antiquant_offset requires a gradient, but has none; detach it",
    ),
    ("quant-matmul-x2-elsewhere", quant(x2=zeros(6, 3, dtype=I8, device="meta")), "x2 must be on cpu"),
    ("quant-matmul-x1-dtype", quant(x1_dtype=290), "x1_dtype must be None; only later devices have it"),
    ("quant-matmul-y-scale", quant(y_scale=zeros(1, 3, dtype=I64)), "y_scale must be None; only later devices have it"),
    ("quant-matmul-float", quant(zeros(4, 6, dtype=F16)), "x1 and x2 must both be int8, or both int32 words"),
    (
        "quant-matmul-mixed",
        quant(x2=zeros(6, 3, dtype=I32)),
        "x1 and x2 must both be int8, or both int32 words of int4 values, but are int8 and int32",
    ),
    ("quant-matmul-1d", quant(zeros(6, dtype=I8)), "x1 dim num should be 2 ~ 6, but x1 has shape (6,)"),
    ("quant-matmul-7d", quant(x2=zeros(1, 1, 1, 1, 1, 6, 3, dtype=I8)), "x2 dim num should be 2 ~ 6"),
    (
        "quant-matmul-batch",
        quant(zeros(2, 4, 6, dtype=I8), zeros(3, 6, 3, dtype=I8)),
        "the batch shape cannot be broadcast, x1 has shape (2, 4, 6) and x2 (3, 6, 3)",
    ),
    ("quant-matmul-k", quant(zeros(4, 5, dtype=I8)), "k dim of x1 and x2 need be same"),
    (
        "quant-matmul-int4-k",
        quant(zeros(4, 2, dtype=I32), zeros(2, 3, dtype=I32), output_dtype=F16),
        "k dim of x1 and x2 need be same (int4 words of x2 run along its last axis, or along K in a transposed view)",
    ),
    ("quant-matmul-no-k", quant(zeros(4, 0, dtype=I8), zeros(0, 3, dtype=I8)), "k must be a positive integer"),
    (
        "quant-matmul-long",
        quant(zeros(1, 1, dtype=I8), zeros(1, 65536, dtype=I8), zeros(1)),
        "the last dims of x1 and x2 must be at most 65535, but are 1 and 65536",
    ),
    (
        "quant-matmul-result",
        quant(output_dtype=F32),
        "output_dtype must be float16 or int8 or bfloat16 or int32 for int8",
    ),
    (
        "quant-matmul-int8-per-token",
        quant(pertoken_scale=zeros(4)),
        "output_dtype must be bfloat16 or float16 for int8 operands with pertoken_scale, but is int8",
    ),
    (
        "quant-matmul-result-number",
        quant(output_dtype=99),
        "output_dtype must be a dtype or the number of one, but is 99",
    ),
    (
        "quant-matmul-int4-result",
        quant(zeros(4, 2, dtype=I32), zeros(16, 1, dtype=I32), output_dtype=BF16),
        "output_dtype must be float16 for int4 operands without pertoken_scale, but is bfloat16",
    ),
    ("quant-matmul-scale-dtype", quant(scale=zeros(3, dtype=BF16)), "scale must have dtype int64, uint64, float32"),
    (
        "quant-matmul-words-to-bfloat16",
        quant(scale=zeros(3, dtype=I64), output_dtype=BF16),
        "scale must have dtype float32, bfloat16, but has int64",
    ),
    ("quant-matmul-scale-shape", quant(scale=zeros(1, 3)), "scale must have shape (1,) or (3,), but has (1, 3)"),
    ("quant-matmul-offset", quant(offset=zeros(3), output_dtype=F16), "offset must be None unless the result is int8"),
    ("quant-matmul-offset-dtype", quant(offset=zeros(3, dtype=F16)), "offset must have dtype float32, but has float16"),
    ("quant-matmul-offset-shape", quant(offset=zeros(2)), "offset must have shape (1,) or (3,), but has (2,)"),
    (
        "quant-matmul-per-token-dtype",
        quant(pertoken_scale=zeros(4, dtype=BF16), output_dtype=BF16),
        "pertoken_scale must have dtype float32, but has bfloat16",
    ),
    (
        "quant-matmul-per-token-shape",
        quant(pertoken_scale=zeros(4, 1), output_dtype=BF16),
        "pertoken_scale must have shape (4,), but has (4, 1)",
    ),
    ("quant-matmul-bias-dtype", quant(bias=zeros(3)), "bias must have dtype int32, but has float32"),
    (
        "quant-matmul-bias-shape",
        quant(bias=zeros(4, 1, 3, dtype=I32)),
        "bias must have one of the shapes [(3,), (1, 3)], but has (4, 1, 3)",
    ),
    (
        "quant-matmul-group-sizes",
        quant(group_sizes=[0, 0, 3]),
        "group_sizes must be None or [0, 0, 0] for these scales",
    ),
    (
        "quant-matmul-two-group-sizes",
        quant(group_sizes=[0, 0]),
        "group_sizes must be None or [0, 0, 0] for these scales",
    ),
    (
        "quant-matmul-scale-gradient",
        quant(scale=needing_gradient(3), **PER_TOKEN),
        "scale requires a gradient, but has none; detach it",
    ),
    (
        "quant-matmul-groups",
        grouped(zeros(3, 8)),
        "scale must have shape [G, 8] where G divides K = 16, but has (3, 8)",
    ),
    (
        "quant-matmul-groups-scale",
        grouped(zeros(8)),
        "scale must have shape [G, 8] where G divides K = 16, but has (8,)",
    ),
    (
        "quant-matmul-groups-offset",
        grouped(offset=zeros(2, 8)),
        "offset must be float16 of shape (2, 8) like scale per group, but is float32 of shape (2, 8)",
    ),
    ("quant-matmul-groups-bias", grouped(bias=zeros(8, dtype=I32)), "bias must be None with scales per group"),
    (
        "quant-matmul-groups-size",
        grouped(group_sizes=[0, 0, 32]),
        "group_sizes must be None or [0, 0, 8] for these scales",
    ),
]

LEGAL: list[Callable[[], Any]] = [
    weight_quant(),
    weight_quant(zeros(4, 64, dtype=BF16), scale=zeros(8, dtype=BF16), bias=zeros(8)),
    weight_quant(weight=zeros(64, 1, dtype=I32)),
    weight_quant(weight=zeros(8, 8, dtype=I32).t()),
    weight_quant(scale=zeros(2, 8, dtype=F16), antiquant_group_size=32),
    weight_quant(quant_scale=zeros(8), quant_offset=zeros(8)),
    quant(),
    quant(offset=zeros(3), bias=zeros(3, dtype=I32), group_sizes=[0, 0, 0]),
    quant(**PER_TOKEN),
    grouped(),
    grouped(group_sizes=[0, 0, 8]),
]
