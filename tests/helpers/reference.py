"""Slow, obvious references of the operators: plain loops in float64, sharing no code with the library.

Floating results are float64 *before* the final cast to the output dtype, with every intermediate rounding that the
operator prescribes already applied. Integer results are exact and have their final dtype. Arguments are trusted:
nothing is validated here. Rows that no group covers are zero.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TensorList = Sequence[Tensor]


# --- int4 ------------------------------------------------------------------------------------------------------------


def pack_int4(values: Tensor) -> Tensor:
    """spec: int4 packing 0.4. Eight values of the last axis per int32 word, element 0 in the lowest nibble."""
    source = values.to(torch.int64).numpy()
    words = np.zeros((*source.shape[:-1], source.shape[-1] // 8), dtype=np.int64)
    for word in range(words.shape[-1]):
        for nibble in range(8):
            words[..., word] += (source[..., 8 * word + nibble] & 0xF) << (4 * nibble)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def unpack_int4(words: Tensor) -> Tensor:
    """spec: int4 packing 0.4. The int8 values -8..7 of int32 words, last axis times eight."""
    source = words.to(torch.int64).numpy()
    values = np.zeros((*source.shape[:-1], source.shape[-1] * 8), dtype=np.int8)
    for word in range(source.shape[-1]):
        for nibble in range(8):
            digit = (source[..., word] >> (4 * nibble)) & 0xF
            values[..., 8 * word + nibble] = np.where(digit >= 8, digit - 16, digit)
    return torch.from_numpy(values)


# --- activations -----------------------------------------------------------------------------------------------------


def sigmoid(value: Tensor) -> Tensor:
    """spec: SwiGLU family 3. 1 / (1 + exp(-v)) in float64."""
    return 1.0 / (1.0 + torch.exp(-value.double()))


def relu(value: Tensor) -> Tensor:
    """spec: activations 1.8.9, act_type 1."""
    return torch.where(value.double() < 0, torch.zeros_like(value.double()), value.double())


def gelu_tanh(value: Tensor) -> Tensor:
    """spec: activations 1.8.9, act_type 2."""
    v = value.double()
    return 0.5 * v * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v * v * v)))


def fast_gelu(value: Tensor) -> Tensor:
    """spec: activations 1.8.9, act_type 4."""
    v = value.double()
    return v / (1.0 + torch.exp(-1.702 * v))


def silu(value: Tensor) -> Tensor:
    """spec: activations 1.8.9, act_type 5."""
    v = value.double()
    return v / (1.0 + torch.exp(-v))


def activation(value: Tensor, act_type: int) -> Tensor:
    """spec: activations 1.8.9. Applies an act_type number (3 does not exist) in float64."""
    functions = {0: lambda v: v.double(), 1: relu, 2: gelu_tanh, 4: fast_gelu, 5: silu}
    return functions[act_type](value)


# --- grouped matmul --------------------------------------------------------------------------------------------------


def group_ends(group_list: Tensor | Sequence[int], group_list_type: int) -> list[int]:
    """spec: group lists 0.6. The exclusive end row of every group, from prefix sums (0) or counts (1)."""
    entries = [int(entry) for entry in group_list]
    if group_list_type == 0:
        return entries
    ends, total = [], 0
    for count in entries:
        total += count
        ends.append(total)
    return ends


def decode_scale_word(word: int) -> tuple[float, int]:
    """spec: FP19 and the packed parameter 0.3. The truncated float32 scale and the signed 9-bit offset."""
    scale = struct.unpack("<f", struct.pack("<I", word & 0xFFFFE000))[0]
    offset = (word >> 37) & 0x1FF
    return scale, offset - 512 if offset >= 256 else offset


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


def dequantise_weight(weight: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """spec: weight-only quantisation 1.8.6. [K,N] integers to float64 values that were rounded to dtype.

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
    """spec: no quantisation 1.8.1. Every row of x [m,K] times weight [K,N], plus the bias, in float64."""
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
    """spec: grouped matmul 1.4, 1.5, 1.8 and 1.9, dtype rows 1-13.

    A list of ints selects the List overload (prefix sums; group_type is ignored), anything else the Tensor overload.
    """
    assert _present(offset) is None, "offset belongs to no dtype row covered here"
    list_overload = isinstance(group_list, (list, tuple))
    if list_overload and len(group_list) == 0:
        group_list = None
    ends = None if group_list is None else group_ends(group_list, 0 if list_overload else group_list_type or 0)
    if not list_overload and group_type == 2:
        assert ends is not None
        return [_k_split(x[0], weight[0], ends)]

    stacked = weight[0].dim() == 3
    weights = [weight[0][g] for g in range(weight[0].shape[0])] if stacked else list(weight)
    biases = _per_group(bias, stacked, len(weights))
    scales = _per_group(scale, stacked, len(weights))
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
    for group, rows in enumerate(pieces):
        matrix = weights[group]
        if matrix.dtype == torch.int32:  # packed along N, or a view that is packed along K
            packed_n = matrix.shape[0] == rows.shape[1]
            matrix = unpack_int4(matrix) if packed_n else unpack_int4(matrix.t()).t()
        if rows.dtype == torch.int8:
            factors = None if per_token is None else per_token[0].reshape(-1)[row : row + rows.shape[0]]
            y_dtype = torch.int8 if output_dtype is None else output_dtype
            y = _int8_rows(rows, matrix, biases[group], scales[group], factors, act_type or 0, y_dtype)
        elif antiquant_scales[group] is not None:
            matrix = dequantise_weight(matrix, antiquant_scales[group], antiquant_offsets[group], rows.dtype)
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


