"""Gating and replica choice: worked examples, for the library and the reference alike, and relations between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.helpers.reference.common import Float
from tests.ops.samples import DRAWS, REFERENCES
from tests.ops.test_properties import repeatable


def _of_reference(name: str) -> Callable[..., Any]:
    """The reference with its results in the dtypes of the operator."""

    def function(first: Tensor, *args: Any, **options: Any) -> Any:
        def cast(result: Any) -> Tensor:
            if isinstance(result, Float):
                return result.values.to(result.dtype)
            return result.to(first.dtype) if result.dtype == torch.float64 else result

        return tree_map(cast, REFERENCES[name](first, *args, **options))

    return function


def both(name: str) -> Any:
    functions = [
        pytest.param(lambda *args, **options: getattr(ops, name)(*args, **options), id="library"),
        pytest.param(_of_reference(name), id="reference"),
    ]
    return pytest.mark.parametrize("operator", functions)


def _near(actual: Tensor, expected: list[Any]) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=1e-6)


def _int32(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- softmax, second form --------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[1, 3, 3, 0], [0, 0, 0, 0], [2, -1, 0.5, 2]])
SOFTMAX = [[0.061935, 0.457640, 0.457640, 0.022785], [0.25] * 4, [0.439963, 0.021904, 0.098169, 0.439963]]


@both("npu_moe_gating_top_k_softmax_v2")
def test_softmax_of_the_chosen_logits(operator: Callable[..., Any]) -> None:
    y, expert_idx, softmax_result = operator(LOGITS, k=2, renorm=1)
    _near(y, [[0.5, 0.5]] * 3)
    assert_bits_equal(expert_idx, _int32([[1, 2], [0, 1], [0, 3]]))
    assert softmax_result.shape == (0,)
    assert softmax_result.dtype == torch.float32


@both("npu_moe_gating_top_k_softmax_v2")
def test_softmax_of_all_logits(operator: Callable[..., Any]) -> None:
    finished = torch.tensor([False, True, False])
    y, expert_idx, softmax_result = operator(LOGITS, k=2, renorm=0, output_softmax=True, finished=finished)
    _near(y, [[0.457640, 0.457640], [0.25, 0.25], [0.439963, 0.439963]])
    assert_bits_equal(expert_idx, _int32([[1, 2], [4, 4], [0, 3]]))
    _near(softmax_result, SOFTMAX)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_softmax_is_float32_and_of_the_shape_of_the_logits(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5).to(dtype)
    y, expert_idx, softmax_result = ops.npu_moe_gating_top_k_softmax_v2(x, k=2, output_softmax=True)
    assert (y.shape, y.dtype) == ((2, 3, 2), dtype)
    assert (expert_idx.shape, expert_idx.dtype) == ((2, 3, 2), torch.int32)
    assert_bits_equal(softmax_result, torch.softmax(x.float(), -1))


def test_only_the_first_form_rounds_float16_before_it_sorts() -> None:
    x = torch.tensor([[0, 1e-4]], dtype=torch.float16)  # probabilities 0.499975 and 0.500025
    assert ops.npu_moe_gating_top_k_softmax(x, k=1)[1].tolist() == [[0]]
    for renorm in (0, 1):
        y, expert_idx, _ = ops.npu_moe_gating_top_k_softmax_v2(x, k=1, renorm=renorm)
        assert expert_idx.tolist() == [[1]]
        assert y.tolist() == [[0.5 if renorm == 0 else 1.0]]


@pytest.mark.parametrize("name", ["npu_moe_gating_top_k_softmax", "npu_moe_gating_top_k_softmax_v2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_many_experts(name: str, dtype: torch.dtype) -> None:
    # a few large logits, far apart, and many ties
    x = torch.zeros(3, 5120, dtype=dtype)
    places = torch.stack([torch.randperm(5120)[:8] for _ in range(3)])
    x.scatter_(1, places, torch.arange(12.0, 4.0, -1).to(dtype).expand(3, 8))
    y, expert_idx, _ = getattr(ops, name)(x, k=10)
    assert_bits_equal(expert_idx[:, :8], places.int())
    first = [[expert for expert in range(16) if expert not in row][:2] for row in places.tolist()]
    assert expert_idx[:, 8:].tolist() == first
    assert_close(y, REFERENCES[name](x, k=10)[0], reduction=5120)


@repeatable
@given(data=st.data())
def test_renormalized_weights_are_the_others_divided_by_their_sum(data: st.DataObject) -> None:
    (x,), options = DRAWS["npu_moe_gating_top_k_softmax_v2"](data.draw)
    options |= {"renorm": 0, "output_softmax": True}
    y, expert_idx, softmax_result = ops.npu_moe_gating_top_k_softmax_v2(x.double(), **options)
    chosen, same_idx, nothing = ops.npu_moe_gating_top_k_softmax_v2(x.double(), **{**options, "renorm": 1})
    assert_bits_equal(same_idx, expert_idx)
    torch.testing.assert_close(chosen, y / y.sum(-1, keepdim=True))
    assert nothing.shape == (0,)
    if options["k"]:
        torch.testing.assert_close(chosen.sum(-1), torch.ones(x.shape[:-1], dtype=torch.float64))
    # the first form is the second without renorm
    first, first_idx, _ = ops.npu_moe_gating_top_k_softmax(x.double(), options["finished"], options["k"])
    assert_bits_equal(first, y)
    assert_bits_equal(first_idx, expert_idx)
    assert_bits_equal(softmax_result, torch.softmax(x.double(), -1))
    assert_bits_equal(y, softmax_result.sort(-1, descending=True).values[..., : options["k"]])


def test_gradients_of_weights_and_softmax_add_up() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, rest = torch.randn(4, 2).double(), torch.randn(4, 6).double()
    y, expert_idx, softmax_result = ops.npu_moe_gating_top_k_softmax_v2(x, k=2, output_softmax=True)
    (dx,) = torch.autograd.grad((y * weight).sum() + (softmax_result * rest).sum(), x)
    probabilities = torch.softmax(x, -1)
    loss = (probabilities.gather(1, expert_idx.long()) * weight).sum() + (probabilities * rest).sum()
    torch.testing.assert_close(dx, torch.autograd.grad(loss, x)[0])
    assert not ops.npu_moe_gating_top_k_softmax_v2(x, k=2)[2].requires_grad


# --- groups and bias -------------------------------------------------------------------------------------------------

ROW = torch.tensor([[3.0, -3, 1, 1, 0, 0, -1, 2]])
BIAS = torch.tensor([0, 0, 0, 0, 0, 0.5, 0, 0])
SIGMOID = [[0.952574, 0.047426, 0.731059, 0.731059, 0.5, 0.5, 0.268941, 0.880797]]
GROUPED: dict[str, Any] = {"bias": BIAS, "group_count": 4, "k_group": 2, "norm_type": 1, "routed_scaling_factor": 2.5}


@both("npu_moe_gating_top_k")
@pytest.mark.parametrize(
    ("changes", "ids", "weights"),
    [
        pytest.param({"group_select_mode": 0}, [5, 0, 4], [0.640181, 1.219639, 0.640181], id="best"),
        pytest.param({"group_select_mode": 1}, [5, 2, 3], [0.637067, 0.931467, 0.931467], id="two-best"),
        pytest.param({"group_count": 1, "k_group": 1}, [5, 0, 7], [0.535706, 1.020599, 0.943696], id="no-groups"),
    ],
)
def test_groups(operator: Callable[..., Any], changes: dict[str, Any], ids: list[int], weights: list[float]) -> None:
    y, expert_idx, norm_out = operator(ROW, 3, **{**GROUPED, "out_flag": True, **changes})
    assert_bits_equal(expert_idx, _int32([ids]))
    _near(y, [weights])
    _near(norm_out, SIGMOID)


@both("npu_moe_gating_top_k")
@pytest.mark.parametrize(
    ("renorm", "weights"), [(0, [0.568531, 0.209151, 0.076942]), (1, [0.665241, 0.244728, 0.090031])]
)
def test_softmax_scores(operator: Callable[..., Any], renorm: int, weights: list[float]) -> None:
    y, expert_idx, norm_out = operator(ROW, 3, renorm=renorm)
    assert_bits_equal(expert_idx, _int32([[0, 7, 2]]))
    _near(y, [weights])
    assert_bits_equal(norm_out, torch.zeros(1, 8))


@both("npu_moe_gating_top_k")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_from_a_table(operator: Callable[..., Any], dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1, -1, 2], [1, 1, 1, 1]])
    table, keys = torch.tensor([[0, 1], [3, 2]], dtype=dtype), torch.tensor([1, 0], dtype=dtype)
    y, expert_idx, _ = operator(x, 2, input_ids=keys, tid2eid=table, norm_type=1)
    assert_bits_equal(expert_idx, _int32([[3, 2], [0, 1]]))
    _near(y, [[0.766085, 0.233915], [0.5, 0.5]])


@both("npu_moe_gating_top_k")
def test_root_of_softplus(operator: Callable[..., Any]) -> None:
    y, expert_idx, norm_out = operator(torch.tensor([[0.0, 1, -1, 2]]), 2, norm_type=2, out_flag=True)
    _near(norm_out, [[0.832555, 1.145976, 0.559698, 1.458399]])
    assert_bits_equal(expert_idx, _int32([[3, 1]]))
    _near(y, [[0.559980, 0.440020]])


@both("npu_moe_gating_top_k")
def test_no_expert_of_a_dropped_group_where_scores_are_negative(operator: Callable[..., Any]) -> None:
    bias = torch.tensor([-1.0, -1, -2, -2])  # 0 in place of -inf would beat -0.5
    y, expert_idx, _ = operator(torch.zeros(1, 4), 2, bias=bias, group_count=2, norm_type=1)
    assert_bits_equal(expert_idx, _int32([[0, 1]]))
    assert_bits_equal(y, torch.full((1, 2), 0.5))


@both("npu_moe_gating_top_k")
def test_ties_go_to_the_lower_group_and_expert(operator: Callable[..., Any]) -> None:
    x = torch.tensor([[0.0] * 12, [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1]])
    for mode in (0, 1):
        _, expert_idx, _ = operator(x, 5, group_count=4, k_group=2, group_select_mode=mode, norm_type=1)
        # groups 1 and 3 have two ones, group 2 has one: it ties with them only where the best counts
        kept = [3, 4, 8, 5, 6] if mode == 0 else [3, 4, 10, 11, 5]
        assert_bits_equal(expert_idx, _int32([[0, 1, 2, 3, 4], kept]))


@pytest.mark.parametrize("norm_type", [0, 1, 2])
def test_many_ties(norm_type: int) -> None:
    x = torch.zeros(2, 2048)
    x[1, [7, 300, 2047]] = 1
    _, expert_idx, _ = ops.npu_moe_gating_top_k(x, 5, norm_type=norm_type)
    assert expert_idx.tolist() == [[0, 1, 2, 3, 4], [7, 300, 2047, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_compared_in_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([[6.0, 6 + 4 * torch.finfo(dtype).eps]], dtype=dtype)
    assert torch.sigmoid(x).unique().numel() == 1  # but not in float32
    assert ops.npu_moe_gating_top_k(x, 1, norm_type=1)[1].tolist() == [[1]]


@pytest.mark.parametrize("num_rows", [8, 300])
@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_router(num_rows: int, k: int, dtype: torch.dtype) -> None:
    x, bias = torch.randn(num_rows, 256).to(dtype), torch.randn(256).to(dtype)
    options: dict[str, Any] = {"bias": bias, "group_count": 8, "k_group": 4, "group_select_mode": 1, "norm_type": 1}
    options |= {"out_flag": True, "eps": 1e-20}
    results = ops.npu_moe_gating_top_k(x, k, **options)
    y, expert_idx, norm_out = REFERENCES["npu_moe_gating_top_k"](x, k, **options)
    assert_bits_equal(results[1], expert_idx)
    assert_close(results[0], y, reduction=k)
    assert_close(results[2], norm_out.values)


def _draw_scored(draw: st.DrawFn) -> tuple[Tensor, int, dict[str, Any]]:
    """A call in float64 that chooses by score, not by table: no rounding to speak of."""
    (x, k), options = DRAWS["npu_moe_gating_top_k"](draw)
    for name in ("input_ids", "tid2eid"):
        options.pop(name, None)
    if options.get("bias") is not None:
        options["bias"] = options["bias"].double()
    return x.double(), k, {**options, "eps": 1e-20, "out_flag": True}


@repeatable
@given(data=st.data())
def test_weights_are_unbiased_scores_of_distinct_experts_in_few_groups(data: st.DataObject) -> None:
    x, k, options = _draw_scored(data.draw)
    y, expert_idx, scores = ops.npu_moe_gating_top_k(x, k, **options)
    ids = expert_idx.long()
    weights = scores.gather(1, ids)
    is_normalized = options["norm_type"] != 0 or options["renorm"] == 1
    if is_normalized:
        weights = weights / weights.sum(1, keepdim=True)
        total = torch.full((x.size(0),), options["routed_scaling_factor"], dtype=torch.float64)
        torch.testing.assert_close(y.sum(1), total)
    torch.testing.assert_close(y, weights * options["routed_scaling_factor"])
    assert all(len(set(row)) == k for row in ids.tolist())
    group_size = x.size(1) // options.get("group_count", 1)
    assert all(len({expert // group_size for expert in row}) <= options.get("k_group", 1) for row in ids.tolist())
    bias = options.get("bias")
    biased = scores if bias is None else scores + bias
    assert (biased.gather(1, ids).diff(dim=1) <= 0).all()
    expected = (torch.softmax(x, 1), torch.sigmoid(x), torch.nn.functional.softplus(x).sqrt())[options["norm_type"]]
    torch.testing.assert_close(scores, expected)


@repeatable
@given(data=st.data(), constant=st.sampled_from((-4.0, -0.5, 2.0)))
def test_one_constant_in_every_bias_changes_nothing(data: st.DataObject, constant: float) -> None:
    x, k, options = _draw_scored(data.draw)
    bias = options.setdefault("bias", torch.zeros(x.size(1)).double())
    y, expert_idx, _ = ops.npu_moe_gating_top_k(x, k, **options)
    same, same_idx, _ = ops.npu_moe_gating_top_k(x, k, **{**options, "bias": bias + constant})
    assert_bits_equal(same_idx, expert_idx)
    assert_bits_equal(same, y)


def test_a_bias_for_every_expert_chooses_without_weighing() -> None:
    x, bias = torch.randn(6, 8), torch.zeros(8)
    bias[[1, 6]] = 9
    y, expert_idx, norm_out = ops.npu_moe_gating_top_k(x, 2, bias=bias, norm_type=1, out_flag=True)
    assert all(set(row) == {1, 6} for row in expert_idx.tolist())
    assert_bits_equal(norm_out, torch.sigmoid(x))
    weights = norm_out.gather(1, expert_idx.long())
    assert_bits_equal(y, weights / weights.sum(1, keepdim=True))


def test_no_scaling_factor_gives_zeros() -> None:
    y, *_ = ops.npu_moe_gating_top_k(torch.randn(5, 8), 3, norm_type=1, routed_scaling_factor=0)
    assert_bits_equal(y, torch.zeros(5, 3))


# --- gradient --------------------------------------------------------------------------------------------------------


@both("npu_moe_gating_top_k_backward")
def test_gradient_of_sigmoid_scores(operator: Callable[..., Any]) -> None:
    x_norm = torch.tensor([[0.5, 0.731059, 0.268941, 0.880797]])
    grad = operator(x_norm, torch.tensor([[1, -0.5]]), _int32([[3, 1]]), norm_type=1, routed_scaling_factor=2.5)
    _near(grad, [[0, -0.249957, 0, 0.110788]])
    assert_bits_equal(grad[0, [0, 2]].abs(), torch.zeros(2))


@pytest.mark.parametrize("out_flag", [False, True])
def test_autograd_gives_the_same_whatever_is_returned(out_flag: bool) -> None:
    x = torch.tensor([[0.0, 1, -1, 2]], requires_grad=True)
    y, expert_idx, norm_out = ops.npu_moe_gating_top_k(x, 2, norm_type=1, routed_scaling_factor=2.5, out_flag=out_flag)
    _near(y, [[1.366123, 1.133877]])
    (grad,) = torch.autograd.grad(y, x, torch.tensor([[1, -0.5]]))
    _near(grad, [[0, -0.249957, 0, 0.110788]])
    assert expert_idx.tolist() == [[3, 1]]
    assert not norm_out.requires_grad


@repeatable
@given(data=st.data())
def test_the_gradient_operator_is_the_gradient(data: st.DataObject) -> None:
    (x, k), options = DRAWS["npu_moe_gating_top_k"](data.draw)
    if options.get("bias") is not None:
        options["bias"] = options["bias"].double()
    options["out_flag"] = True
    x = x.double().requires_grad_()
    y, expert_idx, norm_out = ops.npu_moe_gating_top_k(x, k, **options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    (dx,) = torch.autograd.grad(y, x, dy)
    shared = {name: options[name] for name in ("renorm", "norm_type", "routed_scaling_factor", "eps")}
    torch.testing.assert_close(ops.npu_moe_gating_top_k_backward(norm_out, dy, expert_idx, **shared), dx)

    # and that of the formula, written with PyTorch's own operators
    scores = (torch.softmax(x, 1), torch.sigmoid(x), torch.nn.functional.softplus(x).sqrt())[options["norm_type"]]
    weights = scores.gather(1, expert_idx.long())
    if options["norm_type"] != 0 or options["renorm"] == 1:
        weights = weights / (weights.sum(1, keepdim=True) + options["eps"])
    (expected,) = torch.autograd.grad(weights * options["routed_scaling_factor"], x, dy)
    torch.testing.assert_close(dx, expected)
    if x.numel():
        others = torch.ones_like(x).scatter(1, expert_idx.long(), 0) != 0
        assert options["norm_type"] == 0 or not dx[others].any()


@pytest.mark.parametrize("norm_type", [1, 2])
def test_the_only_weight_of_a_row_is_constant(norm_type: int) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    y, *_ = ops.npu_moe_gating_top_k(x, 1, norm_type=norm_type)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.zeros(4, 6), rtol=0, atol=1e-6)


def test_extreme_logits_have_finite_softplus_scores_and_derivatives() -> None:
    x = torch.tensor([[-200.0, -90, 0, 90, 200]], requires_grad=True)
    y, _, norm_out = ops.npu_moe_gating_top_k(x, 5, norm_type=2, out_flag=True)
    assert norm_out[0, 0] == 0
    torch.testing.assert_close(norm_out[0, 3:], torch.tensor([90.0, 200]).sqrt())
    (dx,) = torch.autograd.grad(y, x, torch.arange(5.0).view(1, 5), create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.isfinite().all()
    assert ddx.isfinite().all()


def test_a_bias_that_is_a_parameter_has_no_gradient_and_does_no_harm() -> None:
    x, bias = torch.randn(3, 4, requires_grad=True), torch.nn.Parameter(torch.zeros(4))
    y, *_ = ops.npu_moe_gating_top_k(x, 2, bias=bias, norm_type=1)
    y[:, 0].sum().backward()
    assert x.grad is not None
    assert bias.grad is None


# --- replicas of experts ---------------------------------------------------------------------------------------------

TABLE = _int32([[1, 0, -1, -1], [2, 1, 4, -1], [1, 2, -1, -1], [3, 3, 5, 6]])
CHOICES = [[0, 1], [3, 2], [1, 3], [3, 0]]


@both("npu_moe_update_expert")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, [[0, 1], [3, 2], [1, 3], [3, 0]]),
        (3, [[0, 1], [5, 2], [1, 5], [5, 0]]),
        (5, [[0, 4], [5, 2], [4, 5], [5, 0]]),
        (7, [[0, 4], [6, 2], [4, 6], [6, 0]]),
    ],
)
def test_replicas_by_rank(operator: Callable[..., Any], dtype: torch.dtype, rank: int, expected: list[Any]) -> None:
    ids, keep = operator(torch.tensor(CHOICES, dtype=dtype), TABLE, local_rank_id=rank, world_size=8)
    assert_bits_equal(ids, torch.tensor(expected, dtype=dtype))
    assert_bits_equal(keep, torch.ones(4, 2, dtype=torch.bool))


@both("npu_moe_update_expert")
def test_replicas_by_token(operator: Callable[..., Any]) -> None:
    ids, _ = operator(_int32(CHOICES), TABLE, balance_mode=1)
    assert_bits_equal(ids, _int32([[0, 1], [5, 2], [1, 6], [3, 0]]))


@both("npu_moe_update_expert")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_row", [False, True])
def test_pruning(operator: Callable[..., Any], dtype: torch.dtype, is_row: bool) -> None:
    def keep(scales: list[Any], threshold: list[float], active: list[bool]) -> list[Any]:
        limits = torch.tensor([threshold] if is_row else threshold)
        _, mask = operator(
            _int32(CHOICES),
            TABLE,
            expert_scales=torch.tensor(scales).to(dtype),
            pruning_threshold=limits,
            active_mask=torch.tensor(active),
            balance_mode=1,
        )
        return mask.tolist()

    scales = [[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.75, 0.25]]
    # the last row meets the threshold exactly
    assert keep(scales, [0, 0.25], [True] * 4) == [[True, True], [True, False], [True, True], [True, True]]
    scales[3] = [0.7, 0.3]
    masked = keep(scales, [0, 0.3], [True, True, True, False])
    assert masked == [[True, True], [True, False], [True, True], [False, False]]


@both("npu_moe_update_expert")
@pytest.mark.parametrize(("dtype", "small"), [(torch.float16, 2.0**-12), (torch.bfloat16, 2.0**-9)])
def test_pruning_adds_in_float32(operator: Callable[..., Any], dtype: torch.dtype, small: float) -> None:
    scales = torch.tensor([[1, small]], dtype=dtype)
    assert scales.sum() == 1  # in half precision, where the second weight would be all of its threshold
    threshold = torch.tensor([0, small])
    _, keep = operator(_int32([[0, 1]]), TABLE, expert_scales=scales, pruning_threshold=threshold, balance_mode=1)
    assert keep.tolist() == [[True, False]]


@pytest.mark.parametrize("balance_mode", [0, 1])
@pytest.mark.parametrize("rank", range(8))
def test_random_table_of_many_experts(balance_mode: int, rank: int) -> None:
    experts, top_k, tokens = 256, 8, 64
    # repeated physical ids and a total that no number of ranks divides are accepted
    table = torch.randint(0, 512, (experts, 5), dtype=torch.int32)
    table[:, 0] = torch.randint(1, 5, (experts,))
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].int()
    scales = torch.rand(tokens, top_k).sort(1, descending=True).values
    options: dict[str, Any] = {
        "expert_scales": scales,
        "pruning_threshold": torch.rand(top_k) * 0.15,
        "active_mask": torch.arange(tokens) < 50,
        "local_rank_id": rank,
        "world_size": 8,
        "balance_mode": balance_mode,
    }
    balanced, keep = ops.npu_moe_update_expert(ids, table, **options)
    expected = REFERENCES["npu_moe_update_expert"](ids, table, **options)
    assert_bits_equal(balanced, expected[0])
    assert_bits_equal(keep, expected[1])
    assert 0 < int(keep[:50].sum()) < 50 * top_k
    assert not keep[50:].any()
    # without pruning inputs the ids are the same, and everything is kept
    alone, everything = ops.npu_moe_update_expert(
        ids, table, local_rank_id=rank, world_size=8, balance_mode=balance_mode
    )
    assert_bits_equal(alone, balanced)
    assert everything.all()
    single = table[ids.long(), 0] == 1
    assert_bits_equal(balanced[single], table[:, 1][ids.long()][single])


@pytest.mark.parametrize("world_size", range(1, 14))
def test_every_replica_of_an_expert_serves_its_share_of_ranks(world_size: int) -> None:
    for count in range(1, world_size + 1):
        table = torch.cat([torch.tensor([[count]]), torch.arange(count).unsqueeze(0)], 1).int()
        served = [
            ops.npu_moe_update_expert(_int32([[0]]), table, local_rank_id=rank, world_size=world_size)[0].item()
            for rank in range(world_size)
        ]
        block = -(-world_size // count)
        assert served == [rank // block for rank in range(world_size)]


def test_decisions_have_no_gradient() -> None:
    scales = torch.rand(4, 2, requires_grad=True)
    ids, keep = ops.npu_moe_update_expert(
        _int32(CHOICES), TABLE, expert_scales=scales, pruning_threshold=torch.zeros(2), balance_mode=1
    )
    assert not ids.requires_grad
    assert not keep.requires_grad
