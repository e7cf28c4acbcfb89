"""Samples of the quantized dense matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.reference import common, dense_matmul, quantize
from tests.ops.samples.base import BF16, F16, F32, Inputs, Layout, Sample, Values, contiguous, sliced, transposed

I8, I32, I64 = torch.int8, torch.int32, torch.int64


def _int4_weight(values: torch.Tensor, is_packed_along_k: bool) -> torch.Tensor:
    """Words ``[..., K, N / 8]``, or the transposed view of ``[..., N, K / 8]``."""
    if is_packed_along_k:
        return common.pack_int4(values.mT.contiguous()).mT
    return common.pack_int4(values)


# --- integer weights -------------------------------------------------------------------------------------------------


def _weight_quant_inputs(
    m: int,
    k: int,
    n: int,
    *,
    dtype: torch.dtype = F16,
    int4: str = "",
    scale: tuple[int, ...] | None = None,
    has_offset: bool = True,
    bias: tuple[int, ...] = (),
    quant: tuple[int, ...] = (),
    quant_offset: bool = False,
    words: bool = False,
    x_layout: Layout = contiguous,
    w_layout: Layout = contiguous,
    **options: Any,
) -> Inputs:
    values = Values()
    x = values.normal(m, k, dtype=dtype)
    weight = values.integers(-8, 7, k, n)
    weight = _int4_weight(weight, int4 == "k") if int4 else w_layout(values.integers(-128, 127, k, n))
    shape = scale or (n,)
    arguments = [x_layout(x), weight, (values.positive(*shape) / 16).to(dtype)]
    if has_offset:
        options["antiquant_offset"] = values.normal(*shape, dtype=dtype)
    if bias:
        options["bias"] = values.normal(*bias, dtype=F16 if dtype == F16 else F32)
    if quant:
        options["quant_scale"] = 8 * values.positive(*quant)
        offset = 20 * values.normal(*quant)
        if words:
            options["quant_scale"] = quantize.trans_quant_param(
                options["quant_scale"].flatten(), offset.flatten()
            ).view(quant)
        elif quant_offset:
            options["quant_offset"] = offset
    return tuple(arguments), options


def _weight_quant_samples() -> list[Sample]:
    def sample(id: str, m: int, k: int, n: int, with_rows: Any = None, **options: Any) -> Sample:
        make = lambda: _weight_quant_inputs(m, k, n, **options)  # noqa: E731
        differentiable: tuple[str, ...] = ()
        if "quant" not in options:
            differentiable = ("x", "bias") if "bias" in options else ("x",)
        return Sample("npu_weight_quant_batchmatmul", id, make, max(k, n, m), differentiable, with_rows)

    return [
        sample(
            "float16",
            5,
            6,
            3,
            bias=(3,),
            with_rows=lambda num_rows: _weight_quant_inputs(num_rows, 6, 3, bias=(3,)),
        ),
        sample("bfloat16", 5, 6, 4, dtype=BF16, bias=(1, 4), scale=(1, 4)),
        sample("per-tensor-no-offset", 3, 5, 7, scale=(1,), has_offset=False, bias=(1,)),
        sample("one-by-one-scale", 3, 5, 7, scale=(1, 1), dtype=BF16),
        sample("transposed", 5, 6, 4, x_layout=transposed, w_layout=transposed),
        sample("sliced", 5, 6, 4, x_layout=sliced, w_layout=sliced, bias=(4,)),
        sample("groups", 3, 64, 5, scale=(2, 5), antiquant_group_size=32, dtype=BF16, bias=(5,)),
        sample("short-last-group", 3, 70, 5, scale=(3, 5), antiquant_group_size=32),
        sample("one-row-of-groups", 3, 40, 5, scale=(1, 5), antiquant_group_size=32),
        sample("int4", 3, 5, 16, int4="n", bias=(16,)),
        sample("int4-along-k", 3, 16, 5, int4="k", dtype=BF16),
        sample("int4-groups", 2, 72, 8, int4="n", scale=(2, 8), antiquant_group_size=64),
        sample("int4-along-k-groups", 2, 72, 3, int4="k", scale=(3, 3), antiquant_group_size=32, has_offset=False),
        sample("many-rows", 70, 6, 4, bias=(4,), dtype=BF16),
        sample("int8", 5, 6, 4, quant=(4,), quant_offset=True, bias=(4,)),
        sample("int8-no-offset", 5, 6, 4, quant=(1,), dtype=BF16),
        sample(
            "int8-words",
            5,
            6,
            3,
            quant=(1, 3),
            words=True,
            with_rows=lambda num_rows: _weight_quant_inputs(num_rows, 6, 3, quant=(1, 3), words=True),
        ),
        sample(
            "int8-one-word-groups", 3, 40, 8, quant=(1,), words=True, int4="n", scale=(2, 8), antiquant_group_size=32
        ),
    ]


def _draw_weight_quant(draw: st.DrawFn) -> Inputs:
    int4 = draw(st.sampled_from(("", "", "n", "k")))
    m, k, n = (draw(st.integers(1, 6)) for _ in range(3))
    if draw(st.booleans()):
        k += 32
    if int4 == "k":
        k, n = 8 * ((k + 7) // 8), n + 1  # a matrix of one word is no transposed view
    elif int4 == "n":
        n *= 8
    options: dict[str, Any] = {}
    scale = draw(st.sampled_from(((1,), (n,), (1, n))))
    if k > 32 and draw(st.booleans()):
        scale, options["antiquant_group_size"] = ((k + 31) // 32, n), 32
    shapes = ((1,), (n,), (1, n))
    if draw(st.booleans()):
        options["bias"] = draw(st.sampled_from(shapes))
    if draw(st.booleans()):
        options["quant"] = draw(st.sampled_from(shapes))
        options[draw(st.sampled_from(("words", "quant_offset")))] = True
    return _weight_quant_inputs(
        m,
        k,
        n,
        dtype=draw(st.sampled_from((F16, BF16))),
        int4=int4,
        scale=scale,
        has_offset=draw(st.booleans()),
        x_layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        w_layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        **options,
    )


# --- integer operands ------------------------------------------------------------------------------------------------


def _quant_matmul_inputs(
    x1: tuple[int, ...],
    x2: tuple[int, ...],
    *,
    int4: str = "",
    scale: tuple[int, ...] = (1,),
    scale_dtype: torch.dtype = F32,
    offset: tuple[int, ...] = (),
    per_token: bool = False,
    bias: tuple[int, ...] = (),
    bias_dtype: torch.dtype = I32,
    x1_layout: Layout = contiguous,
    x2_layout: Layout = contiguous,
    **options: Any,
) -> Inputs:
    values = Values()
    bound = 7 if int4 else 127
    a, b = values.integers(-bound - 1, bound, *x1), values.integers(-bound - 1, bound, *x2)
    a, b = (common.pack_int4(a), _int4_weight(b, int4 == "k")) if int4 else (x1_layout(a), x2_layout(b))
    factors = values.positive(*scale) / (4.0 if int4 else 512.0)
    is_grouped = len(scale) == 2
    if scale_dtype in (I64, torch.uint64):
        factors = quantize.trans_quant_param(factors, 9 * values.normal(*scale)).view(scale_dtype)
    else:
        factors = factors.to(scale_dtype)
    if offset:
        options["offset"] = values.normal(*offset, dtype=F16) if is_grouped else 20 * values.normal(*offset)
    if per_token:
        options["pertoken_scale"] = values.positive(x1[-2])
    if bias:
        options["bias"] = (
            values.integers(-999, 999, *bias, dtype=I32)
            if bias_dtype == I32
            else values.normal(*bias, dtype=bias_dtype)
        )
    return (a, b, factors), options


def _quant_matmul_samples() -> list[Sample]:
    def sample(id: str, x1: tuple[int, ...], x2: tuple[int, ...], with_rows: Any = None, **options: Any) -> Sample:
        make = lambda: _quant_matmul_inputs(x1, x2, **options)  # noqa: E731
        return Sample("npu_quant_matmul", id, make, x1[-1], (), with_rows)

    def resizable(id: str, k: int, n: int, **options: Any) -> Sample:
        rows = lambda num_rows: _quant_matmul_inputs((num_rows, k), (k, n), **options)  # noqa: E731
        return sample(id, (5, k), (k, n), rows, **options)

    f16, bf16, i32 = {"output_dtype": F16}, {"output_dtype": BF16}, {"output_dtype": I32}
    return [
        resizable("int8", 6, 3, scale=(3,), bias=(3,), offset=(1,)),
        sample("int8-by-number", (5, 6), (6, 4), scale=(1,), offset=(4,), output_dtype=1),
        sample("int8-words", (5, 6), (6, 4), scale=(4,), scale_dtype=I64, bias=(1, 4), offset=(4,)),
        sample("int8-unsigned-words", (5, 6), (6, 4), scale_dtype=torch.uint64),
        sample("float16", (5, 6), (6, 4), scale=(4,), bias=(4,), **f16),
        sample("float16-words", (5, 6), (6, 4), scale=(4,), scale_dtype=I64, output_dtype=5),
        resizable("float16-per-token", 6, 3, scale=(3,), per_token=True, bias=(3,), bias_dtype=F16, **f16),
        sample("float16-per-token-float32-bias", (5, 6), (6, 4), per_token=True, bias=(4,), bias_dtype=F32, **f16),
        sample("bfloat16", (5, 6), (6, 4), scale=(4,), bias=(4,), bias_dtype=BF16, output_dtype=15),
        sample("bfloat16-scale", (5, 6), (6, 4), scale=(4,), scale_dtype=BF16, bias=(4,), **bf16),
        sample("bfloat16-per-token", (5, 6), (6, 4), scale=(4,), per_token=True, bias=(4,), bias_dtype=F32, **bf16),
        sample("bfloat16-per-token-int32-bias", (5, 6), (6, 4), scale_dtype=BF16, per_token=True, bias=(4,), **bf16),
        sample("int32", (5, 6), (6, 4), bias=(4,), **i32),
        sample("int32-bfloat16-scale", (5, 6), (6, 4), scale=(4,), scale_dtype=BF16, output_dtype=3),
        sample("transposed", (5, 6), (6, 4), x1_layout=transposed, x2_layout=transposed),
        sample("sliced", (5, 6), (6, 4), x1_layout=sliced, x2_layout=sliced),
        sample("no-rows", (0, 6), (6, 4), per_token=True, **bf16),
        sample("batch", (3, 5, 6), (3, 6, 4), bias=(3, 1, 4), group_sizes=[0, 0, 0]),
        sample("batch-of-one", (1, 5, 6), (3, 6, 4), bias=(4,), per_token=True, **bf16),
        sample("batch-by-one-weight", (2, 3, 5, 6), (6, 4), scale=(4,), per_token=True, **f16),
        sample("one-matrix-by-batch", (5, 6), (2, 6, 4), **i32),
        sample("six-dims", (2, 1, 1, 2, 5, 6), (1, 2, 1, 6, 4), scale=(4,), x2_layout=transposed),
        sample("long-sums", (2, 1500), (1500, 3), **i32),
        sample("int4", (5, 8), (8, 16), int4="n", scale=(16,), bias=(16,), **f16),
        sample("int4-along-k", (5, 16), (16, 3), int4="k", scale=(3,), scale_dtype=I64, **f16),
        sample("int4-batch", (2, 3, 8), (2, 8, 8), int4="k", **f16),
        resizable("int4-groups", 16, 8, int4="n", scale=(2, 8), offset=(2, 8), per_token=True, **f16),
        sample(
            "int4-groups-along-k",
            (2, 3, 24),
            (24, 5),
            int4="k",
            scale=(3, 5),
            offset=(3, 5),
            per_token=True,
            group_sizes=[0, 0, 8],
            **bf16,
        ),
    ]


def _draw_quant_matmul(draw: st.DrawFn) -> Inputs:
    int4 = draw(st.sampled_from(("", "", "n", "k")))
    m, k, n = (draw(st.integers(1, 5)) for _ in range(3))
    k = 8 * k if int4 else k
    n = {"": n, "n": 8 * n, "k": n + 1}[int4]  # a matrix of one word is no transposed view
    batches = [((), ()), ((), ()), ((2,), (2,)), ((1,), (3,)), ((2, 3), ()), ((), (2,)), ((2, 1), (3,))]
    batch1, batch2 = draw(st.sampled_from(batches))
    output = draw(st.sampled_from((F16, BF16) if int4 else (None, I8, F16, BF16, I32)))
    per_token = (output == BF16 and int4 != "") or (output in (F16, BF16) and draw(st.booleans()))
    options: dict[str, Any] = {"output_dtype": output, "per_token": per_token}
    scale = draw(st.sampled_from(((1,), (n,))))
    bias_dtypes = [I32]
    if int4 and per_token:
        scale = (k // 8, n)
        options["offset"] = scale
        bias_dtypes = []
    elif per_token or output in (BF16, I32):
        options["scale_dtype"] = draw(st.sampled_from((F32,) if output == F16 else (F32, BF16)))
        if output != I32:
            bias_dtypes += [F32, output]
    else:
        options["scale_dtype"] = draw(st.sampled_from((F32, I64)))
        if output in (None, I8) and draw(st.booleans()):
            options["offset"] = draw(st.sampled_from(((1,), (n,))))
    if bias_dtypes and draw(st.booleans()):
        options["bias"], options["bias_dtype"] = (n,), draw(st.sampled_from(bias_dtypes))
    return _quant_matmul_inputs(
        (*batch1, m, k),
        (*batch2, k, n),
        int4=int4,
        scale=scale,
        x1_layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        x2_layout=draw(st.sampled_from((contiguous, sliced, transposed))),
        **options,
    )


DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    "npu_weight_quant_batchmatmul": _draw_weight_quant,
    "npu_quant_matmul": _draw_quant_matmul,
}

SAMPLES = [*_weight_quant_samples(), *_quant_matmul_samples()]

REFERENCES: dict[str, Callable[..., Any]] = {
    "npu_weight_quant_batchmatmul": dense_matmul.weight_quant_batchmatmul,
    "npu_quant_matmul": dense_matmul.quant_matmul,
}
