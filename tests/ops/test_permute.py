"""Permutation and its way back by hand: worked examples, gradients, what is kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.ops._library import REGISTRATIONS
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.helpers.reference import permute as reference
from tests.ops.samples.base import Values
from tests.ops.samples.routing_map import top_k_map

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")


def column(*values: float, dtype: torch.dtype = F32) -> Tensor:
    """Rows of two equal columns."""
    return torch.tensor([[value, value] for value in values], dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def near(result: Tensor, values: Sequence[Any]) -> None:
    torch.testing.assert_close(result, torch.tensor(values, dtype=result.dtype))


# --- index form ------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 0], [2, 1], [0, 1]])
ORDER = ints(2, 0, 5, 3, 1, 4)
PROBS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
PERMUTED = column(10, 20, 30, 40, 50, 60)


@pytest.mark.parametrize("ids", [IDS, IDS.int()])
@pytest.mark.parametrize(("keep", "rows"), [(None, 6), (0, 6), (4, 4), (-1, 5), (100, 6)])
def test_permute(ids: Tensor, keep: int | None, rows: int) -> None:
    permuted, sorted_indices = ops.npu_moe_token_permute(column(1, 2, 3), ids, keep)
    assert_bits_equal(permuted, column(1, 3, 1, 2, 3, 2)[:rows])
    assert_bits_equal(sorted_indices, ORDER)


def test_permute_with_one_expert_per_token() -> None:
    tokens = column(1, 2, 3)
    for ids in (torch.tensor([2, 0, 2]), torch.tensor([[2], [0], [2]])):
        permuted, sorted_indices = ops.npu_moe_token_permute(tokens=tokens, indices=ids)
        assert_bits_equal(permuted, column(2, 1, 3))
        assert_bits_equal(sorted_indices, ints(1, 0, 2))


UNPERMUTES = [ops.npu_moe_token_unpermute, lambda *args: ops._npu_moe_token_unpermute(*args)[0]]


@pytest.mark.parametrize("unpermute", UNPERMUTES)
def test_unpermute(unpermute: Any) -> None:
    assert_bits_equal(unpermute(PERMUTED, ORDER, PROBS), column(25, 50, 20))
    assert_bits_equal(unpermute(PERMUTED[:4], ORDER, PROBS), column(25, 20, 20))
    assert_bits_equal(unpermute(PERMUTED, ORDER), column(30, 10, 60, 40, 20, 50))
    assert_bits_equal(unpermute(PERMUTED, ORDER, None, False, [7, 7]), column(30, 10, 60, 40, 20, 50))
    # row 4 has weight zero, and no index names row 6
    poisoned = torch.cat([PERMUTED, column(NAN)]).index_fill(0, torch.tensor([4]), NAN)
    assert_bits_equal(unpermute(poisoned, ORDER, PROBS), column(25, 50, 20))
    assert unpermute(poisoned, ORDER, PROBS + 1)[2].isnan().all()


def test_ranges_of_experts_add_up() -> None:
    """A rank names rows of other ranks -1, or 1 after abs(), and gives them weight zero."""
    rows = column(20, 60, 80, 120)
    ids = torch.tensor([[0, 1], [3, 0], [2, 1], [3, 2]])
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 2.0], [0.1, 0.9]])
    expanded = ints(-1, 0, -1, -1, 2, 1, -1, 3)
    masked = weights * ((ids >= 1) & (ids < 3))
    for index in (expanded, expanded.abs()):
        poisoned = torch.cat([rows, column(NAN, NAN, NAN, NAN)])
        out = ops.npu_moe_token_unpermute(poisoned, index, masked)
        near(out[:, 0], [10.0, 0.0, 80.0 + 2 * 60.0, 0.9 * 120.0])


def test_two_permutations_go_to_another_rank_and_back() -> None:
    """All-to-all of two ranks with two experts each, where expert e multiplies by e + 1."""
    first, order = ops.npu_moe_token_permute(column(1, 2), torch.tensor([[0, 3], [2, 0]]))
    assert first[:, 0].tolist() == [1, 2, 2, 1]
    received, source_expert = column(1, 2, 3, 3), torch.tensor([0, 1, 0, 1])  # by source, then expert
    grouped, back = ops.npu_moe_token_permute(received, source_expert)
    assert grouped[:, 0].tolist() == [1, 3, 2, 3]
    results = grouped * torch.tensor([[3.0], [3.0], [4.0], [4.0]])
    assert ops.npu_moe_token_unpermute(results, back)[:, 0].tolist() == [3, 8, 9, 12]
    scaled = first * torch.tensor([[1.0], [1.0], [3.0], [4.0]])
    near(ops.npu_moe_token_unpermute(scaled, order, torch.full((2, 2), 0.5))[:, 0], [2.5, 4.0])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_equal_weights_give_the_tokens_back(dtype: torch.dtype) -> None:
    tokens, ids = Values().normal(6, 5, dtype=dtype), Values(1).normal(6, 4).argsort(1)
    permuted, order = ops.npu_moe_token_permute(tokens, ids)
    for probs_dtype in (F32, dtype):
        out = ops.npu_moe_token_unpermute(permuted, order, torch.full((6, 4), 0.25, dtype=probs_dtype))
        assert_bits_equal(out, tokens)


# --- gradients of the index form -------------------------------------------------------------------------------------


def test_gradient_of_permute() -> None:
    grad, tokens = column(1, 2, 4, 8), column(1, 2, 3).requires_grad_()
    permuted, _ = ops.npu_moe_token_permute(tokens, IDS, 4)
    by_autograd = torch.autograd.grad(permuted, tokens, grad)[0]
    by_first = ops.npu_moe_token_permute_grad(tokens, grad, IDS, ORDER)
    by_second = ops.npu_moe_token_permute_grad_v2(grad, ORDER, 3, F32, 2)
    for gradient in (by_autograd, by_first, by_second):
        assert_bits_equal(gradient, column(5, 8, 2))
    assert not by_first.requires_grad  # whatever tokens says: its values have no part in it
    assert ops.npu_moe_token_permute_grad_v2(grad, ORDER, 3, BF16, 2, padded_mode=False).dtype == BF16


@pytest.mark.parametrize("size", [5, 8])
def test_first_form_of_the_gradient_of_permute_is_differentiable(size: int) -> None:
    grad = Values().normal(size, 2, dtype=F64).requires_grad_()
    tokens, indices, order = (
        torch.zeros(4, 2, dtype=F64),
        torch.zeros(4, 2, dtype=torch.int64),
        ints(7, 0, 3, 1, 6, 2, 5, 4),
    )

    def function(grad: Tensor) -> Tensor:
        return ops.npu_moe_token_permute_grad(tokens, grad, indices, order)

    assert torch.autograd.gradcheck(function, grad)
    assert torch.autograd.gradgradcheck(function, grad)


def test_gradients_of_unpermute() -> None:
    permuted = torch.tensor([[10.0, 0], [20, 0], [30, 0], [40, 0], [50, 0], [60, 0]])
    grad = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    leaves = (permuted.clone().requires_grad_(), PROBS.clone().requires_grad_())
    results = [
        torch.autograd.grad(ops.npu_moe_token_unpermute(leaves[0], ORDER, leaves[1]), leaves, grad),
        torch.autograd.grad(ops._npu_moe_token_unpermute(leaves[0], ORDER, leaves[1])[0], leaves, grad),
        ops.npu_moe_token_unpermute_grad(permuted, grad, ORDER, PROBS),
        ops.npu_moe_token_unpermute_grad_v2(grad, ORDER, 6, F32, PROBS, permuted_tokens=permuted),
    ]
    for dpermuted, dprobs in results:
        near(dpermuted, [[0.25, 0.5], [5, 6], [0.75, 1.5], [1.5, 2], [0, 0], [1.5, 2]])
        near(dprobs, [[30, 10], [180, 120], [100, 250]])  # the last one where the weight is zero


def test_gradients_of_unpermute_without_probs() -> None:
    grad = column(1, 2, 3, 4, 5, 6)
    for rows in (6, 4, 8):
        expected = torch.cat([column(2, 5, 1, 4, 6, 3), column(0, 0)])[:rows]
        permuted = torch.full((rows, 2), NAN)
        first, nothing = ops.npu_moe_token_unpermute_grad(permuted, grad, ORDER)
        assert nothing is None
        assert_bits_equal(first, expected)
        second, nothing = ops.npu_moe_token_unpermute_grad_v2(grad, ORDER, rows, F32)
        assert nothing is None
        assert_bits_equal(second, expected)


@pytest.mark.parametrize(("dtype", "probs_dtype"), [(BF16, F32), (F16, F32), (F32, BF16), (BF16, BF16)])
def test_the_gradient_of_probs_has_their_dtype(dtype: torch.dtype, probs_dtype: torch.dtype) -> None:
    values = Values()
    permuted, grad = values.normal(8, 16, dtype=dtype), values.normal(4, 16, dtype=dtype)
    probs, order = values.positive(4, 2, dtype=probs_dtype), values.normal(8).argsort().int()
    leaves = (permuted.clone().requires_grad_(), probs.clone().requires_grad_())
    gradients = torch.autograd.grad(ops.npu_moe_token_unpermute(leaves[0], order, leaves[1]), leaves, grad)
    expected = reference.moe_token_unpermute_grad(permuted, grad, order, probs)
    for gradient, leaf, wanted in zip(gradients, leaves, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        assert wanted is not None
        assert_close(gradient, wanted, reduction=16)


def test_second_derivatives_with_pairs_that_have_no_row() -> None:
    """A negative index with weight zero stays one, whatever the incoming gradient of its weight is."""
    permuted = Values().normal(3, 2, dtype=F64).requires_grad_()
    grad = Values(1).normal(2, 2, dtype=F64).requires_grad_()
    probs = torch.tensor([[0.5, 0.0], [2.0, 1.0]], dtype=F64, requires_grad=True)
    _, dprobs = ops.npu_moe_token_unpermute_grad(permuted, grad, ints(0, -1, 2, 1), probs)
    assert dprobs is not None
    assert dprobs[0, 1] == 0
    ddgrad, ddpermuted = torch.autograd.grad(dprobs, (grad, permuted), torch.ones(2, 2, dtype=F64))
    near(ddgrad, torch.stack([permuted[0], permuted[2] + permuted[1]]).tolist())
    near(ddpermuted, torch.stack([grad[0], grad[1], grad[1]]).tolist())


# --- what is kept for backward ---------------------------------------------------------------------------------------


def kept_by(function: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function()
    return kept


def is_among(tensor: Tensor, kept: list[Tensor]) -> bool:
    return any(each.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for each in kept)


@pytest.mark.parametrize("name", ["npu_moe_token_unpermute", "_npu_moe_token_unpermute"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_unpermute_keeps_its_own_arguments_and_no_rows_without_probs(name: str, dtype: torch.dtype) -> None:
    permuted = Values().normal(8, 4, dtype=dtype).requires_grad_()
    order, probs = torch.arange(8, dtype=torch.int32), Values().positive(4, 2).requires_grad_()
    kept = kept_by(lambda: getattr(ops, name)(permuted, order, probs))
    assert is_among(permuted, kept)
    assert is_among(probs, kept)
    assert sum(each.is_floating_point() for each in kept) == 2  # nothing gathered, cast or multiplied
    kept = kept_by(lambda: getattr(ops, name)(permuted, order))
    assert not is_among(permuted, kept)
    assert [each.dtype for each in kept] == [torch.int32]


def test_permute_keeps_indices_alone() -> None:
    tokens = Values().normal(3, 4).requires_grad_()
    assert [each.dtype for each in kept_by(lambda: ops.npu_moe_token_permute(tokens, IDS))] == [torch.int32]


def test_the_rows_for_backward_are_the_argument() -> None:
    permuted = PERMUTED.clone().requires_grad_()
    out, for_backward = ops._npu_moe_token_unpermute(permuted, ORDER)
    assert for_backward.data_ptr() == permuted.data_ptr()
    assert not for_backward.requires_grad
    assert out.requires_grad


# --- NPU kernels that do less than the operator ----------------------------------------------------------------------


def _kernel(permuted: Tensor, grad: Tensor, order: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As the device: it writes wherever an index points."""
    assert int(order.max()) < permuted.size(0)
    dpermuted, dprobs = reference.moe_token_unpermute_grad(permuted, grad, order, probs)
    return dpermuted.to(permuted.dtype), None if probs is None or dprobs is None else dprobs.to(probs.dtype)


