"""Facts about the grouped matmuls: forms of a call that mean the same, what is refused first, the table of dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.ops import _grouped_matmul_rows, grouped_matmul
from moe_npu.ops._grouped_matmul_rows import HEADER, ROWS
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.helpers.reference import matmul
from tests.ops.samples import SAMPLES
from tests.ops.samples.base import BF16, F16, F32, Inputs, Values, int64, transposed
from tests.ops.samples.grouped_matmul import ROWS as DRAWN_ROWS
from tests.ops.samples.grouped_matmul import matmul_inputs, raw_words

FLOATS = (F16, BF16, F32)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def run(inputs: Inputs, **changes: Any) -> list[Tensor]:
    (x, weight), options = inputs
    return ops.npu_grouped_matmul(x, weight, **{**options, **changes})


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for result, wanted in zip(actual, expected, strict=True):
        assert_bits_equal(result, wanted)


# --- the table of dtypes ---------------------------------------------------------------------------------------------


def test_every_row_has_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    check_dtypes = _grouped_matmul_rows.check_dtypes

    def record(*args: Any) -> Any:
        row = check_dtypes(*args)
        used.add(row)
        return row

    monkeypatch.setattr(grouped_matmul, "check_dtypes", record)
    for sample in SAMPLES:
        if sample.op_name == "npu_grouped_matmul":
            run(sample.make())
    assert used == set(ROWS)


def test_the_table_in_words() -> None:
    rows = [dict(zip(HEADER, row.cells(), strict=True)) for row in ROWS]
    assert len(rows) == 17  # the sixteen of the documentation and float64
    assert len({tuple(row.values()) for row in rows}) == 17
    (a8w4,) = (row for row in rows if row["family"] == "A8W4 asymmetric")
    assert a8w4 == {
        "family": "A8W4 asymmetric",
        "x": "int8",
        "weight": "int4",
        "bias": "float32",
        "scale": "int64",
        "offset": "float32",
        "antiquant": "-",
        "per_token_scale": "float32",
        "output_dtype": "float16",
        "y": "float16",
        "scenarios": "sss",
        "group_list": "counts",
        "act_type": "0",
        "format": "ND, NZ",
    }
    (bfloat16,) = (row for row in rows if (row["x"], row["weight"]) == ("bfloat16", "bfloat16"))
    assert (bfloat16["bias"], bfloat16["output_dtype"], bfloat16["y"]) == ("-, float32", "-, bfloat16", "bfloat16")


# --- scenarios -------------------------------------------------------------------------------------------------------


@dtypes
def test_three_products_of_their_own_sizes(dtype: torch.dtype) -> None:
    values = Values()
    sizes = ((256, 256, 256), (1024, 256, 1024), (512, 1024, 128))
    x = [values.normal(m, k, dtype=dtype) for m, k, _ in sizes]
    weight = [values.normal(k, n, dtype=dtype) for _, k, n in sizes]
    bias = [values.normal(n, dtype=F32 if dtype == BF16 else dtype) for *_, n in sizes]
    results = ops.npu_grouped_matmul(x, weight, bias=bias, group_list=None, split_item=0)  # group_type left out
    for result, *operands in zip(results, x, weight, bias, strict=True):
        a, b, c = (operand.double() for operand in operands)
        assert_close(result, a @ b + c, reduction=1024)


@dtypes
def test_more_dimensions_of_x_are_rows(dtype: torch.dtype) -> None:
    values = Values()
    x, weight = values.normal(2, 3, 1, 2, 4, 8, dtype=dtype), values.normal(8, 5, dtype=dtype)
    (y,) = ops.npu_grouped_matmul([x], [weight], group_type=-1)
    (flat,) = ops.npu_grouped_matmul([x.reshape(-1, 8)], [weight], group_type=-1)
    assert_bits_equal(y, flat.view(2, 3, 1, 2, 4, 5))


@dtypes
def test_the_forms_of_one_product_agree(dtype: torch.dtype) -> None:
    """One weight or a list of them, one result or several, group lists of every kind."""
    values, counts = Values(), [2, 0, 3]
    x, weight = values.normal(5, 4, dtype=dtype), values.normal(3, 4, 6, dtype=dtype)
    expected = matmul.grouped_mm(x, weight, int64(counts))
    (y,) = ops.npu_grouped_matmul([x], [weight], group_list=int64([2, 2, 5]), group_type=0, split_item=2)
    assert_close(y, expected, reduction=4)
    rows = {"group_type": 0, "split_item": 3}
    for results in (
        ops.npu_grouped_matmul([x], [weight], group_list=int64(counts), group_list_type=1, **rows),
        ops.npu_grouped_matmul([x], list(weight), group_list=int64([2, 2, 5]), **rows),
        ops.npu_grouped_matmul([x], list(weight), group_list=[2, 2, 5], split_item=2),
        ops.npu_grouped_matmul(list(x.split(counts)), list(weight), **rows),
        ops.npu_grouped_matmul(list(x.split(counts)), list(weight), group_list=int64([2, 2, 5]), **rows),
        ops.npu_grouped_matmul(x.split(counts), weight.unbind(), group_list=(2, 2, 5), split_item=3),
        [torch.cat(ops.npu_grouped_matmul([x], list(weight), group_list=[2, 2, 5]))],
        [torch.cat(ops.npu_grouped_matmul(list(x.split(counts)), list(weight), group_list=[], split_item=1))],
        [torch.cat(ops.npu_grouped_matmul(list(x.split(counts)), list(weight), group_type=-1))],
    ):
        assert_same(results, [y])


@pytest.mark.parametrize("counts", [(0, 0, 4, 0), (0, 2, 0, 0, 1), (3, 0), (0, 0, 0)], ids=str)
def test_groups_without_rows_and_rows_without_a_group_read_nothing(counts: tuple[int, ...]) -> None:
    covered = sum(counts)
    (x, weight), options = matmul_inputs("sss", "float16", counts, rows=covered + 2, group_list_type=1)
    x[0][covered:] = math.nan
    weight[0][[index for index, count in enumerate(counts) if count == 0]] = math.nan
    (y,) = ops.npu_grouped_matmul(x, weight, **options)
    assert_bits_equal(y[covered:], torch.zeros_like(y[covered:]))
    assert not y.isnan().any()


@pytest.mark.parametrize("row", [row for row in DRAWN_ROWS if not DRAWN_ROWS[row].is_int4_product])
def test_a_transposed_view_is_the_same_weight(row: str) -> None:
    (x, weight), options = matmul_inputs("sss", row, (2, 1), k=16, bias=True)
    if weight[0].dtype == torch.int32:
        view = matmul_inputs("sss", row, (2, 1), k=16, bias=True, layout=transposed)[0][1]
    else:
        view = [transposed(weight[0])]
    assert not view[0].is_contiguous()
    results, expected = (ops.npu_grouped_matmul(x, w, **options) for w in (view, weight))
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)  # another layout is another order of additions


@pytest.mark.parametrize("row", ["float16", "bfloat16", "per-token-bfloat16", "accumulators", "a4w4-float16"])
def test_a_weight_in_nz_format_is_the_same_weight(row: str) -> None:
    (x, weight), options = matmul_inputs("sss", row, (2, 1), bias=True)
    tiled = [ops.npu_format_cast(weight[0], 29)]
    assert ops.get_npu_format(tiled[0]) == 29
    assert_same(ops.npu_grouped_matmul(x, tiled, **options), ops.npu_grouped_matmul(x, weight, **options))


# --- arguments that mean the same ------------------------------------------------------------------------------------

LISTS = ("bias", "scale", "offset", "antiquant_scale", "antiquant_offset", "per_token_scale")
RESERVED = ("activation_input", "activation_quant_scale", "activation_quant_offset")


@pytest.mark.parametrize("name", LISTS + RESERVED)
@pytest.mark.parametrize("absent", [None, [], (), [torch.zeros(0)]], ids=["none", "list", "tuple", "empty-tensor"])
def test_lists_that_are_absent(name: str, absent: Any) -> None:
    inputs = matmul_inputs("sss", "float32")
    assert_same(run(inputs, **{name: absent}), run(inputs))


def test_explicit_none_is_the_default() -> None:
    inputs = matmul_inputs("mmm", "float32")
    names = ("split_item", "group_list_type", "act_type", "output_dtype", "tuning_config", "group_list", "x_dtype")
    assert_same(run(inputs, **dict.fromkeys(names)), run(inputs))
    inputs = matmul_inputs("ints-smm", "float32")
    names = ("split_item", "group_type", "group_list_type", "act_type", "output_dtype", "tuning_config")
    assert_same(run(inputs, **dict.fromkeys(names)), run(inputs, group_type=-1, group_list_type=0, act_type=0))


@pytest.mark.parametrize("row", ["per-token-bfloat16-bias", "int8-to-float16", "accumulators", "a8w4-float16"])
def test_a_per_token_scale_of_no_rows_counts_as_given_or_not(row: str) -> None:
    (y,) = run(matmul_inputs("sss", row, (0, 0), bias=True), per_token_scale=[torch.zeros(0)])
    assert (y.shape, y.dtype) == ((0, 16), DRAWN_ROWS[row].output_dtype)


@pytest.mark.parametrize("tuning_config", [[], [0], (4, 1, 2)], ids=str)
def test_hints_have_no_effect(tuning_config: Any) -> None:
    inputs = matmul_inputs("sss", "accumulators")
    assert_same(run(inputs, tuning_config=tuning_config), run(inputs))


@pytest.mark.parametrize("row", ["int8-to-int8", "a4w4-bfloat16", "a8w4-float16"])
def test_scale_words_may_be_unsigned(row: str) -> None:
    inputs = matmul_inputs("sss", row, bias=True)
    words = [tensor.view(torch.uint64) for tensor in inputs[1]["scale"]]
    assert_same(run(inputs, scale=words), run(inputs))


@pytest.mark.parametrize("row", ["a4w4-float16", "a8w4-float16"])
def test_only_nineteen_bits_of_a_scale_word_of_int4_weights_count(row: str) -> None:
    inputs = matmul_inputs("sss", row)
    (words,) = inputs[1]["scale"]
    assert (words & 0x1FFF).any()
    high = torch.full_like(words, 0x7FFF << 32)
    assert_same(run(inputs, scale=[(words & ~0x1FFF) | high]), run(inputs))


def test_one_scale_per_column_of_int4_weights_with_or_without_an_axis_of_groups() -> None:
    for row in ("a4w4-float16", "a8w4-bfloat16", "a8w4-asymmetric"):
        inputs = matmul_inputs("sss", row)
        (words,) = inputs[1]["scale"]
        flat = words.flatten(1)
        for form in (flat, flat.unsqueeze(1)):
            assert_same(run(inputs, scale=[form]), run(inputs))
    inputs = matmul_inputs("sss", "a8w4-bfloat16")
    column = [tensor.unsqueeze(1) for tensor in inputs[1]["per_token_scale"]]
    assert_same(run(inputs, per_token_scale=column), run(inputs))


def test_raw_accumulators_ignore_a_scale_of_any_kind() -> None:
    inputs = matmul_inputs("sss", "accumulators", bias=True)
    for scale in (torch.full((2,), math.nan), torch.zeros(3, 16, dtype=torch.int64), torch.ones(3, 16, dtype=BF16)):
        assert_same(run(inputs, scale=[scale]), run(inputs))


# --- what callers combine --------------------------------------------------------------------------------------------


def test_scale_words_of_trans_quant_param() -> None:
    inputs = matmul_inputs("sss", "int8-to-int8", (2, 3), bias=True)
    scale = torch.tensor([[0.001], [0.002]]).expand(2, 16).contiguous()
    words = torch.stack([ops.npu_trans_quant_param(row) for row in scale])
    (accumulators,) = run(inputs, scale=None, output_dtype=torch.int32)
    kept = (scale.view(torch.int32) & -0x2000).view(F32).repeat_interleave(torch.tensor([2, 3]), 0)
    expected = (accumulators.double() * kept.double()).round().clamp(-128, 127).to(torch.int8)
    assert_same(run(inputs, scale=[words]), [expected])


def test_key_value_counts_of_init_routing_are_pairs() -> None:
    """They are padded with zeros behind the experts that have rows, so group 0 may come again there."""
    values = Values()
    ids = torch.tensor([[1, 3], [3, 0], [3, 1]], dtype=torch.int32)

    def routed(num_type: int) -> tuple[Tensor, ...]:
        return ops.npu_moe_init_routing_v2(
            Values(1).normal(3, 8),
            ids,
            expert_num=4,
            active_expert_range=[0, 4],
            expert_tokens_num_type=num_type,
            expert_tokens_num_flag=True,
            quant_mode=1,
        )

    weight, scale = values.integers(-128, 127, 4, 8, 16), values.positive(4, 16)
    results = []
    for num_type, kind, group_list in ((2, 2, [[0, 1], [1, 2], [3, 3], [0, 0]]), (1, 1, [1, 2, 0, 3])):
        rows, _, counts, row_scale = routed(num_type)
        assert counts.tolist() == group_list
        results.append(
            ops.npu_grouped_matmul(
                [rows],
                [weight],
                scale=[scale],
                per_token_scale=[row_scale],
                group_list=counts,
                group_list_type=kind,
                group_type=0,
                split_item=3,
                output_dtype=F16,
            )
        )
    assert_same(*results)
    assert results[0][0].shape == (6, 16)


def test_int8_times_int4_with_the_right_bias_is_the_product() -> None:
    values, counts = Values(), [3, 4]
    x, weight = values.integers(-128, 127, 7, 128), values.integers(-8, 7, 2, 128, 16)
    words = raw_words(values.positive(2, 4, 16) / 256)
    scale = (words.to(torch.int32) & -0x2000).view(F32).double().repeat_interleave(32, 1)
    dequantized, rows = weight.double() * scale, values.positive(7)
    (y,) = ops.npu_grouped_matmul(
        [x],
        [torch.stack([ops.npu_convert_weight_to_int4pack(w.to(torch.int32)) for w in weight])],
        scale=[words],
        bias=[8 * dequantized.sum(1).float()],
        per_token_scale=[rows],
        group_list=int64(counts),
        group_list_type=1,
        group_type=0,
        split_item=3,
        output_dtype=F16,
    )
    expected = matmul.grouped_mm(x.double() * rows.double().unsqueeze(1), dequantized, int64(counts))
    assert ((y.double() - expected).abs().amax(1) <= 1e-2 * expected.abs().amax(1)).all()


def test_a_device_kernel_that_overwrites_x_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
        results = ops.npu_grouped_matmul(x, weight, **options)
        x[0].zero_()
        return results

    monkeypatch.setattr(grouped_matmul, "_npu_op", device)
    (x, weight), options = matmul_inputs("sss", "a8w4-float16")
    calls: list[Any] = []
    monkeypatch.setattr(grouped_matmul, "_op", lambda *args: calls.append(args) or ops.npu_grouped_matmul)
    ops.npu_grouped_matmul(x, weight, **options)
    monkeypatch.undo()
    monkeypatch.setattr(grouped_matmul, "_npu_op", device)
    before = x[0].clone()
    expected = ops.npu_grouped_matmul(x, weight, **options)
    assert_same(grouped_matmul._npu(*calls[0]), expected)
    assert_bits_equal(x[0], before)


# --- what is refused, and in which order -----------------------------------------------------------------------------

WRONG = [torch.zeros(1, dtype=torch.bool)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [], "group_type": None}, "neither x nor weight could be empty"),
        ({"group_type": None, "split_item": 9}, "Requires manual passing group_type, current is None"),
        ({"group_type": 1, "split_item": 9}, "The group type must be -1, 0 or 2, but now is 1"),
        ({"split_item": 4, "activation_input": WRONG}, "should only be one of 0/1/2/3"),
        ({"activation_input": WRONG, "act_type": 3}, "activation_input must be None"),
        ({"act_type": 3, "group_list_type": 9}, "act_type must be"),
        ({"group_list_type": 9, "x": WRONG}, "group_list_type must be"),
        ({"x": WRONG, "group_list": None}, "x of bool with weight of float32 is not supported"),
        ({"group_list": None, "weight": [torch.zeros(2, 9, 16)]}, "group_list must be given"),
        ({"weight": [transposed(torch.zeros(2, 9, 16))], "group_list": int64([-1, 5])}, "x[0] has 8 columns but"),
        ({"group_list": int64([-1, 5])}, "should be larger than or equal to 0"),
    ],
)
def test_the_first_of_two_broken_rules(changes: dict[str, Any], message: str) -> None:
    (x, weight), options = matmul_inputs("sss", "float32", (2, 3))
    with pytest.raises(RuntimeError) as caught:
        ops.npu_grouped_matmul(**{"x": x, "weight": weight, **options, **changes})
    assert message in str(caught.value)


SWAPPED: list[Callable[[], Inputs]] = [
    lambda: matmul_inputs("sss", "float32", (2, 3), split_item=0),
    lambda: matmul_inputs("sms", "float32", (2, 3), split_item=1),
    lambda: matmul_inputs("mmm", "float32", (2, 3), split_item=3),
    lambda: matmul_inputs("k-split", "float32", (2, 3), split_item=1),
]


@pytest.mark.parametrize("make", SWAPPED)
def test_results_of_the_other_number_are_refused(make: Callable[[], Inputs]) -> None:
    with pytest.raises(ops.OperatorError, match="split_item must be"):
        run(make())
