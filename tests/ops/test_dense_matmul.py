"""Numbers of the quantized dense matmuls that can be checked by hand, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.ops import _numerics
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.reference import common
from tests.ops.samples.base import BF16, F16, F32

I8, I32, I64 = torch.int8, torch.int32, torch.int64


def int8(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=I8)


# --- npu_weight_quant_batchmatmul ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_weight_quant(dtype: torch.dtype) -> None:
    x, weight = torch.tensor([[1, 2]], dtype=dtype), int8([[1, -2], [3, 4]])
    scale, offset = torch.tensor([0.5, 0.25], dtype=dtype), torch.tensor([1, 0], dtype=dtype)
    y = ops.npu_weight_quant_batchmatmul(x, weight, scale, offset)
    assert_bits_equal(y, torch.tensor([[5, 1.5]], dtype=dtype))
    bias = torch.tensor([[1, -1]], dtype=F16 if dtype == F16 else F32)
    y = ops.npu_weight_quant_batchmatmul(x, weight.t().contiguous().t(), scale[None], offset[None], bias=bias)
    assert_bits_equal(y, torch.tensor([[6, 0.5]], dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "weight", "offset", "scale", "expected"),
    [
        # float16 is rounded after the addition and after the product, bfloat16 once
        (F16, 77, -0.7, 0.013, 0.9921875),
        (BF16, 77, -0.7, 0.013, 0.9921875),
        (F16, -37, 0.11, 0.037, -1.3642578125),
        (BF16, -37, 0.11, 0.037, -1.3671875),
    ],
)
def test_weight_quant_rounds_the_weight(
    dtype: torch.dtype, weight: int, offset: float, scale: float, expected: float
) -> None:
    parameters = (torch.tensor([value], dtype=dtype) for value in (scale, offset))
    y = ops.npu_weight_quant_batchmatmul(torch.ones(1, 1, dtype=dtype), int8([[weight]]), *parameters)
    assert y.item() == expected


def test_weight_quant_groups_with_a_short_last_one() -> None:
    x, weight = torch.ones(1, 70, dtype=F16), torch.ones(70, 2, dtype=I8)
    scale = torch.tensor([[1, 2], [0.5, 1], [4, 8]], dtype=F16)
    y = ops.npu_weight_quant_batchmatmul(x, weight, scale, antiquant_group_size=32)
    assert_bits_equal(y, torch.tensor([[32 + 16 + 24, 64 + 32 + 48]], dtype=F16))
    offset = torch.tensor([[0, 0], [1, 1], [0, -1]], dtype=F16)
    y = ops.npu_weight_quant_batchmatmul(x, weight, scale, offset, antiquant_group_size=32)
    assert_bits_equal(y, torch.tensor([[32 + 32 + 24, 64 + 64 + 0]], dtype=F16))


def test_weight_quant_of_int4_words() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (16, 8), generator=generator, dtype=I32)
    x, scale = torch.randn(3, 16, generator=generator).half(), torch.rand(8, generator=generator).half()
    expected = ops.npu_weight_quant_batchmatmul(x, values.to(I8), scale)
    along_n = ops.npu_convert_weight_to_int4pack(values)
    along_k = ops.npu_convert_weight_to_int4pack(values.t().contiguous()).t()
    for words in (along_n, along_k, along_n.t().contiguous().t(), ops.npu_format_cast(along_n, 29)):
        assert_bits_equal(ops.npu_weight_quant_batchmatmul(x, words, scale), expected)


def test_weight_quant_quantizes_the_unrounded_result() -> None:
    x, weight = torch.tensor([[1, 2]], dtype=F16), int8([[1, -2], [3, 4]])
    scale, offset = torch.tensor([0.5, 0.25], dtype=F16), torch.tensor([1, 0], dtype=F16)
    quant_scale, quant_offset = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.25])
    y = ops.npu_weight_quant_batchmatmul(x, weight, scale, offset, quant_scale)
    assert_bits_equal(y, int8([[2, 2]]))  # 2.5 and 1.5
    y = ops.npu_weight_quant_batchmatmul(x, weight, scale, offset, quant_scale, quant_offset)
    assert_bits_equal(y, int8([[4, 3]]))  # 3.5 and 2.75
    words = ops.npu_trans_quant_param(quant_scale, torch.tensor([-3.0, 200.0]))
    y = ops.npu_weight_quant_batchmatmul(x, weight, scale, offset, words)
    assert_bits_equal(y, int8([[-1, 127]]))
    # 2049 is no float16: rounded first it would give 2048
    long = torch.full((1, 3), 683, dtype=F16)
    y = ops.npu_weight_quant_batchmatmul(
        long, torch.ones(3, 1, dtype=I8), torch.ones(1, dtype=F16), None, torch.ones(1), torch.tensor([-2048.0])
    )
    assert y.item() == 1


def test_weight_quant_saturates_nine_bits_before_the_offset_of_a_word() -> None:
    x, weight, one = torch.full((1, 1), 1000, dtype=F16), int8([[1]]), torch.ones(1, dtype=F16)
    words = ops.npu_trans_quant_param(torch.tensor([0.3]), torch.tensor([-200.0]))
    assert ops.npu_weight_quant_batchmatmul(x, weight, one, None, words).item() == 55
    y = ops.npu_weight_quant_batchmatmul(x, weight, one, None, torch.tensor([0.3]), torch.tensor([-200.0]))
    assert y.item() == 100


def test_gradients_of_weight_quant_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=generator).bfloat16().requires_grad_()
    bias = torch.randn(4, generator=generator).requires_grad_()
    weight = torch.randint(-128, 128, (8, 4), generator=generator, dtype=I8)
    scale = torch.full((4,), 2.0**-6, dtype=BF16)  # the weight is exact
    dense = weight.double() * 2.0**-6

    def through(product: Tensor, *leaves: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(product.double().square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.double().square().sum() for gradient in first), leaves)
        return [*first, *second]

    actual = through(ops.npu_weight_quant_batchmatmul(x, weight, scale, bias=bias), x, bias)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, bias)]
    expected = through(wide[0] @ dense + wide[1], *wide)
    for gradient, wanted in zip(actual, expected, strict=True):
        tolerance = 0.05 * wanted.abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=tolerance)
        assert gradient.dtype in (BF16, F32)


def test_quantized_results_have_no_gradient() -> None:
    x = torch.ones(2, 4, dtype=F16, requires_grad=True)
    scale = torch.ones(1, dtype=F16, requires_grad=True)
    y = ops.npu_weight_quant_batchmatmul(x, torch.ones(4, 3, dtype=I8), scale, quant_scale=torch.ones(1))
    assert not y.requires_grad
    factor = torch.ones(1, requires_grad=True)
    assert not ops.npu_quant_matmul(torch.ones(2, 4, dtype=I8), torch.ones(4, 3, dtype=I8), factor).requires_grad


# --- npu_quant_matmul ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "scale", "offset", "expected"),
    [
        ((5, 1), 0.5, 0, 2),
        ((7, 1), 0.5, 0, 4),
        ((35, 1), 0.1, 0, 3),  # 3.4991 with ten bits of mantissa, 3.5 with all
        ((100, 10), 0.3, -200, 55),  # 300 is 255 in nine bits
        ((-100, 10), 0.3, 0, -128),
        ((-100, 10), 0.3, 100, -128),
        ((100, 10), 0.3, 0, 127),
        ((25, 1), 0.1, 3, 5),
    ],
)
def test_int8_results(factors: tuple[int, int], scale: float, offset: int, expected: int) -> None:
    x1, x2 = (int8([[factor]]) for factor in factors)
    scales, offsets = torch.tensor([scale]), torch.tensor([float(offset)])
    words = ops.npu_trans_quant_param(scales, offsets)
    assert_bits_equal(ops.npu_quant_matmul(x1, x2, words), int8([[expected]]))
    assert_bits_equal(ops.npu_quant_matmul(x1, x2, words, offset=torch.tensor([99.0])), int8([[expected]]))
    assert_bits_equal(ops.npu_quant_matmul(x1, x2, scales, offset=offsets), int8([[expected]]))
    assert_bits_equal(ops.npu_quant_matmul(x1, x2, scales, offset=offsets, output_dtype=1), int8([[expected]]))


X1 = [[10, -20], [3, 4], [-5, 6]]
X2 = [[1, 2, -3], [4, -5, 6]]
SCALE, BIAS, PER_TOKEN = [0.5, 0.25, 0.125], [1, 2, 3], [0.01, 0.02, 0.03]


def test_int32_results_ignore_the_scale() -> None:
    bias = torch.tensor(BIAS, dtype=I32)
    for scale in (torch.tensor(SCALE), torch.tensor([7.0], dtype=BF16)):
        y = ops.npu_quant_matmul(int8(X1), int8(X2), scale, bias=bias, output_dtype=I32)
        assert_bits_equal(y, torch.tensor([[-69, 122, -147], [20, -12, 18], [20, -38, 54]], dtype=I32))


def test_float16_results_per_token() -> None:
    y = ops.npu_quant_matmul(
        int8(X1),
        int8(X2),
        torch.tensor(SCALE),
        bias=torch.tensor(BIAS, dtype=I32),
        pertoken_scale=torch.tensor(PER_TOKEN),
        output_dtype=F16,
    )
    assert y[0].tolist() == [-0.344970703125, 0.304931640625, -0.1837158203125]


def test_bfloat16_results() -> None:
    scale, bias = torch.tensor(SCALE, dtype=BF16), torch.tensor(BIAS, dtype=I32)
    y = ops.npu_quant_matmul(
        int8(X1), int8(X2), scale, bias=bias, pertoken_scale=torch.tensor(PER_TOKEN), output_dtype=BF16
    )
    assert y[0].tolist() == [-0.345703125, 0.3046875, -0.18359375]
    late = torch.tensor([1, -1, 0.5], dtype=BF16)
    y = ops.npu_quant_matmul(
        int8(X1), int8(X2), scale, bias=late, pertoken_scale=torch.tensor(PER_TOKEN), output_dtype=BF16
    )
    assert y[0].tolist() == [0.6484375, -0.69921875, 0.3125]
    y = ops.npu_quant_matmul(int8(X1), int8(X2), scale, bias=bias, output_dtype=BF16)
    assert y[0].tolist() == [-34.5, 30.5, -18.375]


def test_a_float32_scale_loses_bits_where_a_device_packs_it() -> None:
    x1, x2, scale = int8([[17]]), int8([[1]]), torch.tensor([0.1])
    assert ops.npu_quant_matmul(x1, x2, scale, output_dtype=F16).item() == 1.69921875
    per_token = ops.npu_quant_matmul(x1, x2, scale, pertoken_scale=torch.ones(1), output_dtype=F16)
    assert per_token.item() == 1.7001953125
    # 0.1 is not cut: 125 * 0.1 is 12.5 and not 12.497
    assert ops.npu_quant_matmul(int8([[125]]), x2, scale, output_dtype=BF16).item() == 12.5


def test_batches_broadcast() -> None:
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randint(-5, 5, (1, 4, 6), generator=generator, dtype=I8)
    x2 = torch.randint(-5, 5, (3, 6, 5), generator=generator, dtype=I8)
    bias = torch.randint(-5, 5, (3, 1, 5), generator=generator, dtype=I32)
    scale, offset = torch.rand(5, generator=generator), torch.randn(5, generator=generator)
    y = ops.npu_quant_matmul(x1, x2, scale, offset=offset, bias=bias)
    assert y.shape == (3, 4, 5)
    for batch in range(3):
        alone = ops.npu_quant_matmul(x1[0], x2[batch], scale, offset=offset, bias=bias[batch, 0])
        assert_bits_equal(y[batch], alone)


def test_int4_words_are_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 8, (3, 16), generator=generator, dtype=I32)
    b = torch.randint(-8, 8, (16, 8), generator=generator, dtype=I32)
    scale, bias = torch.rand(8, generator=generator), torch.arange(8, dtype=I32)
    expected = ops.npu_quant_matmul(a.to(I8), b.to(I8), scale, bias=bias, output_dtype=F16)
    words, along_n = (ops.npu_convert_weight_to_int4pack(values) for values in (a, b))
    along_k = ops.npu_convert_weight_to_int4pack(b.t().contiguous()).t()
    for x2 in (along_n, along_k, along_n.t().contiguous().t()):
        assert_bits_equal(ops.npu_quant_matmul(words, x2, scale, bias=bias, output_dtype=F16), expected)


def test_int4_groups_subtract_the_offset_of_the_weight() -> None:
    x1, x2 = torch.tensor([[1, 2, 3, 4, -5, -6, 7, -8]]), torch.ones(8, 8, dtype=torch.int64)
    scale, offset = torch.full((2, 8), 0.5), torch.zeros(2, 8, dtype=F16)
    scale[1], offset[1, 0] = 0.25, 3
    y = ops.npu_quant_matmul(
        common.pack_int4(x1),
        common.pack_int4(x2),
        scale,
        offset=offset,
        pertoken_scale=torch.tensor([2.0]),
        output_dtype=BF16,
    )
    # 10 * 0.5 - 12 * 0.25, and where the weight is 1 - 3 instead of 1: 10 * 0.5 + 24 * 0.25
    assert_bits_equal(y, torch.tensor([[22.0] + [4.0] * 7], dtype=BF16))


@pytest.mark.parametrize("has_dot_product", [False, True])
def test_sums_are_exact_on_every_cpu(has_dot_product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_numerics, "_has_int8_dot_product", lambda: has_dot_product)
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randint(-128, 128, (2, 3000), generator=generator, dtype=I8) for _ in range(2))
    for right in (x2.t(), x2.t().contiguous()):
        y = ops.npu_quant_matmul(x1, right, torch.ones(1), output_dtype=I32)
        assert_bits_equal(y, (x1.long() @ x2.t().long()).int())


def test_the_format_of_the_weight_changes_nothing() -> None:
    x1, x2 = int8(X1), int8(X2)
    expected = ops.npu_quant_matmul(x1, x2, torch.tensor([0.5]))
    assert_bits_equal(ops.npu_quant_matmul(x1, ops.npu_format_cast(x2, 29), torch.tensor([0.5])), expected)
    with torch.no_grad():
        scale = torch.tensor([0.5], requires_grad=True)
        assert ops.npu_quant_matmul(x1, x2, scale, output_dtype=BF16).dtype == BF16


@pytest.mark.parametrize("layout", ["rows", "columns", "overlapping", "one-column"])
@pytest.mark.parametrize("side", ["x1", "x2"])
def test_memory_that_is_shared_between_rows_is_read_as_the_view_says(side: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randint(-128, 128, (200,), generator=generator, dtype=I8)
    views = {
        "rows": memory[:64].view(1, 64).expand(64, 64),
        "columns": memory[:64].view(64, 1).expand(64, 64),
        "overlapping": memory.as_strided((64, 64), (2, 1)),
        "one-column": memory[:128].view(64, 2)[:, :1].expand(64, 64),
    }
    other = torch.randint(-128, 128, (64, 64), generator=generator, dtype=I8)
    x1, x2 = (views[layout], other) if side == "x1" else (other, views[layout])
    y = ops.npu_quant_matmul(x1, x2, torch.ones(1), output_dtype=I32)
    assert_bits_equal(y, (x1.long() @ x2.long()).int())


def test_a_scale_that_is_a_constant_fits_whatever_is_compiled() -> None:
    scale = torch.ones(16, dtype=F16)
    compiled = torch.compile(
        lambda x, weight: ops.npu_weight_quant_batchmatmul(x, weight, scale), fullgraph=True, backend="eager"
    )
    x = torch.ones(4, 64, dtype=F16)
    for weight in (torch.ones(64, 16, dtype=I8), torch.zeros(64, 2, dtype=I32), torch.ones(64, 16, dtype=I8)):
        assert_bits_equal(compiled(x, weight), ops.npu_weight_quant_batchmatmul(x, weight, scale))
