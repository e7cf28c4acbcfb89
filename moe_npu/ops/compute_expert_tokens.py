"""End offsets of the experts in sorted expert ids: ``out[e] = number of ids <= e`` (spec: routing 2.4)."""

from __future__ import annotations

import torch

from moe_npu.ops._errors import reject, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "npu_moe_compute_expert_tokens"
_MAX_IDS = 2**24
_MAX_EXPERTS = 2048


def _check(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> None:
    require_dim(_OP, "sorted_expert_for_source_row", sorted_expert_for_source_row, (1,))
    require_dtype(_OP, "sorted_expert_for_source_row", sorted_expert_for_source_row, (torch.int32,))
    if sorted_expert_for_source_row.numel() >= _MAX_IDS:
        reject(
            f"{_OP}: sorted_expert_for_source_row must have fewer than 2**24 elements, "
            f"but has {sorted_expert_for_source_row.numel()}"
        )
    if not 0 < num_expert <= _MAX_EXPERTS:
        reject(f"{_OP}: num_expert must be between 1 and {_MAX_EXPERTS}, but is {num_expert}")


def _cpu(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    ids = sorted_expert_for_source_row.contiguous()
    if bool((ids[1:] < ids[:-1]).any()):  # a binary search finds something else in each implementation
        reject(f"{_OP}: sorted_expert_for_source_row must be in ascending order")
    experts = torch.arange(num_expert, dtype=torch.int32)
    return torch.searchsorted(ids, experts, right=True, out_int32=True)


def _npu(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    if sorted_expert_for_source_row.numel() == 0:
        return _fake(sorted_expert_for_source_row, num_expert).zero_()
    return torch.ops.npu.npu_moe_compute_expert_tokens(sorted_expert_for_source_row, num_expert)


def _fake(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    return sorted_expert_for_source_row.new_empty(num_expert)


_op = register_op(
    "npu_moe_compute_expert_tokens(Tensor sorted_expert_for_source_row, int num_expert) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_moe_compute_expert_tokens(sorted_expert_for_source_row: torch.Tensor, num_expert: int) -> torch.Tensor:
    """The cumulative counts of sorted expert ids: the end offset of each expert.

    Args:
        sorted_expert_for_source_row: ``[N*K]`` int32 in ascending order, fewer than 2**24: the third result of
            :func:`npu_moe_init_routing`. Ids of ``num_expert`` and more are not counted.
        num_expert: 1 to 2048.

    Returns:
        ``[num_expert]`` int32, never decreasing; cast to int64 it is a group list of ``group_list_type=0``.

    Raises:
        OperatorError: wrong rank, dtype or size; on CPU also ids that are not sorted.

    Example:
        >>> npu_moe_compute_expert_tokens(torch.tensor([0, 0, 1, 2, 2, 2], dtype=torch.int32), 4)
        tensor([2, 3, 6, 6], dtype=torch.int32)
    """
    _check(sorted_expert_for_source_row, num_expert)
    return _op(sorted_expert_for_source_row, num_expert)
