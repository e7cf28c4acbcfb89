"""FRACTAL_NZ: the last two axes of a tensor lie in memory as tiles of 16 rows.

``[..., W / c, H / 16, 16, c]`` holds what views and strides describe as contiguous ``[..., H, W]``; what fills up the
last tiles is zero. No strides describe that, so a kernel computes on a copy.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.sim.installation import torch_npu_folder

# aclFormat: FRACTAL_NZ, and the names of it that say how many columns a tile has
FORMATS = frozenset({29, 50, 51, 52, 53, 54})
_ROWS = 16
_ORIGIN = "_moe_npu_sim_origin"


def _divided(size: int, by: int) -> int:
    return -(-size // by)


def storage_shape(shape: Sequence[int], columns: int) -> list[int]:
    """The shape in memory of a contiguous tensor, in tiles of so many columns."""
    return [*shape[:-2], _divided(shape[-1], columns), _divided(shape[-2], _ROWS), _ROWS, columns]


def untile(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Contiguous ``[..., H, W]`` of tiles ``[..., W / c, H / 16, 16, c]``; a copy."""
    matrix = memory.movedim(-4, -2).flatten(-2).flatten(-3, -2)
    return matrix[..., :rows, :columns].clone(memory_format=torch.contiguous_format)


def tile(memory: Tensor, matrix: Tensor) -> None:
    """The inverse: write ``[..., H, W]`` into tiles."""
    *_, column_tiles, row_tiles, rows, columns = memory.shape
    padding = (0, column_tiles * columns - matrix.size(-1), 0, row_tiles * rows - matrix.size(-2))
    padded = torch.nn.functional.pad(matrix, padding)
    memory.copy_(padded.unflatten(-2, (row_tiles, rows)).unflatten(-1, (column_tiles, columns)).movedim(-2, -4))


def is_padded(shape: Sequence[int], strides: Sequence[int], memory_shape: Sequence[int]) -> bool:
    """Whether the tiles hold more than the tensor."""
    return math.prod(base_size(shape, strides, memory_shape)) != math.prod(memory_shape[-4:])


def base_size(shape: Sequence[int], strides: Sequence[int], memory_shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns ``(H, W)`` of the contiguous tensor that a view with these strides was made of.

    Raises:
        NotImplementedError: the view does not tell.
    """
    column_tiles, row_tiles, rows, columns = memory_shape[-4:]
    candidates = []
    if len(shape) >= 2:
        last = (strides[-2], strides[-1])
        batch = [stride for size, stride in zip(shape[:-2], strides[:-2], strict=True) if size > 1]
        for height, width, row_stride, stride in (
            (shape[-2], shape[-1], *last),
            (shape[-1], shape[-2], *reversed(last)),
        ):
            if (stride == 1 or width == 1) and (row_stride == width or height == 1):
                candidates.append((height, width))
        if 1 in last:
            width = max(last)
            candidates.append((batch[-1] // width if batch else rows * row_tiles, width))
    for height, width in candidates:
        if _divided(height, rows) == row_tiles and _divided(width, columns) == column_tiles:
            return height, width
    raise NotImplementedError(
        f"a view of shape {list(shape)} and strides {list(strides)} does not tell the size of its tensor, which is "
        f"in the format FRACTAL_NZ as {list(memory_shape)}"
    )


def host_copy(tensor: Tensor) -> Tensor:
    """A tensor of the device in tiles as a CPU tensor, as :func:`decode` makes it of a descriptor."""
    sizes = (ctypes.c_int64 * 16)()
    count = _runtime().moe_npu_sim_storage_sizes(_storage_sizes(), ctypes.c_void_p(tensor._cdata), sizes)
    if count < 0:
        raise NotImplementedError(f"tensors with more than {len(sizes)} dimensions in memory are not implemented")
    storage = tensor.untyped_storage()
    num_bytes = math.prod(sizes[:count]) * tensor.dtype.itemsize
    block = (ctypes.c_uint8 * num_bytes).from_address(storage.data_ptr())
    block.owner = storage  # type: ignore[attr-defined]
    memory = torch.frombuffer(block, dtype=tensor.dtype).view(sizes[:count])
    base = tensor._base  # knows what the strides of a row, or of all elements in one axis, do not tell
    whole: Sequence[int] | None = None
    if base is not None and base.dtype == tensor.dtype and base.is_contiguous() and base.storage_offset() == 0:
        whole = base.shape if storage_shape(base.shape, memory.size(-1)) == list(memory.shape) else None
    return decode(memory, tensor.shape, tensor.stride(), int(tensor.storage_offset()), whole)


@functools.cache
def _storage_sizes() -> ctypes.c_void_p:
    """``at_npu::native::get_npu_storage_sizes(const at::Tensor&)`` of torch_npu."""
    library = ctypes.CDLL(str(torch_npu_folder() / "lib" / "libtorch_npu.so"))
    return ctypes.cast(library._ZN6at_npu6native21get_npu_storage_sizesERKN2at6TensorE, ctypes.c_void_p)


def _runtime() -> ctypes.CDLL:
    from moe_npu.sim import device  # it imports this file

    return device.runtime()


def decode(
    memory: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int, whole: Sequence[int] | None = None
) -> Tensor:
    """A tensor in tiles as a CPU tensor with these sizes and strides: a copy, which :func:`encode` writes back.

    Args:
        memory: the tiles.
        shape: sizes of the view.
        strides: steps of the view in the contiguous tensor.
        offset: where the view begins.
        whole: shape of the contiguous tensor, if it is known.

    Raises:
        NotImplementedError: the shape is not known and the strides do not tell what the tensor is.
    """
    height, width = base_size(shape, strides, memory.shape) if whole is None else whole[-2:]
    matrix = untile(memory, height, width)
    tensor = matrix.as_strided(shape, strides, offset)
    if tensor.dim() >= 2:
        ops.npu_format_cast_(tensor, 29)  # kernels refuse it where the device would
    setattr(tensor, _ORIGIN, (memory, matrix))
    return tensor


def encode(tensor: Tensor) -> None:
    """Write a tensor of :func:`decode` back after it was changed; nothing to do for any other."""
    if hasattr(tensor, _ORIGIN):
        tile(*getattr(tensor, _ORIGIN))


def stored(tensor: Tensor) -> Tensor:
    """The memory of the device that a tensor of :func:`decode` was read from; any other tensor itself."""
    memory: Tensor = getattr(tensor, _ORIGIN, (tensor,))[0]
    return memory
