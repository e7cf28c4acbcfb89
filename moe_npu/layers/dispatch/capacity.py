"""Experts with a capacity: the same number of rows for each, more are dropped, fewer padded."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

from moe_npu import ops
from moe_npu.layers.dispatch.base import Dispatched, TokenDispatcher
from moe_npu.quant import QuantizedRows
from moe_npu.quant.scheme import refuse_gradient


@dataclass(frozen=True)
class _State:
    row_of_pair: torch.Tensor  # [T * K] int32, -1 for dropped pairs
    topk_weights: torch.Tensor  # [T, K]


class CapacityDispatcher(TokenDispatcher):
    """Gives each expert exactly C rows, so that all shapes follow from the number of tokens alone.

    ``C = ceil(T * K / E * capacity_factor)``, the expert capacity of GShard and Switch Transformer, but never more than
    T. Pairs beyond the capacity of their expert are dropped: they contribute nothing, forward and backward, and the
    weights of the others stay as they are. Experts with fewer pairs get rows of zeros, whose results nobody reads and
    which have no gradient. Where no pair is dropped, the result is that of ``LocalDispatcher``.

    Args:
        num_experts: E; every id must be in ``[0, E)``.
        capacity_factor: 1.0 leaves room for an even split only, E / K drops nothing. Give this or ``capacity``.
        capacity: C itself.
        drop: which pairs of a full expert are dropped: ``"last"``, those of the last tokens, or ``"lightest"``, those
            of the lowest weights (some twenty small kernels more).

    Raises:
        ValueError: neither or both of ``capacity_factor`` and ``capacity``, one that is not positive, or an unknown
            ``drop``.

    Example:
        >>> dispatcher = CapacityDispatcher(2, capacity_factor=1.0)
        >>> ids = torch.tensor([[0], [0], [0], [1]])
        >>> rows, expert_tokens, state = dispatcher.dispatch(torch.arange(4.0).view(4, 1), ids, torch.ones(4, 1))
        >>> rows.flatten(), expert_tokens
        (tensor([0., 1., 3., 0.]), tensor([2, 2]))
        >>> dispatcher.combine(rows, state).flatten()
        tensor([0., 1., 0., 3.])
    """

    def __init__(
        self,
        num_experts: int,
        *,
        capacity_factor: float | None = None,
        capacity: int | None = None,
        drop: Literal["last", "lightest"] = "last",
    ) -> None:
        if (capacity_factor is None) == (capacity is None):
            raise ValueError(
                f"one of capacity_factor and capacity must be given, but they are {capacity_factor} and {capacity}"
            )
        for name, count in (("num_experts", num_experts), ("capacity", capacity)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, but is {count!r}")
        if capacity_factor is not None:
            is_number = isinstance(capacity_factor, (int, float))
            if not is_number or not 0 < capacity_factor < float("inf"):
                raise ValueError(f"capacity_factor must be positive and finite, but is {capacity_factor!r}")
        if drop not in ("last", "lightest"):
            raise ValueError(f"drop must be 'last' or 'lightest', but is {drop!r}")
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.capacity = capacity
        self.drop = drop
        # a fraction: in floating point, 10 * 1.1 rows would be rounded up to 12
        ratio = Fraction(0) if capacity_factor is None else Fraction(str(capacity_factor)) / num_experts
        self._rows_per_pair = (ratio.numerator, ratio.denominator)

    def rows_per_expert(self, num_tokens: int, top_k: int) -> int:
        """C for ``num_tokens`` tokens of ``top_k`` experts each."""
        capacity = self.capacity
        if capacity is None:
            numerator, denominator = self._rows_per_pair
            capacity = (num_tokens * top_k * numerator + denominator - 1) // denominator
        return max(min(capacity, num_tokens), 1)  # the operator wants a row also where there is no token

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        quantize: bool = False,
    ) -> Dispatched:
        """See :meth:`TokenDispatcher.dispatch`.

        Raises:
            ValueError: a gradient of rows that are to be quantized is asked for.
        """
        if quantize:
            refuse_gradient(hidden_states)
        topk_ids = topk_ids.to(torch.int32)
        num_rows = self.rows_per_expert(*topk_ids.shape)
        num_experts = self.num_experts
        if self.drop == "lightest":
            # to one expert more, whose rows are cut off
            topk_ids = topk_ids.masked_fill(
                ~_is_among_heaviest(topk_ids, topk_weights, num_experts, num_rows), num_experts
            )
            num_experts += 1
        rows, row_of_pair, _, row_scale = ops.npu_moe_init_routing_v2(
            hidden_states,
            topk_ids,
            expert_capacity=num_rows,
            expert_num=num_experts,
            drop_pad_mode=1,
            active_expert_range=[0, num_experts],
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            quant_mode=1 if quantize else -1,
        )  # [E, C, H], [T * K], [E], [E * C]
        total = self.num_experts * num_rows
        rows = rows.flatten(0, 1)  # [E * C, H]
        if self.drop == "lightest":
            rows, row_scale = rows[:total], row_scale[:total]
            row_of_pair = row_of_pair.masked_fill(row_of_pair >= total, -1)
        expert_tokens = torch.full((self.num_experts,), num_rows, dtype=torch.int64, device=rows.device)
        return Dispatched(
            QuantizedRows(rows, row_scale, hidden_states.dtype) if quantize else rows,
            expert_tokens,
            _State(row_of_pair, topk_weights),
        )

    def combine(self, expert_rows: torch.Tensor, state: _State) -> torch.Tensor:
        """See :meth:`TokenDispatcher.combine`."""
        weights, dtype = state.topk_weights, expert_rows.dtype
        if not (weights.dtype == torch.float32 and dtype == torch.bfloat16):  # which the operator takes as they are
            weights = weights.to(dtype)
        rows = expert_rows.unflatten(0, (self.num_experts, -1))  # [E, C, H]
        return ops.npu_moe_finalize_routing(rows, None, None, None, weights, state.row_of_pair, None, drop_pad_mode=3)


def _is_among_heaviest(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int, num_rows: int
) -> torch.Tensor:
    """Whether a pair is among the ``num_rows`` of its expert with the highest weights, bool ``[T, K]``.

    Of equal weights the first tokens count as heavier.
    """
    ids = topk_ids.reshape(-1)  # [N]
    by_weight = topk_weights.detach().reshape(-1).float().argsort(descending=True, stable=True)
    # as float32, since devices sort integers slowly; index_select, since indexing waits for the device
    order = by_weight.index_select(0, ids.index_select(0, by_weight).float().argsort(stable=True))
    sorted_ids = ids.index_select(0, order).long()  # [N], by expert, then by weight
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add(
        0, sorted_ids, torch.ones_like(sorted_ids)
    )
    first = counts.cumsum(0) - counts  # [E]
    place = torch.arange(ids.numel(), device=ids.device) - first.index_select(0, sorted_ids)  # [N]
    return torch.zeros_like(place).scatter(0, order, place).view(topk_ids.shape) < num_rows
