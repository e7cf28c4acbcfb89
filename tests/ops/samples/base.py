"""The form of a sample and what the tables draw their tensors with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Sample:
    """One call of a public operator."""

    op_name: str
    id: str
    make: Callable[[], Inputs]
    # terms of the longest sum
    reduction: int = 1
    # names of the arguments that have a gradient
    differentiable: tuple[str, ...] = ()
    # the same call with some number of rows: these samples are compiled and exported with a dynamic number of rows
    with_rows: Callable[[int], Inputs] | None = None
    # whether it differs from other samples in what a compiler sees, rather than in a dtype, a mode or a number
    is_traced: bool = True
    # names of the arguments that are written in place
    mutates: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op_name}-{self.id}"


def relayout(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``tensor`` in some dtype with the strides it has, gaps and overlaps included."""
    if tensor.is_meta:
        return tensor
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    return memory.to(dtype, copy=True).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class Values:
    """Random tensors with a seed of their own."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=F64).to(dtype)

    def positive(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return (torch.rand(shape, generator=self._generator, dtype=F64) + 0.5).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        """Uniform in ``low..high``, both ends included."""
        return torch.randint(low, high + 1, shape, generator=self._generator).to(dtype)


def int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def sliced(tensor: Tensor) -> Tensor:
    """The same values as a view of every second column of wider rows."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.size(-1))
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    """The same values as a transposed view of contiguous memory."""
    return tensor.mT.contiguous().mT


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


Layout = Callable[[Tensor], Tensor]


def three_experts(num_rows: int) -> list[int]:
    return [1, 0, num_rows - 1]
