"""Routing on one device: what holds between the operators, and whole layers against a loop over tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.ops.test_properties import repeatable, routings
from tests.ops.test_routing import column_major

# --- what holds between the operators --------------------------------------------------------------------------------


def _rows_for(ids: Tensor) -> Tensor:
    return torch.randn(ids.size(0), 3, generator=torch.Generator().manual_seed(0))


@repeatable
@given(ids=routings(), active=st.integers(0, 8))
def test_generations_differ_in_the_layout_of_the_index_alone(ids: Tensor, active: int) -> None:
    ids, x = ids.int(), _rows_for(ids)
    (num_tokens, k), sources = ids.shape, column_major(ids)
    first, index, experts = ops.npu_moe_init_routing(x, sources, ids, num_tokens)
    rows, row_idx, counts, _ = ops.npu_moe_init_routing_v2(
        x, ids, expert_num=5, expert_tokens_num_flag=True, active_expert_range=[0, 5]
    )
    assert_bits_equal(first, rows)
    assert_bits_equal(index.view(k, num_tokens).t().reshape(-1), row_idx)
    assert_bits_equal(experts, ids.flatten().sort(stable=True).values)
    assert_bits_equal(ops.npu_moe_compute_expert_tokens(experts, 5).long(), counts)
    # a round trip, and a permutation that ascends by expert and then by pair
    assert_bits_equal(rows[row_idx.long()], x.repeat_interleave(k, 0))
    keys = ids.flatten().long() * ids.numel() + torch.arange(ids.numel())
    assert_bits_equal(row_idx, keys.argsort().argsort().int())
    cut, same, _ = ops.npu_moe_init_routing(x, sources, ids, active)
    assert_bits_equal(cut, first[: min(num_tokens, active) * k])
    assert_bits_equal(same, index)


@repeatable
@given(ids=routings(), data=st.data())
def test_forms_of_index_and_counts_agree(ids: Tensor, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 4))
    experts = [start, data.draw(st.integers(start + 1, 5))]
    ids, x = ids.int(), _rows_for(ids)

    def route(**options: Any) -> tuple[Tensor, ...]:
        call = {"expert_num": 5, "active_expert_range": experts, "expert_tokens_num_flag": True, **options}
        return ops.npu_moe_init_routing_v2(x, ids, **call)

    rows, index, ends, _ = route(expert_tokens_num_type=0)
    scattered, order, counts, _ = route(expert_tokens_num_type=1, row_idx_type=1)
    pairs = route(expert_tokens_num_type=2)[2]
    inside = ((ids >= experts[0]) & (ids < experts[1])).flatten()
    available = int(inside.sum())
    assert_bits_equal(scattered, rows)
    assert_bits_equal(index >= 0, inside)
    assert_bits_equal(index[order[:available].long()], torch.arange(available, dtype=torch.int32))
    assert_bits_equal(order.sort().values, torch.arange(ids.numel(), dtype=torch.int32))
    assert_bits_equal(ends, counts.cumsum(0))
    assert int(counts.sum()) == available
    expected = [[experts[0] + expert, count] for expert, count in enumerate(counts.tolist()) if count]
    assert pairs.tolist() == expected + [[0, 0]] * (5 - len(expected))


@repeatable
@given(ids=routings(), cut=st.integers(1, 4))
def test_two_ranges_are_a_partition(ids: Tensor, cut: int) -> None:
    ids, x = ids.int(), _rows_for(ids)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    parts, places = [], []
    for experts in ([0, cut], [cut, 5]):
        rows, index, _, _ = ops.npu_moe_init_routing_v2(x, ids, expert_num=5, active_expert_range=experts)
        rows[int((index >= 0).sum()) :] = math.nan  # undefined on a device
        inside = (ids >= experts[0]) & (ids < experts[1])
        parts.append(ops.npu_moe_token_unpermute(rows, index.abs(), weights * inside))
        places.append(index >= 0)
    assert bool((places[0] ^ places[1]).all())
    rows, index, _, _ = ops.npu_moe_init_routing_v2(x, ids, expert_num=5)
    whole = ops.npu_moe_token_unpermute(rows, index, weights)
    torch.testing.assert_close(parts[0] + parts[1], whole)
    finalized = ops.npu_moe_finalize_routing(rows, None, None, None, weights, index, None, 2)
    torch.testing.assert_close(finalized, whole)


@repeatable
@given(ids=routings(), capacity=st.integers(1, 6))
def test_drop_pad_keeps_the_earliest_tokens_of_each_expert(ids: Tensor, capacity: int) -> None:
    ids, x = ids.int(), _rows_for(ids)
    capacity = min(capacity, max(ids.size(0), 1))
    rows, _, counts, _ = ops.npu_moe_init_routing_v2(
        x, ids, expert_num=5, expert_tokens_num_flag=True, expert_tokens_num_type=1
    )
    padded, _, same, _ = ops.npu_moe_init_routing_v2(
        x,
        ids,
        expert_num=5,
        drop_pad_mode=1,
        expert_capacity=capacity,
        expert_tokens_num_flag=True,
        expert_tokens_num_type=1,
    )
    assert_bits_equal(same, counts)
    for expert, of_expert in enumerate(rows.split(counts.tolist())):
        kept = of_expert[:capacity]
        assert_bits_equal(padded[expert], torch.cat((kept, torch.zeros(capacity - len(kept), 3))))


@repeatable
@given(ids=routings(), quant_mode=st.integers(0, 1), mode=st.integers(1, 2))
def test_quantized_and_second_generation_agree(ids: Tensor, quant_mode: int, mode: int) -> None:
    ids, x = ids.int(), 20 * _rows_for(ids)
    options: dict[str, Any] = {"quant_mode": quant_mode, "expert_num": 5}
    if quant_mode == 0:
        options |= {"scale": torch.tensor([0.5]), "offset": torch.tensor([3.0])}
    else:
        options["scale"] = torch.rand(5, 3, generator=torch.Generator().manual_seed(2)) + 0.5
    rows, index, counts, _, scales = ops.npu_moe_init_routing_quant(x, ids, expert_tokens_num_mode=mode, **options)
    second_rows, second_index, second_counts, second_scales = ops.npu_moe_init_routing_v2(
        x, ids, expert_tokens_num_type=mode - 1, expert_tokens_num_flag=True, **options
    )
    assert_bits_equal(rows, second_rows)
    assert_bits_equal(index, second_index)
    assert counts is not None
    assert_bits_equal(counts.long(), second_counts)
    if quant_mode == 1:
        assert scales is not None
        assert_bits_equal(scales, second_scales)
    padding: dict[str, Any] = {"drop_pad_mode": 1, "expert_capacity": 1}
    rows, index, _, counts, _ = ops.npu_moe_init_routing_quant(
        x, ids, expert_tokens_before_capacity_flag=True, **options, **padding
    )
    second_rows, second_index, second_counts, _ = ops.npu_moe_init_routing_v2(
        x, ids, expert_tokens_num_type=1, expert_tokens_num_flag=True, **options, **padding
    )
    assert_bits_equal(rows, second_rows)
    assert_bits_equal(index, second_index)
    assert counts is not None
    assert_bits_equal(counts.long(), second_counts)


@repeatable
@given(ids=routings())
def test_layouts_of_finalize_agree(ids: Tensor) -> None:
    (num_tokens, k), generator = ids.shape, torch.Generator().manual_seed(0)
    rows = torch.randn(ids.numel(), 3, generator=generator)
    index = torch.randperm(ids.numel(), generator=generator, dtype=torch.int32)
    bias, weights = torch.randn(5, 3, generator=generator), torch.rand(num_tokens, k, generator=generator)
    transposed = index.view(num_tokens, k).t().reshape(-1)
    outs = [
        ops.npu_moe_finalize_routing(rows, None, None, bias, weights, order, ids.int(), mode)
        for mode, order in ((0, transposed), (2, index))
    ]
    assert_bits_equal(outs[0], outs[1])
    for mode, order in ((1, transposed), (3, index)):
        whole = ops.npu_moe_finalize_routing(rows.unsqueeze(0), None, None, bias, weights, order, ids.int(), mode)
        assert_bits_equal(whole, outs[0])


# --- whole layers ----------------------------------------------------------------------------------------------------

NUM_TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 7, 8, 6, 4, 2


class Layer:
    """A small layer of experts, and its output token by token in float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
        self.up = torch.randn(EXPERTS, HIDDEN, 2 * INNER, generator=generator) / 4
        self.down = torch.randn(EXPERTS, INNER, HIDDEN, generator=generator) / 4
        self.skip = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
        self.bias = torch.randn(EXPERTS, HIDDEN, generator=generator)
        logits = torch.randn(NUM_TOKENS, EXPERTS, generator=generator)
        self.weights, self.ids, self.row_idx = ops.npu_moe_gating_top_k_softmax(logits, k=TOP_K)

    def expert(self, row: Tensor, expert: int) -> Tensor:
        first, second = (row.double() @ self.up[expert].double()).chunk(2)
        return (torch.nn.functional.silu(first) * second) @ self.down[expert].double()

    def expected(self, capacity: int = NUM_TOKENS) -> Tensor:
        out, used = torch.zeros(NUM_TOKENS, HIDDEN, dtype=torch.float64), [0] * EXPERTS
        for token, slot in itertools.product(range(NUM_TOKENS), range(TOP_K)):
            expert = int(self.ids[token, slot])
            used[expert] += 1
            row = self.expert(self.x[token], expert) if used[expert] <= capacity else 0
            out[token] += self.weights[token, slot].double() * (row + self.bias[expert].double())
        return out + self.skip

    def experts(self, rows: Tensor, group_list: Tensor, group_list_type: int) -> Tensor:
        grouped = {"group_list": group_list, "group_list_type": group_list_type, "group_type": 0, "split_item": 3}
        (hidden,) = ops.npu_grouped_matmul([rows], [self.up], **grouped)
        (out,) = ops.npu_grouped_matmul([ops.npu_swiglu(hidden)], [self.down], **grouped)
        return out

    def finalize(self, rows: Tensor, index: Tensor, mode: int) -> Tensor:
        return ops.npu_moe_finalize_routing(
            rows, self.skip, None, self.bias, self.weights, index, self.ids, drop_pad_mode=mode
        )