@pytest.mark.parametrize("probs", [PROBS, None])
@pytest.mark.parametrize("rows", [2, 4, 6, 9])
def test_no_row_beyond_the_last_is_written_on_npu(
    rows: int, probs: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(permuted: Tensor, grad: Tensor, order: Tensor, probs: Tensor | None, *modes: Any) -> Any:
        return _kernel(permuted, grad, order, probs)

    def second(
        grad: Tensor, order: Tensor, size: int, dtype: torch.dtype, probs: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        permuted = rest[-1]
        assert permuted.shape == (size, grad.size(1))
        assert permuted.dtype == dtype
        return _kernel(permuted, grad, order, probs)

    npu = SimpleNamespace(npu_moe_token_unpermute_grad=first, npu_moe_token_unpermute_grad_v2=second)
    monkeypatch.setattr(torch.ops, "npu", npu, raising=False)
    permuted, grad = Values().normal(rows, 2), Values(1).normal(6 if probs is None else 3, 2)
    expected = reference.moe_token_unpermute_grad(permuted, grad, ORDER, probs)
    lowerings = [REGISTRATIONS[f"npu_moe_token_unpermute_grad{suffix}"].npu for suffix in ("", "_v2")]
    results = [
        lowerings[0](permuted, grad, ORDER, probs, False, None),
        lowerings[1](grad, ORDER, rows, F32, probs, False, None, None if probs is None else permuted),
    ]
    for dpermuted, dprobs in results:
        assert_close(dpermuted, expected[0])
        if expected[1] is not None:
            assert_close(dprobs, expected[1])


# --- routing map -----------------------------------------------------------------------------------------------------

MAP = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.int8)
MAP_PROBS = torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]])
MAP_ORDER = ints(0, 4, 1, 2, 3, 5)
DROP_MAP = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.int8)
DROP_TOKENS = ints(0, 1, 2, 0, 0, 2)
ROWS = torch.tensor([[10.0], [20], [30], [40], [50], [60]])
TOKENS = torch.tensor([[1.0], [2], [3]])
POWERS = torch.tensor([[1.0], [2], [4], [8], [16], [32]])

