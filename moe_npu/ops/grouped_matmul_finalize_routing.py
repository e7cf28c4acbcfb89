"""Grouped int8 or int4 matmul, its rows weighted and summed into tokens: the second half of a quantized MoE layer.

    y[off : off + S] = shared_input_weight * shared_input,   the rest zero
    c[m] = int32(x[m] @ w[g]) * scale[g] * (pertoken_scale[m] * logit[m]) + bias[g] * logit[m]
    y[row_index[m]] += c[m]                                                    in the order of m

in float32. Products with int4 weights accumulate in float16 (spec: grouped matmul 1.8.8), and their bias and offset
come before the scales of the row. Spec: grouped matmul 3.7.

The result is linear in `shared_input` and in `logit`: dshared_input = shared_input_weight * dy[off : off + S], and
dlogit[m] is the product of dy[row_index[m]] with c[m] without its logit, which is a call of this operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_npu.ops._errors import (
    as_dtype,
    reject,
    require,
    require_device,
    require_dtype,
    require_no_gradient,
)
from moe_npu.ops._fused_matmul import (
    check_group_list,
    check_weight,
    expert_weight,
    list_type,
    npu_list_type,
    require_tensor,
)
from moe_npu.ops._groups import COUNTS, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import INT4_PER_WORD, dense, int8_int4_matmul, int_matmul, signed_words
from moe_npu.ops._signature import typed

_OP = "npu_grouped_matmul_finalize_routing"


def _columns(w: torch.Tensor) -> int:
    return w.size(-1) * (INT4_PER_WORD if w.dtype == torch.int32 else 1)


def _check(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    shared_input: torch.Tensor | None,
    logit: torch.Tensor | None,
    row_index: torch.Tensor | None,
    shared_input_offset: int,
    output_bs: int,
) -> None:
    if x.dim() != 2 or w.dim() != 3:
        reject(f"{_OP}: x_dim should be 2 and w_dim should be 3, but are {x.dim()} and {w.dim()}")
    require_tensor(_OP, "x", x, (torch.int8,), ("M", "K"), x)
    require_tensor(_OP, "w", w, (torch.int8, torch.int32), ("E", "K", "N"), x)
    m, k, experts, columns = x.size(0), x.size(1), w.size(0), _columns(w)
    check_weight(_OP, "w", w, experts, k, columns)
    check_group_list(_OP, group_list, experts, x)
    require(scale is not None, f"{_OP}: scale must be given")
    require(row_index is not None, f"{_OP}: row_index must be given")
    assert scale is not None
    assert row_index is not None
    if w.dtype == torch.int8:
        require_tensor(_OP, "scale", scale, (torch.float32, torch.bfloat16), (experts, columns), x)
        if bias is not None:
            require_tensor(_OP, "bias", bias, (torch.bfloat16,), (experts, columns), x)
        require(offset is None, f"{_OP}: offset must be None unless w holds int4 values")
    else:
        require_tensor(_OP, "scale", scale, (torch.int64,), (experts, 1, columns), x)
        require(bias is not None, f"{_OP}: bias must be given for int4 weights: 8 * sum over K of weight * scale")
        assert bias is not None
        require_tensor(_OP, "bias", bias, (torch.float32,), (experts, columns), x)
        if offset is not None:
            require_tensor(_OP, "offset", offset, (torch.float32,), (experts, 1, columns), x)
    require_tensor(_OP, "row_index", row_index, (torch.int64, torch.int32), (m,), x)
    if pertoken_scale is not None:
        require_tensor(_OP, "pertoken_scale", pertoken_scale, (torch.float32,), (m,), x)
    if logit is not None:
        require_device(_OP, "logit", logit, x)
        require_dtype(_OP, "logit", logit, (torch.float32,))
        if logit.shape != (m,):
            reject(f"{_OP}: logit must have shape [{m}], but has {list(logit.shape)}")
    if not 0 <= output_bs <= m:
        reject(f"{_OP}: output_bs must be 0 to the number of rows of x, {m}, but is {output_bs}")
    if shared_input is not None:
        require_tensor(_OP, "shared_input", shared_input, (torch.bfloat16,), ("S", columns), x)
        batch = output_bs or m
        if not 0 <= shared_input_offset <= batch - shared_input.size(0):
            reject(
                f"{_OP}: shared_input_offset + the {shared_input.size(0)} rows of shared_input must be within the "
                f"{batch} rows of the result, but shared_input_offset is {shared_input_offset}"
            )
    for name, tensor in (("scale", scale), ("bias", bias), ("offset", offset), ("pertoken_scale", pertoken_scale)):
        require_no_gradient(_OP, name, tensor)


def _cpu(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    shared_input: torch.Tensor | None,
    logit: torch.Tensor | None,
    row_index: torch.Tensor,
    shared_input_weight: float,
    shared_input_offset: int,
    output_bs: int,
    group_list_type: int,
    tuning_config: list[int] | None,
) -> torch.Tensor:
    groups = row_groups(_OP, group_list, group_list_type, x.size(0))
    _check_row_index(row_index[: groups[-1].end if groups else 0], output_bs or x.size(0))
    y = _allocate(x, w, logit, output_bs).zero_()
    if shared_input is not None:
        rows = slice(shared_input_offset, shared_input_offset + shared_input.size(0))
        y[rows] = shared_input.to(y.dtype) * shared_input_weight
    logit = x.new_ones(x.size(0), dtype=torch.float32) if logit is None else logit
    row_scale = logit if pertoken_scale is None else pertoken_scale * logit
    for group, start, end in groups:
        rows = slice(start, end)
        matrix, row_factor = expert_weight(w, group), row_scale[rows].unsqueeze(1)
        if w.dtype == torch.int8:
            values = int_matmul(x[rows], matrix).float() * scale[group].float() * row_factor
            if bias is not None:
                values += bias[group].float() * logit[rows].unsqueeze(1)
        else:
            assert bias is not None
            shift = None if offset is None else offset[group]
            values = int8_int4_matmul(x[rows], matrix, scale[group], bias[group], shift) * row_factor
        y.index_add_(0, row_index[rows], values)  # one after another, so in the order of the rows
    return y


def _check_row_index(row_index: torch.Tensor, batch: int) -> None:
    low, high = (int(bound) for bound in row_index.aminmax()) if row_index.numel() else (0, 0)
    if row_index.numel() and not 0 <= low <= high < batch:
        reject(f"{_OP}: row_index must be rows 0 to {batch - 1} of the result, but are {low} to {high}")


def _npu(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    shared_input: torch.Tensor | None,
    logit: torch.Tensor | None,
    row_index: torch.Tensor,
    shared_input_weight: float,
    shared_input_offset: int,
    output_bs: int,
    group_list_type: int,
    tuning_config: list[int] | None,
) -> torch.Tensor:
    if x.size(0) == 0:  # then the result has no rows either
        return _allocate(x, w, logit, output_bs)
    ones = x.new_ones(x.size(0), dtype=torch.float32) if logit is None or pertoken_scale is None else None
    return torch.ops.npu.npu_grouped_matmul_finalize_routing(
        # the kernel splits int8 values for int4 weights in place
        dense(x) if w.dtype == torch.int8 else x.clone(memory_format=torch.contiguous_format),
        w.contiguous(),
        group_list,
        scale=scale.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        offset=None if offset is None else offset.contiguous(),
        # the kernel is documented with both factors of the rows only
        pertoken_scale=ones if pertoken_scale is None else pertoken_scale.contiguous(),
        shared_input=None if shared_input is None else shared_input.contiguous(),
        logit=ones if logit is None else logit.contiguous(),
        row_index=row_index.long().contiguous(),
        dtype=torch.float32,
        shared_input_weight=shared_input_weight,
        shared_input_offset=shared_input_offset,
        output_bs=output_bs,
        group_list_type=npu_list_type(group_list, group_list_type),
        tuning_config=tuning_config,
    )


def _allocate(x: torch.Tensor, w: torch.Tensor, logit: torch.Tensor | None, output_bs: int) -> torch.Tensor:
    return x.new_empty(output_bs or x.size(0), _columns(w), dtype=torch.float32 if logit is None else logit.dtype)


def _fake(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    shared_input: torch.Tensor | None,
    logit: torch.Tensor | None,
    row_index: torch.Tensor,
    shared_input_weight: float,
    shared_input_offset: int,
    output_bs: int,
    group_list_type: int,
    tuning_config: list[int] | None,
) -> torch.Tensor:
    return _allocate(x, w, logit, output_bs)


# ---------------------------------------------------------------- gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, w, group_list, scale, bias, offset, pertoken_scale, shared_input, logit, row_index, *modes = inputs
    ctx.shared_input_weight, ctx.shared_input_offset, _, ctx.group_list_type, ctx.tuning_config = modes
    ctx.shared_rows, ctx.shared_dtype = (
        (0, None) if shared_input is None else (shared_input.size(0), shared_input.dtype)
    )
    operands = (x, w, group_list, scale, bias, offset, pertoken_scale, row_index)
    ctx.save_for_backward(*(operands if logit is not None and logit.requires_grad else [None] * len(operands)))


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, w, group_list, scale, bias, offset, pertoken_scale, row_index = ctx.saved_tensors
    needs_dshared, needs_dlogit = ctx.needs_input_grad[7:9]
    dshared = dlogit = None
    if needs_dshared:
        part = dy.narrow(0, ctx.shared_input_offset, ctx.shared_rows)
        dshared = (part * ctx.shared_input_weight).to(ctx.shared_dtype)
    if needs_dlogit:
        own_rows = torch.arange(x.size(0), device=x.device)
        rows = _op(
            x,
            w,
            group_list,
            scale,
            bias,
            offset,
            pertoken_scale,
            None,
            None,
            own_rows,
            1.0,
            0,
            0,
            ctx.group_list_type,
            ctx.tuning_config,
        )
        # rows that no group covers are zero in `rows`, and their index may be anything
        covered = row_index.clamp(0, max(dy.size(0) - 1, 0))
        dlogit = (dy.index_select(0, covered) * rows).sum(1)
    return (*[None] * 7, dshared, dlogit, *[None] * 6)


_op = register_op(
    f"{_OP}(Tensor x, Tensor w, Tensor group_list, Tensor scale, Tensor? bias, Tensor? offset,"
    " Tensor? pertoken_scale, Tensor? shared_input, Tensor? logit, Tensor row_index, float shared_input_weight,"
    " SymInt shared_input_offset, SymInt output_bs, int group_list_type, int[]? tuning_config) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("shared_input", "logit"),
)


@typed
def npu_grouped_matmul_finalize_routing(
    x: torch.Tensor,
    w: torch.Tensor,
    group_list: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    shared_input: torch.Tensor | None = None,
    logit: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    dtype: torch.dtype | int | None = None,
    shared_input_weight: float | None = 1.0,
    shared_input_offset: int | None = 0,
    output_bs: int | None = 0,
    group_list_type: int | None = 1,
    tuning_config: Sequence[int] | None = None,
    x_dtype: torch.dtype | int | None = None,
    w_dtype: torch.dtype | int | None = None,
    scale_dtype: torch.dtype | int | None = None,
    pertoken_scale_dtype: torch.dtype | int | None = None,
) -> torch.Tensor:
    """The rows of each group times the weight of the group, weighted and summed into the tokens they belong to.

    Differentiable any number of times with respect to ``logit`` and ``shared_input``.

    Args:
        x: ``[M, K]`` int8, the rows of group 0 first; K at most 65535.
        w: ``[E, K, N]`` int8, or int4 as int32 words ``[E, K, N / 8]``.
        group_list: ``[E]`` int64.
        scale: ``[E, N]`` float32 or bfloat16; for int4 weights ``[E, 1, N]`` int64 words, the bits of a float32 each.
        bias: ``[E, N]`` bfloat16 or None; for int4 weights float32, ``8 * (weight * scale).sum(K)``.
        offset: None; or for asymmetric int4 weights ``[E, 1, N]`` float32, multiplied by the sum of the row of x.
        pertoken_scale: ``[M]`` float32; None is one.
        shared_input: ``[S, N]`` bfloat16, where the sums start; or None.
        logit: ``[M]`` float32, the weight of each row (on CPU also float64, which makes the result float64); None is
            one.
        row_index: ``[M]`` int64 or int32, the row of the result that each row of x is added to.
        dtype: None or ``torch.float32``.
        shared_input_weight: factor of ``shared_input``.
        shared_input_offset: the row of the result where ``shared_input`` begins.
        output_bs: B, the rows of the result, at most M; 0 means M.
        group_list_type: 0 cumulative sums, 1 counts; counts unless given.
        tuning_config: a hint.
        x_dtype: must be None.
        w_dtype: must be None.
        scale_dtype: must be None.
        pertoken_scale_dtype: must be None.

    Returns:
        ``[B, N]`` float32. Rows of x beyond the last group contribute nothing. On CPU rows are added in their order;
        a device may add them in any.

    Raises:
        OperatorError: dtypes, shapes or devices as above do not hold, or scale, bias, offset or pertoken_scale
            requires a gradient; on CPU also a wrong group_list or a row_index out of range.

    Example:
        >>> x = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> w = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, 1]]], dtype=torch.int8)
        >>> npu_grouped_matmul_finalize_routing(
        ...     x,
        ...     w,
        ...     torch.tensor([1, 1]),
        ...     scale=torch.ones(2, 2),
        ...     logit=torch.tensor([0.5, 0.25]),
        ...     row_index=torch.tensor([0, 0]),
        ...     output_bs=1,
        ... )
        tensor([[2.2500, 2.7500]])
    """
    for name, code in (
        ("x_dtype", x_dtype),
        ("w_dtype", w_dtype),
        ("scale_dtype", scale_dtype),
        ("pertoken_scale_dtype", pertoken_scale_dtype),
    ):
        require(code is None, f"{_OP}: {name} must be None, but is {code}; only later devices reinterpret dtypes")
    result_dtype = as_dtype(_OP, "dtype", dtype)
    if result_dtype not in (None, torch.float32):
        reject(f"{_OP}: Not supportted output dtype is {result_dtype}; it must be None or torch.float32")
    encoding = list_type(_OP, group_list_type, COUNTS)
    scale = None if scale is None else signed_words(scale)
    shared_input_offset, output_bs = shared_input_offset or 0, output_bs or 0
    _check(
        x,
        w,
        group_list,
        scale,
        bias,
        offset,
        pertoken_scale,
        shared_input,
        logit,
        row_index,
        shared_input_offset,
        output_bs,
    )
    return _op(
        x,
        w,
        group_list,
        scale,
        bias,
        offset,
        pertoken_scale,
        shared_input,
        logit,
        row_index,
        1.0 if shared_input_weight is None else float(shared_input_weight),
        shared_input_offset,
        output_bs,
        encoding,
        None if tuning_config is None else list(tuning_config),
    )
