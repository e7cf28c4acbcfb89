"""Routing on one device: worked examples with hand-checkable numbers, for the references too, and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.ops._library import REGISTRATIONS
from moe_npu.ops.init_routing_v2 import _gather_index
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.reference import routing


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def i64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def column_major(expert_idx: Tensor) -> Tensor:
    """The third result of gating: ``row_idx[n, j] = j * N + n``."""
    num_tokens, k = expert_idx.shape
    return torch.arange(num_tokens * k, dtype=torch.int32).view(k, num_tokens).t()


# --- first generation ------------------------------------------------------------------------------------------------

FIRST_X = torch.tensor([[10.0, 11], [20, 21], [30, 31]])
FIRST_IDS = i32([[2, 0], [1, 2], [0, 2]])


@pytest.mark.parametrize(("active_num", "first_column"), [(3, [10, 30, 20, 10, 20, 30]), (2, [10, 30, 20, 10])])
def test_first_generation(active_num: int, first_column: list[int]) -> None:
    rows, index, experts = ops.npu_moe_init_routing(FIRST_X, i32([[0, 3], [1, 4], [2, 5]]), FIRST_IDS, active_num)
    assert rows[:, 0].tolist() == first_column
    assert rows[:, 1].tolist() == [value + 1 for value in first_column]
    assert_bits_equal(index, i32([3, 2, 1, 0, 4, 5]))
    assert_bits_equal(experts, i32([0, 0, 1, 2, 2, 2]))


def test_first_generation_inverts_any_order_of_sources_that_it_is_given() -> None:
    sources = i32([[4, 0], [5, 2], [3, 1]])
    rows, index, _ = ops.npu_moe_init_routing(FIRST_X, sources, FIRST_IDS, 3)
    # the sources in the order of the experts, and the tokens that they name
    assert rows[:, 0].tolist() == [FIRST_X[source % 3, 0].item() for source in (0, 3, 5, 4, 2, 1)]
    assert_bits_equal(index, i32([0, 5, 4, 1, 3, 2]))


def test_gradient_of_the_first_generation_follows_repeated_sources() -> None:
    x = FIRST_X.clone().requires_grad_()
    rows, _, _ = ops.npu_moe_init_routing(x, i32([[5, 5], [1, 1], [0, 1]]), FIRST_IDS, 3)
    assert rows[:, 0].tolist() == [30, 10, 20, 30, 20, 20]
    (dx,) = torch.autograd.grad(rows, x, torch.tensor([1.0, 2, 4, 8, 16, 32]).unsqueeze(1).expand(6, 2))
    assert_bits_equal(dx, torch.tensor([[2.0, 2], [52, 52], [9, 9]]))


def test_counts_leave_finished_tokens_out() -> None:
    logits = torch.tensor([[1.0, 0, 0], [0, 2, 1], [3, 0, 1]])
    _, ids, sources = ops.npu_moe_gating_top_k_softmax(logits, torch.tensor([False, True, False]), k=1)
    rows, _, experts = ops.npu_moe_init_routing(logits, sources, ids, 3)
    assert experts.tolist() == [0, 0, 3]
    assert rows[:, 0].tolist() == [1, 3, 0]  # the finished token behind all others
    assert_bits_equal(ops.npu_moe_compute_expert_tokens(experts, 3), i32([2, 2, 2]))


# --- second generation -----------------------------------------------------------------------------------------------

X = torch.tensor([[10.0, 11], [20, 21], [30, 31], [40, 41]])
IDS = i32([[3, 1], [0, 3], [1, 3], [2, 1]])
SCALE = torch.tensor([0.1, 0.2, 0.3, 0.4])
CODES_X = torch.tensor([[1.0, -4], [0, 0], [127, 50], [-3, 1]])


def second(x: Tensor = X, ids: Tensor = IDS, *, type: int | None = None, **options: Any) -> tuple[Tensor, ...]:
    if type is not None:
        options |= {"expert_tokens_num_flag": True, "expert_tokens_num_type": type}
    return ops.npu_moe_init_routing_v2(x, ids, **{"expert_num": 4, **options})


@pytest.mark.parametrize(
    ("options", "first_column", "index"),
    [
        pytest.param(
            {"active_expert_range": [0, 4]}, [20, 10, 30, 40, 40, 10, 20, 30], [5, 1, 0, 6, 2, 7, 4, 3], id="all"
        ),
        pytest.param({}, [20, 10, 30, 40, 40, 10, 20, 30], [5, 1, 0, 6, 2, 7, 4, 3], id="no-range"),
        pytest.param({"row_idx_type": 1}, [20, 10, 30, 40, 40, 10, 20, 30], [2, 1, 4, 7, 6, 0, 3, 5], id="scatter"),
        pytest.param(
            {"active_expert_range": [1, 3]}, [10, 30, 40, 40, 0, 0, 0, 0], [-1, 0, -1, -1, 1, -1, 3, 2], id="range"
        ),
        pytest.param(
            # ids past the range keep their order among themselves, those before it come last
            {"active_expert_range": [1, 3], "row_idx_type": 1},
            [10, 30, 40, 40, 0, 0, 0, 0],
            [1, 4, 7, 6, 0, 3, 5, 2],
            id="range-scatter",
        ),
        pytest.param(
            {"active_expert_range": [1, 3], "active_num": 3},
            [10, 30, 40],
            [-1, 0, -1, -1, 1, -1, 3, 2],
            id="range-active",
        ),
        pytest.param({"active_num": 5}, [20, 10, 30, 40, 40], [5, 1, 0, 6, 2, 7, 4, 3], id="active"),
        pytest.param({"active_num": 0}, [20, 10, 30, 40, 40, 10, 20, 30], [5, 1, 0, 6, 2, 7, 4, 3], id="active-zero"),
    ],
)
def test_second_generation(options: dict[str, Any], first_column: list[int], index: list[int]) -> None:
    rows, row_idx, counts, scales = second(**options)
    assert rows[:, 0].tolist() == first_column
    assert_bits_equal(row_idx, i32(index))
    start, end = options.get("active_expert_range", (0, 4))
    assert_bits_equal(counts, torch.zeros(end - start, dtype=torch.int64))  # not asked for, and a tensor all the same
    assert_bits_equal(scales, torch.zeros(len(first_column)))


@pytest.mark.parametrize(
    ("experts", "type", "expected"),
    [
        ([0, 4], 0, [1, 4, 5, 8]),
        ([0, 4], 1, [1, 3, 1, 3]),
        ([0, 4], 2, [[0, 1], [1, 3], [2, 1], [3, 3]]),
        ([1, 3], 0, [3, 4]),
        ([1, 3], 1, [3, 1]),
        ([1, 3], 2, [[1, 3], [2, 1], [0, 0], [0, 0]]),
    ],
)
@pytest.mark.parametrize("active_num", [-1, 3])
def test_counts_of_the_second_generation(experts: list[int], type: int, expected: Any, active_num: int) -> None:
    _, _, counts, _ = second(type=type, active_expert_range=experts, active_num=active_num)
    assert_bits_equal(counts, i64(expected))


def test_a_range_of_nobody() -> None:
    rows, index, counts, _ = second(X[:2], IDS[:2], type=2, active_expert_range=[2, 3])
    assert_bits_equal(rows, torch.zeros(4, 2))
    assert_bits_equal(index, i32([-1, -1, -1, -1]))
    assert_bits_equal(counts, torch.zeros(4, 2, dtype=torch.int64))


def test_scales_go_along_with_the_rows() -> None:
    _, _, _, scales = second(active_expert_range=[1, 3], scale=SCALE)
    assert_bits_equal(scales, torch.tensor([0.1, 0.3, 0.4, 0.4, 0, 0, 0, 0]))


def test_drop_and_pad() -> None:
    rows, index, counts, scales = second(drop_pad_mode=1, expert_capacity=2, scale=SCALE, type=1)
    assert rows[..., 0].tolist() == [[20, 0], [10, 30], [40, 0], [10, 20]]
    assert_bits_equal(index, i32([6, 2, 0, 7, 3, -1, 4, -1]))
    assert_bits_equal(counts, i64([1, 3, 1, 3]))  # more than the capacity: before rows are dropped
    assert_bits_equal(scales, torch.tensor([0.2, 0, 0.1, 0.3, 0.4, 0, 0.1, 0.2]))


@pytest.mark.parametrize("type", [0, 1, 2])
def test_no_tokens(type: int) -> None:
    none = torch.zeros(0, 2)
    for options in ({}, {"quant_mode": 1, "scale": torch.zeros(0)}, {"scale": torch.zeros(3, 7, 1)}):
        rows, index, counts, scales = second(none, i32([]).view(0, 2), type=type, **options)
        assert rows.shape == (0, 2)
        assert index.shape == scales.shape == (0,)
        assert_bits_equal(counts, torch.zeros((4, 2) if type == 2 else 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("scale", "codes", "scales"),
    [
        (None, [[32, -127], [127, 50], [-127, 42], [-127, 42]], [0.031496, 1.0, 0.023622, 0.023622]),
        (
            [[1.0, 2], [0.5, 1]],
            [[16, -127], [127, 100], [-127, 85], [-127, 85]],
            [0.062992, 1.0, 0.023622, 0.011811],
        ),
    ],
)
def test_dynamic_quantization(scale: Any, codes: list[list[int]], scales: list[float]) -> None:
    smooth = None if scale is None else torch.tensor(scale)
    rows, _, _, row_scales = second(CODES_X, quant_mode=1, active_expert_range=[1, 3], scale=smooth)
    assert rows.dtype == torch.int8
    assert rows.tolist() == [*codes, *[[0, 0]] * 4]
    torch.testing.assert_close(row_scales, torch.tensor([*scales, 0, 0, 0, 0]), atol=1e-6, rtol=0)


def test_a_zero_row_has_scale_zero() -> None:
    rows, _, _, scales = second(CODES_X, quant_mode=1)
    assert rows[0].tolist() == [0, 0]
    assert scales[0] == 0


def test_static_quantization() -> None:
    options = {"quant_mode": 0, "scale": torch.tensor([2.0]), "offset": torch.tensor([-3.0])}
    rows, _, _, scales = second(CODES_X, active_expert_range=[1, 3], **options)
    assert rows[:4].tolist() == [[-1, -11], [127, 97], [-9, -1], [-9, -1]]
    assert_bits_equal(scales, torch.zeros(8))  # not an output, and a tensor all the same
    padded, _, _, scales = second(CODES_X, drop_pad_mode=1, expert_capacity=2, **options)
    assert padded[0].tolist() == [[-3, -3], [0, 0]]  # the unused place is zero, whatever the offset
    assert_bits_equal(scales, torch.zeros(8))


def test_static_quantization_is_within_one_of_the_kernel_of_the_device() -> None:
    """Which computes in float32, rounds to int32 and passes through float16."""
    x = 60 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    scale, offset = torch.tensor([0.7]), torch.tensor([11.3])
    rows, *_ = second(x, i32([[0]] * 50), quant_mode=0, scale=scale, offset=offset)
    on_device = (x * scale + offset).round().half().clamp(-128, 127).to(torch.int8)
    difference = (rows.int() - on_device.int()).abs()
    assert difference.max() == 1  # the two do differ
    assert (difference != 0).float().mean() < 0.05


def test_dynamic_quantization_is_that_of_a_row_alone() -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).half()
    codes, scales = ops.npu_dynamic_quant(x)
    rows, index, _, row_scales = second(x, i32([[1, 0], [3, 3], [2, 0], [1, 1], [0, 2], [3, 2]]), quant_mode=1)
    assert (rows[index.long()].view(6, 2, 16).int() - codes.unsqueeze(1).int()).abs().max() <= 1
    torch.testing.assert_close(row_scales[index.long()].view(6, 2), scales.unsqueeze(1).expand(6, 2))


def test_number_of_experts_is_the_end_of_the_range_if_missing() -> None:
    for without, expected in zip(
        second(type=2, active_expert_range=[1, 4], expert_num=-1),
        second(type=2, active_expert_range=[1, 4]),
        strict=True,
    ):
        assert_bits_equal(without, expected)


@pytest.mark.parametrize("mode", [mode for mode in range(2, 18) if mode != 10])
def test_modes_of_a_later_generation_are_named(mode: int) -> None:
    with pytest.raises(ops.OperatorError, match=rf"quant_mode {mode} exists on devices of generation 950 only"):
        second(quant_mode=mode)


def test_one_token_of_many_experts() -> None:
    """More slots than tokens, some experts several times."""
    ids = torch.randint(0, 226, (1, 475), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    options = {"active_num": 475, "expert_num": 226, "active_expert_range": [23, 35]}
    rows, index, counts, scales = second(torch.ones(1, 613), ids, type=1, scale=torch.tensor([2.0]), **options)
    active = int(((ids >= 23) & (ids < 35)).sum())
    assert rows.shape == (475, 613)
    assert counts.shape == (12,)
    assert int(counts.sum()) == int((index >= 0).sum()) == int(rows[:, 0].sum()) == active
    assert scales[:active].tolist() == [2.0] * active


# --- quantized -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "expected"), [(0, None), (1, [1, 4, 5, 8]), (2, [1, 3, 1, 3])])
def test_quantized_generation(mode: int, expected: list[int] | None) -> None:
    rows, index, counts, before, scales = ops.npu_moe_init_routing_quant(
        CODES_X, IDS, expert_num=4, active_num=0, quant_mode=1, expert_tokens_num_mode=mode
    )
    assert rows.tolist() == [
        [0, 0], [32, -127], [127, 50], [-127, 42], [-127, 42], [32, -127], [0, 0], [127, 50]
    ]  # fmt: skip
    assert_bits_equal(index, i32([5, 1, 0, 6, 2, 7, 4, 3]))
    assert before is None
    if expected is None:
        assert counts is None
    else:
        assert counts is not None
        assert_bits_equal(counts, i32(expected))
    assert scales is not None
    torch.testing.assert_close(
        scales, torch.tensor([0, 0.031496, 1, 0.023622, 0.023622, 0.031496, 0, 1]), atol=1e-6, rtol=0
    )


def test_quantized_generation_cuts_large_batches_by_default() -> None:
    x, ids = torch.randn(600, 4), torch.zeros(600, 2, dtype=torch.int32)
    rows, index, *_ = ops.npu_moe_init_routing_quant(x, ids)
    assert rows.shape == (1024, 4)
    assert int(index.max()) == 1199
    assert ops.npu_moe_init_routing_quant(x, ids, active_num=-1)[0].shape == (1200, 4)


def test_quantized_generation_in_drop_pad_mode() -> None:
    options = {"expert_num": 4, "drop_pad_mode": 1, "expert_capacity": 2, "expert_tokens_num_mode": 2}
    static = {"quant_mode": 0, "scale": torch.tensor([1.0]), "offset": torch.tensor([5.0])}
    rows, index, counts, before, scales = ops.npu_moe_init_routing_quant(
        CODES_X, IDS, **options, **static, expert_tokens_before_capacity_flag=True
    )
    assert rows[0].tolist() == [[5, 5], [0, 0]]
    assert_bits_equal(index, i32([6, 2, 0, 7, 3, -1, 4, -1]))
    assert counts is None
    assert scales is None
    assert before is not None
    assert_bits_equal(before, i32([1, 3, 1, 3]))
    assert ops.npu_moe_init_routing_quant(CODES_X, IDS, **options)[3] is None


# --- counts and re-routing -------------------------------------------------------------------------------------------


def test_compute_expert_tokens() -> None:
    ids = i32([0, 0, 1, 2, 2, 2])
    assert_bits_equal(ops.npu_moe_compute_expert_tokens(ids, 4), i32([2, 3, 6, 6]))
    assert_bits_equal(ops.npu_moe_compute_expert_tokens(ids, 2), i32([2, 3]))
    assert_bits_equal(ops.npu_moe_compute_expert_tokens(ids + 2, 4), i32([0, 0, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
def test_re_routing(dtype: torch.dtype, count_dtype: torch.dtype) -> None:
    counts = torch.tensor([[2, 1], [0, 3], [1, 2]], dtype=count_dtype)
    tokens, scales = torch.arange(9).view(9, 1).to(dtype), torch.arange(9) / 2
    order = [0, 1, 6, 2, 3, 4, 5, 7, 8]
    for idx_type, expected in ((0, order), (1, [0, 1, 3, 4, 5, 6, 2, 7, 8])):
        rows, row_scales, index, per_expert = ops.npu_moe_re_routing(
            tokens, counts, per_token_scales=scales, idx_type=idx_type
        )
        assert_bits_equal(rows, tokens[order])
        assert_bits_equal(row_scales, scales[order])
        assert_bits_equal(index, i32(expected))
        assert_bits_equal(per_expert, torch.tensor([3, 6], dtype=count_dtype))
    gather, scatter = (ops.npu_moe_re_routing(tokens, counts, idx_type=idx_type)[2].long() for idx_type in (0, 1))
    assert_bits_equal(rows.index_select(0, torch.argsort(gather)), tokens)
    assert_bits_equal(rows.index_select(0, scatter), tokens)


@pytest.mark.parametrize("counts", [[[4, 0, 3]], [[4], [0], [3]], [[0, 0], [7, 0], [0, 0]]])
def test_re_routing_of_one_rank_or_one_expert_changes_nothing(counts: list[list[int]]) -> None:
    _, scales, index, _ = ops.npu_moe_re_routing(torch.zeros(7, 1, dtype=torch.int8), i32(counts))
    assert_bits_equal(index, torch.arange(7, dtype=torch.int32))
    assert_bits_equal(scales, torch.zeros(7))


def test_derivatives_of_re_routing() -> None:
    """The operator itself: the public function takes no dtype in which finite differences mean anything."""
    counts, op = i64([[2, 1], [0, 2]]), REGISTRATIONS["npu_moe_re_routing"].op
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 2), (5,))]
    for idx_type in (0, 1):

        def floats(tokens: Tensor, scales: Tensor, idx_type: int = idx_type) -> tuple[Tensor, ...]:
            return tuple(op(tokens, counts, scales, idx_type)[:2])

        assert torch.autograd.gradcheck(floats, leaves)
        assert torch.autograd.gradgradcheck(floats, leaves)


# --- finalize --------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]])
BIAS = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
SCALES = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1, 2]])


def near(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("mode", "index"), [(0, [3, 2, 1, 0, 4, 5]), (2, [3, 0, 2, 4, 1, 5])])
def test_finalize(mode: int, index: list[int]) -> None:
    skip1, skip2 = torch.full((3, 2), 100.0), torch.full((3, 2), 1000.0)
    out = ops.npu_moe_finalize_routing(ROWS, skip1, skip2, BIAS, SCALES, i32(index), FIRST_IDS, mode)
    near(out, [[1104.2, 1105.2], [1108.275, 1109.275], [1125.7, 1128.7]])


def test_finalize_without_weights() -> None:
    index = i32([3, 0, 2, 4, 1, 5])
    out = ops.npu_moe_finalize_routing(ROWS, None, None, None, None, index, None, drop_pad_mode=2, k=2)
    assert_bits_equal(out, torch.tensor([[8.0, 10], [14, 16], [14, 16]]))
    # with the default k of 1 a permutation
    out = ops.npu_moe_finalize_routing(ROWS, None, None, None, None, index, None)
    assert_bits_equal(out, ROWS[index.long()])


def test_finalize_of_dropped_pairs_adds_their_bias() -> None:
    index = i32([4, 0, 2, 5, 1, -1])
    rows = ROWS.view(3, 2, 2)
    out = ops.npu_moe_finalize_routing(rows, None, None, BIAS, SCALES, index, FIRST_IDS, drop_pad_mode=3)
    near(out, [[5.2, 6.2], [9.775, 10.775], [3.7, 4.7]])
    out = ops.npu_moe_finalize_routing(rows, None, None, None, SCALES, index, None, drop_pad_mode=3)
    assert_bits_equal(out, torch.tensor([[5.0, 6], [9.5, 10.5], [3, 4]]))
    column_major_index = i32([4, 2, 1, 0, 5, -1])
    out = ops.npu_moe_finalize_routing(rows, None, None, BIAS, SCALES, column_major_index, FIRST_IDS, 1)
    near(out, [[5.2, 6.2], [9.775, 10.775], [3.7, 4.7]])


def test_finalize_takes_minus_one_in_every_mode_as_zero() -> None:
    for mode, index in ((0, [3, -1, 1, 0, 4, 5]), (2, [3, 0, -1, 4, 1, 5])):
        out = ops.npu_moe_finalize_routing(ROWS, None, None, BIAS, SCALES, i32(index), FIRST_IDS, mode)
        near(out[1], [0.25 * 0.2 + 0.75 * (9 + 0.3), 0.25 * 0.2 + 0.75 * (10 + 0.3)])


def test_finalize_skips_no_weight_of_zero() -> None:
    rows = torch.tensor([[math.nan], [1.0]])
    out = ops.npu_moe_finalize_routing(rows, None, None, None, torch.tensor([[0.0, 1.0]]), i32([0, 1]), None, 2)
    assert out.isnan().all()
    assert not ops.npu_moe_token_unpermute(rows, i32([0, 1]), torch.tensor([[0.0, 1.0]])).isnan().any()


def test_finalize_takes_its_arguments_by_torch_npu_names() -> None:
    named = {
        "expanded_permuted_rows": ROWS.bfloat16(),
        "skip1": None,
        "skip2": None,
        "bias": None,
        "scales": SCALES,
        "expanded_src_to_dst_row": i32([3, 2, 1, 0, 4, 5]),
        "export_for_source_row": FIRST_IDS,
        "drop_pad_mode": None,
        "k": None,
    }
    out = ops.npu_moe_finalize_routing(**named)
    assert out.dtype == torch.bfloat16
    assert_bits_equal(out, ops.npu_moe_finalize_routing(*named.values()))


def test_finalize_sums_half_precision_in_float32() -> None:
    """In float16 the small terms would be lost, each in its turn."""
    rows = torch.tensor([[2048.0], [1], [1], [1]], dtype=torch.float16)
    out = ops.npu_moe_finalize_routing(rows, None, None, None, None, i32([0, 1, 2, 3]), None, 2, k=4)
    assert out.item() == 2052  # 2051, rounded once


# --- one rank of several ---------------------------------------------------------------------------------------------


def test_contribution_of_one_rank_of_all_gather_expert_parallelism() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1, 2], [0.1, 0.9]])
    rows, index, counts, _ = second(type=1, active_expert_range=[1, 3])
    factors = torch.repeat_interleave(torch.tensor([2.0, 3.0]), counts)
    result = torch.full_like(rows, math.nan)
    result[:4] = rows[:4] * factors.unsqueeze(1)
    assert result[:4, 0].tolist() == [20, 60, 80, 120]
    inside = (IDS >= 1) & (IDS < 3)
    out = ops.npu_moe_token_unpermute(result, index.abs(), weights * inside)
    torch.testing.assert_close(out[:, 0], torch.tensor([10.0, 0, 60, 84]))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_idx_type", [0, 1])
@pytest.mark.parametrize("active_num", [-1, 3])
def test_rows_that_were_never_written_have_no_gradient(row_idx_type: int, active_num: int) -> None:
    x, scale = X.clone().requires_grad_(), SCALE.clone().requires_grad_()
    rows, _, _, scales = second(
        x, scale=scale, active_expert_range=[1, 3], active_num=active_num, row_idx_type=row_idx_type
    )
    drows, dscales = torch.full_like(rows, math.nan), torch.full_like(scales, math.nan)
    valid = 4 if active_num == -1 else 3
    drows[:valid] = torch.tensor([[1.0, 1], [2, 2], [4, 4], [8, 8]])[:valid]
    dscales[:valid] = torch.tensor([1.0, 2, 4, 8])[:valid]
    dx, dscale = torch.autograd.grad((rows, scales), (x, scale), (drows, dscales))
    expected = torch.tensor([1.0, 0, 2, 12 if active_num == -1 else 4])
    assert_bits_equal(dx, expected.unsqueeze(1).expand(4, 2).contiguous())
    assert_bits_equal(dscale, expected)


def test_dropped_pairs_and_unused_places_have_no_gradient() -> None:
    x = X.clone().requires_grad_()
    rows, *_ = second(x, drop_pad_mode=1, expert_capacity=2)
    drows = torch.full_like(rows, math.nan)
    for number, (expert, slot) in enumerate(((0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1))):
        drows[expert, slot] = 2.0**number
    (dx,) = torch.autograd.grad(rows, x, drows)
    assert dx[:, 0].tolist() == [2 + 16, 1 + 32, 4, 8]


def test_an_undefined_tail_of_a_scatter_index_is_not_used_by_the_gradient() -> None:
    """On a device the tail is arbitrary, out of range even."""
    _, index, _, _ = second(active_expert_range=[1, 3])
    _, order, _, _ = second(active_expert_range=[1, 3], row_idx_type=1)
    order[4:] = -(2**31)
    assert_bits_equal(_gather_index(order, IDS, 1, 3), index)


@pytest.mark.parametrize("options", [{"quant_mode": 1}, {"quant_mode": 1, "drop_pad_mode": 1, "expert_capacity": 2}])
def test_quantized_rows_have_no_gradient(options: dict[str, Any]) -> None:
    x = CODES_X.clone().requires_grad_()
    assert not any(result.requires_grad for result in second(x, **options))
    quantized = ops.npu_moe_init_routing_quant(x, IDS, expert_num=4, expert_tokens_num_mode=1)
    assert not any(result is not None and result.requires_grad for result in quantized)


def test_scales_of_quantized_rows_are_differentiable_where_they_are_copied() -> None:
    scale = SCALE.clone().requires_grad_()
    rows, _, _, scales = second(X.to(torch.int8), scale=scale)
    assert not rows.requires_grad
    (dscale,) = torch.autograd.grad(scales.sum(), scale)
    assert_bits_equal(dscale, torch.full((4,), 2.0))


# --- the references --------------------------------------------------------------------------------------------------


def test_references_give_the_worked_examples() -> None:
    rows, index, experts = routing.moe_init_routing(FIRST_X, column_major(FIRST_IDS), FIRST_IDS, 2)
    assert rows[:, 0].tolist() == [10, 30, 20, 10]
    assert (index.tolist(), experts.tolist()) == ([3, 2, 1, 0, 4, 5], [0, 0, 1, 2, 2, 2])
    padded, index, counts, scales = routing.moe_init_routing_v2(
        X, IDS, SCALE, None, -1, 2, 4, 1, 1, True, -1, [0, 4], 0
    )
    assert padded[..., 0].tolist() == [[20, 0], [10, 30], [40, 0], [10, 20]]
    assert (index.tolist(), counts.tolist()) == ([6, 2, 0, 7, 3, -1, 4, -1], [1, 3, 1, 3])
    near(scales.values.float(), [0.2, 0, 0.1, 0.3, 0.4, 0, 0.1, 0.2])
    pairs: Sequence[Any] = routing.moe_init_routing_v2(
        X, IDS, expert_num=4, expert_tokens_num_type=2, expert_tokens_num_flag=True, active_expert_range=[1, 3]
    )[2].tolist()
    assert pairs == [[1, 3], [2, 1], [0, 0], [0, 0]]
    codes, _, counts, _, scales = routing.moe_init_routing_quant(
        CODES_X, IDS, active_num=0, expert_num=4, expert_tokens_num_mode=1
    )
    assert codes.values.round()[:4].tolist() == [[0, 0], [32, -127], [127, 50], [-127, 42]]
    assert counts is not None
    assert counts.tolist() == [1, 4, 5, 8]
    _, _, index, per_expert = routing.moe_re_routing(torch.zeros(9, 1).half(), i64([[2, 1], [0, 3], [1, 2]]))
    assert (index.tolist(), per_expert.tolist()) == ([0, 1, 6, 2, 3, 4, 5, 7, 8], [3, 6])
    out = routing.moe_finalize_routing(
        ROWS.view(3, 2, 2), None, None, BIAS, SCALES, i32([4, 0, 2, 5, 1, -1]), FIRST_IDS, 3
    )
    near(out.float(), [[5.2, 6.2], [9.775, 10.775], [3.7, 4.7]])