def test_layer_of_the_first_generation() -> None:
    layer = Layer()
    rows, index, experts = ops.npu_moe_init_routing(layer.x, layer.row_idx, layer.ids, NUM_TOKENS)
    ends = ops.npu_moe_compute_expert_tokens(experts, EXPERTS).long()
    out = layer.finalize(layer.experts(rows, ends, 0), index, 0)
    assert_close(out, layer.expected(), reduction=HIDDEN * INNER)


@pytest.mark.parametrize("type", [0, 1])
def test_layer_of_the_second_generation(type: int) -> None:
    layer = Layer()
    rows, index, counts, _ = ops.npu_moe_init_routing_v2(
        layer.x,
        layer.ids,
        expert_num=EXPERTS,
        active_expert_range=[0, EXPERTS],
        expert_tokens_num_type=type,
        expert_tokens_num_flag=True,
    )
    result = layer.experts(rows, counts, type)
    assert_close(layer.finalize(result, index, 2), layer.expected(), reduction=HIDDEN * INNER)
    without_bias = ops.npu_moe_token_unpermute(result, index, layer.weights)
    finalized = ops.npu_moe_finalize_routing(result, None, None, None, layer.weights, index, None, 2)
    torch.testing.assert_close(without_bias, finalized)


@pytest.mark.parametrize("capacity", [1, 2, 3, NUM_TOKENS])
def test_layer_with_a_capacity(capacity: int) -> None:
    layer = Layer()
    rows, index, _, _ = ops.npu_moe_init_routing_v2(
        layer.x, layer.ids, expert_num=EXPERTS, drop_pad_mode=1, expert_capacity=capacity
    )
    result = torch.bmm(ops.npu_swiglu(torch.bmm(rows, layer.up)), layer.down)
    assert_close(layer.finalize(result, index, 3), layer.expected(capacity), reduction=HIDDEN * INNER)


