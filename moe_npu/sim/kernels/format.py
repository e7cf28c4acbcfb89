"""Casts of storage formats and copies of views. Descriptors of tensors in tiles are read and written as such."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_npu.sim import tiles
from moe_npu.sim.kernels.table import kernel


def _identity(source: Tensor, out: Tensor) -> Tensor:
    is_tiled = any(tiles.stored(tensor) is not tensor for tensor in (source, out))
    if is_tiled and source.shape != out.shape:  # of a view, whose offset nobody passes
        raise NotImplementedError("copies into views of a tensor in FRACTAL_NZ")
    return source


def _slice(source: Tensor, starts: Tensor, sizes: Tensor, out: Tensor) -> Tensor:
    for axis, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        source = source.narrow(axis, start, size)
    return source.reshape(out.shape)  # the output of a selection lacks the axis


def _strided_slice(source: Tensor, begin: Tensor, end: Tensor, strides: Tensor, out: Tensor) -> Tensor:
    ranges = zip(begin.tolist(), end.tolist(), strides.tolist(), strict=True)
    return source[tuple(slice(*bounds) for bounds in ranges)].reshape(out.shape)


def _view(base: Tensor, sizes: Tensor, strides: Tensor, offset: Tensor) -> Tensor:
    """A view into the memory that begins where ``base`` does.

    ``base`` has the shape that the memory was allocated with, which says nothing if the tensor was viewed as another
    dtype, or if ``base`` begins at the offset of the view.
    """
    from moe_npu.sim.descriptors import memory  # it imports this file

    shape, steps, start = sizes.tolist(), strides.tolist(), int(offset)
    if tiles.stored(base) is not base:
        if torch.Size(shape) == base.shape and steps == list(base.stride()) and start == 0:
            return base
        raise NotImplementedError("copies of views into the tiles of a tensor in FRACTAL_NZ")
    if 0 in shape:
        return base.new_empty(shape)
    if base.numel() == 0:
        raise NotImplementedError("copies of views into a tensor that was allocated with no elements")
    extent = 1 + start + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    return memory(base.data_ptr(), extent * base.itemsize, base.dtype).as_strided(shape, steps, start)


def _view_copy(
    sizes: Tensor, strides: Tensor, offset: Tensor, source: Tensor, source_sizes: Tensor, source_strides: Tensor,
    source_offset: Tensor, out: Tensor,
) -> None:  # fmt: skip
    _view(out, sizes, strides, offset).copy_(_view(source, source_sizes, source_strides, source_offset))


kernel("aclnnNpuFormatCast", "source:T >out:T", lambda source: source)
# graph operators: what torch_npu launches for tensors in tiles, and for copies while jit_compile is set
kernel("Identity", "source:T >>out:T", _identity)
kernel("Cast", "source:T >>out:T", lambda source, out: source.to(out.dtype))
kernel("Transpose", "source:T axes:T >out:T", lambda source, axes: source.permute(axes.tolist()))
kernel("Slice", "source:T starts:T sizes:T >>out:T", _slice)
kernel("StridedSlice", "source:T begin:T end:T strides:T >>out:T", _strided_slice)  # of a mask, see runtime.cpp
kernel("BroadcastTo", "source:T shape:T >out:T", lambda source, shape: source.expand(shape.tolist()))
kernel("AsStrided", "source:T sizes:T strides:T offset:T >out:T", lambda source, sizes, strides, offset: (
    _view(source, sizes, strides, offset)
))  # fmt: skip
# the output is the first input; what the view does not show must stay as it is
kernel(
    "ViewCopy",
    "_destination:T sizes:T strides:T offset:T source:T source_sizes:T source_strides:T source_offset:T =out:T",
    _view_copy,
)
