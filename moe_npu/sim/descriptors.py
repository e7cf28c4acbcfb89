"""Reads the arguments of an operator from the descriptors that torch_npu makes: views of device memory, no copies."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from moe_npu.sim import tiles
from moe_npu.sim.kernels import Argument, Kernel

# aclDataType
DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    33: torch.complex32,
}
INT4 = 29
# aclFormat: NCHW, NHWC, ND, NDHWC, NCDHW, NCL are names for memory in the order of the strides
_BASE_FORMATS = {0, 1, 2, 27, 30, 47}


class Slot(ctypes.Union):
    """One argument: ``union Slot`` of operators.h."""

    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("real", ctypes.c_double))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("references", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("storage_dim", ctypes.c_int64),
        ("shape", ctypes.c_int64 * 16),
        ("strides", ctypes.c_int64 * 16),
        ("storage_shape", ctypes.c_int64 * 16),
        ("data", ctypes.c_void_p),
    )


class _Array(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("references", ctypes.c_int64),
        ("size", ctypes.c_uint64),
        ("values", ctypes.c_void_p),
    )


class _Scalar(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("references", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("value", ctypes.c_uint8 * 16),
    )


# a type for memory of any size: making one for every size would be slow, and would fill memory until a collection
_Memory = ctypes.c_uint8 * (1 << 62)


def memory(address: int, num_bytes: int, dtype: torch.dtype = torch.uint8, *, owner: Any = None) -> Tensor:
    """The whole elements in a piece of device memory, ``[num_bytes // dtype.itemsize]``, shared and not owned.

    ``owner`` lives as long as the result.
    """
    count = num_bytes // dtype.itemsize
    if count == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    block = _Memory.from_address(address)
    block.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(block, dtype=dtype, count=count)


def _tensor(address: int | None) -> Tensor | None:
    if not address:
        return None
    descriptor = _Tensor.from_address(address)
    shape, strides = descriptor.shape[: descriptor.dim], descriptor.strides[: descriptor.dim]
    storage_shape, offset = descriptor.storage_shape[: descriptor.storage_dim], descriptor.offset
    if descriptor.dtype == INT4:
        dtype = torch.int32
        shape, strides, offset, storage_shape = _words(shape, strides, offset, storage_shape, descriptor.format)
    elif descriptor.dtype in DTYPES:
        dtype = DTYPES[descriptor.dtype]
    else:
        raise NotImplementedError(f"tensors of aclDataType {descriptor.dtype} are not implemented")
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    if not descriptor.data:
        raise ValueError(f"a tensor of shape {shape} has no memory")
    # tiles have two dimensions more in memory; the adapter of npu_grouped_matmul_swiglu_quant_v2 also calls a weight of
    # that shape a tensor in tiles, and the operator takes it as it is
    if descriptor.format in tiles.FORMATS and len(storage_shape) > len(shape):
        if offset != 0 and tiles.is_padded(shape, strides, storage_shape):  # what a device reads there is not defined
            raise NotImplementedError("operators on views with an offset into a tensor in FRACTAL_NZ with padding")
        elements = memory(descriptor.data, math.prod(storage_shape) * dtype.itemsize, dtype)
        return tiles.decode(elements.view(storage_shape), shape, strides, offset)
    if descriptor.format not in _BASE_FORMATS | tiles.FORMATS:
        raise NotImplementedError(f"tensors of aclFormat {descriptor.format} are not implemented")
    extent = 1 + offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = memory(descriptor.data, extent * dtype.itemsize, dtype)
    return storage.as_strided(shape, strides, offset)


def _words(
    shape: list[int], strides: list[int], offset: int, storage_shape: list[int], acl_format: int
) -> tuple[list[int], list[int], int, list[int]]:
    """A tensor of int4 values as one of int32 words, eight values each, which is what operators take."""
    inner = next((axis for axis in reversed(range(len(shape))) if strides[axis] == 1), None)
    if inner is None or any(n % 8 for n in (shape[inner], offset, *strides[:inner], *strides[inner + 1 :])):
        raise NotImplementedError(f"int4 values of shape {shape} and strides {strides} do not fill words of eight")
    words = [size // 8 if axis == inner else size for axis, size in enumerate(shape)]
    steps = [1 if axis == inner else stride // 8 for axis, stride in enumerate(strides)]
    if acl_format in tiles.FORMATS:
        storage_shape = [*storage_shape[:-1], storage_shape[-1] // 8]
    return words, steps, offset // 8, storage_shape


def _array(address: int | None, element: type) -> list[Any] | None:
    if not address:
        return None
    descriptor = _Array.from_address(address)
    return list((element * descriptor.size).from_address(descriptor.values))


def _scalar(address: int | None) -> Any:
    if not address:
        return None
    descriptor = _Scalar.from_address(address)
    if descriptor.dtype not in DTYPES:
        raise NotImplementedError(f"scalars of aclDataType {descriptor.dtype} are not implemented")
    return torch.frombuffer(bytearray(descriptor.value), dtype=DTYPES[descriptor.dtype])[0].item()


def _list(address: int | None, read: Any) -> list[Any] | None:
    pointers = _array(address, ctypes.c_void_p)
    return None if pointers is None else [read(pointer) for pointer in pointers]


_READERS = {
    "T": lambda slot: _tensor(slot.pointer),
    "L": lambda slot: _list(slot.pointer, _tensor),
    "A": lambda slot: _array(slot.pointer, ctypes.c_int64),
    "F": lambda slot: _array(slot.pointer, ctypes.c_double),
    "B": lambda slot: None if not slot.pointer else [bool(v) for v in _array(slot.pointer, ctypes.c_int64) or []],
    "S": lambda slot: _scalar(slot.pointer),
    "Z": lambda slot: _list(slot.pointer, _scalar),
    "i": lambda slot: slot.integer,
    "e": lambda slot: slot.integer,
    "b": lambda slot: bool(slot.integer),
    "d": lambda slot: slot.real,
    "f": lambda slot: slot.real,
    "s": lambda slot: None if not slot.pointer else (ctypes.string_at(slot.pointer)).decode(),
}


def read_arguments(kernel: Kernel, slots: Any) -> list[tuple[Argument, Any]]:
    """Each argument of a call with its value; tensors share the memory of the device, but for those in tiles."""
    return [(argument, _READERS[argument.type](slots[i])) for i, argument in enumerate(kernel.arguments)]
