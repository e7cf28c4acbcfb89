"""Worked examples of the grouped matmuls with hand-checkable values, for the library and for the reference alike."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.reference import common, matmul

HALF_DTYPES = [torch.float16, torch.bfloat16]
FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class _Reference:
    """The reference behind the public signatures, with the final cast applied."""

    def npu_grouped_matmul(self, x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
        dtype = options.get("output_dtype") or x[0].dtype
        results = matmul.grouped_matmul(x, weight, **options)
        return [y.float().to(dtype) if y.is_floating_point() else y for y in results]

    def npu_convert_weight_to_int4pack(self, weight: Tensor) -> Tensor:
        return common.pack_int4(weight)


@pytest.fixture(params=[_Reference(), ops], ids=["reference", "library"])
def impl(request: pytest.FixtureRequest) -> Any:
    return request.param


def _int8(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


def _int32(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _int64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _assert_near(actual: Tensor, expected: Sequence[Any], dtype: torch.dtype = torch.float32) -> None:
    """For values that are printed with seven digits."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_int4_weight_packed_along_k_as_transposed_view(impl: Any, dtype: torch.dtype) -> None:
    logical = _int32([[((3 * k + 5 * n + 7 * e) % 16) - 8 for n in range(16)] for e in range(2) for k in range(8)])
    logical = logical.reshape(2, 8, 16)
    packed_n = torch.stack([impl.npu_convert_weight_to_int4pack(w) for w in logical])
    packed_k = torch.stack([impl.npu_convert_weight_to_int4pack(w.t().contiguous()) for w in logical]).transpose(1, 2)
    assert packed_n.shape == (2, 8, 2)
    assert packed_k.shape == (2, 1, 16)
    x = torch.eye(8, dtype=dtype).repeat(2, 1)
    for weight in (packed_n, packed_k):
        y = impl.npu_grouped_matmul(
            [x],
            [weight],
            antiquant_scale=[torch.full((2, 16), 0.5, dtype=dtype)],
            antiquant_offset=[torch.ones(2, 16, dtype=dtype)],
            group_list=_int64([8, 16]),
            group_type=0,
            split_item=2,
        )[0]
        assert_bits_equal(y, ((logical.reshape(16, 16) + 1) * 0.5).to(dtype))


# --- grouped matmul: unquantized -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("split_item", [2, 3])
@pytest.mark.parametrize(
    ("group_list", "group_list_type"),
    [pytest.param([2, 0, 2], 1, id="counts"), pytest.param([2, 2, 4], 0, id="cumsum")],
)
def test_single_weight_with_empty_group_and_uncovered_row(
    impl: Any, dtype: torch.dtype, split_item: int, group_list: list[int], group_list_type: int
) -> None:
    x = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]], dtype=dtype)
    weight = torch.tensor([[[1, 0, 2], [0, 1, -1]], [[float("nan")] * 3] * 2, [[-1, 0, 1], [0, 2, 0]]], dtype=dtype)
    bias = torch.tensor([[0.5, 0, 0], [0, 0.25, 0], [1, 1, 1]], dtype=_bias_dtype(dtype))
    y = impl.npu_grouped_matmul(
        [x],
        [weight],
        bias=[bias],
        group_list=_int64(group_list),
        group_type=0,
        group_list_type=group_list_type,
        split_item=split_item,
    )
    expected = [[1.5, 2, 0], [3.5, 4, 2], [-4, 13, 6], [-6, 17, 8], [0, 0, 0]]
    assert_bits_equal(y[0], torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("group_list", "group_list_type"),
    [pytest.param([1, 0, 3], 1, id="counts"), pytest.param([1, 1, 4], 0, id="cumsum")],
)
def test_k_split(impl: Any, dtype: torch.dtype, group_list: list[int], group_list_type: int) -> None:
    x = torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8]], dtype=dtype).t()
    weight = torch.tensor([[1, 0, 1], [0, 1, 1], [2, 0, 0], [0, 0, 3]], dtype=dtype)
    y = impl.npu_grouped_matmul(
        [x], [weight], group_list=_int64(group_list), group_type=2, group_list_type=group_list_type, split_item=2
    )
    expected = [[[1, 0, 1], [5, 0, 5]], [[0, 0, 0], [0, 0, 0]], [[6, 2, 14], [14, 6, 30]]]
    assert_bits_equal(y[0], torch.tensor(expected, dtype=dtype))


