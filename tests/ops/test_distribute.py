"""Facts about the distributed operators that one rank, or none, can show: shapes in large worlds, int8 rows, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.gloo import single_rank_group

I32 = torch.int32


def shapes(operator: Any, tokens: int, k: int, experts: int, world: int, rank: int = 0, **options: Any) -> list[Any]:
    """Shapes of dispatch on the meta device, which needs no other ranks."""
    x = torch.empty(tokens, 4, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(tokens, k, dtype=I32, device="meta")
    return [tuple(result.shape) for result in operator(x, ids, "group", world, rank, experts, **options)]


def test_room_in_large_worlds() -> None:
    dispatch = ops.npu_moe_distribute_dispatch_v2
    assert shapes(dispatch, 2, 3, 32, 16) == [(64, 4), (64,), (8192,), (2,), (32,), (0,), (64,)]
    assert shapes(dispatch, 2, 3, 32, 16, global_bs=64)[0] == (128, 4)
    # lanes double the rows, their scales and the counts
    lanes = shapes(dispatch, 2, 3, 32, 16, tp_world_size=2)
    assert lanes == [(128, 4), (128,), (8192,), (2,), (64,), (2,), (64,)]
    assert shapes(dispatch, 2, 3, 32, 16, tp_world_size=1)[5] == (1,)
    # ranks 0 to 3 host two shared experts, two ranks each: eight of the sixteen ranks send their tokens to one of them
    shared = {"shared_expert_num": 2, "shared_expert_rank_num": 4}
    assert shapes(dispatch, 2, 3, 24, 16, 3, **shared)[0] == (16, 4)
    assert shapes(dispatch, 2, 3, 24, 16, 4, **shared)[0] == (64, 4)
    assert shapes(ops.npu_moe_distribute_dispatch, 2, 3, 24, 16, 3, **shared)[0] == (8, 4)
    assert shapes(dispatch, 2, 3, 24, 16, 3, **shared)[3:5] == [(1,), (16,)]


@pytest.mark.parametrize(("world", "extra"), [(4, 0), (8, 2 * 16 * 3), (16, 2 * 32 * 3 * 2)])
def test_weights_that_travel_need_more_counts(world: int, extra: int) -> None:
    weights = torch.empty(2, 3, device="meta")
    for operator in (ops.npu_moe_distribute_dispatch, ops.npu_moe_distribute_dispatch_v2):
        result = shapes(operator, 2, 3, 2 * world, world, expert_scales=weights)
        assert result[4] == (2 * world + extra,)
        assert result[6] == result[1]


def test_int8_rows_round_half_to_even() -> None:
    x = torch.tensor([[1.0, -2.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float16)
    ids = torch.tensor([[1], [0]], dtype=I32)
    rows, scales, *_ = ops.npu_moe_distribute_dispatch_v2(x, ids, single_rank_group(), 1, 0, 2, quant_mode=2)
    assert rows.tolist() == [[0, 0, 0], [32, -64, 127]]  # of 31.75 and -63.5
    assert_bits_equal(scales, torch.tensor([0.0, 4 / 127]))


def test_scales_of_the_expert_come_first() -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float16)
    ids = torch.tensor([[1, 0]], dtype=I32)
    smooth = torch.tensor([[1.0, 2.0], [4.0, 1.0]])
    rows, scales, *_ = ops.npu_moe_distribute_dispatch_v2(
        x, ids, single_rank_group(), 1, 0, 2, quant_mode=2, scales=smooth
    )
    assert rows.tolist() == [[64, 127], [127, 32]]  # of 63.5 and 31.75
    assert_bits_equal(scales, torch.tensor([2 / 127, 4 / 127]))


def test_results_that_are_codes_have_no_gradient() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    ids = torch.tensor([[0]], dtype=I32)
    results = ops.npu_moe_distribute_dispatch(x, ids, single_rank_group(), 1, 0, 1, quant_mode=2)
    assert not any(result.requires_grad for result in results)


def test_rows_of_inactive_tokens_are_zero_and_so_are_their_gradients() -> None:
    place = (single_rank_group(), 1, 0, 2)
    mask = torch.tensor([True, False])
    ids = torch.tensor([[0, 1], [1, 0]], dtype=I32)
    x = torch.ones(2, 3, requires_grad=True)
    shared = torch.ones(2, 3, requires_grad=True)
    rows, _, handle, nums, counts, *_ = ops.npu_moe_distribute_dispatch_v2(x, ids, *place, x_active_mask=mask)
    assert nums.tolist() == [1, 1]
    y = ops.npu_moe_distribute_combine_v2(
        rows, ids, handle, counts, torch.ones(2, 2), *place, x_active_mask=mask, shared_expert_x=shared
    )
    assert y.tolist() == [[3.0] * 3, [0.0] * 3]
    dx, dshared = torch.autograd.grad(y.sum(), (x, shared))
    assert dx.tolist() == [[2.0] * 3, [0.0] * 3]
    assert dshared.tolist() == [[1.0] * 3, [0.0] * 3]


def test_special_experts_by_hand() -> None:
    # of two MoE experts, ids 2 is a zero, 3 a copy and 4 a constant expert
    ids = torch.tensor([[2, 3, 4]], dtype=I32)
    counts = torch.zeros(2, dtype=I32)
    y = ops.npu_moe_distribute_combine_v2(
        torch.full((3, 1), float("nan")),
        ids,
        torch.zeros(384, dtype=I32),
        counts,
        torch.tensor([[100.0, 10.0, 1.0]]),
        single_rank_group(),
        1,
        0,
        2,
        ori_x=torch.tensor([[2.0]]),
        const_expert_alpha_1=torch.tensor([[3.0]]),
        const_expert_alpha_2=torch.tensor([[5.0]]),
        const_expert_v=torch.tensor([[7.0]]),
        zero_expert_num=1,
        copy_expert_num=1,
        const_expert_num=1,
    )
    assert y.tolist() == [[10 * 2 + (3 * 2 + 5 * 7)]]


def test_norm_by_hand() -> None:
    y, rstd, x_out = ops.npu_moe_distribute_combine_add_rms_norm(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[0]], dtype=I32),
        torch.zeros(128, dtype=I32),
        torch.ones(1, dtype=I32),
        torch.tensor([[2.0]]),
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([1.0, 10.0]),
        single_rank_group(),
        1,
        0,
        1,
        norm_eps=3.5,
    )
    assert x_out.tolist() == [[[3.0, 4.0]]]
    assert rstd.tolist() == [[[0.25]]]  # 1 / sqrt(12.5 + 3.5)
    assert y.tolist() == [[[0.75, 10.0]]]


def test_the_smallest_rows_are_quantized_by_the_formula() -> None:
    """127 over the largest of such a row is infinite in float32."""
    x = torch.tensor([[1e-38, 0.0, -5e-39, 0.0]], dtype=torch.bfloat16)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    rows, scale, *_ = ops.npu_moe_distribute_dispatch_v2(
        x, ids, single_rank_group(), 1, 0, 1, shared_expert_num=0, quant_mode=2
    )
    values = x.double()
    assert rows.tolist() == (values / values.max() * 127).round().int().tolist()
    torch.testing.assert_close(scale.double(), values.max(1).values / 127)