both_maps = pytest.mark.parametrize("as_dtype", [torch.bool, torch.int8])


@both_maps
def test_permute_with_routing_map(as_dtype: torch.dtype) -> None:
    tokens, probs = TOKENS.clone().requires_grad_(), MAP_PROBS.clone().requires_grad_()
    routing_map = MAP.to(as_dtype)
    for number in (6, MAP.sum(), torch.tensor([6], dtype=torch.int32)):
        permuted, permuted_probs, order = ops.npu_moe_token_permute_with_routing_map(
            tokens, routing_map, probs=probs, num_out_tokens=number
        )
        assert permuted.flatten().tolist() == [1, 2, 2, 3, 1, 3]
        assert permuted_probs is not None
        near(permuted_probs, [0.6, 0.5, 0.4, 0.3, 0.3, 0.5])
        assert_bits_equal(order, MAP_ORDER)
    ramp = torch.arange(1.0, 7)
    results = [
        torch.autograd.grad((permuted, permuted_probs), (tokens, probs), (POWERS, ramp)),
        ops.npu_moe_token_permute_with_routing_map_grad(POWERS, ramp, MAP_ORDER, routing_map, 3, 3, False),
    ]
    for dtokens, dprobs in results:
        assert dtokens.flatten().tolist() == [17, 6, 40]
        near(dprobs, [[1, 0, 5], [2, 3, 0], [0, 4, 6]])
    without = ops.npu_moe_token_permute_with_routing_map(TOKENS, routing_map, num_out_tokens=6)
    assert without[1] is None
    assert_bits_equal(without[0], permuted.detach())
    assert ops.npu_moe_token_permute_with_routing_map_grad(POWERS, None, MAP_ORDER, routing_map, 3, 3, False)[1] is None


