"""Replicas of experts: the physical expert of each logical one, and which choices are kept.

With n = table[e, 0], the number of replicas of expert e, whose physical ids are table[e, 1] to table[e, n]:

    balance_mode 0  table[e, 1 + local_rank_id // ceil(world_size / n)]     by rank
    balance_mode 1  table[e, 1 + row % n]                                   by token

The only replica of an expert is chosen in either mode.

    keep[row, j] = active_mask[row] and scales[row, j] >= threshold[j] * sum of scales[row, :]

The comparison is float32. Spec: routing 5.8.
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BY_RANK, _BY_TOKEN = 0, 1


def _check(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    expert_scales: torch.Tensor | None,
    pruning_threshold: torch.Tensor | None,
    active_mask: torch.Tensor | None,
    local_rank_id: int,
    world_size: int,
    balance_mode: int,
) -> None:
    op = "npu_moe_update_expert"
    for name, tensor in (
        ("eplb_table", eplb_table),
        ("expert_scales", expert_scales),
        ("pruning_threshold", pruning_threshold),
        ("active_mask", active_mask),
    ):
        require_device(op, name, tensor, expert_ids)
    require_dim(op, "expert_ids", expert_ids, (2,))
    require_dtype(op, "expert_ids", expert_ids, (torch.int32, torch.int64))
    require_dim(op, "eplb_table", eplb_table, (2,))
    require_dtype(op, "eplb_table", eplb_table, (torch.int32,))
    if eplb_table.size(1) < 2:
        reject(f"{op}: eplb_table must have a count and at least one replica, but has {eplb_table.size(1)} columns")
    _check_pruning(op, expert_ids, expert_scales, pruning_threshold, active_mask)
    if balance_mode not in (_BY_RANK, _BY_TOKEN):
        reject(f"{op}: balance_mode must be 0 or 1, but is {balance_mode}")
    if balance_mode == _BY_RANK:
        if world_size < 1:
            reject(f"{op}: world_size must be given and positive with balance_mode 0, but is {world_size}")
        if not 0 <= local_rank_id < world_size:
            reject(
                f"{op}: local_rank_id must be between 0 and {world_size - 1} with balance_mode 0, "
                f"but is {local_rank_id}"
            )


def _check_pruning(
    op: str,
    expert_ids: torch.Tensor,
    expert_scales: torch.Tensor | None,
    pruning_threshold: torch.Tensor | None,
    active_mask: torch.Tensor | None,
) -> None:
    if expert_scales is None or pruning_threshold is None:
        require(
            expert_scales is None and pruning_threshold is None,
            f"{op}: expert_scales and pruning_threshold must be given together",
        )
        require(active_mask is None, f"{op}: active_mask requires expert_scales and pruning_threshold")
        return
    require_dtype(op, "expert_scales", expert_scales, _FLOATS)
    if expert_scales.shape != expert_ids.shape:
        reject(
            f"{op}: expert_scales must have the shape of expert_ids {tuple(expert_ids.shape)}, "
            f"but has {tuple(expert_scales.shape)}"
        )
    require_dim(op, "pruning_threshold", pruning_threshold, (1, 2))
    require_dtype(op, "pruning_threshold", pruning_threshold, (torch.float32,))
    top_k = expert_ids.size(1)
    if pruning_threshold.size(-1) != top_k or (pruning_threshold.dim() == 2 and pruning_threshold.size(0) != 1):
        reject(
            f"{op}: pruning_threshold must have shape ({top_k},) or (1, {top_k}), "
            f"but has {tuple(pruning_threshold.shape)}"
        )
    if active_mask is not None:
        require_dim(op, "active_mask", active_mask, (1,))
        require_dtype(op, "active_mask", active_mask, (torch.bool,))
        if active_mask.size(0) != expert_ids.size(0):
            reject(
                f"{op}: active_mask must have one element for each of {expert_ids.size(0)} tokens, "
                f"but has {active_mask.size(0)}"
            )


def _require_range(argument: str, index: torch.Tensor, low: int, high: int) -> None:
    if index.numel() and not low <= int(index.min()) <= int(index.max()) <= high:
        reject(
            f"npu_moe_update_expert: {argument} must be between {low} and {high}, "
            f"but is {int(index.min())} to {int(index.max())}"
        )


def _cpu(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    expert_scales: torch.Tensor | None,
    pruning_threshold: torch.Tensor | None,
    active_mask: torch.Tensor | None,
    local_rank_id: int,
    world_size: int,
    balance_mode: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _require_range("expert_ids", expert_ids, 0, eplb_table.size(0) - 1)
    ids = expert_ids.long()
    # entries that no id names may hold anything
    replicas = eplb_table[:, 0].long()[ids]
    _require_range("eplb_table's count of replicas", replicas, 1, torch.iinfo(torch.int32).max)
    if balance_mode == _BY_RANK:
        per_replica = (replicas + (world_size - 1)).div(replicas, rounding_mode="floor")
        replica = torch.full_like(ids, local_rank_id).div(per_replica, rounding_mode="floor")
    else:
        replica = torch.arange(ids.size(0)).unsqueeze(1) % replicas
    column = replica + 1
    _require_range("the chosen column of eplb_table", column, 1, eplb_table.size(1) - 1)
    balanced = eplb_table[ids, column].to(expert_ids.dtype)

    keep = torch.ones(expert_ids.shape, dtype=torch.bool)
    if expert_scales is not None and pruning_threshold is not None:
        scales = expert_scales.float()
        keep = scales >= pruning_threshold.float().view(1, -1) * scales.sum(1, keepdim=True)
        if active_mask is not None:
            keep &= active_mask.unsqueeze(1)
    return balanced.contiguous(), keep.contiguous()


def _npu(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    expert_scales: torch.Tensor | None,
    pruning_threshold: torch.Tensor | None,
    active_mask: torch.Tensor | None,
    local_rank_id: int,
    world_size: int,
    balance_mode: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    if expert_ids.numel() == 0:  # no kernel takes an empty tensor
        return _fake(expert_ids)
    balanced, keep = torch.ops.npu.npu_moe_update_expert(
        expert_ids,
        eplb_table,
        expert_scales=expert_scales,
        pruning_threshold=pruning_threshold,
        active_mask=active_mask,
        local_rank_id=local_rank_id,
        world_size=world_size,
        balance_mode=balance_mode,
    )
    # without scales the kernel does not write the mask, and dispatch takes it for one of active experts
    return balanced, torch.ones_like(keep) if expert_scales is None else keep


def _fake(expert_ids: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return expert_ids.new_empty(expert_ids.shape), expert_ids.new_empty(expert_ids.shape, dtype=torch.bool)


_op = register_op(
    "npu_moe_update_expert(Tensor expert_ids, Tensor eplb_table, Tensor? expert_scales, Tensor? pruning_threshold, "
    "Tensor? active_mask, int local_rank_id, int world_size, int balance_mode) -> (Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_moe_update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    expert_scales: torch.Tensor | None = None,
    pruning_threshold: torch.Tensor | None = None,
    active_mask: torch.Tensor | None = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The physical expert for each logical one, so that replicas share the load, and which choices to keep.

    Args:
        expert_ids: ``[T, K]``, int32 or int64: logical experts.
        eplb_table: ``[E, F]``, int32: a row per logical expert: n, the number of its replicas, then their n physical
            ids; what follows is not read.
        expert_scales: ``[T, K]``, float16, bfloat16 or float32: weights, each row in descending order. Together with
            ``pruning_threshold``.
        pruning_threshold: ``[K]`` or ``[1, K]``, float32: a choice whose weight is below this part of the sum of its
            row is not kept.
        active_mask: ``[T]`` bool: no choice of an inactive token is kept. Requires the two above.
        local_rank_id: this rank; needed for ``balance_mode`` 0.
        world_size: number of ranks; needed for ``balance_mode`` 0.
        balance_mode: which replica. 0: by rank, in blocks of equal size. 1: by token, in turn.

    Returns:
        ``(balanced_expert_ids, balanced_active_mask)``, each ``[T, K]``: physical experts, dtype of ``expert_ids``,
        and bool, all True without ``expert_scales``. Neither has a gradient.

    Raises:
        OperatorError: wrong rank, dtype or size, an option out of range, or only some of the pruning inputs; on CPU
            also ids, or numbers of replicas that they name, that point outside the table.

    Example:
        >>> table = torch.tensor([[1, 0, -1], [2, 1, 3], [1, 2, -1]], dtype=torch.int32)
        >>> ids, keep = npu_moe_update_expert(torch.tensor([[0, 1], [2, 1]]), table, local_rank_id=1, world_size=2)
        >>> ids
        tensor([[0, 3],
                [2, 3]])
    """
    _check(
        expert_ids,
        eplb_table,
        expert_scales,
        pruning_threshold,
        active_mask,
        local_rank_id,
        world_size,
        balance_mode,
    )
    # ids and decisions have no gradient
    scales = None if expert_scales is None else expert_scales.detach()
    threshold = None if pruning_threshold is None else pruning_threshold.detach()
    return _op(expert_ids, eplb_table, scales, threshold, active_mask, local_rank_id, world_size, balance_mode)
