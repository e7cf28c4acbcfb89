"""Weights in the format FRACTAL_NZ, int4 words and the documented forms of grouped matmul on the simulated device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.sim import device
from moe_npu.sim.descriptors import INT4, memory
from moe_npu.sim.descriptors import _tensor as read_tensor
from tests.helpers.assertions import assert_bits_equal
from tests.ops.samples.base import BF16, F16, F32, Values, int64

ND, NZ = 2, 29
I8, I32 = torch.int8, torch.int32

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu", "_internal_formats")]


@pytest.fixture
def _internal_formats(npu: torch.device) -> Iterator[None]:
    """torch_npu casts to FRACTAL_NZ only where a program allows it."""
    torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
    yield
    torch.npu.config.allow_internal_format = False  # type: ignore[attr-defined]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators that are launched on the device."""
    names: list[str] = []
    launch = device.launch

    def observe(kernel: Any, slots: Any) -> None:
        names.append(kernel.name)
        launch(kernel, slots)

    monkeypatch.setattr(device, "launch", observe)
    return names


def nz(tensor: Tensor) -> Tensor:
    result: Tensor = torch.ops.npu.npu_format_cast(tensor.npu(), NZ)
    assert format_of(result) == NZ
    return result


def format_of(tensor: Tensor) -> int:
    return int(torch.ops.npu.get_npu_format(tensor))


