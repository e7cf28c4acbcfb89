"""What the grouped matmuls share that are fused with what follows them: weights, arguments, group lists.

Spec: grouped matmul 0.4 (int4 packing), 0.6 (group lists), 0.9 (weights in tiles).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_npu.ops._errors import dtype_name, reject, require_device, require_dim
from moe_npu.ops._groups import COUNTS, CUMSUM
from moe_npu.ops._numerics import INT4_PER_WORD, from_tiles, unpack_int4

# int32 accumulators cannot overflow up to here
_MAX_K = 65535
_TILE_ROWS = 16
# columns of a tile: 32 int8 values, or 8 words of 8 int4 values
_TILE_COLUMNS = {torch.int8: 32, torch.int32: 8}


def require_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    x: torch.Tensor,
) -> None:
    """Raise unless ``tensor`` has one of ``dtypes``, ``shape`` and the device of x; a string stands for any size."""
    require_device(op, name, tensor, x)
    if tensor.dtype not in dtypes:
        names = ", ".join(dtype_name(dtype) for dtype in dtypes)
        reject(f"{op}: {name} must have dtype {names}, but has {dtype_name(tensor.dtype)}")
    if tensor.dim() != len(shape) or not all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        sizes = ", ".join(str(size) for size in shape)
        reject(f"{op}: {name} must have shape [{sizes}], but has {list(tensor.shape)}")


def check_group_list(op: str, group_list: torch.Tensor, groups: int, x: torch.Tensor) -> None:
    """Raise unless ``group_list`` is int64 with an entry for each of the ``groups``."""
    require_tensor(op, "group_list", group_list, (torch.int64,), (groups,), x)
    if groups < 1:
        reject(f"{op}: group_list must have at least one entry, but is empty")


def list_type(op: str, group_list_type: int | None, default: int) -> int:
    """The checked encoding of the group list."""
    group_list_type = default if group_list_type is None else group_list_type
    if group_list_type not in (CUMSUM, COUNTS):
        reject(f"{op}: group_list_type must be 0 (cumulative sums) or 1 (counts), but is {group_list_type}")
    return group_list_type


def npu_list_type(group_list: torch.Tensor, group_list_type: int) -> int:
    """The encoding for a device, which refuses counts of length 1; the cumulative sum is the same."""
    return CUMSUM if group_list.size(0) == 1 else group_list_type


def check_weight(op: str, name: str, weight: torch.Tensor, experts: int, k: int, columns: int) -> None:
    """Raise unless ``weight`` is ``[E, K, N]`` of int8 values or words of int4 values, or the tiles of one.

    ``columns`` is N of the result: of a weight in tiles no single size is.
    """
    require_dim(op, name, weight, (3, 5))
    width = columns if weight.dtype == torch.int8 else columns // INT4_PER_WORD
    if columns % INT4_PER_WORD != 0 and weight.dtype != torch.int8:
        reject(f"{op}: {name} holds int4 values, so N must be a multiple of {INT4_PER_WORD}, but is {columns}")
    if weight.dim() == 3:
        form = [experts, k, width]
        if list(weight.shape) != form:
            reject(
                f"{op}: {name} must have shape {form}, K from x and N = {columns} from its scale, "
                f"but has {list(weight.shape)}"
            )
    else:
        tile = _TILE_COLUMNS[weight.dtype]
        form = [experts, width // tile, k // _TILE_ROWS, _TILE_ROWS, tile]
        if list(weight.shape) != form or width % tile != 0 or k % _TILE_ROWS != 0:
            reject(
                f"{op}: {name} in tiles must have shape {form} for K = {k} and N = {columns}, "
                f"but has {list(weight.shape)}"
            )
    if k > _MAX_K:
        reject(f"{op}: x must have at most {_MAX_K} columns, but has {k}; more could overflow the int32 sums")


def expert_weight(weight: torch.Tensor, expert: int) -> torch.Tensor:
    """Int8 ``[K, N]`` of one expert of a weight that passed :func:`check_weight`."""
    matrix = weight[expert] if weight.dim() == 3 else from_tiles(weight[expert : expert + 1])[0]
    return matrix if matrix.dtype == torch.int8 else unpack_int4(matrix)