def test_counts_and_cumsum_of_nine_groups_are_equivalent(impl: Any) -> None:
    counts = [123, 0, 333, 0, 0, 333, 0, 0, 0]
    cumsum = [123, 123, 456, 456, 456, 789, 789, 789, 789]
    x = (torch.arange(789 * 2).reshape(789, 2) % 7 - 3).half()
    weight = (torch.arange(9 * 2 * 3).reshape(9, 2, 3) % 11 - 5).half()
    expected = matmul.grouped_mm(x, weight, _int64(counts)).half()
    for group_list, kind in ((counts, 1), (cumsum, 0)):
        y = impl.npu_grouped_matmul(
            [x], [weight], group_list=_int64(group_list), group_type=0, group_list_type=kind, split_item=2
        )
        assert_bits_equal(y[0], expected)


def _zeros(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape, dtype=torch.float16) for shape in shapes]


@pytest.mark.parametrize(
    ("x", "weight", "options", "shapes"),
    [
        pytest.param(
            _zeros((8, 4)),
            _zeros((2, 4, 6)),
            {"group_list": _int64([4, 8]), "group_type": 0, "split_item": 2},
            [(8, 6)],
            id="rows-single-weight",
        ),
        pytest.param(
            _zeros((8, 4)),
            _zeros((4, 6), (4, 6)),
            {"group_list": _int64([4, 8]), "group_type": 0, "split_item": 3},
            [(8, 6)],
            id="rows-weight-list",
        ),
        pytest.param(
            _zeros((2, 3, 4), (1, 3, 5)),
            _zeros((4, 6), (5, 7)),
            {"group_type": -1},
            [(2, 3, 6), (1, 3, 7)],
            id="no-grouping-rank-3",
        ),
        pytest.param(
            _zeros((8, 4), (3, 5)),
            _zeros((4, 6), (5, 6)),
            {"group_type": 0, "split_item": 2},
            [(11, 6)],
            id="lists-to-one-output",
        ),
        pytest.param(
            [torch.zeros(8, 4, dtype=torch.float16).t()],
            _zeros((8, 6)),
            {"group_list": _int64([3, 8]), "group_type": 2, "split_item": 2},
            [(2, 4, 6)],
            id="k-split",
        ),
        pytest.param(
            _zeros((8, 4)),
            [torch.zeros(2, 4, 2, dtype=torch.int32)],
            {
                "antiquant_scale": _zeros((2, 16)),
                "antiquant_offset": _zeros((2, 16)),
                "group_list": _int64([4, 8]),
                "group_type": 0,
                "split_item": 2,
            },
            [(8, 16)],
            id="int4-weight",
        ),
        pytest.param(
            _zeros((8, 4)),
            _zeros((4, 6), (4, 3)),
            {"group_list": [2, 8]},
            [(2, 6), (6, 3)],
            id="list-overload-one-x-many-outputs",
        ),
        pytest.param(
            _zeros((8, 4)),
            _zeros((4, 6), (4, 6)),
            {"group_list": [2, 8], "split_item": 3},
            [(8, 6)],
            id="list-overload-one-x-one-output",
        ),
        pytest.param(
            _zeros((8, 4), (3, 5)),
            _zeros((4, 6), (5, 6)),
            {"group_list": [8, 11], "split_item": 2},
            [(11, 6)],
            id="list-overload-lists-to-one-output",
        ),
    ],
)
def test_output_shapes(
    impl: Any, x: list[Tensor], weight: list[Tensor], options: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    y = impl.npu_grouped_matmul(x, weight, **options)
    assert isinstance(y, (list, tuple))
    assert [tuple(tensor.shape) for tensor in y] == shapes
    assert all(tensor.dtype == torch.float16 and tensor.is_contiguous() for tensor in y)


# --- grouped matmul: int8 --------------------------------------------------------------------------------------------


def _scale_word(scale: float, offset: int = 0, *, low_bits: int = 0, signed: bool = True) -> int:
    """The packed parameter, bit by bit: float32 bits 13-31 of the scale, the 9-bit offset at 37, the flag at 46."""
    bits = struct.unpack("<I", struct.pack("<f", scale))[0]
    return (bits & 0xFFFFE000) | (low_bits & 0x1FFF) | ((offset & 0x1FF) << 37) | (int(signed) << 46)


def test_hand_built_scale_words() -> None:
    assert _scale_word(0.1) == 70369781006336
    assert _scale_word(0.5, -2) == 140463667412992
    assert common.decode_scale_word(70369781006336) == (0.0999755859375, 0)
    assert common.decode_scale_word(70507248869376) == (1.0458984375, 1)
    assert common.decode_scale_word(140463653937152) == (0.1741943359375, -2)


@pytest.mark.parametrize(
    ("low_bits", "signed"),
    [
        pytest.param(0, True, id="trans-quant-param"),
        pytest.param(0x1FFF, True, id="low-mantissa-bits-set"),
        pytest.param(0, False, id="signed-flag-clear"),
    ],
)
@pytest.mark.parametrize("accumulator_from", ["product", "bias"])
@pytest.mark.parametrize("scenario", ["single-weight", "no-grouping"])
def test_int8_output_truncates_the_scale_and_clamps_to_int9(
    impl: Any, low_bits: int, signed: bool, accumulator_from: str, scenario: str
) -> None:
    cases = [  # accumulator, scale, offset, result
        (5, 0.5, 0, 2),  # 2.5 ties to even
        (7, 0.5, 0, 4),  # 3.5 ties to even
        (35, 0.1, 0, 3),  # 3.499..., an untruncated scale gives 3.5
        (1000, 0.3, -200, 55),  # 300 is clamped to 255 before the offset
        (-1000, 0.3, 0, -128),
        (-1000, 0.3, 100, -128),
        (1000, 0.3, 0, 127),
        (25, 0.1, 3, 5),
        (1000, 0.0, 0, 0),
    ]
    accumulators = [case[0] for case in cases]
    words = _int64([_scale_word(s, o, low_bits=low_bits if s else 0, signed=signed) for _, s, o, _ in cases])
    x = _int8([[8, 1]])
    if accumulator_from == "product":
        quotients = [int(value / 8) for value in accumulators]
        rests = [value - 8 * q for value, q in zip(accumulators, quotients, strict=True)]
        weight, bias = _int8([quotients, rests]), torch.zeros(len(cases), dtype=torch.int32)
    else:
        weight, bias = torch.ones(2, len(cases), dtype=torch.int8), _int32(accumulators) - 9
    if scenario == "single-weight":
        y = impl.npu_grouped_matmul(
            [x],
            [weight[None]],
            bias=[bias[None]],
            scale=[words[None]],
            group_list=_int64([1]),
            group_type=0,
            split_item=2,
        )
    else:
        y = impl.npu_grouped_matmul([x], [weight], bias=[bias], scale=[words], group_type=-1)
    assert_bits_equal(y[0], _int8([[case[3] for case in cases]]))


INT8_SCALE = [[0.5, 0.25, 0.125], [0.1, 0.2, 0.3]]
INT8_BIAS = _int32([[1, 2, 3], [0, 0, 10]])
PER_TOKEN = torch.tensor([0.01, 0.02, 0.03])


@pytest.mark.parametrize(
    ("options", "output_dtype", "expected"),
    [
        pytest.param(
            {"bias": [INT8_BIAS]},
            torch.int32,
            [[-69, 122, -147], [17, 24, 41], [-41, -40, -29]],
            id="raw-accumulators",
        ),
        pytest.param(
            {"bias": [INT8_BIAS], "scale": [torch.tensor(INT8_SCALE)], "per_token_scale": [PER_TOKEN]},
            torch.float16,
            [
                [-0.344970703125, 0.304931640625, -0.1837158203125],
                [0.03399658203125, 0.09600830078125, 0.2459716796875],
                [-0.12298583984375, -0.239990234375, -0.260986328125],
            ],
            id="per-token-float16",
        ),
        pytest.param(
            {"bias": [INT8_BIAS], "scale": [torch.tensor(INT8_SCALE).bfloat16()], "per_token_scale": [PER_TOKEN]},
            torch.bfloat16,
            [
                [-0.345703125, 0.3046875, -0.18359375],
                [0.033935546875, 0.09619140625, 0.2470703125],
                [-0.123046875, -0.240234375, -0.26171875],
            ],
            id="per-token-bfloat16",
        ),
        pytest.param(
            {"bias": [INT8_BIAS], "scale": [torch.tensor(INT8_SCALE)]},
            torch.float16,
            [[-34.5, 30.5, -18.375], [1.7001953125, 4.80078125, 12.296875], [-4.1015625, -8, -8.703125]],
            id="static-float16",
        ),
        pytest.param(
            {
                "bias": [torch.tensor([[1, -1, 0.5], [2, 0, -2]], dtype=torch.bfloat16)],
                "scale": [torch.tensor(INT8_SCALE).bfloat16()],
                "per_token_scale": [PER_TOKEN],
            },
            torch.bfloat16,
            [
                [0.6484375, -0.69921875, 0.3125],
                [2.03125, 0.09619140625, -1.8125],
                [1.875, -0.240234375, -2.359375],
            ],
            id="per-token-bfloat16-bias-after-scaling",
        ),
    ],
)
def test_int8(impl: Any, options: dict[str, Any], output_dtype: torch.dtype, expected: list[list[float]]) -> None:
    y = impl.npu_grouped_matmul(
        [_int8([[10, -20], [3, 4], [-5, 6]])],
        [_int8([[[1, 2, -3], [4, -5, 6]], [[7, 8, 9], [-1, 0, 1]]])],
        group_list=_int64([1, 2]),
        group_type=0,
        group_list_type=1,
        split_item=2,
        output_dtype=output_dtype,
        **options,
    )
    assert_bits_equal(y[0], torch.tensor(expected, dtype=output_dtype))


ACTIVATIONS = [  # at -3, -1, -0.5, 0.5, 1, 3
    pytest.param(0, [-3, -1, -0.5, 0.5, 1, 3], id="none"),
    pytest.param(1, [0, 0, 0, 0.5, 1, 3], id="relu"),
    pytest.param(2, [-0.0036374, -0.1588080, -0.1542860, 0.3457140, 0.8411920, 2.9963627], id="gelu-tanh"),
    pytest.param(4, [-0.0180713, -0.1542042, -0.1496116, 0.3503884, 0.8457958, 2.9819288], id="fast-gelu"),
    pytest.param(5, [-0.1422776, -0.2689414, -0.1887703, 0.3112297, 0.7310586, 2.8577223], id="silu"),
]


def _activation_options(act_type: int) -> dict[str, Any]:
    return {
        "scale": [torch.full((1, 2), 0.5)],
        "per_token_scale": [torch.ones(6)],
        "group_list": _int64([6]),
        "group_type": 0,
        "split_item": 2,
        "act_type": act_type,
        "output_dtype": torch.float16,
    }


@pytest.mark.parametrize(("act_type", "values"), ACTIVATIONS)
def test_activations_on_the_per_token_path(impl: Any, act_type: int, values: list[float]) -> None:
    x, weight = _int8([[-6], [-2], [-1], [1], [2], [6]]), _int8([[[1, -1]]])
    y = impl.npu_grouped_matmul([x], [weight], **_activation_options(act_type))[0]
    expected = torch.tensor([values, values[::-1]]).t().half()
    assert_bits_equal(y + 0.0, expected + 0.0)  # ReLU may return either zero


@pytest.mark.parametrize(("act_type", "values"), ACTIVATIONS)
def test_activations_of_the_reference_before_the_cast(act_type: int, values: list[float]) -> None:
    x, weight = _int8([[-6], [-2], [-1], [1], [2], [6]]), _int8([[[1, -1]]])
    y = matmul.grouped_matmul([x], [weight], **_activation_options(act_type))[0]
    _assert_near(y, list(zip(values, values[::-1], strict=True)), torch.float64)


# --- grouped matmul: quantized weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        pytest.param(torch.float16, [0.9921875, -1.3642578125], id="float16-rounds-twice"),
        pytest.param(torch.bfloat16, [0.9921875, -1.3671875], id="bfloat16-rounds-once"),
    ],
)
@pytest.mark.parametrize("scenario", ["single-weight", "no-grouping"])
def test_int8_weight_rounding(impl: Any, dtype: torch.dtype, expected: list[float], scenario: str) -> None:
    x, weight = torch.ones(1, 1, dtype=dtype), _int8([[77, -37]])
    offset, scale = torch.tensor([-0.7, 0.11], dtype=dtype), torch.tensor([0.013, 0.037], dtype=dtype)
    if scenario == "single-weight":
        y = impl.npu_grouped_matmul(
            [x],
            [weight[None]],
            antiquant_scale=[scale[None]],
            antiquant_offset=[offset[None]],
            group_list=_int64([1]),
            group_type=0,
            split_item=2,
        )
    else:
        y = impl.npu_grouped_matmul([x], [weight], antiquant_scale=[scale], antiquant_offset=[offset], group_type=-1)
    assert_bits_equal(y[0], torch.tensor([expected], dtype=dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_int4_weight_with_two_groups_along_k(impl: Any, dtype: torch.dtype) -> None:
    rows = [[1, -2, 3, -4, 5, -6, 7, -8], [0, 1, 2, 3, -1, -2, -3, -4], [7, 6, 5, 4, 3, 2, 1, 0], list(range(-8, 0))]
    packed = impl.npu_convert_weight_to_int4pack(_int32(rows))
    assert_bits_equal(packed, _int32([[-2019179551], [-839962096], [19088743], [-19088744]]))
    y = impl.npu_grouped_matmul(
        [torch.tensor([[1, 2, 3, 4], [-1, 0.5, 0, 2]], dtype=dtype)],
        [packed[None]],
        antiquant_scale=[torch.tensor([[[0.5] * 8, [0.25, 0.5] * 4]], dtype=dtype)],
        antiquant_offset=[torch.tensor([[[1] * 8, [-1] * 8]], dtype=dtype)],
        group_list=_int64([2]),
        group_type=0,
        split_item=2,
    )
    expected = [[-2.5, -7, 1, -5, -0.5, -10, -1, -12], [-5.25, -7, -4.75, -3.5, -5.5, -1.75, -6, 0.75]]
    assert_bits_equal(y[0], torch.tensor(expected, dtype=dtype))


# --- pairs of group and size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        pytest.param([[2, 1], [0, 2], [1, 0]], [[100, 0], [3, 4], [4, 6], [0, 0]], id="rows-follow-the-list"),
        pytest.param([[2, 1], [0, 0], [1, 2]], [[100, 0], [0, 0], [0, 0], [0, 0]], id="stops-at-a-size-of-zero"),
        pytest.param([[0, 0], [0, 0], [0, 0]], [[0, 0]] * 4, id="only-padding"),
    ],
)
def test_pairs(impl: Any, pairs: list[list[int]], expected: list[list[int]]) -> None:
    y = impl.npu_grouped_matmul(
        [_int8([[1, 0], [0, 1], [1, 1], [2, 2]])],
        [_int8([[[1, 2], [3, 4]], [[7, 7], [7, 7]], [[100, 0], [0, 100]]])],
        group_list=_int64(pairs),
        group_type=0,
        group_list_type=2,
        split_item=3,
        output_dtype=torch.int32,
    )
    assert_bits_equal(y[0], _int32(expected))


