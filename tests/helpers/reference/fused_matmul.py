"""References of the grouped matmuls fused with what follows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import Codes, Float, decode_scale_word, group_ends, unpack_int4

F32 = np.float32


def _row_groups(group_list: Tensor, group_list_type: int | None) -> list[int]:
    """The group of every covered row."""
    groups: list[int] = []
    for group, end in enumerate(group_ends(group_list, group_list_type or 0)):
        groups += [group] * (end - len(groups))
    return groups


def _matrix(weight: Tensor, expert: int) -> np.ndarray:
    """spec: NZ storage 0.9. The int64 [K,N] of an expert: values or int4 words, three axes or tiles."""
    weight = weight[expert]
    if weight.dim() == 4:
        column_tiles, row_tiles, rows, columns = weight.shape
        plain = weight.new_zeros(row_tiles * rows, column_tiles * columns)
        for k in range(plain.shape[0]):
            for n in range(plain.shape[1]):
                plain[k, n] = weight[n // columns, k // rows, k % rows, n % columns]
        weight = plain
    if weight.dtype == torch.int32:
        weight = unpack_int4(weight)
    return weight.numpy().astype(np.int64)


def _int4_product(row: np.ndarray, matrix: np.ndarray, words: np.ndarray) -> np.ndarray:
    """spec: A4W4 1.8.7. float16 [N]: int32 sums of each group of K, scaled in float32, added up in float16."""
    length = matrix.shape[0] // words.shape[0]
    total = None
    for q in range(words.shape[0]):
        terms = slice(q * length, (q + 1) * length)
        factors = np.array([decode_scale_word(int(word))[0] for word in words[q]], dtype=F32)
        part = ((row[terms] @ matrix[terms]).astype(F32) * factors).astype(np.float16)
        total = part if total is None else total + part
    return total


def _int8_int4_product(
    row: np.ndarray, matrix: np.ndarray, words: np.ndarray, bias: np.ndarray, offset: np.ndarray | None
) -> np.ndarray:
    """spec: A8W4 1.8.8, before the factor of the row. float32 [N]."""
    high = _int4_product(row // 16, matrix, words).astype(F32)
    low = _int4_product(row % 16 - 8, matrix, words).astype(F32)
    value = F32(16) * high + low + bias
    return value if offset is None else value + F32(row.sum()) * offset


def _activated(row: np.ndarray, smooth: np.ndarray | None) -> tuple[np.ndarray, float]:
    """spec: swiglu_quant 3.5, 3.6. Codes before rounding, and the scale, of a row of c, in float64."""
    value = row.astype(np.float64)
    half = value.shape[0] // 2
    value = value[:half] / (1 + np.exp(-value[:half])) * value[half:]
    if smooth is not None:
        value = value * smooth
    scale = np.abs(value).max() / 127
    return (value / scale if scale else np.zeros_like(value)), scale


def _swiglu_quant(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    groups: list[int],
    assist: Tensor | None,
    smooth_scale: Tensor | None,
) -> tuple[Codes, Float]:
    codes = np.zeros((x.shape[0], weight_scale.shape[-1] // 2))
    scales = np.zeros(x.shape[0])
    values = (unpack_int4(x) if x.dtype == torch.int32 else x).numpy().astype(np.int64)
    for m, group in enumerate(groups):
        matrix, factor = _matrix(weight, group), F32(x_scale[m].item())
        if weight.dtype == torch.int8:
            row = (values[m] @ matrix).astype(F32) * factor * weight_scale[group].float().numpy()
        else:
            words = weight_scale[group].reshape(-1, weight_scale.shape[-1]).numpy()
            if x.dtype == torch.int32:
                row = _int4_product(values[m], matrix, words).astype(F32) * factor
            else:
                assert assist is not None
                row = _int8_int4_product(values[m], matrix, words, assist[group].numpy(), None) * factor
        smooth = None if smooth_scale is None else smooth_scale[group].double().numpy()
        codes[m], scales[m] = _activated(row, smooth)
    return Codes(torch.from_numpy(codes)), Float(torch.from_numpy(scales), torch.float32)


def grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Codes, Float, Tensor]:
    """spec: grouped_matmul_swiglu_quant 3.5."""
    groups = _row_groups(group_list, 0)
    y, y_scale = _swiglu_quant(x, weight, weight_scale, x_scale, groups, bias, None)
    return y, y_scale, torch.zeros(())


def grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: Sequence[Tensor] | None = None,
    group_list_type: int | None = 0,
) -> tuple[Codes, Float]:
    """spec: grouped_matmul_swiglu_quant_v2 3.6."""
    assist = weight_assist_matrix[0] if weight_assist_matrix else None
    groups = _row_groups(group_list, group_list_type)
    return _swiglu_quant(x, weight[0], weight_scale[0], x_scale, groups, assist, smooth_scale)


def grouped_matmul_finalize_routing(
    x: Tensor,
    w: Tensor,
    group_list: Tensor,
    scale: Tensor,
    row_index: Tensor,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    shared_input: Tensor | None = None,
    logit: Tensor | None = None,
    shared_input_weight: float | None = 1.0,
    shared_input_offset: int | None = 0,
    output_bs: int | None = 0,
    group_list_type: int | None = 1,
) -> Float:
    """spec: grouped_matmul_finalize_routing 3.7. Differentiable with respect to shared_input and logit."""
    columns = w.shape[2] * (8 if w.dtype == torch.int32 else 1)
    rows = [torch.zeros(columns, dtype=torch.float64) for _ in range(output_bs or x.shape[0])]
    for index in range(0 if shared_input is None else shared_input.shape[0]):
        assert shared_input is not None
        factor = 1.0 if shared_input_weight is None else shared_input_weight
        rows[(shared_input_offset or 0) + index] = shared_input[index].double() * factor
    values = x.numpy().astype(np.int64)
    for m, group in enumerate(_row_groups(group_list, 1 if group_list_type is None else group_list_type)):
        matrix = _matrix(w, group)
        row_scale = 1.0 if pertoken_scale is None else pertoken_scale[m].double()
        weight = 1.0 if logit is None else logit[m].double()
        if w.dtype == torch.int8:
            exact = torch.from_numpy(values[m] @ matrix).double() * scale[group].double()
            row = exact * row_scale * weight
            if bias is not None:
                row = row + bias[group].double() * weight
        else:
            assert bias is not None
            shift = None if offset is None else offset[group, 0].numpy()
            product = _int8_int4_product(values[m], matrix, scale[group].numpy(), bias[group].numpy(), shift)
            row = torch.from_numpy(product).double() * row_scale * weight
        rows[int(row_index[m])] = rows[int(row_index[m])] + row
    y = torch.stack(rows) if rows else torch.zeros(0, columns, dtype=torch.float64)
    return Float(y, torch.float64 if logit is not None and logit.dtype == torch.float64 else torch.float32)


def grouped_matmul_add(input: Tensor, x: Tensor, weight: Tensor, group_list: Tensor) -> Tensor:
    """spec: grouped_matmul_add 3.8. What input is afterwards."""
    groups, m = group_list.shape[0], x.shape[1]
    result = input.double().clone()
    for row, group in enumerate(_row_groups(group_list, 0)):
        product = torch.outer(x[row].double(), weight[row].double())
        if input.dim() == 3:
            result[group] += product
        else:
            assert input.shape[0] == groups * m
            result[group * m : (group + 1) * m] += product
    return result


def quant_grouped_matmul_dequant(
    x: Tensor,
    quantized_weight: Tensor,
    weight_scale: Tensor,
    group_list: Tensor,
    x_scale: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    quant_mode: str | None = "pertoken",
) -> Tensor:
    """spec: quant_grouped_matmul_dequant 3.9. Exact in float32, rounded to float16."""
    value = x.float().numpy()
    if smooth_scale is not None:
        value = value * smooth_scale.float().numpy()
    y = np.zeros((x.shape[0], weight_scale.shape[1]), dtype=np.float16)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for m, group in enumerate(_row_groups(group_list, 0)):
            if x_scale is not None:
                scale = x_scale[m if quant_mode != "pertensor" else 0].numpy()
            else:
                area = value if quant_mode == "pertensor" else value[m]
                scale = (np.abs(area).max() if area.size else F32(0)) / F32(127)
            code = np.rint(value[m] * (F32(1) / scale))
            code = np.clip(np.where(np.isnan(code), F32(0), code), -128, 127).astype(np.int64)
            sums = quantized_weight[group].numpy().astype(np.int64) @ code
            y[m] = (sums.astype(F32) * weight_scale[group].numpy() * scale).astype(np.float16)
    return torch.from_numpy(y)
