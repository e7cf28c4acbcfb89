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


class Case(NamedTuple):
    name: str
    router: routers.LinearRouter
    forward: list[str]
    backward: list[str] | None = None
    replay: list[str] | None = None


CASES: list[Case] = []


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