# --- int4 activations and weights ------------------------------------------------------------------------------------

A4_ROWS = [[1, 2, 3, 4, -5, -6, 7, -8], [7, 7, 7, 7, -8, -8, -8, -8]]
W4_COLUMN = [-1239649576, -380656373, 477288510, 1336216417, 1926774420, -1525980729, -666987270, 190957357]
# float32 bits of 0.1 and 0.3
TENTH, THREE_TENTHS = 1036831949, 1050253722


def _w4() -> Tensor:
    return _int32([[(3 * k + 5 * n) % 16 - 8 for n in range(8)] for k in range(8)])


def test_packed_operands_of_the_int4_example(impl: Any) -> None:
    assert_bits_equal(impl.npu_convert_weight_to_int4pack(_int32(A4_ROWS)), _int32([[-2018819295], [-2004322441]]))
    assert_bits_equal(impl.npu_convert_weight_to_int4pack(_w4()), _int32([[word] for word in W4_COLUMN]))
    assert _scale_word(0.1, low_bits=TENTH, signed=False) == TENTH
    assert _scale_word(0.3, low_bits=THREE_TENTHS, signed=False) == THREE_TENTHS


def _a4w4(impl: Any, words: Tensor, **options: Any) -> Tensor:
    (y,) = impl.npu_grouped_matmul(
        [_int32([[-2018819295], [-2004322441]])],
        [_int32(W4_COLUMN).reshape(1, 8, 1)],
        scale=[words],
        group_list=_int64([2]),
        group_type=0,
        split_item=2,
        **{"output_dtype": torch.float16, **options},
    )
    return y


