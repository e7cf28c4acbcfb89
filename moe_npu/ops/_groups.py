"""Group lists: how the rows of one tensor are cut into one group per expert (spec: grouped matmul 0.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_npu.ops._errors import reject, require

CUMSUM = 0
COUNTS = 1
# [E, 2]: group and size in the order of the rows, up to the first size that is not positive
PAIRS = 2


class Group(NamedTuple):
    """Rows ``start:end`` belong to the group number ``group``."""

    group: int
    start: int
    end: int


def counts_from(group_list: torch.Tensor, group_list_type: int) -> torch.Tensor:
    """Per-group sizes ``[E]``, on the device of ``group_list`` and without a host read; not of pairs."""
    if group_list_type == COUNTS:
        return group_list
    return torch.diff(group_list, prepend=group_list.new_zeros(1))


def row_groups(
    op: str, group_list: torch.Tensor, group_list_type: int, num_rows: int, argument: str = "group_list"
) -> list[Group]:
    """The groups that have rows, in row order. Reads the values of ``group_list``: CPU kernels only.

    ``argument`` is what the operator calls its group list.

    Raises:
        OperatorError: a negative or decreasing entry, or more rows in the groups than there are; in pairs
            also a group that does not exist or comes twice.
    """
    if group_list_type == PAIRS:
        return _pair_groups(op, group_list.tolist(), num_rows)
    values: list[int] = group_list.tolist()
    if group_list_type == COUNTS:
        if values and min(values) < 0:
            reject(f"{op}: {argument} counts should be larger than or equal to 0, but are {values}")
        ends = torch.cumsum(group_list, 0).tolist()
    else:
        ends = values
    return _groups_between(op, ends, num_rows, argument)


def split_groups(op: str, ends: Sequence[int], num_rows: int) -> list[Group]:
    """All groups of a cumulative sum of host integers, the empty ones too.

    Raises:
        OperatorError: a negative or decreasing entry, or more rows in the groups than there are.
    """
    _groups_between(op, list(ends), num_rows, "group_list")
    starts = [0, *ends[:-1]]
    return [Group(index, start, end) for index, (start, end) in enumerate(zip(starts, ends, strict=True))]


def _groups_between(op: str, ends: list[int], num_rows: int, argument: str) -> list[Group]:
    groups, start = [], 0
    for index, end in enumerate(ends):
        if end != start:
            require(
                end > start,
                f"{op}: each difference of {argument} should be larger than or equal to 0 (cumulative sums), "
                f"but entry {index} is {end} after {start}",
            )
            groups.append(Group(index, start, end))
            start = end
    _check_rows(op, start, num_rows, argument)
    return groups


def _pair_groups(op: str, pairs: list[list[int]], num_rows: int) -> list[Group]:
    groups: list[Group] = []
    end, seen = 0, set()
    for _, size in pairs:
        require(size >= 0, f"{op}: group_list sizes should be larger than or equal to 0, but are {pairs}")
    for group, size in pairs:
        if size == 0:  # the end; producers pad with zeros, so the rest may name one group again and again
            break
        require(
            0 <= group < len(pairs) and group not in seen,
            f"{op}: group_list must name each of the groups 0 to {len(pairs) - 1} once at most, but is {pairs}",
        )
        seen.add(group)
        groups.append(Group(group, end, end + size))
        end += size
    _check_rows(op, end, num_rows, "group_list")
    return groups


def _check_rows(op: str, covered: int, num_rows: int, argument: str) -> None:
    require(
        covered <= num_rows,
        f"{op}: {argument} covers {covered} rows but there are only {num_rows}; rows must cover the groups",
    )
