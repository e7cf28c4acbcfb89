"""The grouped matmuls fused with what follows them: worked examples and facts with hand-checkable numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.ops._library import REGISTRATIONS
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.helpers.reference import common, fused_matmul
from tests.ops.samples.base import BF16, F16, F64, Values, int64, sliced
from tests.ops.samples.fused_matmul import add_inputs, finalize_inputs, swiglu_inputs, tiles, words

NAN, INF = math.nan, math.inf


def i8(rows: list[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


X = i8([[10, -20], [3, 4], [-5, 6], [9, 9]])
W = i8([[[10, 20, -30, 40], [40, -50, 60, 10]], [[70, -80, 90, -100], [-10, 0, 10, 20]]])


# --- with SwiGLU and quantization ------------------------------------------------------------------------------------

SCALE = torch.tensor([[0.01, 0.02, 0.01, 0.02], [0.01, 0.01, 0.02, 0.02]])
X_SCALE = torch.tensor([0.1, 0.5, 0.2, 1.0])


def test_swiglu_quant_example() -> None:
    y, y_scale, y_offset = ops.npu_grouped_matmul_swiglu_quant(X, W, int64([1, 3]), SCALE, X_SCALE)
    assert_bits_equal(y, i8([[50, 127], [127, 42], [36, 127], [0, 0]]))
    torch.testing.assert_close(y_scale, torch.tensor([0.0069303480, 0.0145353889, 0.0107788127, 0.0]))
    assert (y_offset.dtype, y_offset.shape) == (torch.float32, ())


def test_swiglu_quant_v2_is_the_same_with_either_group_list() -> None:
    expected = ops.npu_grouped_matmul_swiglu_quant(X, W, int64([1, 3]), SCALE, X_SCALE)[:2]
    for group_list, options in ((int64([1, 3]), {}), (int64([1, 2]), {"group_list_type": 1})):
        results = ops.npu_grouped_matmul_swiglu_quant_v2(X, [W], [SCALE], X_SCALE, group_list, **options)
        for result, wanted in zip(results, expected, strict=True):
            assert_bits_equal(result, wanted)


def test_swiglu_quant_of_the_same_groups_as_sums_and_as_counts() -> None:
    (x, weight, scale, x_scale, _), options = swiglu_inputs([3, 1, 0, 2], version=2)
    results = [
        ops.npu_grouped_matmul_swiglu_quant_v2(
            x, weight, scale, x_scale, int64(group_list), **{**options, "group_list_type": kind}
        )
        for kind, group_list in ((0, [3, 4, 4, 6]), (1, [3, 1, 0, 2]))
    ]
    assert_bits_equal(results[0][0], results[1][0])
    assert_bits_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 1e38, 1e-45])
def test_swiglu_quant_does_not_look_at_its_scales(value: float) -> None:
    full, row = torch.full((2, 4), value), torch.full((4,), value)
    for scale, x_scale in ((full, X_SCALE), (SCALE, row), (full, row), (full.half(), row)):
        y, y_scale, _ = ops.npu_grouped_matmul_swiglu_quant(X, W, int64([1, 4]), scale, x_scale)
        assert y.shape == (4, 2)
        assert y_scale.shape == (4,)


@pytest.mark.parametrize("word", [-1, 0, 2**63 - 1, -(2**63), 0x7F800000])
def test_swiglu_quant_takes_any_scale_words(word: int) -> None:
    weight = torch.full((1, 16, 2), -1, dtype=torch.int32)
    scale = torch.full((1, 16), word)
    x, ones = torch.ones(3, 16, dtype=torch.int8), torch.ones(3)
    y, y_scale, _ = ops.npu_grouped_matmul_swiglu_quant(x, weight, int64([3]), scale, ones, bias=torch.zeros(1, 16))
    assert (y.shape, y_scale.shape) == ((3, 8), (3,))
    packed = torch.ones(3, 2, dtype=torch.int32)
    y, y_scale = ops.npu_grouped_matmul_swiglu_quant_v2(packed, [weight], [scale], ones, int64([3]))
    assert (y.shape, y_scale.shape) == ((3, 8), (3,))


def test_columns_come_from_the_scale_of_a_weight_in_tiles() -> None:
    weight = torch.zeros(2, 128 // 32, 32 // 16, 16, 32, dtype=torch.int8)
    scale = torch.zeros(2, 128)
    y, *_ = ops.npu_grouped_matmul_swiglu_quant(
        torch.zeros(5, 32, dtype=torch.int8), weight, int64([2, 5]), scale, torch.zeros(5)
    )
    assert y.shape == (5, 64)
    words_in_tiles = torch.zeros(2, 128 // 64, 32 // 16, 16, 8, dtype=torch.int32)
    y, _ = ops.npu_grouped_matmul_swiglu_quant_v2(
        torch.zeros(5, 4, dtype=torch.int32), [words_in_tiles], [scale.long()], torch.zeros(5), int64([2, 5])
    )
    assert y.shape == (5, 64)


@pytest.mark.parametrize("x_kind", ["int8", "int4"])
def test_a_weight_in_tiles_is_the_weight(x_kind: str) -> None:
    for weight_kind in ("int4",) if x_kind == "int4" else ("int8", "int4"):
        results = [
            ops.npu_grouped_matmul_swiglu_quant_v2(*args, **options)
            for in_tiles in (False, True)
            for args, options in [
                swiglu_inputs([2, 3], version=2, x=x_kind, weight=weight_kind, k=32, n=128, in_tiles=in_tiles)
            ]
        ]
        for plain, tiled in zip(*results, strict=True):
            assert_bits_equal(tiled, plain)


def test_where_an_element_is_in_tiles() -> None:
    weight = torch.zeros(1, 32, 64, dtype=torch.int8)
    weight[0, 17, 40] = 1
    assert tiles(weight)[0, 40 // 32, 17 // 16, 17 % 16, 40 % 32] == 1


@pytest.mark.parametrize("x_kind", ["int8", "int4"])
def test_int4_weights_are_the_int8_product_where_half_precision_is_exact(x_kind: str) -> None:
    values = Values()
    matrix = values.integers(-8, 7, 2, 16, 16)
    scale = torch.full((2, 16), 2.0**-6)
    x = values.integers(-128, 127, 5, 16) if x_kind == "int8" else values.integers(-8, 7, 5, 16)
    x_scale, group_list = values.positive(5), int64([2, 5])
    expected = ops.npu_grouped_matmul_swiglu_quant_v2(x, [matrix], [scale], x_scale, group_list)
    assist = None if x_kind == "int4" else [8 * (matrix * scale.unsqueeze(1)).sum(1)]
    results = ops.npu_grouped_matmul_swiglu_quant_v2(
        x if x_kind == "int8" else common.pack_int4(x),
        [common.pack_int4(matrix)],
        [words(scale)],
        x_scale,
        group_list,
        weight_assist_matrix=assist,
    )
    for result, wanted in zip(results, expected, strict=True):
        assert_bits_equal(result, wanted)
    if assist is not None:  # the operator never computes the bias: a wrong one shows
        first = ops.npu_grouped_matmul_swiglu_quant(
            x, common.pack_int4(matrix), group_list, words(scale), x_scale, bias=torch.zeros(2, 16)
        )
        assert not torch.equal(first[1], expected[1])


def test_smooth_scale_comes_between_swiglu_and_quantization() -> None:
    args, options = swiglu_inputs([2, 3], version=2, x="int4", weight="int4", k=16, n=16)
    y, y_scale = ops.npu_grouped_matmul_swiglu_quant_v2(*args, **options)
    per_expert = torch.tensor([4.0, 0.5])
    smoothed, smoothed_scale = ops.npu_grouped_matmul_swiglu_quant_v2(*args, **options, smooth_scale=per_expert)
    assert_bits_equal(smoothed, y)
    assert_bits_equal(smoothed_scale, y_scale * torch.tensor([4.0, 4.0, 0.5, 0.5, 0.5]))
    columns = per_expert.unsqueeze(1).expand(2, 8)
    for result, wanted in zip(
        ops.npu_grouped_matmul_swiglu_quant_v2(*args, **options, smooth_scale=columns),
        (smoothed, smoothed_scale),
        strict=True,
    ):
        assert_bits_equal(result, wanted)


# --- with the sum of the experts of a token --------------------------------------------------------------------------

FINALIZE: dict[str, Any] = {
    "scale": torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 1.0]]),
    "pertoken_scale": X_SCALE,
    "logit": torch.tensor([0.6, 0.7, 0.4, 0.3]),
    "row_index": int64([1, 0, 1, 0]),
    "output_bs": 2,
    "shared_input": torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=BF16),
    "shared_input_weight": 0.5,
    "shared_input_offset": 1,
}


def test_finalize_routing_example() -> None:
    expected = torch.tensor([[87.65, -63.8, 49.5, -193.6], [-20.1, 23.4, -29.4, 56.4]])
    y = ops.npu_grouped_matmul_finalize_routing(X, W, int64([2, 2]), **FINALIZE)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        fused_matmul.grouped_matmul_finalize_routing(X, W, int64([2, 2]), **FINALIZE).values.float(), expected
    )


def test_finalize_routing_counts_unless_told_otherwise() -> None:
    expected = ops.npu_grouped_matmul_finalize_routing(X, W, int64([1, 2]), **FINALIZE)
    for group_list, group_list_type in (([1, 2], 1), ([1, 2], None), ([1, 3], 0)):
        y = ops.npu_grouped_matmul_finalize_routing(
            X, W, int64(group_list), group_list_type=group_list_type, **FINALIZE
        )
        assert_bits_equal(y, expected)


def test_finalize_routing_adds_in_the_order_of_the_rows() -> None:
    # in float32 2^24 + 1 is 2^24
    x, w = i8([[1], [1], [1]]), torch.ones(1, 1, 1, dtype=torch.int8)
    for logits, total in (([2.0**24, 1, -(2.0**24)], 0.0), ([2.0**24, -(2.0**24), 1], 1.0)):
        y = ops.npu_grouped_matmul_finalize_routing(
            x,
            w,
            int64([3]),
            scale=torch.ones(1, 1),
            logit=torch.tensor(logits),
            row_index=torch.zeros(3, dtype=torch.int32),
            output_bs=1,
        )
        assert y.item() == total


def test_finalize_routing_starts_from_zero_and_from_the_shared_rows() -> None:
    y = ops.npu_grouped_matmul_finalize_routing(X, W, int64([0, 0]), **{**FINALIZE, "output_bs": 0})
    assert_bits_equal(y, torch.tensor([[0.0] * 4, [0.5, 1.0, 1.5, 2.0], [0.0] * 4, [0.0] * 4]))


def test_finalize_routing_ignores_rows_that_no_group_covers() -> None:
    poisoned = {**FINALIZE, "row_index": int64([1, 0, 99, -99]), "logit": torch.tensor([0.6, 0.7, NAN, INF])}
    y = ops.npu_grouped_matmul_finalize_routing(X, W, int64([2, 0]), **poisoned)
    torch.testing.assert_close(y, torch.tensor([[6.65, -9.8, 15.75, 22.4], [-3.7, 15.4, -25.5, 6.8]]))


def test_finalize_routing_bias_has_the_weight_of_its_row() -> None:
    bias = torch.tensor([[8.0, 0, 0, 0], [0, 0, 0, 16.0]], dtype=BF16)
    plain = ops.npu_grouped_matmul_finalize_routing(X, W, int64([2, 2]), **FINALIZE)
    y = ops.npu_grouped_matmul_finalize_routing(X, W, int64([2, 2]), bias=bias, **FINALIZE)
    torch.testing.assert_close(y - plain, torch.tensor([[5.6, 0, 0, 4.8], [4.8, 0, 0, 6.4]]), atol=1e-4, rtol=0)


def test_finalize_routing_of_int4_weights() -> None:
    """Asymmetric: c = (x @ (w * s) + sum(x) * offset) * pertoken * logit, where half precision is exact."""
    values = Values()
    x, matrix = values.integers(-128, 127, 4, 16), values.integers(-8, 7, 2, 16, 8)
    scale, offset = torch.full((2, 8), 2.0**-4), values.integers(-4, 4, 2, 1, 8).float() / 8
    options: dict[str, Any] = {"row_index": int64([1, 0, 1, 0]), "output_bs": 2, "pertoken_scale": X_SCALE}
    options["logit"] = torch.tensor([1.0, 0.5, 2.0, 0.25])
    y = ops.npu_grouped_matmul_finalize_routing(
        x,
        common.pack_int4(matrix),
        int64([1, 3]),
        scale=words(scale).unsqueeze(1),
        bias=8 * (matrix * scale.unsqueeze(1)).sum(1),
        offset=offset,
        **options,
    )
    expected = torch.zeros(2, 8, dtype=F64)
    for m, group in enumerate((0, 1, 1, 1)):
        dense = matrix[group].double() / 16 + offset[group].double()
        factor = options["pertoken_scale"][m].double() * options["logit"][m].double()
        expected[options["row_index"][m]] += x[m].double() @ dense * factor
    assert_close(y, expected, reduction=16)


def test_x_is_left_alone_by_int4_weights() -> None:
    args, options = finalize_inputs([2, 3], weight="int4", tokens=2)
    before = args[0].clone()
    ops.npu_grouped_matmul_finalize_routing(*args, **options)
    assert_bits_equal(args[0], before)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_finalize_routing_gradients(weight: str) -> None:
    args, options = finalize_inputs(
        [2, 0, 3],
        weight=weight,
        extra_rows=2,
        tokens=4,
        shared=2,
        shared_input_offset=1,
        shared_input_weight=0.25,
        with_bias=True,
        with_offset=True,
    )
    shared, logit = options.pop("shared_input"), options.pop("logit")
    dy = Values(1).normal(4, 8)
    leaves = [shared.requires_grad_(), logit.requires_grad_()]
    y = ops.npu_grouped_matmul_finalize_routing(*args, shared_input=shared, logit=logit, **options)
    dshared, dlogit = torch.autograd.grad(y, leaves, dy)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    result = fused_matmul.grouped_matmul_finalize_routing(*args, shared_input=wide[0], logit=wide[1], **options)
    expected = torch.autograd.grad(result.values, wide, dy.double())
    assert (dshared.dtype, dlogit.dtype) == (BF16, torch.float32)
    assert_close(dshared, expected[0])
    assert_close(dlogit, expected[1], reduction=64)
    assert (dlogit[5:] == 0).all()


@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_finalize_routing_derivatives_of_logit(weight: str) -> None:
    args, options = finalize_inputs([2, 0, 3], weight=weight, tokens=4, shared=2, with_bias=True)
    logit = options.pop("logit").double().requires_grad_()

    def function(logit: Tensor) -> Tensor:
        return ops.npu_grouped_matmul_finalize_routing(*args, logit=logit, **options)

    assert function(logit).dtype == F64
    assert torch.autograd.gradcheck(function, [logit])
    assert torch.autograd.gradgradcheck(function, [logit])


def test_nothing_large_is_kept_where_only_the_shared_rows_have_a_gradient() -> None:
    args, options = finalize_inputs([2, 3], tokens=4, shared=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        options["shared_input"].requires_grad_()
        y = ops.npu_grouped_matmul_finalize_routing(*args, **options)
    assert y.requires_grad
    assert kept == []


# --- accumulated weight gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", [(3, 2, 3), (6, 3)])
def test_add_example(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype)
    weight = torch.tensor([[1, 0, 2], [0, 1, 1], [2, 2, 0]], dtype=dtype)
    expected = torch.tensor([[[2.0, 1, 3], [3, 1, 5]], [[1, 1, 1]] * 2, [[11, 14, 4], [13, 17, 5]]]).view(shape)
    input = torch.ones(shape)
    y = ops.npu_grouped_matmul_add(input, x, weight, int64([1, 1, 3]))
    assert_bits_equal(y, expected)
    assert_bits_equal(input, expected)  # the out-of-place form changes it too
    y.zero_()  # but what it returns is a copy
    assert_bits_equal(input, expected)
    in_place = torch.ones(shape)
    assert ops.npu_grouped_matmul_add_(in_place, x, weight, int64([1, 1, 3])) is in_place
    assert_bits_equal(in_place, expected)
    ops.npu_grouped_matmul_add_(in_place, x, weight, int64([1, 1, 3]))
    assert_bits_equal(in_place, 2 * expected - 1)


def test_add_has_no_rounding_in_between() -> None:
    x = torch.tensor([[1.0], [2.0**-12]], dtype=BF16)
    dy = torch.tensor([[1.0], [1.0]], dtype=BF16)
    assert ops.npu_grouped_matmul_add(torch.zeros(1, 1, 1), x, dy, int64([2])).item() == 1 + 2.0**-12


def test_add_writes_through_views() -> None:
    args, _ = add_inputs([1, 2])
    expected = ops.npu_grouped_matmul_add(*add_inputs([1, 2])[0])
    memory = torch.full((2, 3, 10), 7.0)
    memory[..., ::2] = args[0]
    ops.npu_grouped_matmul_add_(memory[..., ::2], *args[1:])
    assert_bits_equal(memory[..., ::2], expected)
    assert (memory[..., 1::2] == 7).all()


def test_add_leaves_input_as_it_is_after_an_error() -> None:
    (input, x, weight, _), _ = add_inputs([1, 2])
    before, version = input.clone(), input._version
    for group_list in ([1, 4], [2, 1], [-1, 3]):
        with pytest.raises(ops.OperatorError):
            ops.npu_grouped_matmul_add_(input, x, weight, int64(group_list))
    assert_bits_equal(input, before)
    assert input._version == version


def test_autograd_notices_that_input_changed() -> None:
    for operator in (ops.npu_grouped_matmul_add, ops.npu_grouped_matmul_add_):
        args, _ = add_inputs([1, 2])
        factor = torch.ones(2, 3, 5, requires_grad=True)
        y = factor * args[0]
        operator(*args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class _Accumulating(torch.autograd.Function):
    """A grouped matmul that adds the gradient of its weight to `main_grad`, as training frameworks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.main_grad = main_grad
        return ops.grouped_mm(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, counts = ctx.saved_tensors
        ops.npu_grouped_matmul_add_(ctx.main_grad, x, dy, counts.cumsum(0))
        return ops.grouped_mm(dy, weight.mT, counts), None, None, None


def test_add_accumulates_in_a_backward_pass() -> None:
    values, counts = Values(), int64([2, 0, 3])
    x, weight = values.normal(5, 4, dtype=BF16).requires_grad_(), values.normal(3, 4, 6, dtype=BF16).requires_grad_()
    main_grad, dy = torch.zeros(3, 4, 6), values.normal(5, 6, dtype=BF16)
    for _ in range(2):
        _Accumulating.apply(x, weight, counts, main_grad).backward(dy)
    assert weight.grad is None
    expected = 2 * ops.grouped_mm_weight_grad(x.detach().float(), dy.float(), counts)
    assert_close(main_grad, expected.double(), reduction=6)
    assert (main_grad[1] == 0).all()


def test_add_without_autograd_takes_parameters() -> None:
    (input, x, weight, group_list), _ = add_inputs([1, 2])
    parameter = torch.nn.Parameter(input.clone())
    with torch.no_grad():
        ops.npu_grouped_matmul_add_(parameter, x.requires_grad_(), weight, group_list)
        assert_bits_equal(parameter, ops.npu_grouped_matmul_add(input, x, weight, group_list))


# --- quantized on the way in -----------------------------------------------------------------------------------------


def test_quant_dequant_example() -> None:
    x = torch.tensor([[1, -2], [0.5, 4], [3, 3]], dtype=F16)
    weight = i8([[[1, 2], [3, -4], [5, 6]], [[7, 8], [-9, 10], [11, -12]]])
    scale = torch.tensor([[0.1, 0.2, 0.3], [0.01, 0.02, 0.03]])
    expected = torch.tensor(
        [
            [-0.29931640625, 2.205078125, -2.087890625],
            [0.355224609375, 0.70947265625, -1.2734375],
            [0.449951171875, 0.05999755859375, -0.09002685546875],
        ],
        dtype=F16,
    )
    y = ops.npu_quant_grouped_matmul_dequant(x, weight, scale, int64([1, 3]))
    assert_bits_equal(y, expected)
    assert_bits_equal(fused_matmul.quant_grouped_matmul_dequant(x, weight, scale, int64([1, 3])), expected)
    # the same with the scale of each row given, and without the last row
    x_scale = torch.tensor([2.0, 4.0, NAN]) / 127
    y = ops.npu_quant_grouped_matmul_dequant(x, weight, scale, int64([1, 2]), x_scale=x_scale)
    assert_bits_equal(y[:2], expected[:2])
    assert (y[2] == 0).all()


@pytest.mark.parametrize(("largest", "code"), [(9.0, 64), (15.0, 63)])
def test_quant_dequant_multiplies_by_the_reciprocal(largest: float, code: int) -> None:
    # half of the maximum is the tie 63.5; a division would give the other neighbour
    x = torch.tensor([[largest, largest / 2]], dtype=F16)
    y = ops.npu_quant_grouped_matmul_dequant(x, i8([[[0, 1]]]), torch.ones(1, 1), int64([1]))
    assert_bits_equal(y, (code * (torch.tensor([[largest]]) / 127)).half())


def test_quant_dequant_pertensor_takes_one_scale_for_all() -> None:
    x = torch.tensor([[1, -2], [0.5, 4]], dtype=F16)
    weight, ones = i8([[[1, 0], [0, 1]]]), torch.ones(1, 2)
    y = ops.npu_quant_grouped_matmul_dequant(x, weight, ones, int64([2]), quant_mode="pertensor")
    # codes of 4 / 127: 31.75, -63.5 (even), 15.875, 127
    assert_bits_equal(y, (torch.tensor([[32.0, -64.0], [16.0, 127.0]]) * (torch.tensor(4.0) / 127)).half())
    smooth = torch.tensor([2.0, 0.5], dtype=F16)
    y = ops.npu_quant_grouped_matmul_dequant(
        x, weight, ones, int64([2]), smooth_scale=smooth, x_scale=torch.tensor([0.25]), quant_mode="pertensor"
    )
    assert_bits_equal(y, torch.tensor([[2.0, -1.0], [1.0, 2.0]], dtype=F16))


def test_quant_dequant_of_a_zero_row_is_zero() -> None:
    x = torch.zeros(2, 2, dtype=F16)
    x[1] = 1
    y = ops.npu_quant_grouped_matmul_dequant(x, i8([[[1, 2]]]), torch.ones(1, 1), int64([2]))
    assert_bits_equal(y, torch.tensor([[0.0], [3.0]], dtype=F16))


# --- what the NPU kernels do around the call -------------------------------------------------------------------------


class _Device:
    """In the place of `torch.ops.npu`: records how each operator is called and computes it on CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        names = [name for name in REGISTRATIONS if "grouped_matmul" in name and hasattr(ops, name)]
        monkeypatch.setattr(torch.ops, "npu", SimpleNamespace(**{name: self._operator(name) for name in names}))

    def _operator(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(kwargs)
            result = getattr(ops, name)(*args, **kwargs)
            if args[0].dtype == torch.int8 and torch.int32 in (args[1][0].dtype, getattr(args[1], "dtype", None)):
                args[0].zero_()  # the digits of int8 values are split in place
            return result

        return call


@pytest.mark.parametrize("input_layout", [sliced, lambda input: input.mT.contiguous().mT])
def test_device_adds_to_memory_that_is_not_contiguous(input_layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ops.npu_grouped_matmul_add(*add_inputs([1, 2])[0])
    for name in ("npu_grouped_matmul_add", "npu_grouped_matmul_add_"):
        (input, *others), _ = add_inputs([1, 2], input_layout=input_layout)
        with monkeypatch.context() as patch:
            device = _Device(patch)
            REGISTRATIONS[name].npu(input, *others)
        assert len(device.calls) == 1
        assert_bits_equal(input, expected)


def test_device_may_split_x_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch)
    args, options = swiglu_inputs([1, 2], weight="int4", n=16)
    before = args[0].clone()
    REGISTRATIONS["npu_grouped_matmul_swiglu_quant"].npu(*args, options["bias"])
    assert_bits_equal(args[0], before)
    (x, weight, scale, x_scale, group_list), options = swiglu_inputs([1, 2], version=2, weight="int4", n=16)
    assist = options["weight_assist_matrix"][0]
    REGISTRATIONS["npu_grouped_matmul_swiglu_quant_v2"].npu(
        x, weight[0], scale[0], x_scale, group_list, None, assist, 0, 0, None
    )
    assert_bits_equal(x, before)
    args, options = finalize_inputs([1, 2], weight="int4")
    before = args[0].clone()
    names = ("scale", "bias", "offset", "pertoken_scale", "shared_input", "logit", "row_index")
    REGISTRATIONS["npu_grouped_matmul_finalize_routing"].npu(
        *args, *[options.get(name) for name in names], 1.0, 0, 0, 1, None
    )
    assert_bits_equal(args[0], before)
    assert len(device.calls) == 3


def test_device_gets_cumulative_sums_for_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch)
    (x, weight, scale, x_scale, group_list), _ = swiglu_inputs([2], version=2, group_list_type=1)
    REGISTRATIONS["npu_grouped_matmul_swiglu_quant_v2"].npu(
        x, weight[0], scale[0], x_scale, group_list, None, None, 0, 1, None
    )
    args, options = finalize_inputs([2], factors=())
    REGISTRATIONS["npu_grouped_matmul_finalize_routing"].npu(
        *args, options["scale"], None, None, None, None, None, options["row_index"], 1.0, 0, 0, 1, None
    )
    assert [call["group_list_type"] for call in device.calls] == [0, 0]
    # its kernel is documented with both factors only
    assert_bits_equal(device.calls[1]["logit"], torch.ones(2))
    assert_bits_equal(device.calls[1]["pertoken_scale"], torch.ones(2))


def test_unsigned_scale_words_are_the_same_words() -> None:
    words = torch.rand(2, 16).view(torch.int32).to(torch.int64)
    x, weight = torch.randint(-128, 128, (3, 64), dtype=torch.int8), torch.randint(-9, 9, (2, 64, 2), dtype=torch.int32)
    call = {"weight_assist_matrix": [torch.rand(2, 16)], "group_list_type": 1}
    rest = torch.ones(3), torch.tensor([1, 2])
    signed = ops.npu_grouped_matmul_swiglu_quant_v2(x, [weight], [words], *rest, **call)
    unsigned = ops.npu_grouped_matmul_swiglu_quant_v2(x, [weight], [words.view(torch.uint64)], *rest, **call)
    for result, expected in zip(unsigned, signed, strict=True):
        assert torch.equal(result, expected)
