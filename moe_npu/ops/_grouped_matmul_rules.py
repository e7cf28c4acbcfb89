"""What `npu_grouped_matmul` accepts: dtype combinations, scenarios, shapes (spec: grouped matmul 1.2 to 1.10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_npu.ops._errors import dtype_name, reject, require
from moe_npu.ops._groups import COUNTS, CUMSUM
from moe_npu.ops._numerics import INT4_PER_WORD, is_transposed

OP = "npu_grouped_matmul"

_MAX_TENSORS = 128
_MAX_GROUPS = 1024
_MAX_INNER_AXIS = 65535

_F16, _BF16, _F32, _F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64

_Tensors = Sequence[torch.Tensor]


class Row(NamedTuple):
    """One legal combination of dtypes and the dtype of its result; None means "must be None"."""

    x: torch.dtype
    weight: torch.dtype
    bias: tuple[torch.dtype, ...]
    scale: torch.dtype | None
    antiquant: torch.dtype | None
    per_token_scale: torch.dtype | None
    output_dtype: tuple[torch.dtype | None, ...]
    y: torch.dtype
    takes_activation: bool = False
    row_groups_only: bool = False  # group_type 0 with one x only

    @property
    def is_quantized(self) -> bool:
        """Whether weight holds integers."""
        return self.weight in (_I8, _I32)


ROWS = (
    Row(_F16, _F16, (_F16,), None, None, None, (None, _F16), _F16),
    Row(_BF16, _BF16, (_F32,), None, None, None, (None, _BF16), _BF16),
    Row(_F32, _F32, (_F32,), None, None, None, (None, _F32), _F32),
    Row(_F64, _F64, (_F64,), None, None, None, (None, _F64), _F64),  # CPU only, for gradcheck and references
    Row(_I8, _I8, (_I32,), _I64, None, None, (None, _I8), _I8),
    Row(_I8, _I8, (_I32,), _BF16, None, None, (_BF16,), _BF16, takes_activation=True),
    Row(_I8, _I8, (_I32,), _F32, None, None, (_F16,), _F16, takes_activation=True),
    Row(_I8, _I8, (_I32, _BF16), _BF16, None, _F32, (_BF16,), _BF16, takes_activation=True, row_groups_only=True),
    Row(_I8, _I8, (_I32,), _F32, None, _F32, (_F16,), _F16, takes_activation=True, row_groups_only=True),
    Row(_I8, _I8, (_I32,), None, None, None, (_I32,), _I32),
    Row(_F16, _I8, (_F16,), None, _F16, None, (None, _F16), _F16),
    Row(_BF16, _I8, (_F32,), None, _BF16, None, (None, _BF16), _BF16),
    Row(_F16, _I32, (_F16,), None, _F16, None, (None, _F16), _F16),
    Row(_BF16, _I32, (_F32,), None, _BF16, None, (None, _BF16), _BF16),
)


def check_tensors(name: str, tensors: _Tensors) -> None:
    """Raise unless there are 1 to 128 ``tensors``."""
    require(len(tensors) > 0, f"neither x nor weight could be empty: {OP} got an empty list for {name}")
    require(
        len(tensors) <= _MAX_TENSORS, f"{OP}: {name} has {len(tensors)} tensors; at most {_MAX_TENSORS} are allowed"
    )


def optional_tensors(name: str, tensors: _Tensors | None) -> list[torch.Tensor] | None:
    """``tensors`` as a list; None, an empty list and a list of one empty 1-D tensor all mean None."""
    if tensors is None or len(tensors) == 0:
        return None
    check_tensors(name, tensors)
    if len(tensors) == 1 and tensors[0].dim() == 1 and tensors[0].size(0) == 0:
        return None
    return list(tensors)


def check_modes(split_item: int, group_type: int, group_list_type: int, act_type: int) -> None:
    """Raise unless each of the mode numbers is one that exists."""
    if group_type not in (-1, 0, 2):
        reject(f"The group type must be -1, 0 or 2, but now is {group_type}.")
    if split_item not in (0, 1, 2, 3):
        reject(f"{OP}: split_item should only be one of 0/1/2/3, but now is {split_item}")
    if act_type not in (0, 1, 2, 4, 5):
        reject(f"{OP}: act_type must be 0, 1, 2, 4 or 5, but is {act_type}")
    if group_list_type not in (CUMSUM, COUNTS):
        reject(f"{OP}: group_list_type must be 0 (cumulative sums) or 1 (counts), but is {group_list_type}")


def check_list_overload(
    group_sizes: Sequence[int],
    per_token_scale: _Tensors | None,
    group_type: int,
    group_list_type: int,
    act_type: int,
) -> None:
    """Raise unless the modes that a list of ints does not take are left at their defaults."""
    rule = "when group_list is a list of ints, which takes no modes; pass group_list as a tensor"
    if group_type != -1:
        reject(f"{OP}: group_type must be None, but is {group_type}, {rule}")
    if group_list_type != 0:
        reject(f"{OP}: group_list_type must be None or 0, but is {group_list_type}, {rule}")
    if act_type != 0:
        reject(f"{OP}: act_type must be None or 0, but is {act_type}, {rule}")
    require(optional_tensors("per_token_scale", per_token_scale) is None, f"{OP}: per_token_scale must be None {rule}")
    previous = 0
    for index, end in enumerate(group_sizes):
        if end < previous:
            reject(
                f"{OP}: each difference of group_list should be larger than or equal to 0 (cumulative sums), "
                f"but entry {index} is {end} after {previous}"
            )
        previous = end


def check_gradients(
    row: Row,
    bias: _Tensors | None,
    scale: _Tensors | None,
    antiquant_scale: _Tensors | None,
    antiquant_offset: _Tensors | None,
    per_token_scale: _Tensors | None,
) -> None:
    """Raise where a gradient is asked for that does not exist: it would silently never arrive."""
    if not torch.is_grad_enabled():
        return
    for name, tensors in (
        ("bias", bias if row.x == _I8 else None),
        ("scale", scale),
        ("antiquant_scale", antiquant_scale),
        ("antiquant_offset", antiquant_offset),
        ("per_token_scale", per_token_scale),
    ):
        for index, tensor in enumerate(tensors or ()):
            require(
                not tensor.requires_grad,
                f"{OP}: {name}[{index}] requires a gradient, but has none for weight of {dtype_name(row.weight)}; "
                f"detach it",
            )


def check_dtypes(
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    scale: _Tensors | None,
    antiquant_scale: _Tensors | None,
    antiquant_offset: _Tensors | None,
    per_token_scale: _Tensors | None,
    output_dtype: torch.dtype | None,
    act_type: int,
) -> Row:
    """The legal combination that the arguments are.

    Raises:
        OperatorError: they are none; the message lists those with the same x and weight.
    """
    for name, tensors in (
        ("x", x),
        ("weight", weight),
        ("bias", bias),
        ("scale", scale),
        ("antiquant_scale", antiquant_scale),
        ("antiquant_offset", antiquant_offset),
        ("per_token_scale", per_token_scale),
    ):
        for index, tensor in enumerate(tensors or ()):
            assert tensors is not None
            require(
                tensor.dtype == tensors[0].dtype,
                f"{OP}: all tensors of {name} must have one dtype, but {name}[{index}] is {dtype_name(tensor.dtype)} "
                f"and {name}[0] is {dtype_name(tensors[0].dtype)}",
            )
            require(
                tensor.device == x[0].device,
                f"{OP}: {name}[{index}] is on {tensor.device} but x[0] is on {x[0].device}",
            )
    x_dtype, weight_dtype = x[0].dtype, weight[0].dtype
    candidates = [row for row in ROWS if (row.x, row.weight) == (x_dtype, weight_dtype)]
    if x_dtype == _F64 and x[0].device.type not in ("cpu", "meta"):
        candidates = []
    if not candidates:
        pairs = sorted({f"{dtype_name(row.x)} x {dtype_name(row.weight)}" for row in ROWS})
        reject(
            f"{OP}: x of {dtype_name(x_dtype)} with weight of {dtype_name(weight_dtype)} is not supported on "
            f"{x[0].device.type}; supported are {', '.join(pairs)} (int32 weights hold eight int4 each)"
        )
    raw_accumulators = x_dtype == _I8 and output_dtype == _I32
    if raw_accumulators:
        scale = None  # the device ignores it; callers dequantise later
    for row in candidates:
        if (
            _first_dtype(scale) == row.scale
            and _first_dtype(antiquant_scale) == row.antiquant
            and _first_dtype(antiquant_offset) == row.antiquant
            and _first_dtype(per_token_scale) == row.per_token_scale
            and output_dtype in row.output_dtype
        ):
            break
    else:
        given = {
            "scale": _first_dtype(scale),
            "antiquant_scale": _first_dtype(antiquant_scale),
            "antiquant_offset": _first_dtype(antiquant_offset),
            "per_token_scale": _first_dtype(per_token_scale),
            "output_dtype": output_dtype,
        }
        legal = "; ".join(
            f"scale {dtype_name(row.scale)}, antiquant_scale and antiquant_offset {dtype_name(row.antiquant)}, "
            f"per_token_scale {dtype_name(row.per_token_scale)}, "
            f"output_dtype {' or '.join(dtype_name(dtype) for dtype in row.output_dtype)}"
            for row in candidates
        )
        reject(
            f"{OP}: no kernel for x {dtype_name(x_dtype)}, weight {dtype_name(weight_dtype)}, "
            + ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in given.items())
            + f". Legal with this x and weight: {legal}"
        )
    if bias is not None and bias[0].dtype not in row.bias:
        names = " or ".join(dtype_name(dtype) for dtype in row.bias)
        reject(
            f"{OP}: bias must have dtype {names} for x {dtype_name(x_dtype)}, weight {dtype_name(weight_dtype)} and "
            f"result {dtype_name(row.y)}, but has {dtype_name(bias[0].dtype)}"
        )
    if act_type != 0 and not row.takes_activation:
        reject(
            f"{OP}: act_type must be 0 for x {dtype_name(x_dtype)}, weight {dtype_name(weight_dtype)} and result "
            f"{dtype_name(row.y)}, but is {act_type}; only int8 products with a float result are activated"
        )
    return row


def _first_dtype(tensors: _Tensors | None) -> torch.dtype | None:
    return None if tensors is None else tensors[0].dtype


def logical_shape(weight: torch.Tensor, k: int) -> tuple[int, int]:
    """``(K, N)`` of a weight, counting int4 values, not the int32 words that hold them.

    Strides tell along which axis it is packed, but for a single word only ``k``, the columns of x, does.
    """
    rows, columns = weight.shape[-2:]
    if weight.dtype != _I32:
        return rows, columns
    if is_transposed(weight) or (rows == columns == 1 and k == INT4_PER_WORD):
        return rows * INT4_PER_WORD, columns
    return rows, columns * INT4_PER_WORD


def logical_shapes(x: _Tensors, weight: _Tensors) -> list[tuple[int, int]]:
    """``(K, N)`` of each weight; one x stands for all."""
    return [logical_shape(tensor, x[index if len(x) > 1 else 0].size(-1)) for index, tensor in enumerate(weight)]


def is_pairs(x: _Tensors, weight: _Tensors, has_groups: bool) -> bool:
    """Whether x[i] meets weight[i], rather than groups of the rows of one x meeting weights."""
    is_stacked = len(weight) == 1 and weight[0].dim() == 3
    return len(x) == len(weight) and not is_stacked and not (len(x) == 1 and has_groups)


def check_scenario(
    row: Row,
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    group_list: torch.Tensor | None,
    group_sizes: Sequence[int] | None,
    is_list_overload: bool,
    split_item: int,
    group_type: int,
) -> None:
    """Raise unless the numbers of tensors, their ranks and the group list are one of the legal scenarios."""
    one_output = split_item in (2, 3)
    ranks = sorted({tensor.dim() for tensor in x})
    single_weight = len(weight) == 1 and weight[0].dim() == 3
    if group_list is not None:
        require(
            group_list.dtype == _I64 and group_list.dim() == 1,
            f"{OP}: group_list must be a 1-D int64 tensor, but is {group_list.dim()}-D {dtype_name(group_list.dtype)}",
        )
        if not 1 <= group_list.size(0) <= _MAX_GROUPS:
            reject(f"{OP}: group_list must have 1 to {_MAX_GROUPS} entries, but has {group_list.size(0)}")
        require(
            group_list.device == x[0].device,
            f"{OP}: group_list is on {group_list.device} but x[0] is on {x[0].device}",
        )
    has_groups = group_list is not None or group_sizes is not None
    if group_type == 2:
        _check_k_split(row, x, weight, bias, group_list, one_output)
        return
    if not is_list_overload and group_type == -1:
        require(not has_groups, f"{OP}: group_list must be None for group_type -1")
        if one_output:
            reject(f"{OP}: split_item must be 0 or 1 for group_type -1, but is {split_item}")
    if group_type == 0 and not one_output:
        reject(f"{OP}: split_item must be 2 or 3 for group_type 0, but is {split_item}")

    pairs = is_pairs(x, weight, has_groups)
    if pairs:
        if group_type == -1 and not one_output:
            require(
                len(ranks) == 1 and 2 <= ranks[0] <= 6,
                f"{OP}: all x must have one rank of 2 to 6 when each has its own weight, but have ranks {ranks}",
            )
            require(not has_groups, f"{OP}: group_list must be None when each x has its own weight and result")
        else:
            require(ranks == [2], f"{OP}: all x must be 2-D for one joint result, but have ranks {ranks}")
            _check_pair_groups(x, group_sizes, group_list)
    else:
        require(
            len(x) == 1,
            f"{OP}: len(x) must be 1 or len(weight) with 2-D weights, but is {len(x)} for {len(weight)} weight tensors "
            f"of rank {weight[0].dim()}",
        )
        require(ranks == [2], f"{OP}: x must be 2-D when its rows are grouped, but has shape {tuple(x[0].shape)}")
        require(
            has_groups, f"{OP}: group_list must be given when one x is multiplied by {len(weight)} weight tensor(s)"
        )
        num_weights = weight[0].size(0) if single_weight else len(weight)
        length = len(group_sizes) if group_sizes is not None else group_list.size(0)  # type: ignore[union-attr]
        if length != num_weights:
            reject(f"{OP}: group_list must have one entry per weight, {num_weights}, but has {length}")
        if one_output and group_sizes is not None and group_sizes[-1] != x[0].size(0):
            reject(
                f"{OP}: the last entry of group_list must be the rows of x, {x[0].size(0)}, but is {group_sizes[-1]}"
            )
    require(
        not is_list_overload or not single_weight,
        f"{OP}: weight must be 2-D tensors when group_list is a list of ints; with one 3-D weight pass a tensor",
    )
    for index, tensor in enumerate(weight):
        require(
            single_weight or tensor.dim() == 2,
            f"{OP}: weight[{index}] must be 2-D (or weight one 3-D tensor), but has shape {tuple(tensor.shape)}",
        )
    require(
        not row.row_groups_only or (len(x) == 1 and not pairs and one_output),
        f"{OP}: per_token_scale needs group_type 0, one x and one result",
    )


def _check_pair_groups(x: _Tensors, group_sizes: Sequence[int] | None, group_list: torch.Tensor | None) -> None:
    if group_sizes is not None:
        ends, end = [], 0
        for tensor in x:
            end += tensor.size(0)
            ends.append(end)
        if list(group_sizes) != ends:
            reject(f"{OP}: group_list must be the cumulative row counts of x {ends}, but is {list(group_sizes)}")
    elif group_list is not None and group_list.size(0) != len(x):
        reject(f"{OP}: group_list must have one entry per x, {len(x)}, but has {group_list.size(0)}")


def _check_k_split(
    row: Row,
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    group_list: torch.Tensor | None,
    one_output: bool,
) -> None:
    rule = "for group_type 2 (the rows of weight are grouped)"
    require(one_output, f"{OP}: split_item must be 2 or 3 {rule}")
    require(not row.is_quantized, f"{OP}: x and weight must be float {rule}, but weight is {dtype_name(row.weight)}")
    require(bias is None, f"{OP}: bias must be None {rule}")
    require(group_list is not None, f"{OP}: group_list must be given as a tensor {rule}")
    require(len(x) == 1 and len(weight) == 1, f"{OP}: x and weight must be one tensor each {rule}")
    require(
        x[0].dim() == 2 and weight[0].dim() == 2,
        f"{OP}: x and weight must be 2-D {rule}, but have shapes {tuple(x[0].shape)} and {tuple(weight[0].shape)}",
    )
    # a single row or column has no order: both readings of its strides are right
    require(
        x[0].stride(0) == 1 or 1 in x[0].shape or x[0].numel() == 0,
        f"{OP}: x must be the transposed view of a contiguous [K, M] tensor {rule}; pass x.t() of it",
    )
    require(
        weight[0].stride(1) == 1 or 1 in weight[0].shape or weight[0].numel() == 0,
        f"{OP}: weight must not be transposed {rule}",
    )


def check_shapes(
    row: Row,
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    scale: _Tensors | None,
    antiquant_scale: _Tensors | None,
    antiquant_offset: _Tensors | None,
    per_token_scale: _Tensors | None,
    group_type: int,
    split_item: int,
) -> None:
    """Raise unless sizes agree: K of x and weight, N where one result is asked for, and every parameter."""
    sizes = logical_shapes(x, weight)
    if group_type != 2:
        transposed = {is_transposed(tensor) for tensor in weight if 1 not in tensor.shape[-2:]}
        require(len(transposed) <= 1, f"{OP}: all weights must be transposed views, or none")
    for index, tensor in enumerate(x):
        if group_type == 2:
            inner = tensor.size(0)
        else:
            inner = tensor.size(-1)
            require(
                not is_transposed(tensor) or 1 in tensor.shape[-2:] or tensor.is_contiguous(),
                f"{OP}: x[{index}] must not be a transposed view",
            )
        _check_inner_axis(f"x[{index}]", inner)
    for index, (rows, columns) in enumerate(sizes):
        _check_inner_axis(f"weight[{index}]", rows if is_transposed(weight[index]) else columns)
        k = x[index if len(x) > 1 else 0].size(-1)
        if k != rows:
            reject(
                f"{OP}: x[{index if len(x) > 1 else 0}] has {k} columns but weight[{index}] has {rows} rows "
                f"(weight is [..., K, N])"
            )
        if row.x == _I8 and rows <= 0:
            reject(f"{OP}: k must be a positive integer for int8 products, but is {rows}")
    if split_item in (2, 3):
        columns_of = [columns for _, columns in sizes]
        if not all(columns == columns_of[0] for columns in columns_of):
            reject(f"{OP}: all weights must have one number of columns for one result, but have {columns_of}")
    for name, tensors in (
        ("bias", bias),
        ("scale", scale),
        ("antiquant_scale", antiquant_scale),
        ("antiquant_offset", antiquant_offset),
    ):
        if tensors is None:
            continue
        require(
            len(tensors) == len(weight),
            f"{OP}: {name} must have one tensor per weight, {len(weight)}, but has {len(tensors)}",
        )
        for index, tensor in enumerate(tensors):
            per_group = name.startswith("antiquant") and row.weight == _I32
            _check_parameter(f"{name}[{index}]", tensor, weight[index], sizes[index], per_group)
    if antiquant_scale is not None and antiquant_offset is not None:
        for index, (a, b) in enumerate(zip(antiquant_scale, antiquant_offset, strict=True)):
            require(
                a.shape == b.shape,
                f"{OP}: antiquant_scale[{index}] and antiquant_offset[{index}] must have one shape, "
                f"but have {tuple(a.shape)} and {tuple(b.shape)}",
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
    if per_token_scale is not None:
        require(
            len(per_token_scale) == 1, f"{OP}: per_token_scale must hold one tensor, but has {len(per_token_scale)}"
        )
        if per_token_scale[0].shape != (x[0].size(0),):
            reject(
                f"{OP}: per_token_scale must have shape [{x[0].size(0)}], one value per row of x, "
                f"but has {tuple(per_token_scale[0].shape)}"
            )


def _check_inner_axis(name: str, size: int) -> None:
    if size > _MAX_INNER_AXIS:
        reject(f"{OP}: the inner axis of {name} must be at most {_MAX_INNER_AXIS}, but is {size}")


def is_per_group(parameter: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``parameter`` is ``[..., G, N]``, one row per group of K, rather than ``[..., N]``."""
    return parameter.dim() == weight.dim()


def _check_parameter(
    name: str, parameter: torch.Tensor, weight: torch.Tensor, size: tuple[int, int], per_group: bool
) -> None:
    rows, columns = size
    leading = tuple(weight.shape[:-2])
    if parameter.shape == (*leading, columns):
        return
    if per_group and is_per_group(parameter, weight):
        if (
            (*parameter.shape[:-2], parameter.size(-1)) != (*leading, columns)
            or parameter.size(-2) <= 0
            or rows % parameter.size(-2) != 0
        ):
            reject(
                f"{OP}: {name} must have shape {[*leading, 'G', columns]} with G dividing K = {rows}, "
                f"but has {tuple(parameter.shape)}"
            )
        if is_transposed(weight) and rows // parameter.size(-2) % 2 != 0:
            reject(
                f"{OP}: {name} must cut K = {rows} into groups of even length for a transposed weight, "
                f"but has {parameter.size(-2)} groups"
            )
        return
    reject(f"{OP}: {name} must have shape {[*leading, columns]}, but has {tuple(parameter.shape)}")