# sums over K 0 to 3 and 4 to 7 of the first row, scaled by 0.1 and 0.3, each rounded to float16
PARTS = [
    [-2, 3, -3.19921875, -1.3994140625, 2, 0.599609375, -2.3984375, 1],
    [-23.984375, 10.796875, -7.1953125, -20.390625, 14.390625, -3.59765625, -16.78125, -5.99609375],
]
SUMS = [-25.984375, 13.796875, -10.390625, -21.796875, 16.390625, -2.998046875, -19.1875, -4.99609375]


@pytest.mark.parametrize("part", [0, 1])
def test_int4_products_of_one_group_of_k_are_rounded_to_float16(impl: Any, part: int) -> None:
    words = torch.zeros(1, 2, 8, dtype=torch.int64)
    words[0, part] = (TENTH, THREE_TENTHS)[part]
    assert_bits_equal(_a4w4(impl, words)[0], torch.tensor(PARTS[part], dtype=torch.float16))


def test_int4_products_add_the_groups_of_k_in_float16_and_scale_the_rows_last(impl: Any) -> None:
    words = _int64([[[TENTH] * 8, [THREE_TENTHS] * 8]])
    assert_bits_equal(_a4w4(impl, words)[0], torch.tensor(SUMS, dtype=torch.float16))
    y = _a4w4(impl, words, per_token_scale=[torch.tensor([0.5, 0.01])])
    expected = [
        [-12.9921875, 6.8984375, -5.1953125, -10.8984375, 8.1953125, -1.4990234375, -9.59375, -2.498046875],
        [
            *(-0.14599609375, 0.281982421875, -0.281982421875, 0.03399658203125),
            *(0.349609375, -0.10186767578125, 0.10186767578125, 0.03399658203125),
        ],
    ]
    assert_bits_equal(y, torch.tensor(expected, dtype=torch.float16))
    in_bfloat16 = _a4w4(impl, words, output_dtype=torch.bfloat16)
    assert_bits_equal(in_bfloat16[0], torch.tensor(SUMS).bfloat16())


