"""Comparisons whose tolerance follows from the number format instead of being chosen per test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The largest error may exceed the allowed RMS error (both relative to their own norm of the expected value) this much.
_MAX_FACTOR = 2.0

_BIT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fail_unless_same_shape(actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")


def assert_close(actual: Tensor, expected: Tensor, *, reduction: int = 1, dtype: torch.dtype | None = None) -> None:
    """Compare a result with its float64 reference, which has not been rounded to the result's dtype.

    The allowed relative error is one eps of `dtype` (default: that of `actual`) for the final rounding, plus
    4 * sqrt(reduction) eps of the accumulator (float32; float64 for float64) for sums of `reduction` terms. It limits
    the RMS of the difference relative to the RMS of `expected`, and twice it limits the largest difference relative
    to the largest expected magnitude. Values that overflow `dtype` must be infinities of the same sign.
    """
    if not actual.is_floating_point() or expected.dtype != torch.float64:
        raise TypeError(f"needs a floating result and a float64 reference, got {actual.dtype} and {expected.dtype}")
    _fail_unless_same_shape(actual, expected)
    dtype = actual.dtype if dtype is None else dtype
    actual, expected = actual.detach(), expected.detach()
    # Through float32, as the operators accumulate there; this only decides which elements overflow.
    rounded = expected if dtype == torch.float64 else expected.float().to(dtype).double()
    got = actual.double()
    special = ~torch.isfinite(rounded)
    agree = (torch.isnan(got) == torch.isnan(rounded)) & (torch.isinf(got) == torch.isinf(rounded))
    agree &= ~torch.isinf(rounded) | (got == rounded)
    if not bool(agree.all()):
        where = tuple((~agree).nonzero()[0].tolist())
        raise AssertionError(
            f"{int((~agree).sum())} non-finite values differ, first at {where}: "
            f"{got[where].item()} instead of {rounded[where].item()}"
        )
    got, wanted = got[~special], expected[~special]
    if wanted.numel() == 0:
        return
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    bound = torch.finfo(dtype).eps + 4 * torch.finfo(accumulator).eps * math.sqrt(max(reduction, 1))
    spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of subnormal numbers: no result can be closer
    difference = (got - wanted).abs()
    rms = difference.square().mean().sqrt().item()
    largest = difference.max().item()
    rms_bound = bound * wanted.square().mean().sqrt().item() + spacing
    largest_bound = _MAX_FACTOR * bound * wanted.abs().max().item() + spacing
    if rms > rms_bound or largest > largest_bound:
        raise AssertionError(
            f"RMS error {rms:.6g} (bound {rms_bound:.6g}), largest error {largest:.6g} (bound {largest_bound:.6g}) "
            f"for {dtype} with reduction {reduction}, shape {tuple(actual.shape)}"
        )


def assert_bits_equal(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bit patterns: signs of zeros and NaN payloads count."""
    if actual.dtype != expected.dtype:
        raise AssertionError(f"dtype {actual.dtype} instead of {expected.dtype}")
    _fail_unless_same_shape(actual, expected)
    actual, expected = actual.detach(), expected.detach()
    as_bits = _BIT_DTYPES[actual.element_size()]
    different = actual.contiguous().view(as_bits) != expected.contiguous().view(as_bits)
    if bool(different.any()):
        where = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements differ, first at {where}: "
            f"{actual[where].item()} instead of {expected[where].item()}"
        )


def assert_codes_equal(actual: Tensor, values: Tensor, *, low: int, high: int, slack: float) -> None:
    """Integers that are float64 `values`, rounded half to even and clamped; within `slack` of a half either way."""
    _fail_unless_same_shape(actual, values)
    below, above = ((values + step).round().clamp(low, high) for step in (-slack, slack))
    got = actual.double()
    wrong = (got != below) & (got != above)
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} codes differ, first at {where}: "
            f"{actual[where].item()} instead of {values[where].item():.6g}"
        )
