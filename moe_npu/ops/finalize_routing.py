"""The rows of the experts back in token order: weighted, summed, with bias and residuals (spec: routing 4).

    out[i] = sum over j of w[i, j] * (row(i, j) + bias[expert(i, j)])  + skip1[i] + skip2[i]

The position of pair (i, j) in the index is ``j * N + i`` in modes 0 and 1 and ``i * K + j`` in modes 2 and 3. An index
of -1 is a row of zeros, whose bias counts nevertheless.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moe_npu.ops._errors import reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "npu_moe_finalize_routing"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_COLUMN_MAJOR = (0, 1)
_DROP_PAD = (1, 3)


def _top_k(scales: torch.Tensor | None, k: int) -> int:
    return k if scales is None else scales.size(1)


def _num_tokens(scales: torch.Tensor | None, index: torch.Tensor, k: int) -> int:
    return index.size(0) // k if scales is None else scales.size(0)


def _check(
    rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    index: torch.Tensor,
    experts: torch.Tensor | None,
    drop_pad_mode: int,
    k: int,
) -> None:
    others = {"skip1": skip1, "skip2": skip2, "bias": bias, "scales": scales, "expanded_src_to_dst_row": index}
    for name, tensor in {**others, "export_for_source_row": experts}.items():
        require_device(_OP, name, tensor, rows)
    if drop_pad_mode not in (0, 1, 2, 3):
        reject(f"{_OP}: drop_pad_mode must be 0, 1, 2 or 3, but is {drop_pad_mode}")
    require_dim(_OP, "expanded_permuted_rows", rows, (3 if drop_pad_mode in _DROP_PAD else 2,))
    require_dtype(_OP, "expanded_permuted_rows", rows, _FLOATS)
    require_dim(_OP, "expanded_src_to_dst_row", index, (1,))
    require_dtype(_OP, "expanded_src_to_dst_row", index, (torch.int32,))
    if scales is not None:
        require_dim(_OP, "scales", scales, (2,))
        mixed = (torch.float32,) if rows.dtype == torch.bfloat16 else ()
        require_dtype(_OP, "scales", scales, (rows.dtype, *mixed))
        if scales.numel() != index.size(0):
            reject(
                f"{_OP}: scales must have one weight per entry of expanded_src_to_dst_row, "
                f"but has shape {tuple(scales.shape)} for {index.size(0)} entries"
            )
        require(scales.size(1) != 0, f"{_OP}: scales must have at least one column")
        if k != 1 and k != scales.size(1):
            reject(f"{_OP}: k must be 1 or the number of columns of scales {scales.size(1)}, but is {k}")
        k = scales.size(1)
    elif k <= 0 or index.size(0) % k != 0:
        reject(f"{_OP}: k must be positive and divide the {index.size(0)} entries of the index, but is {k}")
    num_tokens, hidden = _num_tokens(scales, index, k), rows.size(-1)
    require(skip2 is None or skip1 is not None, f"{_OP}: skip2 needs skip1, which is None")
    for name, tensor in (("skip1", skip1), ("skip2", skip2)):
        if tensor is None:
            continue
        require_dtype(_OP, name, tensor, (rows.dtype,))
        if tensor.shape != (num_tokens, hidden):
            reject(f"{_OP}: {name} must have shape {(num_tokens, hidden)}, but has {tuple(tensor.shape)}")
    if bias is not None:
        require(experts is not None, f"{_OP}: bias needs export_for_source_row, which is None")
        require_dtype(_OP, "bias", bias, (rows.dtype,))
        if not (bias.dim() == 2 and bias.size(1) == hidden):
            reject(f"{_OP}: bias must have shape [E, {hidden}], but has {tuple(bias.shape)}")
    if experts is not None:
        require_dtype(_OP, "export_for_source_row", experts, (torch.int32,))
        if experts.shape != (num_tokens, k):
            reject(f"{_OP}: export_for_source_row must have shape {(num_tokens, k)}, but has {tuple(experts.shape)}")


def _pairs(index: torch.Tensor, num_tokens: int, top_k: int, drop_pad_mode: int) -> torch.Tensor:
    """The row of each pair, int64 ``[N, K]``."""
    if drop_pad_mode in _COLUMN_MAJOR:
        return index.reshape(top_k, num_tokens).t().long()
    return index.reshape(num_tokens, top_k).long()


def _check_values(index: torch.Tensor, num_rows: int, experts: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """A device checks nothing of this; there, -1 in modes 0 and 2 is whatever a buffer holds.

    Here it is zero in every mode, as in Huawei's reference.
    """
    if index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < -1 or high >= num_rows:
        reject(f"{_OP}: expanded_src_to_dst_row must be in -1 to {num_rows - 1}, but is {low} to {high}")
    if bias is None or experts is None:
        return
    low, high = (int(bound) for bound in experts.aminmax())
    if low < 0 or high >= bias.size(0):
        reject(f"{_OP}: export_for_source_row must be in 0 to {bias.size(0) - 1}, but is {low} to {high}")


def _gather(rows: torch.Tensor, index: torch.Tensor, may_miss: bool = True) -> torch.Tensor:
    """``rows[index]`` with zeros for -1."""
    if not may_miss:
        return rows.index_select(0, index)
    if rows.size(0) == 0:
        return rows.new_zeros(index.size(0), rows.size(1))
    # clamped and then masked: the row that stands in for a missing one may hold NaN
    return rows.index_select(0, index.clamp_min(0)).masked_fill(index.unsqueeze(1) < 0, 0)


def _cpu(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int,
    k: int,
) -> torch.Tensor:
    rows = expanded_permuted_rows.flatten(0, -2)
    _check_values(expanded_src_to_dst_row, rows.size(0), export_for_source_row, bias)
    num_tokens = _num_tokens(scales, expanded_src_to_dst_row, k)
    index = _pairs(expanded_src_to_dst_row, num_tokens, _top_k(scales, k), drop_pad_mode)
    compute_dtype = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(num_tokens, rows.size(1), dtype=compute_dtype)
    may_miss = bool((index < 0).any())
    for slot in range(index.size(1)):  # ascending, as the device sums
        term = _gather(rows, index[:, slot], may_miss).to(compute_dtype)
        if bias is not None and export_for_source_row is not None:
            term = term + bias.index_select(0, export_for_source_row[:, slot])
        if scales is None:
            out += term
        else:
            out.addcmul_(term, scales[:, slot, None].to(compute_dtype))
    for skip in (skip1, skip2):
        if skip is not None:
            out += skip
    return out.to(rows.dtype)


def _npu(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int,
    k: int,
) -> torch.Tensor:
    num_tokens = _num_tokens(scales, expanded_src_to_dst_row, k)
    if num_tokens == 0:
        return expanded_permuted_rows.new_empty(0, expanded_permuted_rows.size(-1))
    return torch.ops.npu.npu_moe_finalize_routing(
        expanded_permuted_rows,
        skip1,
        skip2,
        bias,
        scales,
        expanded_src_to_dst_row,
        export_for_source_row,
        drop_pad_mode,
        k,
    )


def _fake(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int,
    k: int,
) -> torch.Tensor:
    num_tokens = _num_tokens(scales, expanded_src_to_dst_row, k)
    return expanded_permuted_rows.new_empty(num_tokens, expanded_permuted_rows.size(-1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, skip1, skip2, bias, scales, index, experts, ctx.drop_pad_mode, ctx.k = inputs
    ctx.has_skips = (skip1 is not None, skip2 is not None)
    ctx.rows_shape = tuple(rows.shape)
    # the rows are needed for the gradient of scales only; without it they must not be kept alive
    needs_rows = scales is not None and ctx.needs_input_grad[4]
    ctx.save_for_backward(rows if needs_rows else None, bias, scales, index, experts)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, bias, scales, index, experts = ctx.saved_tensors
    compute_dtype = torch.promote_types(dout.dtype, torch.float32)
    num_tokens, hidden = dout.shape
    index = _pairs(index, num_tokens, _top_k(scales, ctx.k), ctx.drop_pad_mode)  # [N, K]
    grad = dout.contiguous().to(compute_dtype)
    weights = grad.new_ones(index.shape) if scales is None else scales.to(compute_dtype)
    drows = dbias = dscales = None
    if ctx.needs_input_grad[0]:
        # missing rows, -1, go to one more row in front, which is cut off; the others are different rows, so that the
        # order of the additions does not matter
        terms = (weights.unsqueeze(2) * grad.unsqueeze(1)).flatten(0, 1)
        drows = grad.new_zeros(math.prod(ctx.rows_shape[:-1]) + 1, hidden).index_add(0, index.flatten() + 1, terms)[1:]
        drows = drows.to(dout.dtype).reshape(ctx.rows_shape)
    if bias is not None and ctx.needs_input_grad[3]:
        # a matmul instead of additions to rows that repeat, whose order a device does not fix
        per_expert = grad.new_zeros(num_tokens, bias.size(0)).scatter_add(1, experts.long(), weights)
        dbias = torch.mm(per_expert.t(), grad).to(bias.dtype)
    if scales is not None and ctx.needs_input_grad[4]:
        slots = []
        flat = rows.flatten(0, -2)
        for slot in range(scales.size(1)):
            term = _gather(flat, index[:, slot]).to(compute_dtype)
            if bias is not None:
                term = term + bias.index_select(0, experts[:, slot])
            slots.append((grad * term).sum(1))
        dscales = torch.stack(slots, 1).to(scales.dtype)
    has_skip1, has_skip2 = ctx.has_skips
    return drows, dout if has_skip1 else None, dout if has_skip2 else None, dbias, dscales, None, None, None, None


_op = register_op(
    "npu_moe_finalize_routing(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias,"
    " Tensor? scales, Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int drop_pad_mode, SymInt k)"
    " -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("expanded_permuted_rows", "skip1", "skip2", "bias", "scales"),
)


@typed
def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> torch.Tensor:
    """The rows of the experts summed per token, with weights, the bias of each expert and up to two residuals.

    Args:
        expanded_permuted_rows: ``[M, H]`` in modes 0 and 2, ``[E, C, H]`` in modes 1 and 3; float16, bfloat16 or
            float32 (on CPU also float64).
        skip1: ``[N, H]``, dtype of the rows, added to the result.
        skip2: as ``skip1``, only together with it.
        bias: ``[E, H]``, dtype of the rows, added to each row before its weight; needs ``export_for_source_row``.
        scales: ``[N, K]``, the weights: dtype of the rows, or float32 with bfloat16 rows. None: 1. A weight of 0 does
            not hide a row that is NaN.
        expanded_src_to_dst_row: ``[N*K]`` int32, the row of each pair; -1 is a row of zeros, whose bias still counts.
        export_for_source_row: ``[N, K]`` int32, the expert of each pair (that is how torch_npu spells it).
        drop_pad_mode: layout of the index: column-major in 0 and 1, as :func:`npu_moe_init_routing` makes it,
            row-major in 2 and 3, as :func:`npu_moe_init_routing_v2` does. On devices -1 is for modes 1 and 3 only.
        k: K, where ``scales`` is None.

    Returns:
        ``[N, H]``, dtype of the rows, summed in float32 in the order of j, then the residuals, rounded once.
        Differentiable with respect to all floating arguments.

    Raises:
        OperatorError: wrong rank, dtype, size or mode, ``skip2`` without ``skip1``, ``bias`` without experts; on CPU
            also rows and experts that do not exist.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> index = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
        >>> scales = torch.tensor([[0.5, 0.5], [1.0, 2.0]])
        >>> npu_moe_finalize_routing(rows, None, None, None, scales, index, None, drop_pad_mode=2).flatten()
        tensor([ 2., 10.])
    """
    drop_pad_mode, k = 0 if drop_pad_mode is None else drop_pad_mode, 1 if k is None else k
    _check(
        expanded_permuted_rows,
        skip1,
        skip2,
        bias,
        scales,
        expanded_src_to_dst_row,
        export_for_source_row,
        drop_pad_mode,
        k,
    )
    return _op(
        expanded_permuted_rows,
        skip1,
        skip2,
        bias,
        scales,
        expanded_src_to_dst_row,
        export_for_source_row,
        drop_pad_mode,
        k,
    )
