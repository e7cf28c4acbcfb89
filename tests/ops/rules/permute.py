"""Rules of permute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, I8, I32, I64, Rule, int64, ints, zeros


def permute(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_token_permute(**{"tokens": zeros(3, 4), "indices": zeros(3, 2, dtype=I64), **changes})


def unpermute(**changes: Any) -> Callable[[], Any]:
    legal = {"permuted_tokens": zeros(6, 4), "sorted_indices": torch.arange(6, dtype=I32), "probs": torch.ones(3, 2)}
    return lambda: ops.npu_moe_token_unpermute(**{**legal, **changes})


RULES: list[Rule] = [
    ("permute-ids-elsewhere", permute(indices=zeros(3, 2, dtype=I64).to(ELSEWHERE)), "indices must be on cpu"),
    (
        "unpermute-order-elsewhere",
        unpermute(sorted_indices=zeros(6, dtype=I32).to(ELSEWHERE)),
        "sorted_indices must be on cpu",
    ),
    ("unpermute-probs-elsewhere", unpermute(probs=zeros(3, 2).to(ELSEWHERE)), "probs must be on cpu"),
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
]

LEGAL = [permute(), unpermute()]