@both_maps
def test_permute_with_routing_map_and_capacity(as_dtype: torch.dtype) -> None:
    tokens, probs = TOKENS.clone().requires_grad_(), MAP_PROBS.clone().requires_grad_()
    routing_map = DROP_MAP.to(as_dtype)
    permuted, permuted_probs, token_of_row = ops.npu_moe_token_permute_with_routing_map(
        tokens, routing_map, probs=probs, num_out_tokens=6, drop_and_pad=True
    )
    assert_bits_equal(token_of_row, DROP_TOKENS[[0, 1, 2, 3, 4, 5]])
    assert permuted.flatten().tolist() == [1, 2, 3, 1, 1, 3]
    assert permuted_probs is not None
    near(permuted_probs, [0.6, 0.5, 0.3, 0.1, 0.3, 0.5])  # the fourth belongs to a row that pads
    ramp = torch.arange(1.0, 7)
    results = [
        torch.autograd.grad((permuted, permuted_probs), (tokens, probs), (POWERS, ramp)),
        ops.npu_moe_token_permute_with_routing_map_grad(POWERS, ramp, DROP_TOKENS, routing_map, 3, 3, True),
    ]
    for dtokens, dprobs in results:
        assert dtokens.flatten().tolist() == [25, 2, 36]
        near(dprobs, [[1, 4, 5], [2, 0, 0], [0, 3, 6]])


