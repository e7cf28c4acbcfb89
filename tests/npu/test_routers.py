"""Routers on the simulated device against the CPU: experts, weights, gradients, and nothing read on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_npu import sim
from moe_npu.layers import routers
from tests.layers.test_routers import MAKE, H, K, make, route

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


def outcome(router: routers.Router, x: Tensor, topk_ids: Tensor | None) -> list[Tensor]:
    out = route(router, x, topk_ids)
    loss = out.topk_weights.float().square().sum()
    return [*out, *torch.autograd.grad(loss, [x, *router.parameters()])]


@pytest.mark.parametrize("is_replay", [False, True], ids=["choice", "replay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MAKE)
def test_equals_the_cpu_and_reads_nothing(kind: str, dtype: torch.dtype, is_replay: bool) -> None:
    router, x = make(kind, dtype=dtype), torch.randn(9, H, dtype=dtype)
    ids = torch.rand(9, router.num_experts).argsort(1)[:, :K].contiguous() if is_replay else None
    expected = outcome(router, x.requires_grad_(), ids)
    router = router.to("npu")
    x = x.detach().to("npu").requires_grad_()
    ids = None if ids is None else ids.to("npu")
    route(router, x, ids)
    with sim.trace() as record:
        actual = outcome(router, x, ids)
    assert record.num_synchronizations == 0
    assert record.num_copies_to_host == 0
    assert torch.equal(actual[2].cpu(), expected[2])
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b)