def test_int4_products_overflow_float16_before_the_rows_are_scaled(impl: Any) -> None:
    words = torch.full((1, 8), _scale_word(8192, signed=False))
    y = _a4w4(impl, words, per_token_scale=[torch.tensor([1e-3, 1e-3])])
    products = torch.tensor(A4_ROWS) @ _w4().long()
    assert y.isinf().any()
    assert torch.equal(y.isinf(), (products * 8192).abs() > 65504)


# --- int8 activations, int4 weights ----------------------------------------------------------------------------------

A8_ROW = [100, -128, 127, -1, 0, 15, 16, -17]


def _a8w4(impl: Any, groups: Sequence[int], bias: list[float], dtype: torch.dtype) -> Tensor:
    """The row and weight of the int4 example with zero weights up to K = 64, half of it for each word of groups."""
    x, weight = torch.full((1, 64), 77, dtype=torch.int8), torch.zeros(64, 8, dtype=torch.int32)
    places = [0, 1, 2, 3, 32, 33, 34, 35]
    x[0, places], weight[places] = _int8(A8_ROW), _w4()
    (y,) = impl.npu_grouped_matmul(
        [x],
        [impl.npu_convert_weight_to_int4pack(weight).reshape(1, 64, 1)],
        scale=[torch.tensor(groups).reshape(1, -1, 1).repeat(1, 1, 8)],
        bias=[torch.tensor([bias])],
        per_token_scale=[torch.tensor([0.01])],
        group_list=_int64([1]),
        group_type=0,
        group_list_type=1,
        split_item=2,
        output_dtype=dtype,
    )
    return y


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_int8_times_int4_by_two_digits(impl: Any, dtype: torch.dtype) -> None:
    bias = [-12.0, -4, 4, -4, -12, 12, -12, -4]
    expected = [-0.44375, -0.04375, -1.86375, 1.41625, -0.18375, 0.53625, 1.27625, -0.32375]
    y = _a8w4(impl, [1040187392], bias, dtype)  # 0.125
    assert_bits_equal(y, torch.tensor([expected]).to(dtype))
    without = _a8w4(impl, [1040187392], [0.0] * 8, dtype)
    assert_bits_equal(without, torch.tensor([expected]).sub(torch.tensor(bias) * 0.01).to(dtype))
    if dtype == torch.bfloat16:
        rounded = [-0.443359375, -0.043701171875, -1.8671875, 1.4140625, -0.18359375, 0.53515625, 1.2734375]
        assert y[0].tolist() == [*rounded, -0.32421875]


