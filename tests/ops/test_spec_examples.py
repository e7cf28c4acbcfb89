"""Worked examples of the operators with hand-checkable values, for the library and for the test reference alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.reference import common, gating, matmul, permute, quantize, swiglu

HALF_DTYPES = [torch.float16, torch.bfloat16]
FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INT4_ROW = [1, 2, 3, 4, 5, 6, 7, -8]


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The final conversion of the operators: from float32, to the nearest value of the output dtype."""
    return value.float().to(dtype) if value.is_floating_point() else value


class _Reference:
    """The reference behind the public signatures, with the final cast applied."""

    def npu_grouped_matmul(self, x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
        dtype = options.get("output_dtype") or x[0].dtype
        return [_cast(y, dtype) for y in matmul.grouped_matmul(x, weight, **options)]

    def npu_convert_weight_to_int4pack(self, weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
        return common.pack_int4(weight)

    def npu_dynamic_quant(self, input: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        y, scale = quantize.dynamic_quant(input, **options)
        return y, scale.float()

    def npu_swiglu(self, input: Tensor, dim: int = -1) -> Tensor:
        return _cast(swiglu.swiglu(input, dim), input.dtype)

    def swiglu_grad(self, grad: Tensor, input: Tensor, dim: int = -1) -> Tensor:
        return _cast(swiglu.swiglu_backward(grad, input, dim), input.dtype)

    def npu_moe_gating_top_k_softmax(
        self, x: Tensor, finished: Tensor | None = None, k: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, expert_idx, row_idx = gating.moe_gating_top_k_softmax(x, finished, k)
        return _cast(y, x.dtype), expert_idx, row_idx

    def npu_moe_token_permute(
        self, tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        permuted, sorted_indices = permute.moe_token_permute(tokens, indices, num_out_tokens)
        return _cast(permuted, tokens.dtype), sorted_indices

    def npu_moe_token_unpermute(
        self, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
    ) -> Tensor:
        return _cast(permute.moe_token_unpermute(permuted_tokens, sorted_indices, probs), permuted_tokens.dtype)

    def permute_grad(self, grad: Tensor, tokens: Tensor, indices: Tensor, num_out_tokens: int | None) -> Tensor:
        sorted_indices = permute.moe_token_permute(tokens, indices, num_out_tokens)[1]
        return _cast(permute.moe_token_permute_grad(grad, sorted_indices, tokens.shape[0]), tokens.dtype)

    def unpermute_grad(
        self, grad: Tensor, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_permuted, grad_probs = permute.moe_token_unpermute_grad(permuted_tokens, grad, sorted_indices, probs)
        assert grad_probs is not None
        return _cast(grad_permuted, permuted_tokens.dtype), _cast(grad_probs, probs.dtype)


class _Library:
    """The library; gradients come from autograd through the public functions."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def swiglu_grad(self, grad: Tensor, input: Tensor, dim: int = -1) -> Tensor:
        leaf = input.clone().requires_grad_()
        return torch.autograd.grad(ops.npu_swiglu(leaf, dim=dim), leaf, grad)[0]

    def permute_grad(self, grad: Tensor, tokens: Tensor, indices: Tensor, num_out_tokens: int | None) -> Tensor:
        leaf = tokens.clone().requires_grad_()
        permuted, _ = ops.npu_moe_token_permute(leaf, indices, num_out_tokens)
        return torch.autograd.grad(permuted, leaf, grad)[0]

    def unpermute_grad(
        self, grad: Tensor, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = (permuted_tokens.clone().requires_grad_(), probs.clone().requires_grad_())
        return torch.autograd.grad(ops.npu_moe_token_unpermute(leaves[0], sorted_indices, leaves[1]), leaves, grad)


@pytest.fixture(params=[_Reference(), _Library()], ids=["reference", "library"])
def impl(request: pytest.FixtureRequest) -> Any:
    return request.param


def _int8(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


def _int32(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _assert_near(actual: Tensor, expected: Sequence[Any], dtype: torch.dtype = torch.float32) -> None:
    """For values that are printed with seven digits."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)


# --- int4 packing ----------------------------------------------------------------------------------------------------

PACKINGS = [
    pytest.param(INT4_ROW, -2023406815, id="one-to-minus-eight"),
    pytest.param([-1] * 8, -1, id="all-minus-one"),
    pytest.param([1] + [0] * 7, 1, id="first-is-lowest-nibble"),
    pytest.param([0] * 7 + [1], 268435456, id="last-is-highest-nibble"),
    pytest.param([0] * 7 + [-1], -268435456, id="last-is-sign"),
]


@pytest.mark.parametrize(("values", "word"), PACKINGS)
def test_int4_packing(impl: Any, values: list[int], word: int) -> None:
    assert_bits_equal(impl.npu_convert_weight_to_int4pack(_int32([values])), _int32([[word]]))
    assert_bits_equal(common.unpack_int4(_int32([[word]])), _int8([values]))


@pytest.mark.parametrize(("values", "word"), PACKINGS)
def test_int4_unpacking_through_identity_matmul(impl: Any, values: list[int], word: int) -> None:
    ones, zeros = torch.ones(1, 8, dtype=torch.float16), torch.zeros(1, 8, dtype=torch.float16)
    y = impl.npu_grouped_matmul(
        [torch.ones(1, 1, dtype=torch.float16)],
        [_int32([[[word]]])],
        antiquant_scale=[ones],
        antiquant_offset=[zeros],
        group_list=_int64([1]),
        group_type=0,
        split_item=3,
    )
    assert_bits_equal(y[0], torch.tensor([values], dtype=torch.float16))


def test_int4_packing_of_several_words_and_three_dimensions(impl: Any) -> None:
    rows = [INT4_ROW + [-1] * 8, [1] + [0] * 7 + [0] * 7 + [1]]
    packed = [[-2023406815, -1], [1, 268435456]]
    assert_bits_equal(impl.npu_convert_weight_to_int4pack(_int32(rows)), _int32(packed))
    assert_bits_equal(impl.npu_convert_weight_to_int4pack(_int32([rows, rows[::-1]])), _int32([packed, packed[::-1]]))


# --- dynamic quantization --------------------------------------------------------------------------------------------

QUANT_ROWS = [[1, -2, 3, 4], [0, 0, 0, 0], [-8, 0.5, 2, 1]]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    ("options", "y", "scale"),
    [
        pytest.param(
            {},
            [[32, -64, 95, 127], [0, 0, 0, 0], [-127, 8, 32, 16]],
            [0.031496063, 0, 0.062992126],
            id="per-token-tie-and-zero-row",
        ),
        pytest.param(
            {"dst_type": torch.int8},
            [[32, -64, 95, 127], [0, 0, 0, 0], [-127, 8, 32, 16]],
            [0.031496063, 0, 0.062992126],
            id="per-token-explicit-int8",
        ),
        pytest.param(
            {"smooth_scales": [1, 2, 0.5, 0.25]},
            [[32, -127, 48, 32], [0, 0, 0, 0], [-127, 16, 16, 4]],
            [0.031496063, 0, 0.062992126],
            id="smooth",
        ),
        pytest.param(
            {"quant_mode": "pertensor"},
            [[16, -32, 48, 64], [0, 0, 0, 0], [-127, 8, 32, 16]],
            [0.062992126],
            id="per-tensor",
        ),
        pytest.param(
            {"quant_mode": "perchannel"},
            [[16, -127, 127, 127], [0, 0, 0, 0], [-127, 32, 85, 32]],
            [8 / 127, 2 / 127, 3 / 127, 4 / 127],
            id="per-channel",
        ),
        pytest.param(
            {"quant_mode": "perchannel", "smooth_scales": [4, 1, 0.5]},
            [[127, -127, 127, 127], [0, 0, 0, 0], [-127, 4, 11, 4]],
            [4 / 127, 8 / 127, 12 / 127, 16 / 127],
            id="per-channel-smooth-has-one-factor-per-row",
        ),
    ],
)
def test_dynamic_quant(
    impl: Any, dtype: torch.dtype, options: dict[str, Any], y: list[list[int]], scale: list[float]
) -> None:
    if "smooth_scales" in options:
        options = {**options, "smooth_scales": torch.tensor(options["smooth_scales"], dtype=dtype)}
    actual_y, actual_scale = impl.npu_dynamic_quant(torch.tensor(QUANT_ROWS, dtype=dtype), **options)
    assert_bits_equal(actual_y, _int8(y))
    torch.testing.assert_close(actual_scale, torch.tensor(scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_dynamic_quant_to_int4(impl: Any, dtype: torch.dtype) -> None:
    rows = torch.tensor([row * 2 for row in QUANT_ROWS], dtype=dtype)  # packing needs eight columns
    y, scale = impl.npu_dynamic_quant(rows, dst_type=torch.quint4x2)
    expected = [[2, -4, 5, 7], [0, 0, 0, 0], [-7, 0, 2, 1]]
    assert_bits_equal(y, common.pack_int4(_int8([row * 2 for row in expected])))
    torch.testing.assert_close(scale, torch.tensor([0.5714286, 0, 1.1428572]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_dynamic_quant_smooths_by_group_with_an_empty_group(impl: Any, dtype: torch.dtype) -> None:
    rows = torch.tensor([QUANT_ROWS[0], QUANT_ROWS[2], QUANT_ROWS[0], QUANT_ROWS[1], QUANT_ROWS[2]], dtype=dtype)
    smooth = torch.tensor([[1] * 4, [9] * 4, [1, 2, 0.5, 0.25]], dtype=dtype)
    y, scale = impl.npu_dynamic_quant(rows, smooth_scales=smooth, group_index=_int32([2, 2, 5]))
    expected = [[32, -64, 95, 127], [-127, 8, 32, 16], [32, -127, 48, 32], [0, 0, 0, 0], [-127, 16, 16, 4]]
    assert_bits_equal(y, _int8(expected))
    torch.testing.assert_close(scale, torch.tensor([4, 8, 4, 0, 8]) / 127, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("quant_mode", "shape"), [("pertoken", (2, 3)), ("perchannel", (2, 16)), ("pertensor", (1,))])
def test_dynamic_quant_shapes_of_three_dimensions(impl: Any, quant_mode: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(2, 3, 16, dtype=torch.float16)
    y, scale = impl.npu_dynamic_quant(x, quant_mode=quant_mode)
    assert_bits_equal(y, torch.full((2, 3, 16), 127, dtype=torch.int8))
    assert scale.shape == shape
    assert scale.dtype == torch.float32


# --- SwiGLU ----------------------------------------------------------------------------------------------------------

SWIGLU_INPUT = [[1, 2, 3, 4], [-1, 0.5, 2, -2]]
SWIGLU_GRAD = [[2.7830117, 4.3631372, 0.7310586, 1.7615941], [0.1446590, -1.4799224, -0.2689414, 0.3112297]]


def test_swiglu_float32(impl: Any) -> None:
    y = impl.npu_swiglu(torch.tensor(SWIGLU_INPUT))
    _assert_near(y, [[2.1931758, 7.0463762], [-0.5378829, -0.6224594]])


def test_swiglu_float16(impl: Any) -> None:
    y = impl.npu_swiglu(torch.tensor(SWIGLU_INPUT, dtype=torch.float16))
    expected = [[2.193359375, 7.046875], [-0.5380859375, -0.62255859375]]
    assert_bits_equal(y, torch.tensor(expected, dtype=torch.float16))


def test_swiglu_along_the_first_axis_and_of_a_vector(impl: Any) -> None:
    y = impl.npu_swiglu(torch.tensor(SWIGLU_INPUT).t().contiguous(), dim=0)
    _assert_near(y, [[2.1931758, -0.5378829], [7.0463762, -0.6224594]])
    _assert_near(impl.npu_swiglu(torch.tensor([1.0, 2, 3, 4])), [2.1931758, 7.0463762])


def test_swiglu_gradient(impl: Any) -> None:
    _assert_near(impl.swiglu_grad(torch.ones(2, 2), torch.tensor(SWIGLU_INPUT)), SWIGLU_GRAD)


# --- gating ----------------------------------------------------------------------------------------------------------

LOGITS = [[1, 3, 3, 0], [0, 0, 0, 0], [2, -1, 0.5, 2]]
GATES = [[0.457640, 0.457640], [0.25, 0.25], [0.439963, 0.439963]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all-active", "finished-row"])
def test_gating_top_k_softmax(impl: Any, dtype: torch.dtype, masked: bool) -> None:
    finished = torch.tensor([False, True, False]) if masked else None
    y, expert_idx, row_idx = impl.npu_moe_gating_top_k_softmax(torch.tensor(LOGITS, dtype=dtype), finished, k=2)
    if dtype == torch.float32:
        _assert_near(y, GATES)
    else:
        assert_bits_equal(y, torch.tensor(GATES).to(dtype))
    assert_bits_equal(expert_idx, _int32([[1, 2], [4, 4] if masked else [0, 1], [0, 3]]))
    assert_bits_equal(row_idx, _int32([[0, 3], [1, 4], [2, 5]]))


def test_gating_full_softmax_is_not_renormalized(impl: Any) -> None:
    y, expert_idx, _ = impl.npu_moe_gating_top_k_softmax(torch.tensor(LOGITS), k=4)
    _assert_near(y[0], [0.457640, 0.457640, 0.061935, 0.022785])
    _assert_near(y[2], [0.439963, 0.439963, 0.098169, 0.021904])
    assert_bits_equal(expert_idx, _int32([[1, 2, 0, 3], [0, 1, 2, 3], [0, 3, 2, 1]]))


def test_gating_row_idx_of_three_dimensions(impl: Any) -> None:
    y, expert_idx, row_idx = impl.npu_moe_gating_top_k_softmax(torch.zeros(2, 2, 5), None, 2)
    assert_bits_equal(row_idx, _int32([[[0, 4], [1, 5]], [[2, 6], [3, 7]]]))
    assert_bits_equal(expert_idx, _int32([[[0, 1]] * 2] * 2))
    assert y.shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        pytest.param(torch.float16, 0, id="float16-collides-before-the-sort"),
        pytest.param(torch.bfloat16, 1, id="bfloat16-sorts-in-float32"),
        pytest.param(torch.float32, 1, id="float32"),
    ],
)
def test_gating_ties_after_rounding_the_probabilities(impl: Any, dtype: torch.dtype, chosen: int) -> None:
    x = torch.tensor([[0, 1e-4]], dtype=dtype)  # probabilities 0.499975 and 0.500025
    y, expert_idx, _ = impl.npu_moe_gating_top_k_softmax(x, k=1)
    assert_bits_equal(expert_idx, _int32([[chosen]]))
    if dtype != torch.float32:
        assert_bits_equal(y, torch.tensor([[0.5]], dtype=dtype))


# --- permute and unpermute -------------------------------------------------------------------------------------------

EXPERTS = [[1, 0], [2, 1], [0, 1]]
SORTED_INDICES = [2, 0, 5, 3, 1, 4]
PROBS = [[0.75, 0.25], [0.5, 0.5], [1, 0]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("num_out_tokens", "rows"), [(None, 6), (0, 6), (4, 4), (-1, 5), (100, 6)], ids=["none", "0", "4", "-1", "100"]
)
def test_token_permute(
    impl: Any, dtype: torch.dtype, index_dtype: torch.dtype, num_out_tokens: int | None, rows: int
) -> None:
    tokens = torch.tensor([[1, 1], [2, 2], [3, 3]], dtype=dtype)
    permuted, sorted_indices = impl.npu_moe_token_permute(
        tokens, torch.tensor(EXPERTS, dtype=index_dtype), num_out_tokens
    )
    expected = [[value, value] for value in [1, 3, 1, 2, 3, 2][:rows]]
    assert_bits_equal(permuted, torch.tensor(expected, dtype=dtype))
    assert_bits_equal(sorted_indices, _int32(SORTED_INDICES))


def test_token_permute_with_one_expert_per_token(impl: Any) -> None:
    permuted, sorted_indices = impl.npu_moe_token_permute(torch.tensor([[1.0], [2], [3], [4]]), _int64([2, 0, 2, 1]))
    assert_bits_equal(permuted, torch.tensor([[2.0], [4], [1], [3]]))
    assert_bits_equal(sorted_indices, _int32([2, 0, 3, 1]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("available", "probs", "expected"),
    [
        pytest.param(6, PROBS, [25, 50, 20], id="weighted"),
        pytest.param(4, PROBS, [25, 20, 20], id="truncated"),
        pytest.param(6, None, [30, 10, 60, 40, 20, 50], id="without-probs"),
    ],
)
def test_token_unpermute(
    impl: Any, dtype: torch.dtype, available: int, probs: list[list[float]] | None, expected: list[float]
) -> None:
    permuted = torch.tensor([[10], [20], [30], [40], [50], [60]], dtype=dtype)[:available]
    weights = None if probs is None else torch.tensor(probs)
    out = impl.npu_moe_token_unpermute(permuted, _int32(SORTED_INDICES), weights)
    assert_bits_equal(out, torch.tensor(expected, dtype=dtype).reshape(-1, 1))


def test_token_unpermute_skips_a_nan_row_of_weight_zero(impl: Any) -> None:
    permuted = torch.tensor([[10.0], [20], [30], [40], [float("nan")], [60]])  # row 4 has weight 0
    out = impl.npu_moe_token_unpermute(permuted, _int32(SORTED_INDICES), torch.tensor(PROBS))
    assert_bits_equal(out, torch.tensor([[25.0], [50], [20]]))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_token_permute_gradient_of_a_truncated_permute(impl: Any, dtype: torch.dtype) -> None:
    grad = torch.tensor([[1], [2], [4], [8]], dtype=dtype)
    grad_tokens = impl.permute_grad(grad, torch.zeros(3, 1, dtype=dtype), _int64(EXPERTS), 4)
    assert_bits_equal(grad_tokens, torch.tensor([[5], [8], [2]], dtype=dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_token_unpermute_gradients(impl: Any, dtype: torch.dtype, probs_dtype: torch.dtype) -> None:
    permuted = torch.tensor([[10, 0], [20, 0], [30, 0], [40, 0], [50, 0], [60, 0]], dtype=dtype)
    grad = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype)
    grad_permuted, grad_probs = impl.unpermute_grad(
        grad, permuted, _int32(SORTED_INDICES), torch.tensor(PROBS, dtype=probs_dtype)
    )
    expected = [[0.25, 0.5], [5, 6], [0.75, 1.5], [1.5, 2], [0, 0], [1.5, 2]]
    assert_bits_equal(grad_permuted, torch.tensor(expected, dtype=dtype))
    assert_bits_equal(grad_probs, torch.tensor([[30, 10], [180, 120], [100, 250]], dtype=probs_dtype))


def test_dtypes_may_be_given_as_numbers() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0] * 2], dtype=torch.bfloat16)
    for number, dtype in ((1, torch.int8), (16, torch.quint4x2)):
        for by_number, by_dtype in zip(
            ops.npu_dynamic_quant(x, dst_type=number), ops.npu_dynamic_quant(x, dst_type=dtype), strict=True
        ):
            assert_bits_equal(by_number, by_dtype)