# --- SwiGLU and quantisation -----------------------------------------------------------------------------------------


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """spec: npu_swiglu 3.1. The first half along dim is activated and multiplied with the second."""
    half = input.shape[dim] // 2
    first, second = input.double().narrow(dim, 0, half), input.double().narrow(dim, half, half)
    return first * sigmoid(first) * second


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """spec: npu_swiglu_backward 3.1."""
    half = input.shape[dim] // 2
    a, b = input.double().narrow(dim, 0, half), input.double().narrow(dim, half, half)
    dy = grad_output.double()
    grad_a = dy * b * sigmoid(a) * (1.0 + a * (1.0 - sigmoid(a)))
    grad_b = dy * a * sigmoid(a)
    return torch.cat([grad_a, grad_b], dim=dim)


def _quantise_vector(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.float32]:
    """The integers and the scale of one float32 vector that shares a scale, in float32 steps."""
    amax = np.float32(np.max(np.abs(values))) if values.size else np.float32(0)
    if amax == 0:
        return np.zeros(values.shape, dtype=np.int8), np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.rint(values * (np.float32(limit) / amax))
    scaled = np.where(np.isnan(scaled), np.float32(0), scaled)
    return np.clip(scaled, -limit, limit).astype(np.int8), amax * (np.float32(1) / np.float32(limit))


def dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype | None = None,
    quant_mode: str = "pertoken",
) -> tuple[Tensor, Tensor]:
    """spec: npu_dynamic_quant 2.2. y (int8, or packed int32 for quint4x2) and the scale (float32 values in float64)."""
    limit = 7 if dst_type == torch.quint4x2 else 127
    value = input.float().numpy().copy()
    if smooth_scales is not None:
        smooth = smooth_scales.float().numpy()
        if quant_mode == "perchannel":
            value = value * smooth[:, None]
        elif group_index is None:
            value = value * smooth
        else:
            rows = value.reshape(-1, value.shape[-1])
            start = 0
            for group, end in enumerate(group_index.tolist()):
                for row in range(start, end):
                    rows[row] = rows[row] * smooth[group]
                start = end
            value = rows.reshape(value.shape)
    y = np.zeros(value.shape, dtype=np.int8)
    if quant_mode == "pertensor":
        y, factor = _quantise_vector(value, limit)
        scale = np.full((1,), factor, dtype=np.float32)
    elif quant_mode == "perchannel":
        scale = np.zeros((*value.shape[:-2], value.shape[-1]), dtype=np.float32)
        for index in np.ndindex(*scale.shape):
            vector = (*index[:-1], slice(None), index[-1])
            y[vector], scale[index] = _quantise_vector(value[vector], limit)
    else:
        scale = np.zeros(value.shape[:-1], dtype=np.float32)
        for index in np.ndindex(*scale.shape):
            y[index], scale[index] = _quantise_vector(value[index], limit)
    quantised = torch.from_numpy(y)
    if dst_type == torch.quint4x2:
        quantised = pack_int4(quantised)
    return quantised, torch.from_numpy(scale).double()


# --- routing ---------------------------------------------------------------------------------------------------------