def test_int8_times_int4_adds_the_groups_of_k_in_float16(impl: Any) -> None:
    bias = [-6.4, -19.2, 19.2, -6.4, -32, 19.2, -19.2, -6.4]
    emulated = [-0.2349375, -0.2548125, -1.5708125, 1.22475, -0.39484375, 0.32082814, 1.0851876, -0.53478128]
    exact = torch.tensor([[-0.235, -0.255, -1.571, 1.225, -0.395, 0.321, 1.085, -0.535]])
    y = _a8w4(impl, [TENTH, THREE_TENTHS], bias, torch.float16)
    assert_bits_equal(y, torch.tensor([emulated], dtype=torch.float64).half())
    assert not torch.equal(y, exact.half())
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=2e-3)


def test_int8_times_asymmetric_int4_adds_the_sum_of_the_row_times_the_offset(impl: Any) -> None:
    x, weight = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(64, 8, dtype=torch.int32)
    x[0, :2], weight[0], weight[1] = _int8([5, -2]), 3, -1
    (y,) = impl.npu_grouped_matmul(
        [x],
        [impl.npu_convert_weight_to_int4pack(weight).reshape(1, 64, 1)],
        scale=[torch.full((1, 1, 8), _scale_word(0.5, signed=False))],
        offset=[torch.full((1, 1, 8), 0.25)],
        bias=[torch.full((1, 8), 8.0)],  # 8 * (3 - 1) * 0.5
        per_token_scale=[torch.tensor([[2.0], [4.0]])],
        group_list=_int64([2]),
        group_type=0,
        group_list_type=1,
        split_item=3,
        output_dtype=torch.float16,
    )
    # ((5 * 3 + 2 * 1) * 0.5 + (5 - 2) * 0.25) * 2
    assert_bits_equal(y, torch.tensor([[18.5] * 8, [0.0] * 8], dtype=torch.float16))


