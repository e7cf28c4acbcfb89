"""Rules of permute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import ELSEWHERE, F16, F32, I8, I32, I64, Rule, int64, ints, zeros


def permute(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.npu_moe_token_permute(**{"tokens": zeros(3, 4), "indices": zeros(3, 2, dtype=I64), **changes})


def unpermute(**changes: Any) -> Callable[[], Any]:
    legal = {"permuted_tokens": zeros(6, 4), "sorted_indices": torch.arange(6, dtype=I32), "probs": torch.ones(3, 2)}
    return lambda: ops.npu_moe_token_unpermute(**{**legal, **changes})


def internal_unpermute(**changes: Any) -> Callable[[], Any]:
    legal = {"permuted_tokens": zeros(6, 4), "sorted_indices": torch.arange(6, dtype=I32), "probs": torch.ones(3, 2)}
    return lambda: ops._npu_moe_token_unpermute(**{**legal, **changes})


def permute_grad(**changes: Any) -> Callable[[], Any]:
    legal = {
        "tokens": zeros(3, 4),
        "grad_permuted_tokens": zeros(6, 4),
        "indices": zeros(3, 2, dtype=I64),
        "sorted_indices": torch.arange(6, dtype=I32),
    }
    return lambda: ops.npu_moe_token_permute_grad(**{**legal, **changes})


def permute_grad_v2(**changes: Any) -> Callable[[], Any]:
    legal = {
        "grad_permuted_tokens": zeros(6, 4),
        "sorted_indices": torch.arange(6, dtype=I32),
        "tokens_size_0": 3,
        "tokens_dtype": F16,
        "num_topK": 2,
    }
    return lambda: ops.npu_moe_token_permute_grad_v2(**{**legal, **changes})


def unpermute_grad(**changes: Any) -> Callable[[], Any]:
    legal = {
        "permuted_tokens": zeros(6, 4),
        "grad_unpermuted_tokens": zeros(3, 4),
        "sorted_indices": torch.arange(6, dtype=I32),
        "probs": torch.ones(3, 2),
    }
    return lambda: ops.npu_moe_token_unpermute_grad(**{**legal, **changes})


def unpermute_grad_v2(**changes: Any) -> Callable[[], Any]:
    legal = {
        "grad_unpermuted_tokens": zeros(3, 4),
        "sorted_indices": torch.arange(6, dtype=I32),
        "permuted_tokens_size_0": 6,
        "permuted_tokens_dtype": F32,
        "probs": torch.ones(3, 2),
        "permuted_tokens": zeros(6, 4),
    }
    return lambda: ops.npu_moe_token_unpermute_grad_v2(**{**legal, **changes})


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
    (
        "unpermute-negative-id",
        unpermute(sorted_indices=ints(0, 1, -2, 3, 4, 5)),
        "sorted_indices must not be negative where the weight is not",
    ),
    ("unpermute-list-of-floats", unpermute(restore_shape=[1.0]), "restore_shape[0] must be an int, but is float"),
    ("internal-unpermute-3d", internal_unpermute(permuted_tokens=zeros(1, 6, 4)), "must have 2 dimensions, but has"),
    (
        "internal-unpermute-padded",
        internal_unpermute(padded_mode=True),
        "_npu_moe_token_unpermute: padded_mode must be",
    ),
    (
        "permute-grad-3d-tokens",
        permute_grad(tokens=zeros(1, 3, 4)),
        "npu_moe_token_permute_grad: tokens must have 2 dim",
    ),
    ("permute-grad-padded", permute_grad(padded_mode=True), "npu_moe_token_permute_grad: padded_mode must be False"),
    (
        "permute-grad-elsewhere",
        permute_grad(grad_permuted_tokens=zeros(6, 4).to(ELSEWHERE)),
        "grad_permuted_tokens must be on cpu",
    ),
    ("permute-grad-1d", permute_grad(grad_permuted_tokens=zeros(6)), "grad_permuted_tokens must have 2 dimensions"),
    ("permute-grad-integers", permute_grad(grad_permuted_tokens=zeros(6, 4, dtype=I32)), "must have dtype float16"),
    (
        "permute-grad-columns",
        permute_grad(grad_permuted_tokens=zeros(6, 5)),
        "must have 4 columns like tokens, but has",
    ),
    (
        "permute-grad-other-order",
        permute_grad(sorted_indices=torch.arange(5, dtype=I32)),
        "one entry for each of 2 experts of 3 tokens, but has 5",
    ),
    (
        "permute-grad-negative",
        permute_grad(sorted_indices=ints(0, 1, -2, 3, 4, 5)),
        "permute_grad: sorted_indices must not be negative, but has -2",
    ),
    (
        "permute-grad-v2-negative",
        permute_grad_v2(sorted_indices=ints(0, 1, -1, 3, 4, 5)),
        "_v2: sorted_indices must not be negative, but has -1",
    ),
    (
        "permute-grad-v2-int64",
        permute_grad_v2(sorted_indices=zeros(6, dtype=I64)),
        "must have dtype int32, but has int64",
    ),
    ("permute-grad-v2-integers", permute_grad_v2(tokens_dtype=I32), "tokens_dtype must be float16, bfloat16, float32"),
    ("permute-grad-v2-code", permute_grad_v2(tokens_dtype=99), "tokens_dtype must be a dtype or the number of one"),
    ("permute-grad-v2-no-experts", permute_grad_v2(num_topK=0), "num_topK must be 1 or more, but is 0"),
    ("permute-grad-v2-tokens", permute_grad_v2(tokens_size_0=4), "each of 2 experts of 4 tokens, but has 6"),
    ("permute-grad-v2-padded", permute_grad_v2(padded_mode=True), "npu_moe_token_permute_grad_v2: padded_mode must be"),
    (
        "unpermute-grad-elsewhere",
        unpermute_grad(grad_unpermuted_tokens=zeros(3, 4).to(ELSEWHERE)),
        "grad_unpermuted_tokens must be on cpu",
    ),
    (
        "unpermute-grad-tokens",
        unpermute_grad(grad_unpermuted_tokens=zeros(2, 4)),
        "one row for each of 3 tokens, but has",
    ),
    (
        "unpermute-grad-tokens-without-probs",
        unpermute_grad(probs=None),
        "one row for each of 6 tokens, but has shape (3, 4)",
    ),
    (
        "unpermute-grad-columns",
        unpermute_grad(grad_unpermuted_tokens=zeros(3, 5)),
        "4 columns like permuted_tokens, but",
    ),
    ("unpermute-grad-probs", unpermute_grad(probs=torch.ones(2, 2)), "one weight per entry of sorted_indices, but has"),
    (
        "unpermute-grad-negative",
        unpermute_grad(sorted_indices=ints(0, 1, -2, 3, 4, 5)),
        "sorted_indices must not be neg",
    ),
    ("unpermute-grad-padded", unpermute_grad(padded_mode=True), "npu_moe_token_unpermute_grad: padded_mode must be"),
    ("unpermute-grad-v2-padded", unpermute_grad_v2(padded_mode=True), "npu_moe_token_unpermute_grad_v2: padded_mode"),
    (
        "unpermute-grad-v2-integers",
        unpermute_grad_v2(permuted_tokens_dtype=I8),
        "permuted_tokens_dtype must be float16",
    ),
    (
        "unpermute-grad-v2-negative-size",
        unpermute_grad_v2(permuted_tokens_size_0=-1),
        "permuted_tokens_size_0 must not be negative, but is -1",
    ),
    ("unpermute-grad-v2-no-rows", unpermute_grad_v2(permuted_tokens=None), "permuted_tokens must be given with probs"),
    (
        "unpermute-grad-v2-elsewhere",
        unpermute_grad_v2(permuted_tokens=zeros(6, 4).to(ELSEWHERE)),
        "permuted_tokens must be on cpu",
    ),
    (
        "unpermute-grad-v2-3d",
        unpermute_grad_v2(permuted_tokens=zeros(1, 6, 4)),
        "permuted_tokens must have 2 dimensions",
    ),
    (
        "unpermute-grad-v2-other-rows",
        unpermute_grad_v2(permuted_tokens=zeros(5, 4)),
        "must have permuted_tokens_size_0 = 6 rows and the columns of grad_unpermuted_tokens, but has shape (5, 4)",
    ),
]

LEGAL = [
    permute(),
    unpermute(),
    internal_unpermute(),
    permute_grad(),
    permute_grad_v2(),
    unpermute_grad(),
    unpermute_grad_v2(),
    unpermute_grad_v2(probs=None, grad_unpermuted_tokens=zeros(6, 4), permuted_tokens=None),
    unpermute_grad_v2(probs=None, grad_unpermuted_tokens=zeros(6, 4), permuted_tokens=zeros(1)),
    # a weight of zero has no row
    unpermute(sorted_indices=ints(0, 1, -2, 3, 4, 5), probs=torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])),
]
