"""The pure functions of quantization, against loops over the values."""

from __future__ import annotations

import math

import pytest
import torch

from moe_npu import quant
from tests.helpers.assertions import assert_bits_equal


def loop_quantize(weight: torch.Tensor, bits: int, group_size: int, scale_dtype: torch.dtype):
    largest = 2 ** (bits - 1) - 1
    codes, scales = torch.zeros(weight.shape, dtype=torch.int8), []
    for n, row in enumerate(weight.float()):
        for start in range(0, row.numel(), group_size):
            group = row[start : start + group_size]
            amax = max(abs(value) for value in group.tolist())
            scale = (torch.tensor(amax) / largest).to(scale_dtype)
            scale = scale if scale != 0 else torch.tensor(torch.finfo(scale_dtype).eps, dtype=scale_dtype)
            scales.append(scale)
            for offset, value in enumerate(group):
                code = round((value / scale.float()).item())  # half to even, as Python rounds
                codes[n, start + offset] = max(-largest, min(largest, code))
    return codes, torch.stack(scales).view(weight.size(0), -1)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 4), (4, 4), (4, 2), (4, None)])
def test_quantize_equals_the_loop(bits: int, group_size: int | None, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(5, 12)
    weight[2] = 0
    codes, scale = quant.quantize(weight, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    expected_codes, expected_scale = loop_quantize(weight, bits, group_size or 12, scale_dtype)
    assert_bits_equal(codes, expected_codes)
    assert_bits_equal(scale, expected_scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    weight = torch.randn(3, 7, 64)
    codes, scale = quant.quantize(weight, bits=bits, group_size=16, scale_dtype=torch.float32)
    error = (quant.dequantize(codes, scale) - weight).abs()
    assert (error <= 0.5001 * scale.repeat_interleave(16, -1)).all()


def test_zero_weights_stay_zero_with_a_usable_scale() -> None:
    codes, scale = quant.quantize(torch.zeros(2, 8), bits=4, group_size=4, scale_dtype=torch.float16)
    assert codes.eq(0).all()
    assert (scale > 0).all()


def test_pack_int4_round_trip_of_every_value_in_every_place() -> None:
    codes = torch.stack([torch.roll(torch.arange(-8, 8), shift) for shift in range(16)]).to(torch.int8)
    words = quant.pack_int4(codes)
    assert (words.dtype, words.shape) == (torch.int32, (16, 2))
    assert_bits_equal(quant.unpack_int4(words), codes)


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"), [(2048, 128, 128), (768, 128, 128), (704, 128, 88), (64, 128, 64), (8, 3, 2)]
)
def test_group_size_is_the_largest_even_divisor(columns: int, wanted: int, expected: int) -> None:
    assert quant.group_size_for(columns, wanted) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: quant.quantize(torch.ones(2, 4), bits=3, scale_dtype=torch.float32), "bits", id="bits"),
        pytest.param(
            lambda: quant.quantize(torch.ones(2, 4).int(), bits=4, scale_dtype=torch.float32), "float", id="integers"
        ),
        pytest.param(
            lambda: quant.quantize(torch.ones(4), bits=4, scale_dtype=torch.float32), r"\[\.\.\., N, K\]", id="rank"
        ),
        pytest.param(
            lambda: quant.quantize(torch.ones(2, 4), bits=4, group_size=3, scale_dtype=torch.float32),
            "must divide the 4",
            id="divisor",
        ),
        pytest.param(
            lambda: quant.quantize(torch.full((2, 4), math.nan), bits=4, scale_dtype=torch.float32), "finite", id="nan"
        ),
        pytest.param(
            lambda: quant.quantize(torch.full((2, 4), 1e30), bits=4, scale_dtype=torch.float16), "too large", id="inf"
        ),
        pytest.param(lambda: quant.pack_int4(torch.ones(8)), "integers", id="pack-float"),
        pytest.param(lambda: quant.pack_int4(torch.ones(7, dtype=torch.int8)), "multiple of 8", id="pack-length"),
        pytest.param(lambda: quant.pack_int4(torch.full((8,), 8)), r"-8\.\.7", id="pack-range"),
        pytest.param(lambda: quant.unpack_int4(torch.ones(8, dtype=torch.int64)), "int32", id="unpack-dtype"),
        pytest.param(lambda: quant.group_size_for(12, 128), "multiple of 8", id="group-packing"),
        pytest.param(lambda: quant.group_size_for(16, 1), "at least 2", id="group-one"),
        pytest.param(lambda: quant.get_scheme("w8"), "choose one of w4a16, w8a8", id="scheme-name"),
        pytest.param(
            lambda: quant.get_scheme("w8a8", group_size=3), "does not take the option group_size", id="scheme-option"
        ),
        pytest.param(lambda: quant.get_scheme("w4a16", group_size=1), "at least 2", id="scheme-group"),
    ],
)
def test_mistakes_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def stored(quantized: quant.QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(quantized, quant.QuantizedWeight)
    return quantized.weight, quantized.scale


class TestSchemes:
    """What every registered scheme must provide."""

    @pytest.fixture(params=quant.scheme_names())
    def scheme(self, request: pytest.FixtureRequest) -> quant.QuantScheme:
        return quant.get_scheme(request.param)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_empty_announces_what_quantize_returns(self, scheme: quant.QuantScheme, dtype: torch.dtype) -> None:
        weight = torch.randn(3, 6, 32, dtype=dtype)
        announced = scheme.empty(weight.shape, dtype=dtype, device="meta")
        for actual, expected in zip(stored(scheme.quantize(weight)), stored(announced), strict=True):
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)

    def test_quantizing_one_expert_equals_quantizing_all(self, scheme: quant.QuantScheme) -> None:
        weight = torch.randn(3, 6, 32, dtype=torch.bfloat16)
        together = scheme.quantize(weight)
        for expert in range(3):
            for part, whole in zip(stored(scheme.quantize(weight[expert])), stored(together), strict=True):
                assert_bits_equal(part, whole[expert])

    def test_a_prepared_weight_holds_the_same_values(self, scheme: quant.QuantScheme) -> None:
        parts = scheme.quantize(torch.randn(3, 6, 32, dtype=torch.bfloat16))
        prepared = scheme.prepare(parts)
        for part, original in zip(stored(prepared), stored(parts), strict=True):
            assert_bits_equal(part, original)
        if prepared.offset is not None:
            assert_bits_equal(prepared.offset, torch.zeros_like(parts.scale))
        x, expert_tokens = torch.randn(9, 32, dtype=torch.bfloat16), torch.tensor([4, 0, 5])
        assert_bits_equal(scheme.grouped_mm(x, prepared, expert_tokens), scheme.grouped_mm(x, parts, expert_tokens))

    def test_quantizing_the_restored_weight_changes_nothing(self, scheme: quant.QuantScheme) -> None:
        first = scheme.quantize(torch.randn(6, 32))
        second = scheme.quantize(scheme.dequantize(first))
        torch.testing.assert_close(scheme.dequantize(first), scheme.dequantize(second))

    def test_can_be_made_again_from_its_options(self, scheme: quant.QuantScheme) -> None:
        assert quant.get_scheme(scheme.name, **scheme.options) == scheme
        assert scheme.description

    def test_names_are_taken_once(self, scheme: quant.QuantScheme) -> None:
        with pytest.raises(ValueError, match="registered already"):
            quant.register_scheme(type(scheme))