# --- gradients of the grouped matmul ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_grouped_matmul_gradients_from_two_grouped_matmuls(impl: Any, dtype: torch.dtype) -> None:
    weight = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, 1]]], dtype=dtype)
    x, dy = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype), torch.ones(3, 2, dtype=dtype)
    options = {"group_list": _int64([1, 2]), "group_list_type": 1, "split_item": 3}
    dx = impl.npu_grouped_matmul([dy], [weight.transpose(1, 2)], group_type=0, **options)[0]
    dw = impl.npu_grouped_matmul([x.t()], [dy], group_type=2, **options)[0]
    dw_transposed = impl.npu_grouped_matmul([dy.t()], [x], group_type=2, **options)[0]
    expected_dw = torch.tensor([[[1, 1], [2, 2]], [[8, 8], [10, 10]]], dtype=dtype)
    assert_bits_equal(dx, torch.tensor([[1, 1], [2, 2], [2, 2]], dtype=dtype))
    assert_bits_equal(dw, expected_dw)
    assert_bits_equal(dw_transposed.transpose(1, 2), expected_dw)


def test_grouped_mm_references_give_the_gradient_example() -> None:
    weight = torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [1, 1]]])
    x, dy, counts = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.ones(3, 2), _int64([1, 2])
    dx = matmul.grouped_mm(dy, weight.transpose(1, 2), counts)
    assert_bits_equal(dx, torch.tensor([[1, 1], [2, 2], [2, 2]], dtype=torch.float64))
    dw = matmul.grouped_mm_weight_grad(x, dy, counts)
    assert_bits_equal(dw, torch.tensor([[[1, 1], [2, 2]], [[8, 8], [10, 10]]], dtype=torch.float64))


def test_a_single_int4_word_is_read_along_the_axis_that_fits_x() -> None:
    """A weight of one word is [8, 1] or [1, 8]: its strides cannot tell, the columns of x do."""
    word = ops.npu_convert_weight_to_int4pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int32))
    column, row = torch.ones(2, 8, dtype=torch.float16), torch.full((2, 1), 2.0, dtype=torch.float16)
    for x, n, expected in ((column, 1, [[20.0]] * 2), (row, 8, [[2.0, 4, 6, 8, 10, 12, 14, -16]] * 2)):
        (y,) = ops.npu_grouped_matmul(
            [x],
            [word.unsqueeze(0).mT],
            antiquant_scale=[torch.ones(1, n, dtype=torch.float16)],
            antiquant_offset=[torch.zeros(1, n, dtype=torch.float16)],
            group_list=torch.tensor([2]),
            group_type=0,
            split_item=3,
        )
        assert y.tolist() == expected
