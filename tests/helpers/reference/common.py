"""What the references share: int4 packing, activations, group lists, scale words."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TensorList = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Float:
    """A floating result that is not of the dtype of the first argument: float64 values that round to `dtype`."""

    values: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Codes:
    """An integer result before its rounding: float64 values, rounded half to even and clamped to `low..high`.

    A value within `slack` of a half may go either way: the library computes it in float32.
    """

    values: Tensor
    dtype: torch.dtype = torch.int8
    low: int = -128
    high: int = 127
    slack: float = 1e-4


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
