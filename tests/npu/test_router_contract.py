"""What routers launch on a device: the exact sequence of kernels, one of them for all that an operator can do."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from moe_npu.layers import routers
from moe_npu.ops._library import npu_lowerings
from tests.npu.test_layer_contract import launched, names
from tests.npu.test_lowerings import _torch_npu_operators  # noqa: F401 - a fixture of every test here

T, H, E, K, VOCAB = 6, 16, 8, 2, 11
BF16, FP32 = torch.bfloat16, torch.float32


# ---------------------------------------------------------------- sequences

LINEAR = ["aten.mm"]
FLOAT_LINEAR = ["aten._to_copy", "aten.mm"]  # the tokens in float32
GATING = ["npu.npu_moe_gating_top_k"]
SOFTMAX_GATING = ["npu.npu_moe_gating_top_k_softmax_v2"]
TO_FLOAT = TO_HALF = ["aten._to_copy"]
BEST = [*SOFTMAX_GATING, "aten._to_copy"]  # of any values: the ids, as int64
TO_INT64 = TO_INT32 = ["aten._to_copy"]
NORMALIZE = ["aten.sum", "aten.div"]
NORMALIZE_EPS = ["aten.sum", "aten.add", "aten.div"]

LINEAR_BACKWARD = ["aten.mm", "aten.mm"]
FLOAT_LINEAR_BACKWARD = [*LINEAR_BACKWARD, "aten._to_copy"]
SOFTMAX_BACKWARD = ["aten.gather", "aten._softmax", "aten._softmax_backward_data", "aten.zeros_like", "aten.scatter"]
SIGMOID_BACKWARD = [
    "aten.sigmoid",
    "aten._to_copy",
    "aten.mul",
    "aten.gather",
    "aten.sum",
    "aten.add",
    "aten.div",
    "aten.mul",
    "aten.sum",
    "aten.sub",
    "aten.div",
    "aten.zeros_like",
    "aten.scatter_add",
    "aten.rsub",
    "aten.mul",
    "aten.mul",
]

# ---------------------------------------------------------------- routers


def groups(**options: Any) -> routers.LinearRouter:
    defaults = {"score_function": "sigmoid", "group_score": "top2_sum", "norm_topk_prob": True, "dtype": FP32}
    return routers.GroupLimitedRouter(
        H, E, K, num_groups=4, topk_groups=2, has_correction_bias=True, **{**defaults, **options}
    )


class Case(NamedTuple):
    name: str
    router: routers.LinearRouter
    forward: list[str]
    replay: list[str]
    backward: list[str] | None = None


CASES = [
    Case(
        "softmax",
        routers.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=BF16),
        [*LINEAR, *SOFTMAX_GATING],
        [*LINEAR, *TO_INT64, "aten.gather", *TO_FLOAT, "aten._softmax", *TO_HALF],
    ),
    Case(
        "softmax-float32-weights",  # Mixtral
        routers.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, weights_dtype=FP32, dtype=BF16),
        [*LINEAR, *TO_FLOAT, *SOFTMAX_GATING],
        [*LINEAR, *TO_INT64, "aten.gather", *TO_FLOAT, "aten._softmax"],
        [*TO_INT64, *SOFTMAX_BACKWARD, *TO_HALF, *LINEAR_BACKWARD],
    ),
    Case(
        "softmax-correction",  # ERNIE
        routers.SoftmaxTopKRouter(
            H, E, K, norm_topk_prob=True, norm_min=1e-12, has_correction_bias=True, logits_dtype=FP32, dtype=FP32
        ),
        [*FLOAT_LINEAR, *GATING, "aten.sum", "aten.clamp", "aten.div"],
        [*FLOAT_LINEAR, *TO_INT64, "aten._softmax", "aten.gather", "aten.sum", "aten.clamp", "aten.div"],
    ),
    Case(
        "topk-softmax",
        routers.TopKSoftmaxRouter(H, E, K, bias=True, dtype=BF16),
        ["aten.addmm", *SOFTMAX_GATING],
        ["aten.addmm", *TO_INT64, "aten.gather", *TO_FLOAT, "aten._softmax", *TO_HALF],
    ),
    Case(
        "sigmoid",
        routers.SigmoidTopKRouter(
            H, E, K, norm_topk_prob=True, has_correction_bias=True, weights_dtype=FP32, dtype=BF16
        ),
        [*LINEAR, *TO_FLOAT, *GATING],
        [*LINEAR, *TO_INT64, *TO_FLOAT, "aten.sigmoid", "aten.gather", *NORMALIZE],
        [*SIGMOID_BACKWARD, *TO_HALF, *LINEAR_BACKWARD],
    ),
    Case(
        "sigmoid-in-half-precision",  # rounds before it compares, which the operator does not
        routers.SigmoidTopKRouter(H, E, K, norm_topk_prob=True, scores_dtype=None, dtype=BF16),
        [*LINEAR, "aten.sigmoid", *BEST, "aten.gather", *NORMALIZE, *TO_INT32],
        [*LINEAR, *TO_INT64, "aten.sigmoid", "aten.gather", *NORMALIZE],
    ),
    Case(
        "groups",  # DeepSeek-V3
        groups(),
        [*FLOAT_LINEAR, *GATING],
        [*FLOAT_LINEAR, *TO_INT64, "aten.sigmoid", "aten.gather", *NORMALIZE_EPS],
        [*SIGMOID_BACKWARD, *FLOAT_LINEAR_BACKWARD],
    ),
    Case(
        "groups-softmax",  # DeepSeek-V2
        groups(score_function="softmax", group_score="max", norm_topk_prob=False),
        [*FLOAT_LINEAR, *GATING],
        [*FLOAT_LINEAR, *TO_INT64, "aten._softmax", "aten.gather"],
    ),
    Case(
        "groups-filled-with-zero",  # which the operator does not know
        groups(group_fill=0.0),
        [
            *(*FLOAT_LINEAR, "aten.sigmoid", "aten.add", "aten.topk", "aten.sum", "aten.ones_like", *BEST),
            *("aten.scatter", "aten.masked_fill", *BEST, "aten.gather", *NORMALIZE_EPS, *TO_INT32),
        ],
        [*FLOAT_LINEAR, *TO_INT64, "aten.sigmoid", "aten.gather", *NORMALIZE_EPS],
    ),
    Case(
        "sqrt-softplus",
        routers.SqrtSoftplusRouter(H, E, K, norm_topk_prob=True, has_correction_bias=True, logits_dtype=FP32),
        [*FLOAT_LINEAR, *GATING],
        [
            *(*FLOAT_LINEAR, *TO_INT64, "aten.new_zeros", "aten.logaddexp", "aten.eq", "aten.masked_fill", "aten.sqrt"),
            *("aten.masked_fill", "aten.gather", *NORMALIZE),
        ],
    ),
    Case(
        "hash",
        routers.HashRouter(H, E, K, vocab_size=VOCAB, score_function="sigmoid", logits_dtype=FP32),
        [*FLOAT_LINEAR, *GATING],
        [*FLOAT_LINEAR, *TO_INT64, "aten.sigmoid", "aten.gather", *NORMALIZE_EPS],
        [*SIGMOID_BACKWARD, *FLOAT_LINEAR_BACKWARD],
    ),
    Case(
        "llama4",
        routers.Llama4Router(H, E, K),
        [*FLOAT_LINEAR, "aten.sigmoid", *BEST, "aten.gather", *TO_INT32],
        [*FLOAT_LINEAR, *TO_INT64, "aten.sigmoid", "aten.gather"],
    ),
]

# ---------------------------------------------------------------- tracing


def trace(router: routers.LinearRouter, *, with_backward: bool = False, is_replay: bool = False) -> list[str]:
    state = {name: tensor.detach() for name, tensor in [*router.named_parameters(), *router.named_buffers()]}
    x = torch.randn(T, H, dtype=BF16).requires_grad_(with_backward)
    for name, _ in router.named_parameters():
        state[name].requires_grad_(with_backward)
    ids = {"topk_ids": torch.zeros(T, K, dtype=torch.int32)} if is_replay else {"token_ids": torch.zeros(T).long()}

    def run(x: Tensor, state: dict[str, Tensor], ids: dict[str, Tensor]) -> Any:
        out = functional_call(router, state, (x,), ids)
        if not with_backward:
            return out
        leaves = [x, *(tensor for tensor in state.values() if tensor.requires_grad)]
        return out, torch.autograd.grad(out.topk_weights, leaves, torch.ones_like(out.topk_weights))

    return names(launched(make_fx(run, decomposition_table=npu_lowerings(), tracing_mode="fake")(x, state, ids)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_launches_exactly(case: Case) -> None:
    assert trace(case.router) == case.forward


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replay_launches_exactly(case: Case) -> None:
    assert trace(case.router, is_replay=True) == case.replay


@pytest.mark.parametrize("case", [case for case in CASES if case.backward is not None], ids=lambda case: case.name)
def test_forward_and_backward_launch_exactly(case: Case) -> None:
    gradient_of_the_result = ["aten.ones_like"]
    assert trace(case.router, with_backward=True) == [*case.forward, *gradient_of_the_result, *(case.backward or [])]