def test_unpermute_with_routing_map() -> None:
    unpermute = ops.npu_moe_token_unpermute_with_routing_map
    near(unpermute(ROWS, MAP_ORDER, [3, 1], probs=MAP_PROBS, routing_map=MAP), [[21], [22], [42]])
    near(unpermute(ROWS, MAP_ORDER, [3, 1]), [[60], [50], [100]])
    near(unpermute(ROWS, DROP_TOKENS, [3, 1], probs=MAP_PROBS, drop_and_pad=True), [[25], [10], [39]])
    near(unpermute(ROWS, DROP_TOKENS, [3, 1], drop_and_pad=True), [[100], [20], [90]])


def test_internal_unpermute_with_routing_map() -> None:
    unpermute = ops._npu_moe_token_unpermute_with_routing_map
    out, out_index, token, weights = unpermute(ROWS, DROP_TOKENS, [3, 1], probs=MAP_PROBS, drop_and_pad=True)
    near(out, [[25], [10], [39]])
    assert_bits_equal(out_index, ints(0, 3, 4, 1, 2, 5))
    assert_bits_equal(token, ints(0, 0, 0, 1, 2, 2))
    assert weights is not None
    near(weights, [0.6, 0.5, 0.3, 0.1, 0.3, 0.5])
    out, out_index, token, weights = unpermute(ROWS, MAP_ORDER, [3, 1], probs=MAP_PROBS, routing_map=MAP)
    near(out, [[21], [22], [42]])
    assert out_index.shape == token.shape == (6,)
    assert weights is not None
    near(weights, [0.6, 0.3, 0.5, 0.4, 0.3, 0.5])
    assert unpermute(ROWS, MAP_ORDER, [3, 1])[3] is None


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("with_probs", [False, True])
def test_gradients_of_unpermute_with_routing_map(drop: bool, with_probs: bool) -> None:
    values, order = Values(), DROP_TOKENS if drop else MAP_ORDER
    permuted, grad = values.normal(6, 4, dtype=F64).requires_grad_(), values.normal(3, 4, dtype=F64)
    probs = MAP_PROBS.double().requires_grad_() if with_probs else None
    options = {"probs": probs, "routing_map": None if drop else MAP, "drop_and_pad": drop}
    leaves = [permuted] if probs is None else [permuted, probs]
    out = ops.npu_moe_token_unpermute_with_routing_map(permuted, order, [3, 4], **options)
    internal, out_index, token, _ = ops._npu_moe_token_unpermute_with_routing_map(permuted, order, [3, 4], **options)
    indices = (out_index, token) if drop else (order, order)
    results = [
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(internal, leaves, grad),
        ops.npu_moe_token_unpermute_with_routing_map_grad(grad, *indices, MAP, permuted, probs, drop, [3, 4]),
    ]
    # the same by plain indexing
    places = MAP.nonzero() if not drop else torch.stack([order, torch.arange(3).repeat_interleave(2)], 1)
    weights = torch.ones(6, 1, dtype=F64) if probs is None else probs[places[:, 0], places[:, 1]][:, None]
    rows = permuted if drop else permuted[order.long()]
    expected = torch.zeros(3, 4, dtype=F64).index_add(0, places[:, 0], rows * weights)
    torch.testing.assert_close(out, expected)
    for result in results:
        for gradient, wanted in zip(
            result, torch.autograd.grad(expected, leaves, grad, retain_graph=True), strict=False
        ):
            torch.testing.assert_close(gradient, wanted)
    assert (results[2][1] is None) == (probs is None)


