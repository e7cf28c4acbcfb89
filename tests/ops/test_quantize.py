"""Numbers of the quantization operators that can be checked by hand, and what formats and gradients do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal
from tests.ops.samples.base import BF16, F16, F32, sliced

I8, I32, I64 = torch.int8, torch.int32, torch.int64


def int8(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=I8)


def nibbles(words: Tensor) -> list[list[int]]:
    return [
        [(word >> shift & 0xF) - 16 * (word >> shift & 0x8 != 0) for word in row for shift in range(0, 32, 4)]
        for row in words.tolist()
    ]


# --- npu_quantize ----------------------------------------------------------------------------------------------------

X = [[0.26, -0.8354, 2.5, -100.0], [0.5, 1.5, -2.5, 60.0]]


@pytest.mark.parametrize("dtype", [torch.qint8, I8, 12, 1])
def test_quantize_multiplies_and_saturates(dtype: Any) -> None:
    y = ops.npu_quantize(torch.tensor(X), torch.tensor([3.0, 3.0, 1.0, 2.0]), None, dtype, -1, False)
    assert_bits_equal(y, int8([1, -3, 2, -128], [2, 4, -2, 120]))


def test_quantize_adds_the_zero_point_before_rounding() -> None:
    scales, zeros = torch.tensor([3.0, 3.0, 1.0, 2.0]), torch.tensor([0.0, 0.5, 1.0, -10.0])
    y = ops.npu_quantize(torch.tensor(X), scales, zeros, torch.qint8, div_mode=False)
    assert_bits_equal(y, int8([1, -2, 4, -128], [2, 5, -2, 110]))


@pytest.mark.parametrize("axis", [-1, 0, 1, 7])
def test_every_axis_but_the_second_to_last_is_the_last(axis: int) -> None:
    scales = torch.tensor([3.0, 3.0, 1.0, 2.0])
    y = ops.npu_quantize(torch.tensor(X), scales, None, torch.qint8, axis, False)
    assert_bits_equal(y, int8([1, -3, 2, -128], [2, 4, -2, 120]))


def test_quantize_along_the_second_to_last_axis() -> None:
    y = ops.npu_quantize(torch.tensor(X), torch.tensor([1.0, 2.0]), None, torch.qint8, -2, False)
    assert_bits_equal(y, int8([0, -1, 2, -100], [1, 3, -5, 120]))
    column = torch.tensor([[1.0], [2.0]])
    assert_bits_equal(ops.npu_quantize(torch.tensor(X), column, None, torch.qint8, -2, False), y)


def test_quantize_divides_by_default() -> None:
    scales = torch.tensor([0.1, 0.2, 0.5, 1.0])
    y = ops.npu_quantize(torch.tensor(X), scales, torch.tensor([0, 1, -2, 3], dtype=I32), torch.qint8)
    assert_bits_equal(y, int8([3, -3, 3, -97], [5, 8, -7, 63]))
    y = ops.npu_quantize(torch.tensor(X), scales, torch.tensor([0, 1, 2, 3], dtype=I32), torch.quint8, 1)
    assert_bits_equal(y, torch.tensor([[3, 0, 7, 0], [5, 8, 0, 63]], dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.quint4x2, 16, torch.int32, 3])
@pytest.mark.parametrize("input_dtype", [F32, F16, BF16])
def test_quantize_packs_int4(dtype: Any, input_dtype: torch.dtype) -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8], [9, -9, 0.5, 1.5, 2.5, -0.5, -1.5, 100]], dtype=input_dtype)
    y = ops.npu_quantize(rows, torch.ones(1, dtype=input_dtype), None, dtype, -1, False)
    assert y.dtype == I32
    assert y[0].item() == -2023406815
    assert nibbles(y)[1] == [7, -8, 0, 2, 2, 0, -2, 7]
    as_int8 = ops.npu_quantize(rows, torch.ones(8, dtype=input_dtype), None, dtype, 0, False)
    assert_bits_equal(as_int8, y)


def test_int32_means_32_bits_where_scales_divide() -> None:
    y = ops.npu_quantize(torch.tensor([-3e9, 70000.0, 1e12]), torch.ones(1), torch.tensor([1], dtype=I32), I32, 0)
    assert_bits_equal(y, torch.tensor([-(2**31), 70001, 2**31 - 1], dtype=I32))


# torch's own quantized tensors are deprecated
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
def test_quantize_divides_as_torch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(64, generator=generator) + 0.05
    zeros = torch.randint(0, 9, (64,), generator=generator, dtype=I32)
    halves = torch.randint(-60, 60, (32, 64), generator=generator) + 0.5
    for x in (20 * torch.randn(32, 64, generator=generator), halves * scales, halves):
        expected = torch.quantize_per_channel(x, scales, zeros, 1, dtype).int_repr()
        assert (ops.npu_quantize(x, scales, zeros, dtype).long() - expected.long()).abs().max() <= 1
        if torch.backends.quantized.engine in ("fbgemm", "x86", "onednn"):
            assert_bits_equal(ops.npu_quantize(x, scales, zeros, dtype), expected)
        one = torch.quantize_per_tensor(x, scales[0].item(), int(zeros[0]), dtype).int_repr()
        assert (ops.npu_quantize(x, scales[:1], zeros[:1], dtype).long() - one.long()).abs().max() <= 1


def test_quantize_widens_halves_first() -> None:
    input = torch.tensor([[5.0]], dtype=BF16)
    # bfloat16 has 0.10009765625 for 0.1: 5 / it rounds to 50, as 5 * it rounds to 1
    scale = torch.tensor([0.1], dtype=BF16)
    assert scale.item() == 0.10009765625
    assert ops.npu_quantize(input, scale, None, I8).item() == 50
    ties = torch.tensor([[35.0]], dtype=BF16)
    assert ops.npu_quantize(ties, scale, None, I8, -1, False).item() == 4  # 3.5034, a tie in bfloat16
    assert ops.npu_quantize(torch.tensor([[25.0]]), torch.tensor([0.1]), None, I8, -1, False).item() == 2


def test_the_two_modes_are_reciprocal() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 20
    scales = torch.tensor([0.25, 0.5, 1, 2, 4, 8, 16])
    divided = ops.npu_quantize(x, scales, None, I8)
    assert_bits_equal(ops.npu_quantize(x, 1 / scales, None, I8, -1, False), divided)


def test_scales_of_a_weight_in_nz_may_be_float16() -> None:
    weight = torch.randn(2, 256, 8, generator=torch.Generator().manual_seed(0)) * 5
    expected = ops.npu_quantize(weight, torch.ones(1), None, torch.quint4x2, -1, False)
    nz = ops.npu_format_cast(weight, 29)
    for scales in (torch.ones(1), torch.ones(1, dtype=F16), torch.ones(1, 1, 1), torch.ones(1, 1, 8, dtype=F16)):
        assert_bits_equal(ops.npu_quantize(nz, scales, None, torch.quint4x2, -1, False), expected)
    with pytest.raises(ops.OperatorError, match="scales must have dtype float32 like input"):
        ops.npu_quantize(weight, torch.ones(1, dtype=F16), None, torch.quint4x2, -1, False)


# --- npu_dynamic_quant_asymmetric ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_asymmetric_int8(dtype: torch.dtype) -> None:
    row = torch.tensor([[1.0, -1.0, 3.0, 4.1]], dtype=dtype)
    y, scale, offset = ops.npu_dynamic_quant_asymmetric(row)
    assert_bits_equal(y, int8([-28, -128, 72, 127]))
    torch.testing.assert_close(scale, torch.tensor([0.02]), rtol=2e-3, atol=0)
    torch.testing.assert_close(offset, torch.tensor([-78.0]), rtol=2e-3, atol=0)
    assert ((y - offset) * scale - row.float()).abs().max() <= 0.5001 * scale


def test_asymmetric_int4() -> None:
    y, scale, offset = ops.npu_dynamic_quant_asymmetric(
        torch.tensor([[1.0, -1.0, 3.0, 4.1] * 2], dtype=F16), dst_type=torch.quint4x2
    )
    assert nibbles(y) == [[-2, -8, 4, 7] * 2]
    torch.testing.assert_close(scale, torch.tensor([0.34]), rtol=1e-3, atol=0)
    torch.testing.assert_close(offset, torch.tensor([-5.0588236]), rtol=1e-3, atol=0)


def test_asymmetric_divides_as_written() -> None:
    # the sum of the shortest and the longest way to the same number differs in float32
    row = torch.tensor([[4.1015625, -1.0, 3.0, 0.1]], dtype=F16)
    _, scale, offset = ops.npu_dynamic_quant_asymmetric(row)
    largest, smallest = row.float().amax(), row.float().amin()
    assert scale.item() == ((largest - smallest) / torch.tensor(255.0)).item()
    assert offset.item() == (127 - largest / scale).item()


def test_asymmetric_row_of_zeros() -> None:
    y, scale, offset = ops.npu_dynamic_quant_asymmetric(torch.zeros(2, 3, dtype=F16))
    assert_bits_equal(y, torch.full((2, 3), 127, dtype=I8))
    assert_bits_equal(scale, torch.full((2,), 1e-12))
    assert_bits_equal(offset, torch.full((2,), 127.0))


def test_asymmetric_groups_are_cumulative() -> None:
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).half()
    smooth = torch.tensor([[1, 1, 1, 1], [9, 9, 9, 9], [2, 1, 0.5, 4]], dtype=F16)
    results = ops.npu_dynamic_quant_asymmetric(rows, smooth_scales=smooth, group_index=torch.tensor([2, 2, 5]).int())
    alone = [
        ops.npu_dynamic_quant_asymmetric(rows[:2], smooth_scales=smooth[0]),
        ops.npu_dynamic_quant_asymmetric(rows[2:], smooth_scales=smooth[2]),
    ]
    for result, *parts in zip(results, *alone, strict=True):
        assert_bits_equal(result, torch.cat(parts))


@pytest.mark.parametrize(("mode", "shape"), [("pertoken", (2, 3)), ("perchannel", (2, 16)), ("pertensor", (1,))])
def test_asymmetric_shapes(mode: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for dst_type, width in ((I8, 16), (torch.quint4x2, 2)):
        y, scale, offset = ops.npu_dynamic_quant_asymmetric(x, dst_type=dst_type, quant_mode=mode)
        assert y.shape == (2, 3, width)
        assert scale.shape == offset.shape == shape


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "offset", "round_mode", "word"),
    [
        (1.0, None, 0, 70369809530880),
        (1.0, None, None, 0x40003F800000),
        (0.5, None, 0, 70369801142272),
        (0.1, None, 0, 70369781006336),
        (0.3, None, 0, 70369794424832),
        (0.3, None, 1, 70369794433024),
        (-0.5, None, 0, 0x4000BF000000),
        (0.0, None, 0, 70368744177664),
        (0.5, -2.0, 0, 140463667412992),
        (1.0, 255.0, 0, 105416742666240),
        (1.0, 300.0, 0, 105416742666240),
        (1.0, -300.0, 0, 105554181619712),
        (0.1, 2.5, 0, 0x40403DCCC000),
        (0.1, 3.5, 0, 0x40803DCCC000),
        # the next float16-like step, its middle (to even) and just above
        (1 + 2**-10, None, 1, 0x40003F802000),
        (1 + 2**-11, None, 1, 0x40003F800000),
        (1 + 3 * 2**-11, None, 1, 0x40003F804000),
        (2 - 2**-11, None, 1, 0x400040000000),
        (2 - 2**-11, None, 0, 0x40003FFFE000),
        (1e-40, None, 1, 1 << 46),
        (-1e-40, None, 1, (1 << 46) | 0x80000000),
        (math.inf, None, 1, 0x40007F800000),
    ],
)
def test_words(scale: float, offset: float | None, round_mode: int | None, word: int) -> None:
    offsets = None if offset is None else torch.tensor([offset])
    words = ops.npu_trans_quant_param(torch.tensor([scale]), offsets, round_mode)
    assert_bits_equal(words, torch.tensor([word]))


def test_words_of_published_examples_decode() -> None:
    for word, scale, offset in ((70507248869376, 1.0458984375, 1), (140463653937152, 0.1741943359375, -2)):
        assert ops.npu_trans_quant_param(torch.tensor([scale]), torch.tensor([float(offset)])).item() == word


def test_words_broadcast_a_single_scale_or_offset() -> None:
    one, four = torch.tensor([0.5]), torch.tensor([0.0, 1.0, -2.0, 3.0])
    assert_bits_equal(ops.npu_trans_quant_param(one, four), ops.npu_trans_quant_param(one.expand(4).clone(), four))
    assert_bits_equal(ops.npu_trans_quant_param(four, one), ops.npu_trans_quant_param(four, torch.zeros(4)))
    assert ops.npu_trans_quant_param(torch.ones(1, 4), torch.ones(1, 4)).shape == (1, 4)


def test_words_of_rows_are_those_of_their_elements() -> None:
    scale = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = ops.npu_trans_quant_param(scale.reshape(-1)).reshape(3, 5)
    assert_bits_equal(ops.npu_trans_quant_param(scale), expected)


def test_int4pack_keeps_the_low_bits_and_ignores_tiles() -> None:
    pack: Callable[..., Tensor] = ops.npu_convert_weight_to_int4pack
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8], [-1] * 8, [0] * 7 + [1], [0] * 7 + [-1]], dtype=I32)
    expected = torch.tensor([[-2023406815], [-1], [268435456], [-268435456]], dtype=I32)
    assert_bits_equal(pack(values), expected)
    assert_bits_equal(pack(values + 16, 3), expected)
    assert_bits_equal(pack(ops.npu_format_cast(values, 29), inner_k_tiles=1), expected)


# --- npu_anti_quant --------------------------------------------------------------------------------------------------


def test_anti_quant() -> None:
    two = torch.tensor([2.0])
    codes = torch.tensor([1, 2, 3, 4], dtype=I8)
    assert_bits_equal(ops.npu_anti_quant(codes, two, offset=two), torch.tensor([6, 8, 10, 12], dtype=F16))
    assert_bits_equal(ops.npu_anti_quant(codes, two, dst_dtype=BF16), torch.tensor([2, 4, 6, 8], dtype=BF16))
    scalar = ops.npu_anti_quant(torch.tensor(3, dtype=I8), two)
    assert_bits_equal(scalar, torch.tensor(6, dtype=F16))


def test_anti_quant_of_int4_words() -> None:
    words = torch.tensor([[-2023406815], [-1]], dtype=I32)
    y = ops.npu_anti_quant(words, torch.tensor([0.5]), src_dtype=torch.quint4x2, dst_dtype=BF16)
    assert_bits_equal(y, torch.tensor([[0.5, 1, 1.5, 2, 2.5, 3, 3.5, -4], [-0.5] * 8], dtype=BF16))
    assert ops.npu_anti_quant(words, torch.ones(8)).shape == (2, 8)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("scale_dtype", [F32, BF16])
def test_gradients_of_anti_quant(channels: int, scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (3, 5, 4), generator=generator, dtype=I8)
    scale, offset = (torch.rand(channels, generator=generator).to(scale_dtype).requires_grad_() for _ in range(2))
    dy = torch.randn(3, 5, 4, generator=generator).half()
    y = ops.npu_anti_quant(x, scale, offset=offset)
    wide = [parameter.detach().double().requires_grad_() for parameter in (scale, offset)]
    expected = torch.autograd.grad((x + wide[1]) * wide[0], wide, dy.double(), create_graph=True)
    gradients = torch.autograd.grad(y, (scale, offset), dy, create_graph=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == scale_dtype
        torch.testing.assert_close(gradient, wanted.to(scale_dtype), rtol=1e-2 if scale_dtype == BF16 else 1e-5, atol=0)
    # the gradient of scale depends on offset, and that of offset on scale
    second = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), (scale, offset))
    second_expected = torch.autograd.grad(sum(gradient.sum() for gradient in expected), wide)
    for gradient, wanted in zip(second, second_expected, strict=True):
        torch.testing.assert_close(gradient, wanted.to(scale_dtype), rtol=1e-2 if scale_dtype == BF16 else 1e-4, atol=0)


def test_codes_and_words_have_no_gradient() -> None:
    x = torch.randn(2, 8, dtype=F16, requires_grad=True)
    scales = torch.ones(8, requires_grad=True)
    results = [
        *ops.npu_dynamic_quant(x),
        *ops.npu_dynamic_quant_asymmetric(x, smooth_scales=torch.ones(8, dtype=F16, requires_grad=True)),
        ops.npu_quantize(x, scales, None, I8),
        ops.npu_trans_quant_param(scales, scales),
    ]
    assert not any(result.requires_grad for result in results)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_a_format_is_remembered_by_the_memory() -> None:
    weight = torch.randn(4, 6)
    nz = ops.npu_format_cast(weight, 29)
    assert (ops.get_npu_format(weight), ops.get_npu_format(nz)) == (2, 29)
    assert_bits_equal(nz, weight)
    assert nz.data_ptr() != weight.data_ptr()
    for view in (nz.t(), nz[1:], nz.detach(), torch.nn.Parameter(nz)):
        assert ops.get_npu_format(view) == 29
    parameter = torch.nn.Parameter(weight)
    parameter.data = nz
    assert ops.get_npu_format(parameter) == 29
    for copied in (nz.clone(), nz + 0, copy.deepcopy(nz)):
        assert ops.get_npu_format(copied) == 2
    assert ops.get_npu_format(ops.npu_format_cast(nz, 2)) == 2


def test_a_format_is_named_by_number_or_by_a_tensor() -> None:
    weight, nz = torch.randn(4, 6), ops.npu_format_cast(torch.ones(2, 2), acl_format=29)
    for cast in (ops.npu_format_cast(weight, nz), ops.npu_format_cast(weight, dst=nz, customize_dtype=torch.int8)):
        assert ops.get_npu_format(cast) == 29
    assert ops.get_npu_format(weight) == 2
    assert ops.npu_format_cast_(weight, nz) is weight
    assert ops.get_npu_format(weight) == 29
    assert ops.get_npu_format(ops.npu_format_cast_(weight, acl_format=2)) == 2
    assert ops.get_npu_format(ops.npu_format_cast_(weight, src=29)) == 29


@pytest.mark.parametrize(
    "view", [lambda t: t.t(), sliced, lambda t: t[1:, 2:], lambda t: t[:1].expand(4, 6), lambda t: t[:0]]
)
def test_a_cast_keeps_the_strides(view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.randn(4, 6))
    cast = ops.npu_format_cast(tensor, 29)
    assert cast.stride() == tensor.stride()
    assert_bits_equal(cast, tensor)
    with FakeTensorMode() as mode:
        fake = ops.npu_format_cast(mode.from_tensor(tensor), 29)
    assert fake.stride() == tensor.stride()


def test_a_cast_passes_gradients() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    ops.npu_format_cast(weight, 29).square().sum().backward()
    assert weight.grad is not None
    assert_bits_equal(weight.grad, 2 * weight.detach())
    assert ops.npu_format_cast_(weight, 29) is weight
    hidden = weight * 2
    gradient = torch.autograd.grad(ops.npu_format_cast_(hidden, 29).sum(), weight)[0]
    assert_bits_equal(gradient, torch.full((4, 6), 2.0))


def test_a_format_is_nd_while_compiling() -> None:
    def function(weight: Tensor) -> tuple[Tensor, int]:
        nz = ops.npu_format_cast(weight, 29)
        return ops.npu_format_cast_(nz, 2) + 1, ops.get_npu_format(nz)

    weight = torch.randn(4, 6)
    result, number = torch.compile(function, fullgraph=True, backend="aot_eager")(weight)
    assert_bits_equal(result, weight + 1)
    assert number == 2


def test_matmuls_do_not_depend_on_the_format_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 16, generator=generator).half(), torch.randn(2, 16, 16, generator=generator).half()
    options = {"group_list": torch.tensor([1, 3]), "group_list_type": 1, "group_type": 0, "split_item": 3}
    (expected,) = ops.npu_grouped_matmul([x], [weight], **options)
    (y,) = ops.npu_grouped_matmul([x], [ops.npu_format_cast(weight, 29)], **options)
    assert_bits_equal(y, expected)


def test_one_scale_rounds_product_and_sum_together() -> None:
    """As torch does on CPUs with fused multiply-add; these are ties, where it shows."""
    x = torch.arange(-40, 40).mul(0.6875).bfloat16()
    scale, zero = torch.tensor([1.375], dtype=torch.bfloat16), torch.tensor([-3], dtype=torch.bfloat16)
    reciprocal = 1 / torch.tensor(1.375)
    values = (x.double() * reciprocal.double() - 3).float()
    assert_bits_equal(ops.npu_quantize(x, scale, zero, torch.qint8), values.round().to(torch.int8))


@pytest.mark.parametrize("shape", [(1,), (4,), (1, 1), (1, 4), (2, 4)])
def test_an_offset_of_one_row_or_one_number_serves_all_scales(shape: tuple[int, ...]) -> None:
    scale, offset = torch.rand(2, 4), torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    words = ops.npu_trans_quant_param(scale, offset)
    assert_bits_equal(words, ops.npu_trans_quant_param(scale, offset.expand(2, 4).contiguous()))
