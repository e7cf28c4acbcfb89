"""Values of other types that torch's own operators take for the type of an argument are taken here too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.gloo import single_rank_group

X = torch.arange(6.0).view(3, 2)
IDS = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)


@pytest.mark.parametrize("number", [np.int64(4), np.int32(4), torch.tensor(4), torch.tensor([4], dtype=torch.int32)])
def test_ints(number: object) -> None:
    for result, expected in zip(
        ops.npu_moe_token_permute(X, IDS, num_out_tokens=number),
        ops.npu_moe_token_permute(X, IDS, num_out_tokens=4),
        strict=True,
    ):
        assert_bits_equal(result, expected)


@pytest.mark.parametrize("bounds", [np.array([0, 2]), (0, 2), [np.int64(0), np.int64(2)]])
@pytest.mark.parametrize("flag", [True, np.bool_(True)])
def test_lists_of_ints_and_bools(bounds: object, flag: object) -> None:
    options = {"expert_num": 3, "expert_tokens_num_type": 1}
    results = ops.npu_moe_init_routing_v2(X, IDS, active_expert_range=bounds, expert_tokens_num_flag=flag, **options)
    assert results[2].tolist() == [2, 2]


@pytest.mark.parametrize("factor", [2, np.float32(2), np.int64(2)])
def test_numbers(factor: object) -> None:
    y, *_ = ops.npu_moe_gating_top_k(X, 1, norm_type=1, routed_scaling_factor=factor)
    assert_bits_equal(y, torch.full((3, 1), 2.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 1.0),
        ("k", torch.tensor(1.0)),
        ("k", torch.tensor([1, 1])),
        ("k", "1"),
        ("out_flag", 1),
        ("out_flag", None),
        ("eps", "small"),
        ("bias", [0.0, 0.0]),
    ],
)
def test_other_types_are_refused(name: str, value: object) -> None:
    with pytest.raises(ops.OperatorError, match=f"npu_moe_gating_top_k: {name} must be a") as caught:
        ops.npu_moe_gating_top_k(X, **{"k": 1, name: value})
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("counts", [torch.tensor([3]), [torch.tensor(3)], np.array([3]), (3,)])
def test_counts(counts: object) -> None:
    y, _, rows = ops.npu_alltoallv_gmm(
        X, torch.eye(2)[None], single_rank_group(), 1, counts, counts, permute_out_flag=True
    )
    assert_bits_equal(y, X)
    assert_bits_equal(rows, X)


def test_a_bool_is_no_number() -> None:
    with pytest.raises(ops.OperatorError, match="dim must be an int, but is bool"):
        ops.npu_swiglu(X, True)