def moe_gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """spec: npu_moe_gating_top_k_softmax 1.1. y, expert_idx, row_idx.

    Selection is a stable descending sort of the float32 probabilities, which float16 logits first round to float16.
    """
    experts = x.shape[-1]
    logits = x.reshape(-1, experts).double()
    rows = logits.shape[0]
    done = [False] * rows if finished is None else finished.reshape(-1).tolist()
    y = torch.zeros(rows, k, dtype=torch.float64)
    expert_idx = torch.zeros(rows, k, dtype=torch.int32)
    row_idx = torch.zeros(rows, k, dtype=torch.int32)
    for row in range(rows if experts else 0):
        exponentials = torch.exp(logits[row] - logits[row].max())
        probabilities = exponentials / exponentials.sum()
        rounded = probabilities.float().to(torch.float16 if x.dtype == torch.float16 else torch.float32)
        keys = [-key for key in rounded.tolist()]
        order = sorted(range(experts), key=keys.__getitem__)
        for slot in range(k):
            y[row, slot] = probabilities[order[slot]]
            expert_idx[row, slot] = experts if done[row] else order[slot]
            row_idx[row, slot] = slot * rows + row
    shape = (*x.shape[:-1], k)
    return y.reshape(shape), expert_idx.reshape(shape), row_idx.reshape(shape)


def moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """spec: npu_moe_token_permute 3.1. Rows in stable expert order (float64) and the int32 inverse permutation."""
    experts = indices.reshape(-1).tolist()
    if padded_mode:
        rows = [tokens[index].double() for index in experts]
        return torch.stack(rows), torch.tensor(experts, dtype=torch.int32)
    pairs = len(experts)
    top_k = 1 if indices.dim() == 1 else indices.shape[1]
    order = sorted(range(pairs), key=lambda pair: experts[pair])
    sorted_indices = torch.zeros(pairs, dtype=torch.int32)
    for position, pair in enumerate(order):
        sorted_indices[pair] = position
    if num_out_tokens is None or num_out_tokens == 0:
        kept = pairs
    elif num_out_tokens > 0:
        kept = min(num_out_tokens, pairs)
    else:
        kept = max(pairs + num_out_tokens, 0)
    permuted = torch.zeros(kept, tokens.shape[1], dtype=torch.float64)
    for position in range(kept):
        permuted[position] = tokens[order[position] // top_k].double()
    return permuted, sorted_indices


def moe_token_permute_grad(grad_permuted_tokens: Tensor, sorted_indices: Tensor, num_tokens: int) -> Tensor:
    """spec: gradients of permute 3.3. Sum over the slots of a token, truncated rows skipped."""
    top_k = sorted_indices.numel() // num_tokens if num_tokens else 1
    grad = torch.zeros(num_tokens, grad_permuted_tokens.shape[1], dtype=torch.float64)
    for pair, position in enumerate(sorted_indices.tolist()):
        if position < grad_permuted_tokens.shape[0]:
            grad[pair // top_k] += grad_permuted_tokens[position].double()
    return grad


def moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    """spec: npu_moe_token_unpermute 3.2. Truncated pairs and pairs of weight zero are skipped entirely."""
    top_k = 1 if probs is None else probs.shape[1]
    available = permuted_tokens.shape[0]
    out = torch.zeros(sorted_indices.numel() // top_k, permuted_tokens.shape[1], dtype=torch.float64)
    for pair, position in enumerate(sorted_indices.tolist()):
        weight = 1.0 if probs is None else float(probs[pair // top_k, pair % top_k])
        if weight == 0 or position >= available:
            continue
        if position < 0:
            raise IndexError(f"sorted_indices[{pair}] = {position} has a non-zero weight")
        out[pair // top_k] += weight * permuted_tokens[position].double()
    return out


def moe_token_unpermute_grad(
    permuted_tokens: Tensor, grad_unpermuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """spec: gradients of unpermute 3.3. grad_probs is computed where the weight is zero, and 0 for truncated pairs."""
    top_k = 1 if probs is None else probs.shape[1]
    available = permuted_tokens.shape[0]
    grad_permuted = torch.zeros(permuted_tokens.shape, dtype=torch.float64)
    grad_probs = None if probs is None else torch.zeros(probs.shape, dtype=torch.float64)
    for pair, position in enumerate(sorted_indices.tolist()):
        token, slot = pair // top_k, pair % top_k
        if not 0 <= position < available:
            continue
        grad = grad_unpermuted_tokens[token].double()
        weight = 1.0 if probs is None else float(probs[token, slot])
        if weight != 0:
            grad_permuted[position] += weight * grad
        if grad_probs is not None:
            grad_probs[token, slot] = torch.sum(grad * permuted_tokens[position].double())
    return grad_permuted, grad_probs
