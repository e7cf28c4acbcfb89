"""The sizes that `npu_grouped_matmul` accepts (spec: grouped matmul 1.2, 1.6 and 1.11)."""

from __future__ import annotations

import math

import torch

from moe_npu.ops._errors import reject, require
from moe_npu.ops._grouped_matmul_rows import K_SPLIT, OP, Parameters, Row, Tensors
from moe_npu.ops._numerics import INT4_PER_WORD, is_transposed
from moe_npu.ops.format import FRACTAL_NZ, format_of

_MAX_INNER_AXIS = 65535
_MAX_A8W4_ROWS = 18432
_A8W4_ROWS = 64
_NZ_GROUP_LENGTH = 256


def columns_of(x: torch.Tensor) -> int:
    """K of x, counting int4 values."""
    return x.size(-1) * (INT4_PER_WORD if x.dtype == torch.int32 else 1)


def logical_shape(weight: torch.Tensor, k: int) -> tuple[int, int]:
    """``(K, N)`` of a weight, counting int4 values, not the int32 words that hold them.

    Strides tell along which axis it is packed, but with a single row or column only ``k``, the columns of x, does.
    """
    rows, columns = weight.shape[-2:]
    if weight.dtype != torch.int32:
        return rows, columns
    along_k = is_transposed(weight)
    if (rows == 1 or columns == 1) and k in (rows, rows * INT4_PER_WORD):
        along_k = k != rows
    return (rows * INT4_PER_WORD, columns) if along_k else (rows, columns * INT4_PER_WORD)


def logical_shapes(x: Tensors, weight: Tensors) -> list[tuple[int, int]]:
    """``(K, N)`` of each weight; one x stands for all."""
    return [logical_shape(tensor, columns_of(x[index if len(x) > 1 else 0])) for index, tensor in enumerate(weight)]


