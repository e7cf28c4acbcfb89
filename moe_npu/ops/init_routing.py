"""Expansion of token rows in the order of their experts, first generation (spec: routing 2.1).

With A = min(N, active_num), the pairs in stable expert order and src[i] the row_idx of the pair at position i:

    expanded_x[i] = x[src[i] mod N]            for i < A * K
    expanded_row_idx[src[i]] = i,   expanded_expert_idx[i] = its expert
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import reject, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "npu_moe_init_routing"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check(x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int) -> None:
    require_device(_OP, "row_idx", row_idx, x)
    require_device(_OP, "expert_idx", expert_idx, x)
    require_dim(_OP, "x", x, (2,))
    require_dtype(_OP, "x", x, _FLOATS)
    require_dim(_OP, "row_idx", row_idx, (2,))
    require_dtype(_OP, "row_idx", row_idx, (torch.int32,))
    require_dim(_OP, "expert_idx", expert_idx, (2,))
    require_dtype(_OP, "expert_idx", expert_idx, (torch.int32,))
    if row_idx.shape != expert_idx.shape:
        reject(
            f"{_OP}: row_idx must have the shape of expert_idx {tuple(expert_idx.shape)}, "
            f"but has {tuple(row_idx.shape)}"
        )
    if expert_idx.size(0) != x.size(0):
        reject(f"{_OP}: expert_idx must have one row per row of x, but has {expert_idx.size(0)} for {x.size(0)}")
    if active_num < 0:
        reject(f"{_OP}: active_num must not be negative, but is {active_num}")


def _sources(row_idx: torch.Tensor, expert_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sorted experts and the ``row_idx`` beside them."""
    experts, order = torch.sort(expert_idx.reshape(-1), stable=True)
    return experts, row_idx.reshape(-1).index_select(0, order).long()


def _cpu(x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int) -> _Routed:
    num_tokens, num_pairs = x.size(0), expert_idx.numel()
    if num_pairs == 0:
        empty = torch.empty(0, dtype=torch.int32)
        return x.new_empty(0, x.size(1)), empty, torch.empty_like(empty)
    low, high = (int(bound) for bound in row_idx.aminmax())
    if low < 0 or high >= num_pairs:
        reject(f"{_OP}: row_idx must be in 0 to {num_pairs - 1}, but is {low} to {high}")
    experts, source = _sources(row_idx, expert_idx)
    # entries that row_idx repeats go to the last position, those that it misses are zero
    expanded_row_idx = torch.zeros(num_pairs, dtype=torch.int64)
    expanded_row_idx.scatter_reduce_(0, source, torch.arange(num_pairs), "amax")
    kept = min(num_tokens, active_num) * expert_idx.size(1)
    return x.index_select(0, source[:kept].remainder(num_tokens)), expanded_row_idx.to(torch.int32), experts


def _npu(x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int) -> _Routed:
    if expert_idx.numel() == 0:
        return _fake(x, row_idx, expert_idx, active_num)
    return torch.ops.npu.npu_moe_init_routing(x, row_idx, expert_idx, active_num)


def _fake(x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int) -> _Routed:
    pairs = expert_idx.numel()
    return (
        x.new_empty(min(x.size(0), active_num) * expert_idx.size(1), x.size(1)),
        row_idx.new_empty(pairs),
        expert_idx.new_empty(pairs),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Routed) -> None:
    x, row_idx, expert_idx, _ = inputs
    ctx.save_for_backward(row_idx, expert_idx)
    ctx.num_tokens = x.size(0)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, dexpanded: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    row_idx, expert_idx = ctx.saved_tensors
    compute_dtype = torch.promote_types(dexpanded.dtype, torch.float32)
    dx = dexpanded.new_zeros(ctx.num_tokens, dexpanded.size(1), dtype=compute_dtype)
    if dexpanded.size(0) != 0:
        # by the sources and not by expanded_row_idx, which is no inverse where row_idx has repeated entries
        source = _sources(row_idx, expert_idx)[1]
        token = source[: dexpanded.size(0)].remainder(ctx.num_tokens)
        dx = dx.index_add(0, token, dexpanded.to(compute_dtype))
    return dx.to(dexpanded.dtype), None, None, None


_op = register_op(
    "npu_moe_init_routing(Tensor x, Tensor row_idx, Tensor expert_idx, SymInt active_num) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x",),
)


@typed
def npu_moe_init_routing(x: torch.Tensor, row_idx: torch.Tensor, expert_idx: torch.Tensor, active_num: int) -> _Routed:
    """Token rows in the order of their experts, each token once per expert it was routed to.

    torch_npu calls it deprecated and warns at every call on a device; :func:`npu_moe_init_routing_v2` replaces it. Its
    indices are column-major: slot j of token n is at ``j * N + n``.

    Args:
        x: ``[N, H]``, float16, bfloat16 or float32 (on CPU also float64).
        row_idx: ``[N, K]`` int32, ``row_idx[n, j] = j * N + n``, the third result of
            :func:`npu_moe_gating_top_k_softmax`.
        expert_idx: ``[N, K]`` int32, the experts of each token.
        active_num: in tokens: keep the first ``min(N, active_num) * K`` rows, which belong to the lowest experts and
            not to the first tokens.

    Returns:
        ``(expanded_x, expanded_row_idx, expanded_expert_idx)``: ``[min(N, active_num) * K, H]``, dtype of x,
        differentiable; int32 ``[N*K]``, always whole, with ``expanded_x[expanded_row_idx[j*N + n]] == x[n]``; and the
        sorted experts, int32 ``[N*K]``.

    Raises:
        OperatorError: wrong rank, dtype, size or ``active_num``; on CPU also a ``row_idx`` outside of the pairs.

    Example:
        >>> x = torch.tensor([[10.0], [20.0], [30.0]])
        >>> expert_idx = torch.tensor([[2, 0], [1, 2], [0, 2]], dtype=torch.int32)
        >>> row_idx = torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int32)
        >>> rows, expanded_row_idx, experts = npu_moe_init_routing(x, row_idx, expert_idx, active_num=3)
        >>> rows.flatten(), expanded_row_idx
        (tensor([10., 30., 20., 10., 20., 30.]), tensor([3, 2, 1, 0, 4, 5], dtype=torch.int32))
    """
    _check(x, row_idx, expert_idx, active_num)
    return _op(x, row_idx, expert_idx, active_num)
