"""The SwiGLU operators on values that can be checked by hand, and what is peculiar to each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NAN, INF = math.nan, math.inf


def _int8(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


def _int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _int64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _assert_near(actual: Tensor, expected: Any, atol: float = 1e-6) -> None:
    """For values that are printed with seven digits."""
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=3e-7, atol=atol)


# --- npu_swiglu ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_swiglu_of_numbers_at_which_the_sigmoid_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([[-100.0, -20000.0, 100.0, 20000.0, 0.0, 2.0, 3.0, 0.5, 3.0, 1.0]], dtype=dtype).requires_grad_()
    y = ops.npu_swiglu(x)
    assert_bits_equal(y[0, 2:], torch.tensor([50.0, 60000.0, 0.0], dtype=dtype))
    assert y[0, :2].abs().max() == 0
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wanted = [0.0, 0.0, 0.5, 3.0, 0.5, 0.0, 0.0, 100.0, 20000.0, 0.0]
    assert_bits_equal(grad.abs(), torch.tensor([wanted], dtype=dtype))


# --- npu_clipped_swiglu ----------------------------------------------------------------------------------------------

CLIPPED_ROW = [[1.0, 2.0, 8.0, -9.0, -1.0, 0.5]]


def test_clipped_swiglu_interleaved_and_of_halves() -> None:
    x = torch.tensor(CLIPPED_ROW)
    _assert_near(ops.npu_clipped_swiglu(x), [[2.5373874, -41.9997177, -0.2313063]])
    _assert_near(ops.npu_clipped_swiglu(x, interleaved=False), [[-5.0747748, 0.0, 10.4999294]])


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_clipped_swiglu_rounds_once(dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 64).to(dtype).view(4, 16)
    assert_bits_equal(ops.npu_clipped_swiglu(x), ops.npu_clipped_swiglu(x.float()).to(dtype))


def test_clipped_swiglu_has_no_lower_clamp_of_the_gate() -> None:
    # s(-1.702 * 20) is 1.6e-15: far from the -7 * s(-1.702 * 7) = -4.7e-5 of a clamp on both sides
    y = ops.npu_clipped_swiglu(torch.tensor([[-20.0, 0.0]]))
    assert -1e-12 < y.item() < 0


def test_clipped_swiglu_pairs_neighbours_of_the_merged_axes() -> None:
    x = torch.arange(96.0).view(4, 8, 3) / 48 - 1
    y = ops.npu_clipped_swiglu(x, dim=1)
    assert y.shape == (4, 4, 3)
    # neighbours in memory, not neighbours along dim
    assert_bits_equal(y, ops.npu_clipped_swiglu(x.view(4, 24)).view(4, 4, 3))
    assert not torch.equal(y, ops.npu_clipped_swiglu(x.mT.contiguous()).mT)
    halves = ops.npu_clipped_swiglu(x, dim=1, interleaved=False)
    assert_bits_equal(halves, ops.npu_clipped_swiglu(x.mT.contiguous(), interleaved=False).mT.contiguous())
    assert_bits_equal(ops.npu_clipped_swiglu(x, dim=0).view(-1), ops.npu_clipped_swiglu(x.view(1, 96)).view(-1))


@pytest.mark.parametrize(("counts", "covered"), [([1, 0, 1], 2), ([3], 3), ([2, 7], 3), ([0], 0), ([], 0)])
def test_clipped_swiglu_computes_the_rows_of_the_groups(counts: list[int], covered: int) -> None:
    x = torch.linspace(-3, 3, 12).view(3, 4)
    whole = ops.npu_clipped_swiglu(x)
    x[covered:] = NAN
    x.requires_grad_()
    y = ops.npu_clipped_swiglu(x, group_index=_int64(counts))
    assert_bits_equal(y[:covered], whole[:covered])
    assert_bits_equal(y[covered:], torch.zeros(3 - covered, 2))
    # whatever comes back for the other rows
    dy = torch.ones(3, 2)
    dy[covered:] = NAN
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[:covered].isfinite().all()
    assert dx[:covered].ne(0).all()
    assert_bits_equal(dx[covered:], torch.zeros(3 - covered, 4))


def test_clipped_swiglu_sends_nothing_back_through_what_it_clipped() -> None:
    x = torch.tensor([[7.0, 7.0, 7.5, -7.0, -8.0, -7.5, 1.0, 8.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(ops.npu_clipped_swiglu(x).sum(), x)
    is_zero = [False, False, True, False, False, True, False, True]
    assert (dx == 0).tolist() == [is_zero]
    # at the bound itself, as clamp: (b + 1) (s + 1.702 a s (1 - s)) and a s of a = b = 7
    s = 1 / (1 + math.exp(-1.702 * 7))
    _assert_near(dx[0, :2], [8 * (s + 1.702 * 7 * s * (1 - s)), 7 * s])


# --- npu_swiglu_quant ------------------------------------------------------------------------------------------------

QUANT_X = [[1, 2, 3, 4, -1, 0.5, 2, -2], [2, 0, -1, 1, 1, 3, -3, 0.5]]
QUANT_CASES = [
    pytest.param(
        False,
        [[-6, 30, 127, -11], [127, 0, 12, 14]],
        [24.0312634, 86.8603439],
        [[-3, 13, 127, -38], [15, 1, 3, 13]],
        id="right",
    ),
    pytest.param(
        True,
        [[-16, 39, 127, -87], [127, 0, 58, 13]],
        [22.2204914, 72.0937958],
        [[-7, 19, 127, -128], [18, 1, 23, 15]],
        id="left",
    ),
]


@pytest.mark.parametrize(("activate_left", "dynamic", "scale", "static"), QUANT_CASES)
def test_swiglu_quant(
    activate_left: bool, dynamic: list[list[int]], scale: list[float], static: list[list[int]]
) -> None:
    x = torch.tensor(QUANT_X)
    y, s = ops.npu_swiglu_quant(
        x, smooth_scales=torch.tensor([[1, 2, 1, 0.5]]), activate_left=activate_left, quant_mode=1
    )
    assert_bits_equal(y, _int8(dynamic))
    _assert_near(s, scale, atol=2e-5)
    y, s = ops.npu_swiglu_quant(
        x,
        smooth_scales=torch.tensor([[10.0, 20, 30, 40]]),
        offsets=torch.tensor([[0, 1, -1, 0.5]]),
        activate_left=activate_left,
    )
    assert_bits_equal(y, _int8(static))
    assert_bits_equal(s, torch.zeros(2))


def test_swiglu_quant_activates_the_right_half_unless_told() -> None:
    x = torch.tensor(QUANT_X)
    default, _ = ops.npu_swiglu_quant(x, quant_mode=1)
    swapped, _ = ops.npu_swiglu_quant(x.roll(4, 1), activate_left=True, quant_mode=1)
    assert_bits_equal(default, swapped)
    assert not torch.equal(default, ops.npu_swiglu_quant(x, activate_left=True, quant_mode=1)[0])


@pytest.mark.parametrize(("dst_type", "largest"), [(torch.int8, 127), (torch.quint4x2, 7)])
def test_swiglu_quant_returns_the_reciprocal_of_the_step(dst_type: torch.dtype, largest: int) -> None:
    x = torch.linspace(-2, 3, 32, dtype=BF16).view(2, 16)
    swiglu = ops.npu_swiglu(x.float().roll(8, 1))
    y, scale = ops.npu_swiglu_quant(x, quant_mode=1, dst_type=dst_type)
    torch.testing.assert_close(scale, largest / swiglu.abs().amax(1))
    if dst_type == torch.quint4x2:
        y = torch.stack((y.bitwise_left_shift(4).bitwise_right_shift(4), y.bitwise_right_shift(4)), -1).flatten(1)
    assert (y / scale[:, None] - swiglu).abs().max() <= 0.5001 / scale.min()


def test_swiglu_quant_of_a_row_of_zeros() -> None:
    y, scale = ops.npu_swiglu_quant(torch.zeros(2, 6, dtype=F16), quant_mode=1)
    assert_bits_equal(y, torch.zeros(2, 3, dtype=torch.int8))
    assert_bits_equal(scale, torch.tensor([INF, INF]))


def test_swiglu_quant_packs_two_codes_in_a_byte_low_nibble_first() -> None:
    # silu(100) is 100, so the codes are what the left half says
    x = torch.tensor([[1.0, -2, 7, -8, 100, 100, 100, 100]])
    y, _ = ops.npu_swiglu_quant(x, smooth_scales=torch.tensor([0.01]), dst_type=torch.quint4x2)
    assert_bits_equal(y, _int8([[0xE1 - 256, 0x87 - 256]]))
    saturated, _ = ops.npu_swiglu_quant(x, smooth_scales=torch.tensor([1.0]), dst_type=torch.quint4x2)
    assert_bits_equal(saturated, _int8([[0x87 - 256, 0x87 - 256]]))


def test_swiglu_quant_by_group() -> None:
    x = torch.tensor(QUANT_X)[[0, 1, 0, 1]]
    smooth = torch.tensor([[1, 2, 1, 0.5], [NAN] * 4, [2, 2, 2, 2]])
    options: dict[str, Any] = {"smooth_scales": smooth, "quant_mode": 1}
    sums, scale = ops.npu_swiglu_quant(x, group_index=_int32([1, 1, 3]), **options)
    counts, _ = ops.npu_swiglu_quant(x, group_index=_int32([1, 0, 2]), group_list_type=1, **options)
    assert_bits_equal(sums, counts)
    assert_bits_equal(sums[0], _int8([-6, 30, 127, -11]))
    alone, alone_scale = ops.npu_swiglu_quant(x[1:3], smooth_scales=torch.tensor([2.0]), quant_mode=1)
    assert_bits_equal(sums[1:3], alone)
    assert_bits_equal(scale[1:3], alone_scale)
    assert_bits_equal(sums[3], torch.zeros(4, dtype=torch.int8))
    assert scale[3] == 0


def test_swiglu_quant_of_one_number_per_group() -> None:
    x = torch.tensor(QUANT_X)
    numbers = torch.tensor([20.0, 40.0])
    options: dict[str, Any] = {"group_index": _int32([1, 2])}
    by_number, _ = ops.npu_swiglu_quant(x, smooth_scales=numbers, offsets=numbers / 10, **options)
    rows = numbers[:, None].expand(2, 4)
    by_row, _ = ops.npu_swiglu_quant(x, smooth_scales=rows, offsets=rows / 10, **options)
    assert_bits_equal(by_number, by_row)


# --- npu_dequant_swiglu_quant ----------------------------------------------------------------------------------------

DEQUANT_X = [[100, -200, 300, 50, 10, 20, -30, 40], [50, 60, -70, 80, -90, 100, 110, -120], [2**31 - 1] * 8]
DEQUANT = {
    "weight_scale": torch.tensor([[0.01] * 8, [0.02] * 4 + [0.01] * 4]),
    "activation_scale": torch.tensor([[1.0], [0.5], [NAN]]),
    "group_index": _int64([1, 1]),
    "activate_left": True,
}


def test_dequant_swiglu_quant_dynamic() -> None:
    quant_scale = torch.tensor([[1, 1, 2, 1], [0.5, 1, 1, 1]])
    y, scale = ops.npu_dequant_swiglu_quant(_int32(DEQUANT_X), quant_scale=quant_scale, quant_mode=1, **DEQUANT)
    assert_bits_equal(y, _int8([[5, -4, -127, 9], [-27, 74, -49, -127], [0, 0, 0, 0]]))
    _assert_near(scale, [0.0135010509, 0.0026077770, 0.0], atol=1e-9)


def test_dequant_swiglu_quant_static() -> None:
    quant_scale, quant_offset = torch.tensor([[0.05, 0.1, 0.02, 0.01]] * 2), torch.tensor([[1.0, 0, 0, -1]] * 2)
    y, scale = ops.npu_dequant_swiglu_quant(
        _int32(DEQUANT_X), quant_scale=quant_scale, quant_offset=quant_offset, quant_mode=0, **DEQUANT
    )
    assert_bits_equal(y, _int8([[2, 0, -43, 11], [-2, 2, -6, -34], [0, 0, 0, 0]]))
    assert_bits_equal(scale, torch.zeros(3))


def test_dequant_swiglu_quant_is_the_chain_of_its_parts() -> None:
    x = _int32(DEQUANT_X[:2])
    values = x * DEQUANT["weight_scale"] * DEQUANT["activation_scale"][:2]
    _assert_near(ops.npu_swiglu(values)[1], [-0.1400533, 0.1936969, -0.1277477, -0.3311877])
    y, scale = ops.npu_dequant_swiglu_quant(
        x, quant_mode=1, **{**DEQUANT, "activation_scale": DEQUANT["activation_scale"][:2]}
    )
    torch.testing.assert_close(scale, ops.npu_swiglu(values).abs().amax(1) / 127)
    assert ((y * scale[:, None] - ops.npu_swiglu(values)).abs() <= 0.5001 * scale[:, None]).all()


def test_dequant_swiglu_quant_forms_of_the_same_arguments() -> None:
    x, row = _int32(DEQUANT_X[:2]), torch.linspace(0.01, 0.02, 8)
    options: dict[str, Any] = {"activate_left": True, "quant_mode": 1}
    scales = torch.tensor([1.0, 0.5])
    smooth = torch.tensor([1.0, 2, 3, 4])
    wanted, wanted_scale = ops.npu_dequant_swiglu_quant(
        x, weight_scale=row, activation_scale=scales, quant_scale=smooth, **options
    )
    for form in (
        {"weight_scale": row[None], "activation_scale": scales[:, None], "quant_scale": smooth[None]},
        {"weight_scale": row, "activation_scale": scales, "quant_scale": smooth, "group_index": _int64([2])},
        {"weight_scale": row[None], "activation_scale": scales, "quant_scale": smooth.to(BF16)},
        {"weight_scale": row.repeat(2, 1), "group_index": _int64([1, 1])}
        | {"activation_scale": scales[:, None], "quant_scale": smooth.repeat(2, 1)},
        {"weight_scale": row, "activation_scale": scales, "quant_scale": smooth}
        | {"quant_offset": torch.zeros(3), "dst_type": 1, "round_mode": 0, "activate_dim": -1},
    ):
        y, scale = ops.npu_dequant_swiglu_quant(x, **form, **options)
        assert_bits_equal(y, wanted)
        assert_bits_equal(scale, wanted_scale)


def test_dequant_swiglu_quant_adds_int32_bias_before_and_float_bias_after_the_scales() -> None:
    x, options = _int32([[90, 10]]), {"activate_left": True, "quant_scale": torch.tensor([1.0])}
    weight_scale, activation_scale = torch.tensor([1.0, 0.5]), torch.tensor([0.5])
    y, _ = ops.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale / 10, activation_scale=activation_scale, bias=_int32([400, 10]), **options
    )
    # silu(490 * 0.1 * 0.5) * (20 * 0.05 * 0.5)
    assert_bits_equal(y, _int8([[12]]))
    y, _ = ops.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale, activation_scale=activation_scale, bias=torch.tensor([10.0, -1.5]), **options
    )
    # silu(90 * 1 * 0.5 + 10) * (10 * 0.5 * 0.5 - 1.5)
    assert_bits_equal(y, _int8([[55]]))


def test_dequant_swiglu_quant_clipped_modes() -> None:
    x = torch.tensor([[*CLIPPED_ROW[0]]], dtype=BF16)
    options: dict[str, Any] = {"quant_scale": torch.tensor([0.5])}
    # interleaved 2.537, -42.0, -0.231; halves -5.075, 0, 10.5; halves exchanged, a = -9 -1 .5 and b = 1 2 7
    for mode, left, codes in (
        (1, True, [5, -84, 0]),
        (1, False, [5, -84, 0]),
        (2, True, [-10, 0, 21]),
        (2, False, [0, -1, 6]),
    ):
        y, _ = ops.npu_dequant_swiglu_quant(x, swiglu_mode=mode, activate_left=left, **options)
        assert_bits_equal(y, _int8([codes]))
    tight, _ = ops.npu_dequant_swiglu_quant(
        x, swiglu_mode=1, clamp_limit=1.0, glu_alpha=0.0, glu_bias=3.0, quant_scale=torch.tensor([0.0625])
    )
    # min(a, 1) / 2 * (clamp(b, -1, 1) + 3)
    assert_bits_equal(tight, _int8([[32, 16, -28]]))


def test_dequant_swiglu_quant_takes_a_single_zero_for_no_scale() -> None:
    x = torch.tensor([[3.0, -4.0, 100.0, 100.0]] * 2, dtype=BF16)
    y, _ = ops.npu_dequant_swiglu_quant(
        x, quant_scale=torch.tensor([0.0, 4.0]), quant_offset=torch.tensor([1.0, 2.0]), group_index=_int64([1, 1])
    )
    assert_bits_equal(y, _int8([[127, -128], [77, -98]]))
    y, _ = ops.npu_dequant_swiglu_quant(x[:1], quant_scale=torch.tensor([[0.0, 100.0]]))
    assert_bits_equal(y, _int8([[127, -4]]))
    y, _ = ops.npu_dequant_swiglu_quant(x[:1] / 10, quant_scale=torch.tensor([0.0]))
    assert_bits_equal(y, _int8([[3, -4]]))


def test_dequant_swiglu_quant_of_a_row_of_zeros() -> None:
    y, scale = ops.npu_dequant_swiglu_quant(torch.zeros(2, 6, dtype=BF16), quant_mode=1)
    assert_bits_equal(y, torch.zeros(2, 3, dtype=torch.int8))
    assert_bits_equal(scale, torch.zeros(2))


# --- the quotient that decides a rounding ----------------------------------------------------------------------------

ONE = np.float32(1)


def _values() -> tuple[Tensor, np.ndarray]:
    """Inputs of 64 rows whose SwiGLU with the right half activated is exact in float32, and what it is."""
    left = torch.arange(64 * 128).view(64, 128).remainder(509).sub(254).to(BF16)
    left[:, 0] += torch.arange(64)
    left /= 64
    x = torch.cat((left, torch.full_like(left, 64.0)), 1)  # silu(64) is 64
    return x, left.float().numpy() * np.float32(64)


def _codes(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.clip(np.rint(values), -128, 127).astype(np.int8))


def _assert_divides(actual: Tensor, formula: np.ndarray, others: Callable[[], list[np.ndarray]]) -> None:
    assert_bits_equal(actual, _codes(formula))
    for other in others():
        assert not torch.equal(_codes(formula), _codes(other))  # or this test would show nothing


def test_swiglu_quant_multiplies_by_the_quotient() -> None:
    x, values = _values()
    y, scale = ops.npu_swiglu_quant(x, quant_mode=1)
    amax = np.abs(values).max(1, keepdims=True)
    assert_bits_equal(scale, torch.from_numpy((np.float32(127) / amax)[:, 0]))
    _assert_divides(y, values * (np.float32(127) / amax), lambda: [values / (amax / np.float32(127))])


def test_dequant_swiglu_quant_divides_by_the_scale() -> None:
    x, values = _values()
    y, scale = ops.npu_dequant_swiglu_quant(x, quant_mode=1)
    wanted = np.abs(values).max(1, keepdims=True) * (ONE / np.float32(127))
    assert_bits_equal(scale, torch.from_numpy(wanted[:, 0]))
    _assert_divides(y, values / wanted, lambda: [values * (ONE / wanted)])


@pytest.mark.parametrize("form", ["row", "number", "column"])
def test_dequant_swiglu_quant_divides_by_a_row_and_multiplies_by_the_reciprocal_of_a_number(form: str) -> None:
    x, values = _values()
    divisor = np.float32(10 / 3)
    shape = {"row": (1, 128), "number": (1,), "column": (1, 1)}[form]
    y, _ = ops.npu_dequant_swiglu_quant(x, quant_scale=torch.full(shape, float(divisor)))
    quotient, product = values / divisor, values * (ONE / divisor)
    formula, other = (quotient, product) if form == "row" else (product, quotient)
    _assert_divides(y, formula, lambda: [other])


# --- gradients -------------------------------------------------------------------------------------------------------


def test_codes_and_scales_are_detached() -> None:
    x = torch.ones(2, 8, dtype=BF16, requires_grad=True)
    scale = torch.ones(1, 4, requires_grad=True)
    for results in (
        ops.npu_swiglu_quant(x, smooth_scales=scale, quant_mode=1),
        ops.npu_dequant_swiglu_quant(x, quant_scale=scale, quant_mode=1),
    ):
        assert not any(result.requires_grad for result in results)