def on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.npu()
    return [on_device(part) for part in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- casts

SHAPES = [
    pytest.param((16, 16), id="one-tile"),
    pytest.param((20, 40), id="padded"),
    pytest.param((3, 20, 40), id="batch"),
    pytest.param((1, 40), id="one-row"),
    pytest.param((40, 1), id="one-column"),
    pytest.param((2, 2, 17, 33), id="two-batches"),
]
DTYPES = [F32, F16, BF16, I8, I32, torch.uint8]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = Values()
    return values.normal(*shape, dtype=dtype) if dtype.is_floating_point else values.integers(1, 100, *shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cast_lays_memory_out_in_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = weight_of(shape, dtype)
    cast = nz(tensor)
    columns = 32 if dtype.itemsize == 1 else 16
    *batch, height, width = shape
    expected = torch.zeros([*batch, -(-width // columns), -(-height // 16), 16, columns], dtype=dtype)
    for h in range(height):
        for w in range(width):
            expected[..., w // columns, h // 16, h % 16, w % columns] = tensor[..., h, w]
    storage = cast.untyped_storage()
    assert storage.nbytes() == expected.numel() * dtype.itemsize
    assert_bits_equal(memory(storage.data_ptr(), storage.nbytes(), dtype), expected.flatten())
    assert cast.shape == tensor.shape
    assert cast.stride() == tensor.stride()


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "clone": torch.clone,
    "back to ND": lambda t: torch.ops.npu.npu_format_cast(t, ND) if t.device.type == "npu" else t,
    "transposed": lambda t: t.mT,
    "transposed and contiguous": lambda t: t.mT.contiguous(),
    "sum with transposed": lambda t: t.mT + t.mT,
    "one matrix": lambda t: t[1],
    "rows": lambda t: t[:, 3:9].contiguous(),
    "columns": lambda t: t[..., 8:16] * 2,
    "last columns": lambda t: t[..., 8:].contiguous(),
    "flat": lambda t: t.reshape(-1),
    "sum": lambda t: t.sum(dim=1, dtype=t.dtype),
    "other dtype": lambda t: t.float(),
    "product": lambda t: t.float() @ t.float().mT,
}


@pytest.mark.parametrize("dtype", [F16, I8, I32], ids=str)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_aten_reads_the_values(read: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    tensor = weight_of((3, 20, 48), dtype)
    assert_bits_equal(read(nz(tensor)).cpu(), read(tensor))


@pytest.mark.parametrize("dtype", [F16, I8, I32], ids=str)
def test_aten_writes_the_values(dtype: torch.dtype) -> None:
    tensor = weight_of((3, 20, 48), dtype)
    cast = nz(tensor)
    for change in (
        lambda t, _: t.add_(1),
        lambda t, other: t.copy_(other),
        lambda t, other: t.copy_(other.to(t.device)),
        lambda t, other: torch.add(other.to(t.device), 1, out=t),
        lambda t, _: t[1].zero_(),
        lambda t, _: t.mul_(2),
    ):
        change(tensor, weight_of((3, 20, 48), dtype) + 5)
        change(cast, weight_of((3, 20, 48), dtype) + 5)
        assert format_of(cast) == NZ
        assert_bits_equal(cast.cpu(), tensor)


@pytest.mark.parametrize("shape", [(64, 96), (20, 40), (3, 20, 48)], ids=str)
def test_aten_takes_views_that_do_not_tell_the_size(shape: tuple[int, ...]) -> None:
    tensor = weight_of(shape, F16)
    cast = nz(tensor)
    for read in (
        lambda t: t.view(-1) + 1,
        lambda t: t[1] * 2,
        lambda t: t[..., 3].sum(),
        lambda t: t.flatten()[5:9].abs(),
    ):
        assert_bits_equal(read(cast).cpu(), read(tensor))
    for change in (
        lambda t: t[1].add_(1),
        lambda t: t[..., 2, :].mul_(2),
        lambda t: t[..., 5].zero_(),
        lambda t: t[1:3].fill_(7),
        lambda t: t.view(-1)[3:50:5].neg_(),
        lambda t: t[0, 1].add_(3),
    ):
        change(tensor)
        change(cast)
        assert format_of(cast) == NZ
        assert_bits_equal(cast.cpu(), tensor)


def test_copies_into_views_are_not_implemented() -> None:  # torch_npu passes no offset with them
    cast = nz(weight_of((64, 96), F16))
    before = cast.cpu()
    for change, message in (
        (lambda t: t.__setitem__(5, 0), "does not tell the size of its tensor"),
        (lambda t: t.__setitem__(slice(2, 4), 1), "copies into views of a tensor in FRACTAL_NZ"),
        (lambda t: t[2:4].copy_(t[:2].clone()), "copies into views of a tensor in FRACTAL_NZ"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            change(cast)
        assert_bits_equal(cast.cpu(), before)


def test_cast_in_place() -> None:
    tensor = weight_of((20, 40), F16)
    cast = tensor.npu()
    torch.ops.npu.npu_format_cast_(cast, NZ)
    assert format_of(cast) == NZ
    assert_bits_equal(cast.cpu(), tensor)
    torch.ops.npu.npu_format_cast_(cast, ND)
    assert format_of(cast) == ND
    assert_bits_equal(cast.cpu(), tensor)


def test_public_operator_casts() -> None:
    tensor = weight_of((20, 40), F16)
    cast = ops.npu_format_cast(tensor.npu(), NZ)
    assert ops.get_npu_format(cast) == NZ
    assert_bits_equal(cast.cpu(), tensor)
    assert ops.npu_format_cast(cast, NZ) is cast
    assert ops.get_npu_format(ops.npu_format_cast(tensor.npu(), cast)) == NZ
    assert ops.get_npu_format(torch.nn.Parameter(cast)) == NZ


def test_cast_of_a_view_is_a_copy() -> None:
    tensor = weight_of((3, 20, 40), F16)
    for view in (lambda t: t.mT, lambda t: t[1], lambda t: t[:, 3:], lambda t: t[..., 8:24]):
        cast = torch.ops.npu.npu_format_cast(view(tensor.npu()), NZ)
        assert format_of(cast) == NZ
        assert_bits_equal(cast.cpu(), view(tensor))


def test_cast_of_a_vector_keeps_the_format() -> None:
    assert format_of(torch.ops.npu.npu_format_cast(torch.ones(20).npu(), NZ)) == ND


def test_cast_needs_internal_formats_to_be_allowed() -> None:
    torch.npu.config.allow_internal_format = False  # type: ignore[attr-defined]
    tensor = weight_of((20, 40), F16)
    cast = torch.ops.npu.npu_format_cast(tensor.npu(), NZ)
    assert format_of(cast) == ND
    assert_bits_equal(cast.cpu(), tensor)


def test_other_formats_are_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="aclFormat 3 are not implemented"):
        torch.ops.npu.npu_format_cast(torch.ones(2, 3, 4, 5).npu(), 3)


# ---------------------------------------------------------------- matmuls with weights in tiles


def int4_words(*shape: int) -> Tensor:
    return ops.npu_convert_weight_to_int4pack(Values(3).integers(-8, 7, *shape, dtype=I32))


def scale_words(*shape: int) -> Tensor:
    return Values(4).positive(*shape).div(64).view(I32).long()


def grouped_call(family: str) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """x, weight ``[3, 64, 64]`` and parameters of :func:`npu_grouped_matmul`."""
    values = Values()
    options: dict[str, Any] = {"group_list": int64([2, 0, 4]), "group_list_type": 1}
    if family in ("float16", "bfloat16"):
        dtype = {"float16": F16, "bfloat16": BF16}[family]
        return [values.normal(6, 64, dtype=dtype)], values.normal(3, 64, 64, dtype=dtype), options
    x = values.integers(-100, 100, 6, 64)
    tokens = [values.positive(6).div(64)]
    if family == "per token":
        options |= {"scale": [values.positive(3, 64, dtype=BF16)], "per_token_scale": tokens, "output_dtype": BF16}
        return [x], values.integers(-100, 100, 3, 64, 64), options
    if family == "accumulators":
        return [x], values.integers(-100, 100, 3, 64, 64), options | {"output_dtype": I32}
    options |= {"per_token_scale": tokens, "output_dtype": F16}
    if family == "int4 x int4":
        return [int4_words(6, 64)], int4_words(3, 64, 64), options | {"scale": [scale_words(3, 64)]}
    assert family == "int8 x int4"
    options |= {"scale": [scale_words(3, 1, 64)], "bias": [values.normal(3, 64)]}
    return [x], int4_words(3, 64, 64), options


FAMILIES = ["float16", "bfloat16", "per token", "accumulators", "int4 x int4", "int8 x int4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_matmul_takes_weights_in_tiles(family: str, launched: list[str]) -> None:
    x, weight, options = grouped_call(family)
    (expected,) = ops.npu_grouped_matmul(x, [weight], split_item=3, group_type=0, **options)
    moved = {name: on_device(value) for name, value in options.items()}
    if "output_dtype" in moved:
        moved["output_dtype"] = options["output_dtype"]
    cast = nz(weight)
    launched.clear()
    (y,) = torch.ops.npu.npu_grouped_matmul(on_device(x), [cast], split_item=3, group_type=0, **moved)
    assert launched == ["aclnnGroupedMatmulWeightNz"]
    assert_bits_equal(y.cpu(), expected)
    (y,) = ops.npu_grouped_matmul(on_device(x), [cast], split_item=3, group_type=0, **moved)
    assert_bits_equal(y.cpu(), expected)


@pytest.mark.parametrize("family", ["float16", "per token"])
def test_grouped_matmul_takes_transposed_weights_in_tiles(family: str, launched: list[str]) -> None:
    x, weight, options = grouped_call(family)
    (expected,) = ops.npu_grouped_matmul(x, [weight.mT.contiguous().mT], split_item=3, group_type=0, **options)
    moved = {name: on_device(value) for name, value in options.items()}
    cast = nz(weight.mT.contiguous()).mT
    launched.clear()
    (y,) = torch.ops.npu.npu_grouped_matmul(on_device(x), [cast], split_item=3, group_type=0, **moved)
    assert launched == ["aclnnGroupedMatmulWeightNz"]
    assert_bits_equal(y.cpu(), expected)


def test_grouped_matmul_takes_a_list_of_weights_in_tiles(launched: list[str]) -> None:
    values = Values()
    x, weights = values.normal(6, 24, dtype=F16), [values.normal(24, 40, dtype=F16) for _ in range(3)]
    options = {"split_item": 3, "group_type": 0}
    (expected,) = ops.npu_grouped_matmul([x], weights, group_list=int64([2, 2, 6]), **options)
    cast = [nz(weight) for weight in weights]
    launched.clear()
    (y,) = torch.ops.npu.npu_grouped_matmul([x.npu()], cast, group_list=int64([2, 2, 6]).npu(), **options)
    assert launched == ["aclnnGroupedMatmulWeightNz"]
    assert_bits_equal(y.cpu(), expected)


def test_device_refuses_float32_weights_in_tiles() -> None:
    x, weight = torch.ones(2, 16).npu(), nz(torch.ones(1, 16, 16))
    with pytest.raises(RuntimeError, match="must not have the format FRACTAL_NZ for float"):
        torch.ops.npu.npu_grouped_matmul([x], [weight], group_list=int64([2]).npu(), split_item=3, group_type=0)


def fused_calls() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Operator, the argument that is cast, and all arguments, by the name of the kernel."""
    values = Values()
    x, weight = values.integers(-100, 100, 6, 64), values.integers(-100, 100, 3, 64, 64)
    scale, tokens, counts = values.positive(3, 64).div(64), values.positive(6).div(64), int64([2, 0, 4])
    half = values.normal(6, 64, dtype=F16)
    return {
        "aclnnGroupedMatmulSwigluQuantWeightNZ": (
            "npu_grouped_matmul_swiglu_quant",
            "weight",
            {"x": x, "weight": weight, "group_list": int64([2, 2, 6]), "weight_scale": scale, "x_scale": tokens},
        ),
        "aclnnGroupedMatmulSwigluQuantWeightNzV2": (
            "npu_grouped_matmul_swiglu_quant_v2",
            "weight",
            {
                "x": x,
                "weight": [weight],
                "weight_scale": [scale],
                "x_scale": tokens,
                "group_list": counts,
                "group_list_type": 1,
            },
        ),
        "aclnnGroupedMatmulFinalizeRoutingWeightNzV2": (
            "npu_grouped_matmul_finalize_routing",
            "w",
            {
                "x": x,
                "w": weight,
                "group_list": counts,
                "scale": scale,
                "pertoken_scale": tokens,
                "logit": values.positive(6),
                "row_index": int64([0, 2, 1, 0, 1, 3]),
                "output_bs": 4,
            },
        ),
        "aclnnQuantGroupedMatmulDequantWeightNZ": (
            "npu_quant_grouped_matmul_dequant",
            "quantized_weight",
            {"x": half, "quantized_weight": weight, "weight_scale": scale, "group_list": int64([2, 2, 6])},
        ),
        "aclnnQuantMatmulWeightNz": (
            "npu_quant_matmul",
            "x2",
            {"x1": x, "x2": weight[0], "scale": scale[0], "pertoken_scale": tokens, "output_dtype": BF16},
        ),
        "aclnnWeightQuantBatchMatmulV2": (
            "npu_weight_quant_batchmatmul",
            "weight",
            {"x": half, "weight": weight[1].clone(), "antiquant_scale": values.positive(64, dtype=F16)},
        ),
    }


@pytest.mark.parametrize("kernel", fused_calls())
def test_fused_matmuls_take_weights_in_tiles(kernel: str, launched: list[str]) -> None:
    name, cast_argument, options = fused_calls()[kernel]
    expected = getattr(ops, name)(**options)
    moved = {argument: on_device(value) for argument, value in options.items()}
    weight = options[cast_argument]
    moved[cast_argument] = [nz(weight[0])] if isinstance(weight, list) else nz(weight)
    launched.clear()
    results = getattr(torch.ops.npu, name)(**moved)
    assert launched == [kernel]
    if isinstance(expected, Tensor):
        results, expected = (results,), (expected,)
    for result, wanted in zip(results, expected, strict=True):
        assert_bits_equal(result.cpu(), wanted)


# ---------------------------------------------------------------- int4


def test_int4_values_are_packed_into_words() -> None:
    values = Values().integers(-8, 7, 32, 64, dtype=I32)
    expected = ops.npu_convert_weight_to_int4pack(values)
    assert_bits_equal(torch.ops.npu.npu_convert_weight_to_int4pack(values.npu()).cpu(), expected)
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(nz(values))
    assert format_of(packed) == NZ
    assert_bits_equal(packed.cpu(), expected)
    assert_bits_equal((packed + 0).cpu(), expected)


def int4_descriptor(words: Tensor, shape: list[int], strides: list[int], offset: int) -> int:
    runtime, rank = device.runtime(), len(shape)
    runtime.aclCreateTensor.restype = ctypes.c_void_p
    sizes, steps = (ctypes.c_int64 * rank)(*shape), (ctypes.c_int64 * rank)(*strides)
    storage, data = (ctypes.c_int64 * 1)(words.numel() * 8), ctypes.c_void_p(words.data_ptr())
    address: int = runtime.aclCreateTensor(
        sizes, ctypes.c_uint64(rank), INT4, steps, ctypes.c_int64(offset), ND, storage, ctypes.c_uint64(1), data
    )
    return address


def test_descriptors_of_int4_values_are_words() -> None:
    words = int4_words(4, 32)
    whole, rows = int4_descriptor(words, [4, 32], [32, 1], 0), int4_descriptor(words, [16, 2], [1, 32], 40)
    for address, expected in ((whole, words), (rows, words[1:3, 1:3].mT)):
        result = read_tensor(address)
        assert result is not None
        assert_bits_equal(result, expected)
    with pytest.raises(NotImplementedError, match="do not fill words of eight"):
        read_tensor(int4_descriptor(words, [4, 4], [32, 1], 0))


@pytest.mark.parametrize("transposed", [False, True], ids=["along N", "along K"])
def test_grouped_matmul_takes_int4_weights(transposed: bool) -> None:
    values = Values()
    x = values.normal(6, 64, dtype=F16)
    weight = int4_words(3, 48, 64).mT if transposed else int4_words(3, 64, 48)
    options = {
        "antiquant_scale": [values.positive(3, 48, dtype=F16)],
        "antiquant_offset": [values.normal(3, 48, dtype=F16)],
    }
    modes = {"split_item": 3, "group_type": 0}
    (expected,) = ops.npu_grouped_matmul([x], [weight], group_list=int64([2, 2, 6]), **options, **modes)
    moved = weight.mT.npu().mT if transposed else weight.npu()
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x.npu()], [moved], group_list=int64([2, 2, 6]).npu(), **on_device_options(options), **modes
    )
    assert_bits_equal(y.cpu(), expected)


def on_device_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: on_device(value) for name, value in options.items()}


def test_device_spends_int8_rows_on_int4_digits() -> None:
    x, weight, options = grouped_call("int8 x int4")
    moved = on_device_options(options)
    rows = x[0].npu()
    (y,) = ops.npu_grouped_matmul([rows], [weight.npu()], split_item=3, group_type=0, **moved)
    assert_bits_equal(rows.cpu(), x[0])
    torch.ops.npu.npu_grouped_matmul([rows], [weight.npu()], split_item=3, group_type=0, **moved)
    assert not torch.equal(rows.cpu(), x[0])
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", ["view on the device", "view moved to the device", "view of a part"])
def test_batchmatmul_takes_int4_words_along_k(layout: str) -> None:
    values = Values()
    x, scale, words = values.normal(3, 64, dtype=F16), values.positive(5, dtype=F16), int4_words(2, 5, 64)
    expected = ops.npu_weight_quant_batchmatmul(x, words[1].t(), scale)
    weight = {
        "view on the device": lambda: words[1].npu().t(),
        "view moved to the device": lambda: words[1].t().npu(),
        "view of a part": lambda: words.npu()[1].t(),
    }[layout]()
    assert_bits_equal(ops.npu_weight_quant_batchmatmul(x.npu(), weight, scale.npu()).cpu(), expected)


# ---------------------------------------------------------------- npu_grouped_matmul in the forms of its documentation


def three_groups() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    values = Values()
    shapes = [(256, 256, 128), (100, 256, 64), (24, 128, 40)]
    x = [values.normal(m, k, dtype=F16) for m, k, _ in shapes]
    weight = [values.normal(k, n, dtype=F16) for _, k, n in shapes]
    return x, weight, [values.normal(n, dtype=F16) for *_, n in shapes]


def assert_all_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert_bits_equal(result.cpu(), wanted)


def products(x: list[Tensor], weight: list[Tensor], bias: list[Tensor]) -> list[Tensor]:
    return [
        (rows.float() @ matrix.float() + row.float()).half() for rows, matrix, row in zip(x, weight, bias, strict=True)
    ]


@pytest.mark.parametrize("group_list", ["tensor overload", "list overload"])
def test_documented_call_with_several_tensors(group_list: str, launched: list[str]) -> None:
    x, weight, bias = three_groups()
    options = {"group_type": -1} if group_list == "tensor overload" else {}
    call = torch.ops.npu.npu_grouped_matmul
    call = call.default if group_list == "tensor overload" else call.List
    y = call(on_device(x), on_device(weight), bias=on_device(bias), group_list=None, split_item=0, **options)
    assert launched == ["aclnnGroupedMatmulV5" if group_list == "tensor overload" else "aclnnGroupedMatmul"]
    assert_all_equal(y, ops.npu_grouped_matmul(x, weight, bias=bias, group_list=None, split_item=0, group_type=-1))
    for result, wanted in zip(y, products(x, weight, bias), strict=True):
        torch.testing.assert_close(result.cpu(), wanted)


@pytest.mark.parametrize("group_list_type", [0, 1], ids=["cumsum", "counts"])
@pytest.mark.parametrize("is_list", [False, True], ids=["one weight", "list of weights"])
def test_documented_call_with_one_x(group_list_type: int, is_list: bool, launched: list[str]) -> None:
    values = Values()
    x, weight = values.normal(10, 24, dtype=BF16), values.normal(3, 24, 40, dtype=BF16)
    bias, counts = values.normal(3, 40), int64([3, 0, 7])
    group_list = counts if group_list_type == 1 else counts.cumsum(0)
    y = torch.ops.npu.npu_grouped_matmul(
        [x.npu()],
        [part.npu() for part in weight] if is_list else [weight.npu()],
        bias=[part.npu() for part in bias] if is_list else [bias.npu()],
        group_list=group_list.npu(),
        split_item=3,
        group_type=0,
        group_list_type=group_list_type,
    )
    assert launched == ["aclnnGroupedMatmulV5"]
    expected = torch.cat(
        [part.float() @ weight[e].float() + bias[e] for e, part in enumerate(x.split(counts.tolist()))]
    )
    assert len(y) == 1
    torch.testing.assert_close(y[0].cpu(), expected.bfloat16())


@pytest.mark.parametrize("group_list_type", [0, 1], ids=["cumsum", "counts"])
def test_documented_call_with_grouped_k(group_list_type: int) -> None:
    values = Values()
    x, weight, counts = values.normal(10, 24, dtype=F16), values.normal(10, 40, dtype=F16), int64([3, 0, 7])
    group_list = counts if group_list_type == 1 else counts.cumsum(0)
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x.npu().t()],
        [weight.npu()],
        group_list=group_list.npu(),
        split_item=3,
        group_type=2,
        group_list_type=group_list_type,
    )
    expected = torch.stack(
        [
            a.float().t() @ b.float()
            for a, b in zip(x.split(counts.tolist()), weight.split(counts.tolist()), strict=True)
        ]
    )
    torch.testing.assert_close(y.cpu(), expected.half())


@pytest.mark.parametrize("split_item", [0, 1, 2, 3])
def test_documented_call_with_a_list_of_ints(split_item: int, launched: list[str]) -> None:
    values = Values()
    x = values.normal(10, 24, dtype=F16)
    weight = [values.normal(24, 40, dtype=F16) for _ in range(3)]
    bias = [values.normal(40, dtype=F16) for _ in range(3)]
    y = torch.ops.npu.npu_grouped_matmul(
        [x.npu()], on_device(weight), bias=on_device(bias), group_list=[3, 3, 10], split_item=split_item
    )
    assert launched == ["aclnnGroupedMatmul"]
    expected = products(list(x.split([3, 0, 7])), weight, bias)
    expected = expected if split_item < 2 else [torch.cat(expected)]
    assert len(y) == len(expected)
    for result, wanted in zip(y, expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted)


def test_operands_may_be_views_with_offsets() -> None:
    values = Values()
    rows, weights = values.normal(12, 24, dtype=F16), values.normal(5, 40, 24, dtype=F16)
    group_list = int64([9, 3, 3, 10])
    (expected,) = ops.npu_grouped_matmul(
        [rows[2:]], [weights[1:4].mT], group_list=group_list[1:], split_item=3, group_type=0
    )
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [rows.npu()[2:]], [weights.npu()[1:4].mT], group_list=group_list.npu()[1:], split_item=3, group_type=0
    )
    assert_bits_equal(y.cpu(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_item": 3}, "Requires manual passing group_type"),
        ({"split_item": 3, "group_type": 1}, "group type must be -1, 0 or 2"),
        ({"split_item": 4, "group_type": 0}, r"split_item \[4\], which should only be one of 0/1/2/3"),
        ({"split_item": 3, "group_type": 0, "group_list": [7, 3]}, "each difference of group_list"),
    ],
    ids=["no group_type", "group_type", "split_item", "group_list"],
)
def test_wrong_calls_are_refused(options: dict[str, Any], message: str) -> None:
    group_list = int64(options.pop("group_list", [3, 7])).npu()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.npu.npu_grouped_matmul(
            [torch.ones(7, 16).npu()], [torch.ones(2, 16, 16).npu()], group_list=group_list, **options
        )