@pytest.mark.parametrize(("mode", "group_list_type"), [(1, 0), (2, 1)])
def test_layer_of_quantized_rows(mode: int, group_list_type: int) -> None:
    """The codes times their scales stand for the rows: within half a step of each element."""
    layer = Layer()
    codes, index, counts, _, scales = ops.npu_moe_init_routing_quant(
        layer.x, layer.ids, expert_num=EXPERTS, expert_tokens_num_mode=mode
    )
    assert counts is not None
    assert scales is not None
    rows = codes * scales.unsqueeze(1)
    exact = layer.x.repeat_interleave(TOP_K, 0)
    assert ((rows[index.long()] - exact).abs() <= 0.5001 * scales[index.long()].unsqueeze(1)).all()
    out = layer.finalize(layer.experts(rows, counts.long(), group_list_type), index, 2)
    assert (out - layer.expected()).abs().max() < 0.1


def test_rows_that_no_group_covers_reach_no_result() -> None:
    layer = Layer()
    rows, index, counts, _ = ops.npu_moe_init_routing_v2(
        layer.x,
        layer.ids,
        expert_num=EXPERTS,
        active_expert_range=[1, 3],
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
    )
    valid = int(counts.sum())
    assert 0 < valid < len(rows)
    outs = []
    for fill in (0.0, math.nan):
        rows[valid:] = fill
        up, down = layer.up[1:3], layer.down[1:3]
        grouped = {"group_list": counts, "group_list_type": 1, "group_type": 0, "split_item": 3}
        (hidden,) = ops.npu_grouped_matmul([rows], [up], **grouped)
        (result,) = ops.npu_grouped_matmul([ops.npu_swiglu(hidden)], [down], **grouped)
        result[valid:] = fill
        inside = (layer.ids >= 1) & (layer.ids < 3)
        outs.append(ops.npu_moe_token_unpermute(result, index.abs(), layer.weights * inside))
        # a pair without a row is -1 and reads nothing
        finalized = ops.npu_moe_finalize_routing(result, None, None, None, layer.weights, index, None, 2)
        torch.testing.assert_close(finalized, outs[-1])
    assert_bits_equal(outs[0], outs[1])


def test_gradient_of_a_layer_is_that_of_the_loop() -> None:
    layer = Layer()
    leaves = (layer.x, layer.weights, layer.bias, layer.skip)
    layer.x, layer.weights, layer.bias, layer.skip = (leaf.clone().requires_grad_() for leaf in leaves)
    leaves = (layer.x, layer.weights, layer.bias, layer.skip)
    expected = torch.autograd.grad(layer.expected().square().sum(), leaves)
    for mode in (0, 2):
        if mode == 0:
            rows, index, experts = ops.npu_moe_init_routing(layer.x, layer.row_idx, layer.ids, NUM_TOKENS)
            counts = ops.npu_moe_compute_expert_tokens(experts, EXPERTS).long()
        else:
            rows, index, counts, _ = ops.npu_moe_init_routing_v2(
                layer.x, layer.ids, expert_num=EXPERTS, expert_tokens_num_flag=True
            )
        out = layer.finalize(layer.experts(rows, counts, 0), index, mode)
        for gradient, wanted in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(gradient, wanted, check_dtype=False, rtol=1e-4, atol=1e-5)
