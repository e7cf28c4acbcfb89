"""The comparison helpers raise when they should and only then."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.assertions import assert_bits_equal, assert_close, assert_codes_equal

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALF_DTYPES = [torch.float16, torch.bfloat16]


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_accepts_one_rounding(dtype: torch.dtype) -> None:
    expected = _values(64, 33)
    assert_close(expected.to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_accepts_float32_accumulation(dtype: torch.dtype) -> None:
    x, w = _values(16, 512, seed=1).to(dtype), _values(512, 24, seed=2).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    actual = (x.to(accumulator) @ w.to(accumulator)).to(dtype)
    assert_close(actual, x.double() @ w.double(), reduction=512)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_close_rejects_half_precision_accumulation(dtype: torch.dtype) -> None:
    x, w = _values(16, 256, seed=3).to(dtype), _values(256, 24, seed=4).to(dtype)
    total = torch.zeros(16, 24, dtype=dtype)
    for k in range(256):
        total = total + x[:, k : k + 1] * w[k]
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close(total, x.double() @ w.double(), reduction=256)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_close_rejects_systematic_error_of_three_eps(dtype: torch.dtype) -> None:
    expected = _values(64, 32)
    actual = (expected * (1 + 3 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match=r"RMS error .* \(bound .*largest error .* \(bound"):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_rejects_systematic_error_of_ten_eps(dtype: torch.dtype) -> None:
    expected = _values(64, 32)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close((expected * (1 + 10 * torch.finfo(dtype).eps)).to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_rejects_one_wrong_element_that_hides_in_the_rms(dtype: torch.dtype) -> None:
    expected = torch.ones(256, 256, dtype=torch.float64)
    actual = torch.ones(256, 256, dtype=dtype)
    actual[17, 3] += 12 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(actual, expected)


def test_close_uses_the_given_dtype() -> None:
    expected = _values(64, 32)
    actual = expected.bfloat16().float()
    assert_close(actual, expected, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 1), (12,), (1, 3, 4)])
def test_close_rejects_broadcastable_and_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(shape), torch.zeros(3, 4, dtype=torch.float64))


def test_close_rejects_anything_nonzero_for_zero() -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    assert_close(torch.zeros(5), expected)
    with pytest.raises(AssertionError):
        assert_close(torch.full((5,), 1e-30), expected)


def test_close_accepts_subnormal_rounding() -> None:
    expected = _values(100) * 1e-7
    assert_close(expected.half(), expected)


def test_close_accepts_matching_non_finite_values_and_overflow() -> None:
    expected = torch.tensor([1.0, math.nan, math.inf, -math.inf, 1e6, -1e6], dtype=torch.float64)
    assert_close(expected.half(), expected)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1.0, 2.0, math.inf], id="number-for-nan"),
        pytest.param([math.nan, math.nan, math.inf], id="nan-for-number"),
        pytest.param([1.0, math.nan, -math.inf], id="sign-of-inf"),
        pytest.param([1.0, math.nan, 65504.0], id="number-for-inf"),
        pytest.param([math.inf, math.nan, math.inf], id="inf-for-number"),
        pytest.param([1.0, math.inf, math.inf], id="inf-for-nan"),
    ],
)
def test_close_rejects_other_non_finite_values(values: list[float]) -> None:
    expected = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_close(torch.tensor(values, dtype=torch.float16), expected)


def test_close_accepts_empty_and_0d() -> None:
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64))
    assert_close(torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64))


def test_close_needs_a_float64_reference() -> None:
    with pytest.raises(TypeError):
        assert_close(torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError):
        assert_close(torch.zeros(2, dtype=torch.int8), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.int8, torch.int32, torch.int64, torch.bool], ids=lambda dtype: str(dtype).split(".")[1]
)
def test_bits_accept_equal(dtype: torch.dtype) -> None:
    values = (_values(5, 4) * 3).to(dtype)
    assert_bits_equal(values, values.t().contiguous().t())
    assert_bits_equal(values[0, 0], values[0, 0].clone())
    assert_bits_equal(values[:0], values[:0].clone())


def test_bits_accept_equal_nan() -> None:
    assert_bits_equal(torch.tensor([math.nan, math.inf]), torch.tensor([math.nan, math.inf]))


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        pytest.param(torch.zeros(3), torch.zeros(3, dtype=torch.float16), "dtype", id="float-dtype"),
        pytest.param(torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), "dtype", id="int-dtype"),
        pytest.param(torch.zeros(1, 3), torch.zeros(3), "shape", id="shape"),
        pytest.param(torch.zeros(0), torch.zeros(0, 2), "shape", id="empty-shape"),
        pytest.param(torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2", id="one-element"),
        pytest.param(torch.tensor([True]), torch.tensor([False]), "1 of 1", id="bool"),
        pytest.param(torch.tensor(-0.0), torch.tensor(0.0), "1 of 1", id="sign-of-zero"),
        pytest.param(torch.tensor([math.nan]), torch.tensor([0.0]), "1 of 1", id="nan-for-number"),
        pytest.param(
            torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32),
            torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32),
            "1 of 1",
            id="nan-payload",
        ),
        pytest.param(torch.tensor([1 + 2.0**-23]), torch.tensor([1.0]), "1 of 1", id="one-ulp"),
    ],
)
def test_bits_reject(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bits_equal(actual, expected)


def _codes(actual: list[int], values: list[float]) -> None:
    assert_codes_equal(
        torch.tensor(actual, dtype=torch.int8),
        torch.tensor(values, dtype=torch.float64),
        low=-128,
        high=127,
        slack=1e-4,
    )


def test_codes_accept_both_sides_of_a_half_and_saturation() -> None:
    _codes([2, 3, 3, -2, 127, -128], [2.5, 2.5, 2.50005, -2.4, 1e9, -128.7])


@pytest.mark.parametrize(("code", "value"), [(2, 2.501), (3, 2.499), (1, 2.0), (126, 127.4), (4, 2.5)])
def test_codes_reject(code: int, value: float) -> None:
    with pytest.raises(AssertionError, match="1 of 1 codes differ"):
        _codes([code], [value])


def test_codes_reject_other_shapes() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_codes_equal(torch.zeros(2), torch.zeros(2, 1, dtype=torch.float64), low=0, high=1, slack=0)
