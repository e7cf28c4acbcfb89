"""The dispatcher with a capacity against a loop, and against the dropless one where nothing is dropped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_npu
from moe_npu.layers.dispatch import CapacityDispatcher
from tests.helpers.assertions import assert_bits_equal, assert_close

T, E, H, INTER, K = 13, 5, 16, 8, 2


def make(dispatcher: Any, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> moe_npu.MoE:
    torch.manual_seed(0)
    return moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=dtype),
        moe_npu.GroupedExperts(E, H, INTER, bias=bias, dtype=dtype),
        dispatcher=dispatcher,
    )


def kept_pairs(ids: Tensor, weights: Tensor, capacity: int, drop: str) -> set[tuple[int, int]]:
    """The (token, slot) pairs that fit, from the definition."""
    kept = set()
    for expert in range(E):
        pairs = [(t, k) for t in range(len(ids)) for k in range(ids.size(1)) if ids[t, k] == expert]
        if drop == "lightest":
            pairs.sort(key=lambda pair: -weights[pair].item())  # stable: earlier tokens first
        kept |= set(pairs[:capacity])
    return kept


def reference(layer: moe_npu.MoE, x: Tensor, capacity: int, drop: str) -> Tensor:
    logits = x.double() @ layer.router.weight.double().T
    values, ids = logits.softmax(-1).topk(K, -1)
    values = values / values.sum(-1, keepdim=True)
    kept = kept_pairs(ids, values, capacity, drop)
    experts, out = layer.experts, torch.zeros(len(x), H, dtype=torch.float64)
    for t, k in sorted(kept):
        expert = int(ids[t, k])
        gate, up = (experts.gate_up_proj[expert].double() @ x[t].double()).chunk(2)
        y = experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)
        out = out.index_add(0, torch.tensor([t]), (values[t, k] * y).unsqueeze(0))
    return out


@pytest.mark.parametrize("drop", ["last", "lightest"])
@pytest.mark.parametrize("capacity", [1, 2, 4, 13])
def test_equals_a_loop_over_the_pairs_that_fit(capacity: int, drop: Any) -> None:
    layer = make(CapacityDispatcher(E, capacity=capacity, drop=drop))
    x = torch.randn(T, H)
    assert_close(layer(x), reference(layer, x, capacity, drop), reduction=H)


@pytest.mark.parametrize("drop", ["last", "lightest"])
def test_gradients_are_those_of_the_loop(drop: Any) -> None:
    layer, x = make(CapacityDispatcher(E, capacity=3, drop=drop), dtype=torch.float64), torch.randn(T, H).double()
    leaves = [x.requires_grad_(), *layer.parameters()]
    grad = torch.randn(T, H, dtype=torch.float64)
    actual = torch.autograd.grad(layer(x), leaves, grad)
    expected = torch.autograd.grad(reference(layer, x, 3, drop), leaves, grad)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, reduction=H)


@pytest.mark.parametrize("drop", ["last", "lightest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_is_the_dropless_one_where_all_fits(bias: bool, dtype: torch.dtype, drop: Any) -> None:
    layer = make(CapacityDispatcher(E, capacity_factor=E / K, drop=drop), bias=bias, dtype=dtype)
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    leaves, grad = [x, *layer.parameters()], torch.randn(T, H, dtype=dtype)
    results = []
    for dispatcher in (layer.dispatcher, moe_npu.LocalDispatcher(E)):
        layer.dispatcher = dispatcher
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    assert_bits_equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_and_counts_have_the_same_shape_whatever_was_chosen() -> None:
    dispatcher = CapacityDispatcher(E, capacity_factor=1.25)
    capacity = math.ceil(T * K / E * 1.25)
    x, weights = torch.randn(T, H), torch.rand(T, K)
    for ids in (torch.zeros(T, K), torch.arange(T * K).view(T, K) % E):
        rows, expert_tokens, _ = dispatcher.dispatch(x, ids.int(), weights)
        assert rows.shape == (E * capacity, H)
        assert expert_tokens.tolist() == [capacity] * E


@pytest.mark.parametrize(
    ("num_tokens", "factor", "experts", "expected"),
    [(10, 1.1, 2, 10), (50, 1.1, 10, 11), (64, 1.0, 8, 16), (65, 1.0, 8, 17), (4, 100.0, 8, 4), (0, 1.0, 8, 1)],
)
def test_capacity_is_that_of_the_papers(num_tokens: int, factor: float, experts: int, expected: int) -> None:
    dispatcher = CapacityDispatcher(experts, capacity_factor=factor)
    assert dispatcher.rows_per_expert(num_tokens, 2) == expected


class Poison(nn.Module):
    """Experts that double; rows of padding, which are zero, become garbage, and their gradient would be seen."""

    def forward(self, rows: Tensor, expert_tokens: Tensor) -> Tensor:
        is_padding = (rows == 0).all(1, keepdim=True)
        return torch.where(is_padding, float("nan"), rows * 2)


@pytest.mark.parametrize("drop", ["last", "lightest"])
def test_padding_reaches_neither_result_nor_gradient(drop: Any) -> None:
    dispatcher = CapacityDispatcher(E, capacity=4, drop=drop)
    x = torch.randn(3, H, requires_grad=True)
    weights = torch.rand(3, K, requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 1], [0, 3]])
    rows, expert_tokens, state = dispatcher.dispatch(x, ids, weights)
    y = dispatcher.combine(Poison()(rows, expert_tokens), state)
    torch.testing.assert_close(y, 2 * x * weights.sum(1, keepdim=True))
    dx, dweights = torch.autograd.grad(y.sum(), [x, weights])
    torch.testing.assert_close(dx, (2 * weights.sum(1, keepdim=True)).expand(3, H))
    torch.testing.assert_close(dweights, (2 * x.sum(1, keepdim=True)).expand(3, K))


def test_dropped_pairs_have_no_gradient() -> None:
    dispatcher = CapacityDispatcher(2, capacity=1)
    x, weights = torch.randn(3, H, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    rows, _, state = dispatcher.dispatch(x, torch.tensor([[0], [0], [1]]), weights)
    y = dispatcher.combine(rows, state)
    assert torch.equal(y[1], torch.zeros(H))
    dx, dweights = torch.autograd.grad(y.sum(), [x, weights])
    assert dx[:, 0].tolist() == [1, 0, 1]
    assert dweights[1].item() == 0


@pytest.mark.parametrize("drop", ["last", "lightest"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_quantized_experts(scheme: str, drop: Any) -> None:
    layer = make(CapacityDispatcher(E, capacity_factor=E / K, drop=drop), dtype=torch.bfloat16)
    layer.experts = moe_npu.QuantizedExperts.from_float(layer.experts, moe_npu.get_scheme(scheme, **OPTIONS[scheme]))
    x = torch.randn(T, H, dtype=torch.bfloat16)
    with torch.no_grad():
        actual = layer(x)
        layer.dispatcher = moe_npu.LocalDispatcher(E)
        assert_bits_equal(actual, layer(x))


OPTIONS: dict[str, dict[str, Any]] = {"w8a8": {}, "w4a16": {"group_size": 8}}


@pytest.mark.parametrize("drop", ["last", "lightest"])
@pytest.mark.parametrize("options", [{"capacity_factor": 1.1}, {"capacity": 3}], ids=["factor", "capacity"])
def test_compiles_to_one_graph_and_runs_on_meta(options: dict[str, Any], drop: Any) -> None:
    layer = make(CapacityDispatcher(E, **options, drop=drop))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (9, 12):
        x = torch.randn(num_tokens, H, requires_grad=True)
        actual, expected = compiled(x), layer(x)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert layer.to("meta")(torch.randn(4, H, device="meta")).shape == (4, H)


def test_no_tokens() -> None:
    layer, x = make(CapacityDispatcher(E, capacity_factor=1.0)), torch.randn(0, H, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, H)
    assert torch.equal(layer.experts.down_proj.grad, torch.zeros(E, H, INTER))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of capacity_factor and capacity must be given, but they are None and None"),
        ({"capacity_factor": 1.0, "capacity": 2}, "but they are 1.0 and 2"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive and finite, but is 0.0"),
        ({"capacity_factor": float("nan")}, "but is nan"),
        ({"capacity": 0}, "capacity must be a whole number of at least 1, but is 0"),
        ({"capacity": 1.5}, "capacity must be a whole number of at least 1, but is 1.5"),
        ({"capacity_factor": "1.0"}, "capacity_factor must be positive and finite, but is '1.0'"),
        ({"capacity": 1, "drop": "first"}, "drop must be 'last' or 'lightest', but is 'first'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CapacityDispatcher(E, **options)


def test_there_are_experts() -> None:
    with pytest.raises(ValueError, match="num_experts must be a whole number of at least 1, but is 0"):
        CapacityDispatcher(0, capacity=1)
