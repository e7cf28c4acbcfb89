"""What `npu_grouped_matmul` accepts apart from dtypes and sizes: modes, scenarios, group lists.

Spec: grouped matmul 1.1 to 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_npu.ops._errors import dtype_name, reject, require, require_no_gradient
from moe_npu.ops._grouped_matmul_rows import K_SPLIT, OP, Parameters, Row, Tensors
from moe_npu.ops._grouped_matmul_shapes import has_transposed_strides
from moe_npu.ops._groups import COUNTS, CUMSUM, PAIRS

_MAX_TENSORS = 128
_MAX_GROUPS = 1024


def check_tensors(name: str, tensors: Tensors) -> None:
    """Raise unless there are 1 to 128 ``tensors``."""
    require(len(tensors) > 0, f"neither x nor weight could be empty: {OP} got an empty list for {name}")
    require(
        len(tensors) <= _MAX_TENSORS, f"{OP}: {name} has {len(tensors)} tensors; at most {_MAX_TENSORS} are allowed"
    )


def optional_tensors(name: str, tensors: Tensors | None) -> list[torch.Tensor] | None:
    """``tensors`` as a list; None, an empty list and a list of one empty 1-D tensor all mean None."""
    if tensors is None or len(tensors) == 0:
        return None
    check_tensors(name, tensors)
    if len(tensors) == 1 and tensors[0].dim() == 1 and tensors[0].size(0) == 0:
        return None
    return list(tensors)


def check_group_type(group_type: int | None, is_list_overload: bool) -> int:
    """The group type, -1 for the None of the overload that takes a list of ints."""
    if group_type is None:
        require(is_list_overload, "Requires manual passing group_type, current is None.")
        return -1
    if group_type not in (-1, 0, 2):
        reject(f"The group type must be -1, 0 or 2, but now is {group_type}.")
    return group_type


def check_split_item(split_item: int) -> None:
    """Raise unless ``split_item`` is one that exists."""
    if split_item not in (0, 1, 2, 3):
        reject(f"{OP}: split_item should only be one of 0/1/2/3, but now is {split_item}")


def check_modes(act_type: int, group_list_type: int) -> None:
    """Raise unless both numbers are ones that exist."""
    if act_type not in (0, 1, 2, 4, 5):
        reject(f"{OP}: act_type must be 0, 1, 2, 4 or 5, but is {act_type}")
    if group_list_type not in (CUMSUM, COUNTS, PAIRS):
        reject(
            f"{OP}: group_list_type must be 0 (cumulative sums), 1 (counts) or 2 (pairs of group and size), "
            f"but is {group_list_type}"
        )


def check_list_overload(
    group_sizes: Sequence[int],
    per_token_scale: Tensors | None,
    tuning_config: Sequence[int] | None,
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
    require(tuning_config is None, f"{OP}: tuning_config must be None {rule}")
    require(per_token_scale is None, f"{OP}: per_token_scale must be None {rule}")
    previous = 0
    for index, end in enumerate(group_sizes):
        if end < previous:
            reject(
                f"{OP}: each difference of group_list should be larger than or equal to 0 (cumulative sums), "
                f"but entry {index} is {end} after {previous}"
            )
        previous = end


def check_gradients(row: Row, parameters: Parameters) -> None:
    """Raise where a gradient is asked for that does not exist: it would silently never arrive."""
    for name, tensors in parameters.items():
        if name == "bias" and row.x.is_floating_point:
            continue
        for index, tensor in enumerate(tensors or ()):
            require_no_gradient(OP, f"{name}[{index}]", tensor)


def is_pairs(x: Tensors, weight: Tensors, has_groups: bool) -> bool:
    """Whether x[i] meets weight[i], rather than groups of the rows of one x meeting weights."""
    is_stacked = len(weight) == 1 and weight[0].dim() == 3
    return len(x) == len(weight) and not is_stacked and not (len(x) == 1 and has_groups)


def check_scenario(
    row: Row,
    x: Tensors,
    weight: Tensors,
    bias: Tensors | None,
    group_list: torch.Tensor | None,
    group_sizes: Sequence[int] | None,
    is_list_overload: bool,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> str:
    """The scenario: whether x, weight and result are each one tensor (s) or a list (m), or `K_SPLIT`.

    Raises:
        OperatorError: the numbers of tensors, their ranks or the group list are no legal scenario, or not one of row.
    """
    is_joint = split_item in (2, 3)
    _check_group_list(row, x, group_list, group_type, group_list_type)
    has_groups = group_list is not None or group_sizes is not None
    if group_type == 2:
        _check_k_split(row, x, weight, bias, group_list, is_joint)
        return K_SPLIT
    if not is_list_overload and group_type == -1:
        require(
            not has_groups,
            f"{OP}: group_list must be None for group_type -1, the default. Requires manual passing group_type",
        )
        if is_joint:
            reject(f"{OP}: split_item must be 0 or 1 for group_type -1, but is {split_item}")
    if group_type == 0 and not is_joint:
        reject(f"{OP}: split_item must be 2 or 3 for group_type 0, but is {split_item}")

    single_weight = len(weight) == 1 and weight[0].dim() == 3
    if is_pairs(x, weight, has_groups):
        scenario = "mms" if is_joint else "mmm"
        _check_pairs(x, weight, group_list, group_sizes, is_joint, is_list_overload)
    else:
        scenario = "sss" if single_weight else "sms" if is_joint else "smm"
        _check_row_groups(x, weight, group_list, group_sizes, is_joint)
    require(
        not is_list_overload or not single_weight,
        f"{OP}: weight must be 2-D tensors when group_list is a list of ints; with one 3-D weight pass a tensor",
    )
    for index, tensor in enumerate(weight):
        if not single_weight and tensor.dim() != 2:
            reject(f"{OP}: weight[{index}] must be 2-D (or weight one 3-D tensor), but has shape {tuple(tensor.shape)}")
    require(
        scenario in row.scenarios,
        f"{OP}: {row.family} products need x, weight and result, each one tensor (s) or a list (m), "
        f"to be {' or '.join(row.scenarios)}, but they are {scenario}",
    )
    return scenario


def _check_group_list(
    row: Row, x: Tensors, group_list: torch.Tensor | None, group_type: int, group_list_type: int
) -> None:
    if group_list_type == PAIRS:
        require(group_type == 0, f"{OP}: group_list_type must be 0 or 1 unless group_type is 0")
    require(
        group_list_type in row.group_list_types or group_type == -1,
        f"{OP}: group_list_type must be {' or '.join(str(kind) for kind in row.group_list_types)} for {row.family} "
        f"products, but is {group_list_type}",
    )
    if group_list is None:
        return
    rank = 2 if group_list_type == PAIRS else 1
    require(
        group_list.dtype == torch.int64 and group_list.dim() == rank,
        f"{OP}: group_list must be a {rank}-D int64 tensor for group_list_type {group_list_type}, "
        f"but is {group_list.dim()}-D {dtype_name(group_list.dtype)}",
    )
    if not 1 <= group_list.size(0) <= _MAX_GROUPS:
        reject(f"{OP}: group_list must have 1 to {_MAX_GROUPS} entries, but has {group_list.size(0)}")
    if rank == 2 and group_list.size(1) != 2:
        reject(f"{OP}: group_list must hold pairs of group and size, but has shape {tuple(group_list.shape)}")
    require(
        group_list.device == x[0].device,
        f"{OP}: group_list is on {group_list.device} but x[0] is on {x[0].device}",
    )


def _check_pairs(
    x: Tensors,
    weight: Tensors,
    group_list: torch.Tensor | None,
    group_sizes: Sequence[int] | None,
    is_joint: bool,
    is_list_overload: bool,
) -> None:
    ranks = sorted({tensor.dim() for tensor in x})
    if not is_joint:
        require(
            len(ranks) == 1 and 2 <= ranks[0] <= 6,
            f"{OP}: all x must have one rank of 2 to 6 when each has its own weight, but have ranks {ranks}",
        )
        require(
            group_list is None and group_sizes is None,
            f"{OP}: group_list must be None when each x has its own weight and result",
        )
        require(
            not (is_list_overload and any(tensor.dim() == 2 and has_transposed_strides(tensor) for tensor in weight)),
            f"{OP}: weight must not be transposed when group_list is a list of ints and each x has its own weight",
        )
        return
    require(ranks == [2], f"{OP}: all x must be 2-D for one joint result, but have ranks {ranks}")
    if group_sizes is not None:
        ends, end = [], 0
        for tensor in x:
            end += tensor.size(0)
            ends.append(end)
        if list(group_sizes) != ends:
            reject(f"{OP}: group_list must be the cumulative row counts of x {ends}, but is {list(group_sizes)}")
    elif group_list is not None and group_list.size(0) != len(x):
        reject(f"{OP}: group_list must have one entry per x, {len(x)}, but has {group_list.size(0)}")


def _check_row_groups(
    x: Tensors,
    weight: Tensors,
    group_list: torch.Tensor | None,
    group_sizes: Sequence[int] | None,
    is_joint: bool,
) -> None:
    require(
        len(x) == 1,
        f"{OP}: len(x) must be 1 or len(weight) with 2-D weights, but is {len(x)} for {len(weight)} weight tensors "
        f"of rank {weight[0].dim()}",
    )
    if x[0].dim() != 2:
        reject(f"{OP}: x must be 2-D when its rows are grouped, but has shape {tuple(x[0].shape)}")
    num_weights = weight[0].size(0) if weight[0].dim() == 3 else len(weight)
    if group_sizes is not None:
        length = len(group_sizes)
    elif group_list is not None:
        length = group_list.size(0)
    else:
        reject(f"{OP}: group_list must be given when one x is multiplied by {len(weight)} weight tensor(s)")
    if length != num_weights:
        reject(f"{OP}: group_list must have one entry per weight, {num_weights}, but has {length}")
    if is_joint and group_sizes is not None and group_sizes[-1] != x[0].size(0):
        reject(f"{OP}: the last entry of group_list must be the rows of x, {x[0].size(0)}, but is {group_sizes[-1]}")


def _check_k_split(
    row: Row,
    x: Tensors,
    weight: Tensors,
    bias: Tensors | None,
    group_list: torch.Tensor | None,
    is_joint: bool,
) -> None:
    rule = "for group_type 2 (the rows of weight are grouped)"
    require(is_joint, f"{OP}: split_item must be 2 or 3 {rule}")
    require(
        K_SPLIT in row.scenarios,
        f"{OP}: x and weight must be float {rule}, but are {dtype_name(row.x)} and {dtype_name(row.weight)}",
    )
    require(bias is None, f"{OP}: bias must be None {rule}")
    require(group_list is not None, f"{OP}: group_list must be given as a tensor {rule}")
    require(len(x) == 1 and len(weight) == 1, f"{OP}: x and weight must be one tensor each {rule}")
    if x[0].dim() != 2 or weight[0].dim() != 2:
        reject(
            f"{OP}: x and weight must be 2-D {rule}, but have shapes {tuple(x[0].shape)} and {tuple(weight[0].shape)}"
        )
    # a single row or column has no order: both readings of its strides are right
    require(
        x[0].stride(0) == 1 or 1 in x[0].shape or x[0].numel() == 0,
        f"{OP}: x must be the transposed view of a contiguous [K, M] tensor {rule}; pass x.t() of it",
    )
    require(
        not has_transposed_strides(weight[0]) or weight[0].is_contiguous(),
        f"{OP}: weight must not be transposed {rule}",
    )
