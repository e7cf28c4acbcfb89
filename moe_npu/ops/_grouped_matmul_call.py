"""One call of `npu_grouped_matmul` after its checks: what its kernels and its gradient know about it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_npu.ops import _grouped_matmul_rules as rules
from moe_npu.ops._grouped_matmul_rows import PARAMETERS
from moe_npu.ops._grouped_matmul_shapes import is_per_group, logical_shapes
from moe_npu.ops._numerics import dequantize_weight, unpack_int4_weight

TensorList = list[torch.Tensor]

# the reduction axis of the products of group g is cut by group_list, instead of the rows of x
K_SPLIT_TYPE = 2
# parameters that have one tensor for each weight
PER_WEIGHT = tuple(name for name in PARAMETERS if name != "per_token_scale")


class Call(NamedTuple):
    """The arguments of one call, checked; the order is that of the operator's schema."""

    x: TensorList
    weight: TensorList
    bias: TensorList | None
    scale: TensorList | None
    offset: TensorList | None
    antiquant_scale: TensorList | None
    antiquant_offset: TensorList | None
    per_token_scale: TensorList | None
    group_list: torch.Tensor | None
    group_sizes: list[int] | None  # the cumulative sums of group_list where they are host integers
    split_item: int
    group_type: int
    group_list_type: int
    act_type: int
    tuning_config: list[int] | None
    output_dtype: torch.dtype | None

    @property
    def parameters(self) -> dict[str, TensorList | None]:
        """The optional lists by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    @property
    def is_joint(self) -> bool:
        """Whether there is one result, not one per product."""
        return self.split_item in (2, 3)

    @property
    def is_pairs(self) -> bool:
        """Whether x[i] meets weight[i], rather than groups of the rows of one x meeting weights."""
        return rules.is_pairs(self.x, self.weight, self.group_list is not None or self.group_sizes is not None)

    @property
    def host_bounds(self) -> list[tuple[int, int]]:
        """Start and end of each group of rows, from the host integers."""
        assert self.group_sizes is not None
        return list(zip([0, *self.group_sizes[:-1]], self.group_sizes, strict=True))

    @property
    def num_groups(self) -> int:
        """Length of the group list on the device."""
        assert self.group_list is not None
        return self.group_list.size(0)


def allocate(call: Call) -> TensorList:
    """The results, uninitialized (spec 1.9)."""
    x = call.x
    dtype = x[0].dtype if call.output_dtype is None else call.output_dtype
    columns = [n for _, n in logical_shapes(x, call.weight)]
    if call.group_type == K_SPLIT_TYPE:
        return [x[0].new_empty(call.num_groups, x[0].size(0), columns[0], dtype=dtype)]
    if call.is_joint:
        return [x[0].new_empty(sum(tensor.size(0) for tensor in x), columns[0], dtype=dtype)]
    if call.is_pairs:
        return [tensor.new_empty(*tensor.shape[:-1], n, dtype=dtype) for tensor, n in zip(x, columns, strict=True)]
    return [
        x[0].new_empty(end - start, n, dtype=dtype) for (start, end), n in zip(call.host_bounds, columns, strict=True)
    ]


def dequantize(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Float ``[..., K, N]`` of int8 or packed int4 weights and parameters ``[..., N]`` or ``[..., G, N]``."""
    if not is_per_group(scale, weight):
        scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
    return dequantize_weight(
        weight if weight.dtype == torch.int8 else unpack_int4_weight(weight, scale.size(-1)), scale, offset
    )