def is_per_group(parameter: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``parameter`` is ``[..., G, N]``, one row per group of K, rather than ``[..., N]``."""
    return parameter.dim() == weight.dim()


def has_transposed_strides(tensor: torch.Tensor) -> bool:
    """Whether it is a transposed view and not just a single row or column, whose strides say nothing."""
    return is_transposed(tensor) and 1 not in tensor.shape[-2:]


def check_shapes(row: Row, scenario: str, x: Tensors, weight: Tensors, parameters: Parameters, is_joint: bool) -> None:
    """Raise unless sizes agree: K of x and weight, N where one result is asked for, and every parameter."""
    _check_layouts(row, scenario, x, weight)
    sizes = logical_shapes(x, weight)
    for index, tensor in enumerate(x):
        _check_inner_axis(f"x[{index}]", tensor.size(0) if scenario == K_SPLIT else columns_of(tensor))
    for index, (rows, columns) in enumerate(sizes):
        _check_inner_axis(f"weight[{index}]", rows if is_transposed(weight[index]) else columns)
        of_x = index if len(x) > 1 else 0
        k = columns_of(x[of_x])
        if k != rows:
            reject(
                f"{OP}: x[{of_x}] has {k} columns but weight[{index}] has {rows} rows (weight is [..., K, N], int4 "
                f"values count one by one)"
            )
        if not row.x.is_floating_point and rows == 0 and columns != 0 and math.prod(x[of_x].shape[:-1]) != 0:
            reject(f"{OP}: k must be a positive integer for int8 products, but is {rows}")
    if is_joint:
        widths = [columns for _, columns in sizes]
        if not all(width == widths[0] for width in widths):
            reject(f"{OP}: all weights must have one number of columns for one result, but have {widths}")
    if row.is_int4_product:
        _check_a8w4(row, weight[0], sizes[0], parameters)
    _check_parameters(row, weight, sizes, parameters)
    _check_per_token_scale(row, x[0].size(0), parameters["per_token_scale"])


def _check_layouts(row: Row, scenario: str, x: Tensors, weight: Tensors) -> None:
    if scenario != K_SPLIT:
        transposed = {is_transposed(tensor) for tensor in weight if 1 not in tensor.shape[-2:]}
        require(len(transposed) <= 1, f"{OP}: all weights must be transposed views, or none")
        for index, tensor in enumerate(x):
            require(
                not has_transposed_strides(tensor) or tensor.is_contiguous(),
                f"{OP}: x[{index}] must not be a transposed view",
            )
    require(
        not (row.is_int4_product and has_transposed_strides(weight[0])),
        f"{OP}: weight must not be a transposed view for {row.family}; pack it along N",
    )
    for index, tensor in enumerate(x):
        require(format_of(tensor) != FRACTAL_NZ, f"{OP}: x[{index}] must not have the format FRACTAL_NZ; cast it to ND")
    tiled = {format_of(tensor) == FRACTAL_NZ for tensor in weight}
    require(len(tiled) == 1, f"{OP}: all weights must have the format FRACTAL_NZ, or none")
    require(
        True not in tiled or (row.takes_tiles and scenario != K_SPLIT),
        f"{OP}: weight must not have the format FRACTAL_NZ for {row.family} in scenario {scenario}; cast it to ND",
    )


def _check_inner_axis(name: str, size: int) -> None:
    if size > _MAX_INNER_AXIS:
        reject(f"{OP}: the inner axis of {name} must be at most {_MAX_INNER_AXIS}, but is {size}")


def _check_a8w4(row: Row, weight: torch.Tensor, size: tuple[int, int], parameters: Parameters) -> None:
    if row.x != torch.int8:
        return
    rows, _ = size
    if rows % _A8W4_ROWS != 0 or rows > _MAX_A8W4_ROWS:
        reject(f"{OP}: K must be a multiple of {_A8W4_ROWS} up to {_MAX_A8W4_ROWS} for {row.family}, but is {rows}")
    scale = parameters["scale"]
    assert scale is not None
    groups = scale[0].size(-2) if is_per_group(scale[0], weight) else 1
    if groups > 1 and groups * _NZ_GROUP_LENGTH != rows and format_of(weight) == FRACTAL_NZ:
        reject(
            f"{OP}: scale must have one group of K, or groups of {_NZ_GROUP_LENGTH} rows, for weight of the format "
            f"FRACTAL_NZ, but has {groups} groups of K = {rows}"
        )


def _check_parameters(row: Row, weight: Tensors, sizes: list[tuple[int, int]], parameters: Parameters) -> None:
    for name, tensors in parameters.items():
        if tensors is None or name == "per_token_scale":
            continue
        require(
            len(tensors) == len(weight),
            f"{OP}: {name} must have one tensor per weight, {len(weight)}, but has {len(tensors)}",
        )
        for index, tensor in enumerate(tensors):
            per_group = row.weight == torch.int32 and name != "bias"
            _check_parameter(f"{name}[{index}]", tensor, weight[index], sizes[index], per_group, row)
    antiquant_scale, antiquant_offset = parameters["antiquant_scale"], parameters["antiquant_offset"]
    if antiquant_scale is not None and antiquant_offset is not None:
        for index, (a, b) in enumerate(zip(antiquant_scale, antiquant_offset, strict=True)):
            if a.shape != b.shape:
                reject(
                    f"{OP}: antiquant_scale[{index}] and antiquant_offset[{index}] must have one shape, "
                    f"but have {tuple(a.shape)} and {tuple(b.shape)}"
                )
        lengths = [
            size[0] // scale.size(-2)
            for scale, tensor, size in zip(antiquant_scale, weight, sizes, strict=True)
            if is_per_group(scale, tensor)
        ]
        if not all(length == lengths[0] for length in lengths):
            reject(
                f"{OP}: antiquant_scale must cut K into groups of one length for all weights, but has lengths {lengths}"
            )


def _check_parameter(
    name: str, parameter: torch.Tensor, weight: torch.Tensor, size: tuple[int, int], per_group: bool, row: Row
) -> None:
    rows, columns = size
    leading = tuple(weight.shape[:-2])
    if parameter.shape == (*leading, columns):
        return
    if not (per_group and is_per_group(parameter, weight)):
        reject(f"{OP}: {name} must have shape {[*leading, columns]}, but has {tuple(parameter.shape)}")
    groups = parameter.size(-2)
    if (*parameter.shape[:-2], parameter.size(-1)) != (*leading, columns) or groups <= 0 or rows % groups != 0:
        reject(
            f"{OP}: {name} must have shape {[*leading, 'G', columns]} with G dividing K = {rows}, "
            f"but has {tuple(parameter.shape)}"
        )
    if row.offset != (None,) and groups != 1:
        reject(f"{OP}: {name} must have one group of K for {row.family}, but has {groups}")
    if (row.is_int4_product or is_transposed(weight)) and rows // groups % 2 != 0:
        reject(
            f"{OP}: {name} must cut K = {rows} into groups of even length for int4 products and transposed weights, "
            f"but has {groups} groups"
        )


def _check_per_token_scale(row: Row, num_rows: int, per_token_scale: Tensors | None) -> None:
    if per_token_scale is None:
        return
    require(len(per_token_scale) == 1, f"{OP}: per_token_scale must hold one tensor, but has {len(per_token_scale)}")
    shape = per_token_scale[0].shape
    is_column = shape == (num_rows, 1)
    if row.offset != (None,):
        if not is_column:
            reject(f"{OP}: per_token_scale must have shape [{num_rows}, 1] for {row.family}, but has {tuple(shape)}")
    elif shape != (num_rows,) and not (is_column and row.is_int4_product and row.x == torch.int8):
        reject(f"{OP}: per_token_scale must have shape [{num_rows}], one value per row of x, but has {tuple(shape)}")
