"""Rules of permute and unpermute by a routing map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from tests.ops.rules.base import BF16, ELSEWHERE, F16, F32, I8, I32, Rule, ints, zeros

BOTH = torch.ones(3, 2, dtype=torch.bool)  # every token goes to both experts
ORDER = ints(0, 3, 1, 4, 2, 5)


def permute(**changes: Any) -> Callable[[], Any]:
    legal = {"tokens": zeros(3, 4), "routing_map": BOTH, "probs": zeros(3, 2), "num_out_tokens": 6}
    return lambda: ops.npu_moe_token_permute_with_routing_map(**{**legal, **changes})


def permute_grad(**changes: Any) -> Callable[[], Any]:
    legal = {
        "permuted_token_out_grad": zeros(6, 4),
        "probs_grad": zeros(6),
        "sorted_indices": ORDER,
        "routing_map": BOTH,
        "experts_num": 2,
        "tokens_num": 3,
        "drop_and_pad": False,
    }
    return lambda: ops.npu_moe_token_permute_with_routing_map_grad(**{**legal, **changes})


def unpermute(op: str = "npu_moe_token_unpermute_with_routing_map", **changes: Any) -> Callable[[], Any]:
    legal = {
        "permuted_tokens": zeros(6, 4),
        "sorted_indices": ORDER,
        "restore_shape": [3, 4],
        "probs": zeros(3, 2),
        "routing_map": BOTH,
    }
    return lambda: getattr(ops, op)(**{**legal, **changes})


def unpermute_grad(**changes: Any) -> Callable[[], Any]:
    legal = {
        "unpermuted_tokens_grad": zeros(3, 4),
        "out_index": ORDER,
        "permuted_token_id": ORDER,
        "routing_map": BOTH,
        "permuted_tokens": zeros(6, 4),
        "probs": zeros(3, 2),
        "drop_and_pad": False,
        "restore_shape": [3, 4],
    }
    return lambda: ops.npu_moe_token_unpermute_with_routing_map_grad(**{**legal, **changes})


INTERNAL = "_npu_moe_token_unpermute_with_routing_map"
DROPPED = {"drop_and_pad": True, "out_index": ints(0, 3, 1, 4, 2, 5), "permuted_token_id": ints(0, 0, 1, 1, 2, 2)}

RULES: list[Rule] = [
    ("permute-map-tokens", permute(tokens=zeros(3)), "tokens must have 2 dimensions, but has shape (3,)"),
    ("permute-map-elsewhere", permute(routing_map=BOTH.to(ELSEWHERE)), "routing_map must be on cpu"),
    ("permute-map-1d", permute(routing_map=BOTH[0]), "routing_map must have 2 dimensions, but has shape (2,)"),
    ("permute-map-int32", permute(routing_map=BOTH.int()), "routing_map must have dtype bool, int8, but has int32"),
    ("permute-map-twos", permute(routing_map=2 * BOTH.to(I8)), "routing_map must be of 0 and 1, but is 2 to 2"),
    ("permute-map-negative", permute(routing_map=-BOTH.to(I8)), "routing_map must be of 0 and 1, but is -1 to -1"),
    (
        "permute-map-rows",
        permute(tokens=zeros(4, 4)),
        "routing_map must have one row per token, but has 3 for 4 tokens",
    ),
    ("permute-map-probs-elsewhere", permute(probs=zeros(3, 2).to(ELSEWHERE)), "probs must be on cpu"),
    (
        "permute-map-probs-shape",
        permute(probs=zeros(6)),
        "probs must have the shape of routing_map (3, 2), but has (6,)",
    ),
    (
        "permute-map-probs-dtype",
        permute(tokens=zeros(3, 4, dtype=F16)),
        "probs must have the dtype of tokens float16, or float32 with bfloat16 tokens, but has float32",
    ),
    ("permute-map-half-probs", permute(probs=zeros(3, 2, dtype=BF16)), "probs must have the dtype of tokens float32"),
    (
        "permute-map-too-many",
        permute(num_out_tokens=7),
        "num_out_tokens must be 0 to 6, the number of tokens times that of experts, but is 7",
    ),
    ("permute-map-negative-number", permute(num_out_tokens=-1), "num_out_tokens must be 0 to 6"),
    (
        "permute-map-many-experts",
        permute(tokens=zeros(1, 4), probs=None, routing_map=torch.ones(1, 600, dtype=torch.bool), num_out_tokens=513),
        "num_out_tokens must be at most 512 for each of 1 tokens, but is 513",
    ),
    (
        "permute-map-tensors",
        permute(num_out_tokens=BOTH.sum(0)),
        "num_out_tokens must be an int or None, but is Tensor",
    ),
    (
        "permute-map-float",
        permute(num_out_tokens=torch.tensor(6.0)),
        "num_out_tokens must be an int or None, but is Tensor",
    ),
    (
        "permute-map-ones",
        permute(num_out_tokens=3),
        "routing_map must have 3 ones, num_out_tokens // 3 for each token, but",
    ),
    ("permute-map-default", permute(num_out_tokens=None), "routing_map must have 3 ones"),
    (
        "permute-map-grad-1d",
        permute_grad(permuted_token_out_grad=zeros(6)),
        "must have 2 dimensions, but has shape (6,)",
    ),
    ("permute-map-grad-probs-elsewhere", permute_grad(probs_grad=zeros(6).to(ELSEWHERE)), "probs_grad must be on cpu"),
    (
        "permute-map-grad-probs-integer",
        permute_grad(probs_grad=zeros(6, dtype=I32)),
        "probs_grad must have dtype float16",
    ),
    (
        "permute-map-grad-probs-2d",
        permute_grad(probs_grad=zeros(3, 2)),
        "probs_grad must have shape (6,), but has (3, 2)",
    ),
    ("permute-map-grad-order-elsewhere", permute_grad(sorted_indices=ORDER.to(ELSEWHERE)), "sorted_indices must be on"),
    ("permute-map-grad-order-int64", permute_grad(sorted_indices=ORDER.long()), "sorted_indices must have dtype int32"),
    ("permute-map-grad-order-short", permute_grad(sorted_indices=ORDER[1:]), "must have shape (6,), but has (5,)"),
    (
        "permute-map-grad-sizes",
        permute_grad(experts_num=3),
        "routing_map must have shape (tokens_num, experts_num) = (3, 3), but has (3, 2)",
    ),
    (
        "permute-map-grad-rows-of-tokens",
        permute_grad(permuted_token_out_grad=zeros(5, 4), probs_grad=None, sorted_indices=ORDER[:5]),
        "permuted_token_out_grad must have as many rows for each of 3 tokens, but has 5",
    ),
    (
        "permute-map-grad-rows-of-experts",
        permute_grad(permuted_token_out_grad=zeros(5, 4), probs_grad=None, sorted_indices=ORDER[:5], drop_and_pad=True),
        "permuted_token_out_grad must have as many rows for each of 2 experts, but has 5",
    ),
    (
        "permute-map-grad-no-experts",
        permute_grad(probs_grad=None, routing_map=BOTH[:, :0], experts_num=0, drop_and_pad=True),
        "permuted_token_out_grad must have as many rows for each of 0 experts, but has 6",
    ),
    (
        "permute-map-grad-ones",
        permute_grad(routing_map=torch.eye(3, 2).bool()),
        "routing_map must have one of its ones per row, 6, but has 2",
    ),
    (
        "permute-map-grad-order",
        permute_grad(sorted_indices=ints(0, 1, 2, 3, 4, 6)),
        "sorted_indices must be of 0 to 5, the rows, but is 0 to 6",
    ),
    (
        "permute-map-grad-tokens",
        permute_grad(sorted_indices=ints(0, 1, 2, 3, 0, -1), drop_and_pad=True),
        "sorted_indices must be of 0 to 2, the tokens, but is -1 to 3",
    ),
    (
        "unpermute-map-integers",
        unpermute(permuted_tokens=zeros(6, 4, dtype=I8)),
        "permuted_tokens must have dtype float16",
    ),
    ("unpermute-map-order-elsewhere", unpermute(sorted_indices=ORDER.to(ELSEWHERE)), "sorted_indices must be on cpu"),
    ("unpermute-map-order-int64", unpermute(sorted_indices=ORDER.long()), "sorted_indices must have dtype int32"),
    ("unpermute-map-order-short", unpermute(sorted_indices=ORDER[1:]), "(6,), one entry per row, but has (5,)"),
    (
        "unpermute-map-shape",
        unpermute(restore_shape=[3]),
        "restore_shape must be the shape [T, H] of the result, but is [3]",
    ),
    ("unpermute-map-negative-shape", unpermute(restore_shape=[-1, 4]), "shape [T, H] of the result, but is [-1, 4]"),
    (
        "unpermute-map-columns",
        unpermute(restore_shape=(3, 5)),
        "restore_shape must end with 4, the columns of permuted",
    ),
    ("unpermute-map-probs-elsewhere", unpermute(probs=zeros(3, 2).to(ELSEWHERE)), "probs must be on cpu"),
    ("unpermute-map-probs-1d", unpermute(probs=zeros(6)), "probs must have 2 dimensions, but has shape (6,)"),
    ("unpermute-map-probs-integer", unpermute(probs=zeros(3, 2, dtype=I32)), "probs must have dtype float16"),
    (
        "unpermute-map-probs-rows",
        unpermute(probs=zeros(2, 2)),
        "must have restore_shape[0] = 3 rows, but has shape (2, 2)",
    ),
    (
        "unpermute-map-probs-alone",
        unpermute(routing_map=None),
        "routing_map must be given with probs unless drop_and_pad",
    ),
    (
        "unpermute-map-other-map",
        unpermute(routing_map=BOTH[:, :1]),
        "routing_map must have the shape of probs (3, 2), but has (3, 1)",
    ),
    (
        "unpermute-map-experts",
        unpermute(probs=zeros(3, 4), drop_and_pad=True),
        "there must be as many rows for each of 4 experts of probs, but are 6",
    ),
    (
        "unpermute-map-no-experts",
        unpermute(probs=zeros(3, 0), drop_and_pad=True),
        "there must be as many rows for each of 0 experts of probs, but are 6",
    ),
    (
        "unpermute-map-ones",
        unpermute(routing_map=torch.eye(3, 2).bool()),
        "routing_map must have 2 ones for each of 3 tokens, but has 2",
    ),
    (
        "unpermute-map-row",
        unpermute(sorted_indices=ints(0, 1, 2, 3, 4, 6)),
        "must be of 0 to 5, the rows, but is 0 to 6",
    ),
    (
        "unpermute-map-token",
        unpermute(sorted_indices=ints(0, 1, 2, 0, 1, 3), drop_and_pad=True),
        "sorted_indices must be of 0 to 2, the tokens, but is 0 to 3",
    ),
    (
        "internal-unpermute-map-columns",
        unpermute(INTERNAL, restore_shape=[3, 5]),
        f"{INTERNAL}: restore_shape must end",
    ),
    (
        "unpermute-map-grad-1d",
        unpermute_grad(unpermuted_tokens_grad=zeros(3)),
        "unpermuted_tokens_grad must have 2 dimensions, but has shape (3,)",
    ),
    (
        "unpermute-map-grad-2d-index",
        unpermute_grad(out_index=ORDER.view(3, 2)),
        "out_index must have 1 dimensions, but",
    ),
    (
        "unpermute-map-grad-int64",
        unpermute_grad(out_index=ORDER.long()),
        "out_index must have dtype int32, but has int64",
    ),
    (
        "unpermute-map-grad-short-index",
        unpermute_grad(permuted_token_id=ORDER[1:]),
        "permuted_token_id must have shape (6,), one entry per row, but has (5,)",
    ),
    (
        "unpermute-map-grad-shape",
        unpermute_grad(restore_shape=[2, 4]),
        "unpermuted_tokens_grad must have the shape restore_shape [2, 4], but has (3, 4)",
    ),
    ("unpermute-map-grad-no-rows", unpermute_grad(permuted_tokens=None), "permuted_tokens must be given with probs"),
    ("unpermute-map-grad-rows", unpermute_grad(permuted_tokens=zeros(5, 4)), "must have shape (6, 4), but has (5, 4)"),
    (
        "unpermute-map-grad-elsewhere",
        unpermute_grad(permuted_tokens=zeros(6, 4).to(ELSEWHERE)),
        "permuted_tokens must be on cpu",
    ),
    (
        "unpermute-map-grad-row",
        unpermute_grad(out_index=ints(0, 1, 2, 3, 4, 6)),
        "out_index must be of 0 to 5, the rows",
    ),
    (
        "unpermute-map-grad-token",
        unpermute_grad(**{**DROPPED, "permuted_token_id": ints(0, 0, 1, 1, 2, 3)}),
        "permuted_token_id must be of 0 to 2, the tokens, but is 0 to 3",
    ),
    (
        "unpermute-map-grad-dropped-row",
        unpermute_grad(**{**DROPPED, "out_index": ints(0, 3, 1, 4, 2, -1)}),
        "out_index must be of 0 to 5, the rows, but is -1 to 4",
    ),
]

LEGAL: list[Callable[[], Any]] = [
    permute(),
    permute(num_out_tokens=BOTH.sum()),
    permute(routing_map=BOTH.to(I8)),
    permute(tokens=zeros(3, 4, dtype=BF16), probs=zeros(3, 2, dtype=F32)),
    permute(num_out_tokens=5, drop_and_pad=True),
    permute_grad(),
    permute_grad(probs_grad=None, sorted_indices=ints(0, 1, 2, 0, 1, 2), drop_and_pad=True),
    unpermute(),
    unpermute(restore_shape=torch.Size([3, 4])),
    unpermute(INTERNAL),
    unpermute(probs=None, routing_map=None),
    unpermute(routing_map=None, sorted_indices=ints(0, 1, 2, 0, 1, 2), drop_and_pad=True),
    unpermute_grad(),
    unpermute_grad(probs=None, routing_map=None, permuted_tokens=None),
    unpermute_grad(**DROPPED),
    unpermute_grad(**DROPPED, unpermuted_tokens_grad=zeros(3, 4)),
]