def test_gradients_of_unpermute_with_routing_map_have_the_dtype_of_the_incoming_one() -> None:
    permuted, grad = ROWS.to(BF16).requires_grad_(), TOKENS.to(BF16)
    probs = MAP_PROBS.clone().requires_grad_()
    dpermuted, dprobs = ops.npu_moe_token_unpermute_with_routing_map_grad(
        grad, MAP_ORDER, MAP_ORDER, MAP, permuted, probs, False, [3, 1]
    )
    assert dprobs is not None
    assert dpermuted.dtype == dprobs.dtype == BF16
    out = ops.npu_moe_token_unpermute_with_routing_map(permuted, MAP_ORDER, [3, 1], probs=probs, routing_map=MAP)
    by_autograd = torch.autograd.grad(out, (permuted, probs), grad)
    assert_bits_equal(by_autograd[0], dpermuted.detach())
    assert_bits_equal(by_autograd[1], dprobs.detach().float())
    near(by_autograd[1], [[10, 0, 50], [40, 60, 0], [0, 120, 180]])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_map_of_ascending_ids_is_the_same_permutation(k: int) -> None:
    routing_map = top_k_map(7, k)
    ids = routing_map.nonzero()[:, 1].view(7, k)
    tokens, probs = Values().normal(7, 3), Values(1).positive(7, 4)
    by_ids, order = ops.npu_moe_token_permute(tokens, ids)
    by_map, permuted_probs, map_order = ops.npu_moe_token_permute_with_routing_map(
        tokens, routing_map, probs=probs, num_out_tokens=routing_map.sum()
    )
    assert_bits_equal(by_map, by_ids)
    assert_bits_equal(map_order, order)
    assert permuted_probs is not None
    weights = probs.gather(1, ids)
    assert_bits_equal(permuted_probs[order.long()], weights.flatten())
    out = ops.npu_moe_token_unpermute_with_routing_map(
        by_map, map_order, tokens.shape, probs=probs, routing_map=routing_map
    )
    torch.testing.assert_close(out, ops.npu_moe_token_unpermute(by_ids, order, weights))


@pytest.mark.parametrize("drop", [False, True])
def test_one_expert_per_token_and_back(drop: bool) -> None:
    tokens, routing_map = Values().normal(8, 3), torch.eye(4).repeat(2, 1).bool()
    rows, _, order = ops.npu_moe_token_permute_with_routing_map(tokens, routing_map, drop_and_pad=drop)
    assert_bits_equal(rows, tokens[[0, 4, 1, 5, 2, 6, 3, 7]])
    out = ops.npu_moe_token_unpermute_with_routing_map(rows, order, [8, 3], drop_and_pad=drop)
    assert_bits_equal(out, tokens)


def test_padding_without_probability_is_harmless() -> None:
    """Every expert has room for all tokens, and the probabilities are zero outside the map."""
    routing_map, tokens = top_k_map(5, 2), Values().normal(5, 3)
    probs = Values(1).positive(5, 4) * routing_map
    rows, permuted_probs, token = ops.npu_moe_token_permute_with_routing_map(
        tokens, routing_map, probs=probs, num_out_tokens=20, drop_and_pad=True
    )
    assert permuted_probs is not None
    assert int((permuted_probs != 0).sum()) == 10
    out = ops.npu_moe_token_unpermute_with_routing_map(rows, token, [5, 3], probs=probs, drop_and_pad=True)
    torch.testing.assert_close(out, tokens * probs.sum(1, keepdim=True))
    applied = ops.npu_moe_token_unpermute_with_routing_map(
        rows * permuted_probs[:, None], token, [5, 3], drop_and_pad=True
    )
    torch.testing.assert_close(applied, out)


def test_rows_of_the_map_may_have_different_numbers_of_ones() -> None:
    """The device takes any map with as many ones as rows; gradients then reach the right tokens."""
    routing_map = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    tokens = TOKENS.clone().requires_grad_()
    rows, _, order = ops.npu_moe_token_permute_with_routing_map(tokens, routing_map, num_out_tokens=6)
    assert rows.flatten().tolist() == [1, 3, 1, 3, 1, 3]
    assert_bits_equal(order, ints(0, 2, 4, 1, 3, 5))
    assert torch.autograd.grad(rows, tokens, POWERS)[0].flatten().tolist() == [21, 0, 42]
