"""References of the grouped matmuls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference.common import TensorList, activation, decode_scale_word, group_ends, unpack_int4


def _present(tensors: TensorList | None) -> TensorList | None:
    """spec: facts worth testing 1.13. None, an empty list and a list with one empty 1-D tensor all mean absent."""
    if tensors is None or len(tensors) == 0:
        return None
    if len(tensors) == 1 and tuple(tensors[0].shape) == (0,):
        return None
    return tensors


def _per_group(tensors: TensorList | None, stacked: bool, groups: int) -> list[Tensor | None]:
    """One parameter per group: rows of the only tensor for a 3-D weight, list elements otherwise."""
    tensors = _present(tensors)
    if tensors is None:
        return [None] * groups
    if stacked:
        return [tensors[0][g] for g in range(groups)]
    return [tensors[g] for g in range(groups)]


def dequantize_weight(weight: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """spec: weight-only quantization 1.8.6. [K,N] integers to float64 values that were rounded to dtype.

    float16 rounds after the addition and after the product; bfloat16 computes in float32 and rounds once.
    """
    scale = scale.reshape(-1, scale.shape[-1])
    offset = torch.zeros_like(scale) if offset is None else offset.reshape(scale.shape)
    rows, columns = weight.shape
    group_length = rows // scale.shape[0]
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for k in range(rows):
        q = k // group_length
        if dtype == torch.float16:
            shifted = (weight[k].double() + offset[q].double()).numpy().astype(np.float16)
            scaled = (shifted.astype(np.float64) * scale[q].double().numpy()).astype(np.float16)
            result[k] = torch.from_numpy(scaled.astype(np.float64))
        elif dtype == torch.bfloat16:
            shifted = weight[k].numpy().astype(np.float32) + offset[q].float().numpy()
            scaled = shifted * scale[q].float().numpy()
            result[k] = torch.from_numpy(scaled).to(torch.bfloat16).double()
        else:
            result[k] = (weight[k].double() + offset[q].double()) * scale[q].double()
    return result


def _float_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """spec: no quantization 1.8.1. Every row of x [m,K] times weight [K,N], plus the bias, in float64."""
    result = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for row in range(x.shape[0]):
        result[row] = x[row].double() @ weight.double()
        if bias is not None:
            result[row] += bias.double()
    return result


def _int8_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    per_token: Tensor | None,
    act_type: int,
    output_dtype: torch.dtype,
) -> Tensor:
    """spec: int8 to int8 1.8.3, static 1.8.4, per-token 1.8.5, raw accumulators. float32 steps in their fixed order."""
    rows, columns = x.shape[0], weight.shape[1]
    acc = np.zeros((rows, columns), dtype=np.int64)
    for row in range(rows):
        acc[row] = x[row].numpy().astype(np.int64) @ weight.numpy().astype(np.int64)
    late_bias = None
    if bias is not None and bias.dtype == torch.int32:
        acc += bias.numpy().astype(np.int64)
    elif bias is not None:
        late_bias = bias.float().numpy()
    acc = acc.astype(np.int32)
    if output_dtype == torch.int32:
        return torch.from_numpy(acc)
    assert scale is not None
    if output_dtype == torch.int8:
        result = np.zeros((rows, columns), dtype=np.int8)
        for column in range(columns):
            factor, shift = decode_scale_word(int(scale[column]))
            with np.errstate(invalid="ignore", over="ignore"):
                value = acc[:, column].astype(np.float32) * np.float32(factor)
            value = np.where(np.isnan(value), np.float32(0), value)
            int9 = np.clip(np.rint(value), -256, 255).astype(np.int64)
            result[:, column] = np.clip(int9 + shift, -128, 127)
        return torch.from_numpy(result)
    value = np.zeros((rows, columns), dtype=np.float32)
    for row in range(rows):
        value[row] = acc[row].astype(np.float32) * scale.float().numpy()
        if per_token is not None:
            value[row] = value[row] * np.float32(per_token[row].item())
        if late_bias is not None:
            value[row] = value[row] + late_bias
    return activation(torch.from_numpy(value), act_type)


def _int4_rows(x: np.ndarray, weight: np.ndarray, words: Tensor) -> np.ndarray:
    """spec: A4W4 1.8.7. float16 sums over the groups of K, in order; x [m,K], weight [K,N] int64, words [G,N]."""
    groups, columns = words.shape
    length = weight.shape[0] // groups
    total = np.zeros((x.shape[0], columns), dtype=np.float16)
    with np.errstate(over="ignore"):
        for q in range(groups):
            terms = slice(q * length, (q + 1) * length)
            factors = np.array([decode_scale_word(int(word))[0] for word in words[q]], dtype=np.float32)
            scaled = (x[:, terms] @ weight[terms]).astype(np.float32) * factors
            total = scaled.astype(np.float16) if q == 0 else total + scaled.astype(np.float16)
    return total


def _packed_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    words: Tensor,
    offset: Tensor | None,
    per_token: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """spec: A4W4 1.8.7 and A8W4 1.8.8, exact to the last bit: float32 steps in their fixed order, one final cast."""
    words = words[None] if words.dim() == 1 else words
    matrix = unpack_int4(weight).numpy().astype(np.int64)
    if x.dtype == torch.int32:
        value = _int4_rows(unpack_int4(x).numpy().astype(np.int64), matrix, words).astype(np.float32)
    else:
        values = x.numpy().astype(np.int64)
        high, low = values // 16, values % 16 - 8
        assert bias is not None
        value = np.float32(16) * _int4_rows(high, matrix, words).astype(np.float32)
        value = value + _int4_rows(low, matrix, words).astype(np.float32)
        value = value + bias.numpy()
        if offset is not None:
            value = value + values.sum(1, keepdims=True).astype(np.float32) * offset.reshape(1, -1).numpy()
    if per_token is not None:
        value = value * per_token.reshape(-1, 1).numpy()
    return torch.from_numpy(value).to(output_dtype)


def _sparse_pairs(pairs: Tensor) -> list[tuple[int, int]]:
    """spec: group lists 0.6, type 2. The pairs in front of the first size of zero, then pairs without rows."""
    processed = []
    for group, size in pairs.tolist():
        if size <= 0:
            break
        processed.append((group, size))
    return processed + [(0, 0)] * (len(pairs) - len(processed))


def _k_split(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """spec: K split 1.8.2. A sum of outer products per group, zeros for an empty group."""
    result = torch.zeros(len(ends), x.shape[0], weight.shape[1], dtype=torch.float64)
    start = 0
    for group, end in enumerate(ends):
        for k in range(start, end):
            result[group] += torch.outer(x[:, k].double(), weight[k].double())
        start = end
    return result


def grouped_matmul(
    x: TensorList,
    weight: TensorList,
    *,
    bias: TensorList | None = None,
    scale: TensorList | None = None,
    offset: TensorList | None = None,
    antiquant_scale: TensorList | None = None,
    antiquant_offset: TensorList | None = None,
    per_token_scale: TensorList | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = -1,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """spec: grouped matmul 1.4, 1.5, 1.8 and 1.9, dtype rows 1-16.

    A list of ints selects the List overload (prefix sums; group_type is ignored), anything else the Tensor overload.
    """
    list_overload = isinstance(group_list, (list, tuple))
    if list_overload and len(group_list) == 0:
        group_list = None
    order: list[int] | None = None
    if group_list_type == 2 and group_list is not None:
        assert isinstance(group_list, Tensor)
        pairs = _sparse_pairs(group_list)
        order = [group for group, _ in pairs]
        group_list, group_list_type = torch.tensor([size for _, size in pairs]), 1
    ends = None if group_list is None else group_ends(group_list, 0 if list_overload else group_list_type or 0)
    if not list_overload and group_type == 2:
        assert ends is not None
        return [_k_split(x[0], weight[0], ends)]

    stacked = weight[0].dim() == 3
    weights = [weight[0][g] for g in range(weight[0].shape[0])] if stacked else list(weight)
    biases = _per_group(bias, stacked, len(weights))
    scales = _per_group(scale, stacked, len(weights))
    offsets = _per_group(offset, stacked, len(weights))
    antiquant_scales = _per_group(antiquant_scale, stacked, len(weights))
    antiquant_offsets = _per_group(antiquant_offset, stacked, len(weights))
    per_token = _present(per_token_scale)

    # One (rows, output shape of these rows) pair per group.
    pieces: list[Tensor] = []
    if ends is None or len(x) > 1:
        pieces = [tensor.reshape(-1, tensor.shape[-1]) for tensor in x]
    else:
        start = 0
        for end in ends:
            pieces.append(x[0][start:end])
            start = end

    outputs: list[Tensor] = []
    row = 0
    for piece, rows in enumerate(pieces):
        group = piece if order is None or len(x) > 1 else order[piece]
        matrix = weights[group]
        factors = None if per_token is None else per_token[0].reshape(-1)[row : row + rows.shape[0]]
        if matrix.dtype == torch.int32 and not rows.is_floating_point():
            words, y_dtype = scales[group], output_dtype
            assert words is not None
            assert y_dtype is not None
            outputs.append(_packed_rows(rows, matrix, biases[group], words, offsets[group], factors, y_dtype))
            row += rows.shape[0]
            continue
        if matrix.dtype == torch.int32:  # packed along N, or a view that is packed along K
            packed_n = matrix.shape[0] == rows.shape[1]
            matrix = unpack_int4(matrix) if packed_n else unpack_int4(matrix.t()).t()
        if rows.dtype == torch.int8:
            y_dtype = torch.int8 if output_dtype is None else output_dtype
            y = _int8_rows(rows, matrix, biases[group], scales[group], factors, act_type or 0, y_dtype)
        elif antiquant_scales[group] is not None:
            matrix = dequantize_weight(matrix, antiquant_scales[group], antiquant_offsets[group], rows.dtype)
            y = _float_rows(rows, matrix, biases[group])
        else:
            y = _float_rows(rows, matrix, biases[group])
        outputs.append(y)
        row += rows.shape[0]

    if split_item in (2, 3):
        total_rows = sum(tensor.shape[0] for tensor in x)
        result = torch.zeros(total_rows, outputs[0].shape[1], dtype=outputs[0].dtype)
        row = 0
        for y in outputs:
            result[row : row + y.shape[0]] = y
            row += y.shape[0]
        return [result]
    if ends is None or len(x) > 1:
        return [y.reshape(*tensor.shape[:-1], y.shape[1]) for y, tensor in zip(outputs, x, strict=True)]
    return outputs


def grouped_mm(x: Tensor, weight: Tensor, expert_tokens: Tensor, bias: Tensor | None = None) -> Tensor:
    """spec: autograd recipe 4, forward. Consecutive row counts; rows behind the last group stay zero."""
    result = torch.zeros(x.shape[0], weight.shape[2], dtype=torch.float64)
    row = 0
    for expert, count in enumerate(expert_tokens.tolist()):
        for _ in range(count):
            result[row] = x[row].double() @ weight[expert].double()
            if bias is not None:
                result[row] += bias[expert].double()
            row += 1
    return result


def grouped_mm_weight_grad(x: Tensor, grad: Tensor, expert_tokens: Tensor) -> Tensor:
    """spec: autograd recipe 4, weight gradient. Zero for an expert without rows."""
    result = torch.zeros(expert_tokens.numel(), x.shape[1], grad.shape[1], dtype=torch.float64)
    row = 0
    for expert, count in enumerate(expert_tokens.tolist()):
        for _ in range(count):
            result[expert] += torch.outer(x[row].double(), grad[row].double())
            row += 1
    return result
