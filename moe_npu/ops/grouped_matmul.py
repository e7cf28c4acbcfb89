"""`npu_grouped_matmul`: the products of all groups in one call, with (de)quantisation (spec: grouped matmul 1).

    y = x @ weight + bias                                       float, or int8 with int32 result
    y = act(int32(x @ weight + bias) * scale * per_token_scale + bfloat16 bias)
    y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias
    y = clamp(round(int32(x @ weight + bias) * fp19(scale)) + offset)         int64 scale words, int8 result

Integer products are exact, float products accumulate in float32, every result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moe_npu.ops import _grouped_matmul_rules as rules
from moe_npu.ops._errors import reject, require
from moe_npu.ops._groups import COUNTS, CUMSUM, Group, counts_from, row_groups, split_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import (
    dequantize_weight,
    int_matmul,
    is_transposed,
    matmul_into,
    unpack_int4_weight,
)
from moe_npu.ops.grouped_mm import grouped_mm, grouped_mm_gradients, grouped_mm_weight_grad

_OP = rules.OP
_Tensors = list[torch.Tensor]

# the reduction axis of the products of group g is cut by group_list, instead of the rows of x
_K_SPLIT = 2


def _is_pairs(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    group_list: torch.Tensor | None,
    group_sizes: Sequence[int] | None,
) -> bool:
    """Whether x[i] meets weight[i], rather than groups of the rows of one x meeting weights."""
    has_groups = group_list is not None or group_sizes is not None
    return len(x) == len(weight) and weight[0].dim() == 2 and not (len(x) == 1 and has_groups)


def _result_dtype(x: Sequence[torch.Tensor], output_dtype: torch.dtype | None) -> torch.dtype:
    return x[0].dtype if output_dtype is None else output_dtype


# ---------------------------------------------------------------- CPU


def _activate(values: torch.Tensor, act_type: int) -> torch.Tensor:
    if act_type == 1:
        return F.relu(values)
    if act_type == 2:
        return F.gelu(values, approximate="tanh")
    if act_type == 4:
        return values * torch.sigmoid(1.702 * values)
    if act_type == 5:
        return F.silu(values)
    return values


def _requantize(accumulator: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Int8 of int32 accumulators by packed scale words: fp19 scale in the low half, 9-bit offset in bits 37 to 45."""
    fp19 = words.to(torch.int32).bitwise_and(-0x2000).view(torch.float32)  # low 32 bits; 0xFFFFE000 clears 13 of them
    offset = words.bitwise_right_shift(37).bitwise_and(0x1FF)
    offset = torch.where(offset >= 256, offset - 512, offset)
    rounded = (accumulator.float() * fp19).round().clamp(-256, 255)
    return (rounded + offset).clamp(-128, 127).to(torch.int8)


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Float ``[..., K, N]`` of int8 or packed int4 weights and parameters ``[..., N]`` or ``[..., G, N]``."""
    if not rules.is_per_group(scale, weight):
        scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
    return dequantize_weight(weight if weight.dtype == torch.int8 else unpack_int4_weight(weight), scale, offset)


def _multiply(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    antiquant_scale: torch.Tensor | None,
    antiquant_offset: torch.Tensor | None,
    per_token_scale: torch.Tensor | None,
    act_type: int,
) -> None:
    """One group: ``out [M, N]`` of ``x [M, K]`` and ``weight [K, N]`` (or packed)."""
    if antiquant_scale is not None and antiquant_offset is not None:
        weight = _dequantize(weight, antiquant_scale, antiquant_offset)
    if x.is_floating_point():
        matmul_into(out, x, weight, bias)
        return
    accumulator = int_matmul(x, weight)
    if bias is not None and bias.dtype == torch.int32:
        accumulator += bias
    if scale is None or out.dtype == torch.int32:
        out.copy_(accumulator)
    elif scale.dtype == torch.int64:
        out.copy_(_requantize(accumulator, scale))
    else:
        values = accumulator.float().mul_(scale.float())
        if per_token_scale is not None:
            values.mul_(per_token_scale.unsqueeze(1))
        if bias is not None and bias.dtype == torch.bfloat16:
            values.add_(bias.float())
        out.copy_(_activate(values, act_type))


def _cpu(
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    scale: _Tensors | None,
    antiquant_scale: _Tensors | None,
    antiquant_offset: _Tensors | None,
    per_token_scale: _Tensors | None,
    group_list: torch.Tensor | None,
    group_sizes: list[int] | None,
    split_item: int,
    group_type: int,
    group_list_type: int,
    act_type: int,
    tuning_config: list[int] | None,
    output_dtype: torch.dtype | None,
) -> _Tensors:
    outputs = _allocate(x, weight, group_list, group_sizes, split_item, group_type, output_dtype)
    if group_type == _K_SPLIT:
        assert group_list is not None
        outputs[0].zero_()
        for group, start, end in row_groups(_OP, group_list, group_list_type, x[0].size(1)):
            matmul_into(outputs[0][group], x[0][:, start:end], weight[0][start:end])
        return outputs

    single_weight = weight[0].dim() == 3

    def of_group(tensors: _Tensors | None, index: int) -> torch.Tensor | None:
        if tensors is None:
            return None
        return tensors[0][index] if single_weight else tensors[index]

    def multiply(index: int, out: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor | None) -> None:
        group_weight = of_group(weight, index)
        assert group_weight is not None
        if rows.size(0) > 0 and out.size(1) > 0:
            _multiply(
                out,
                rows,
                group_weight,
                of_group(bias, index),
                of_group(scale, index),
                of_group(antiquant_scale, index),
                of_group(antiquant_offset, index),
                row_scale,
                act_type,
            )

    if _is_pairs(x, weight, group_list, group_sizes):
        if group_list is not None:
            _check_rows_match(x, group_list, group_list_type)
        if len(outputs) > 1 or split_item in (0, 1):
            targets = [y.view(-1, y.size(-1)) for y in outputs]
        else:
            targets = list(outputs[0].split([tensor.size(0) for tensor in x]))
        for index, (target, rows) in enumerate(zip(targets, x, strict=True)):
            multiply(index, target, rows.reshape(-1, rows.size(-1)), None)
        return outputs

    (rows,) = x
    groups = _groups_of(rows, group_list, group_sizes, group_list_type)
    for index, start, end in groups:
        target = outputs[index] if split_item in (0, 1) else outputs[0][start:end]
        row_scale = None if per_token_scale is None else per_token_scale[0][start:end]
        multiply(index, target, rows[start:end], row_scale)
    if split_item in (2, 3):
        outputs[0][groups[-1].end if groups else 0 :].zero_()
    return outputs


def _groups_of(
    rows: torch.Tensor, group_list: torch.Tensor | None, group_sizes: list[int] | None, group_list_type: int
) -> list[Group]:
    if group_list is not None:
        return row_groups(_OP, group_list, group_list_type, rows.size(0))
    assert group_sizes is not None
    return split_groups(_OP, group_sizes, rows.size(0))


def _check_rows_match(x: _Tensors, group_list: torch.Tensor, group_list_type: int) -> None:
    counts, sizes = counts_from(group_list, group_list_type).tolist(), [tensor.size(0) for tensor in x]
    require(counts == sizes, f"{_OP}: group_list must describe the rows of x {sizes}, but its counts are {counts}")


def _allocate(
    x: _Tensors,
    weight: _Tensors,
    group_list: torch.Tensor | None,
    group_sizes: list[int] | None,
    split_item: int,
    group_type: int,
    output_dtype: torch.dtype | None,
) -> _Tensors:
    """The results, uninitialised (spec 1.9)."""
    dtype = _result_dtype(x, output_dtype)
    columns = [rules.logical_shape(tensor)[1] for tensor in weight]
    if group_type == _K_SPLIT:
        assert group_list is not None
        return [x[0].new_empty(group_list.size(0), x[0].size(0), columns[0], dtype=dtype)]
    if split_item in (2, 3):
        num_rows = sum(tensor.size(0) for tensor in x)
        return [x[0].new_empty(num_rows, columns[0], dtype=dtype)]
    if _is_pairs(x, weight, group_list, group_sizes):
        return [tensor.new_empty(*tensor.shape[:-1], n, dtype=dtype) for tensor, n in zip(x, columns, strict=True)]
    assert group_sizes is not None
    starts = [0, *group_sizes[:-1]]
    return [
        x[0].new_empty(end - start, n, dtype=dtype) for start, end, n in zip(starts, group_sizes, columns, strict=True)
    ]


# ---------------------------------------------------------------- NPU and fake


def _npu(
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    scale: _Tensors | None,
    antiquant_scale: _Tensors | None,
    antiquant_offset: _Tensors | None,
    per_token_scale: _Tensors | None,
    group_list: torch.Tensor | None,
    group_sizes: list[int] | None,
    split_item: int,
    group_type: int,
    group_list_type: int,
    act_type: int,
    tuning_config: list[int] | None,
    output_dtype: torch.dtype | None,
) -> _Tensors:
    if all(tensor.numel() == 0 for tensor in x):
        outputs = _allocate(x, weight, group_list, group_sizes, split_item, group_type, output_dtype)
        return [y.zero_() for y in outputs]
    # the scales of a group axis are read as contiguous memory
    tensors = {
        "bias": bias,
        "scale": scale,
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "per_token_scale": per_token_scale,
    }
    parameters: dict[str, Any] = {
        name: None if values is None else [value.contiguous() for value in values] for name, values in tensors.items()
    }
    parameters["split_item"] = split_item
    if group_sizes is not None:  # the overload with host integers has no modes
        return torch.ops.npu.npu_grouped_matmul.List(
            x, weight, group_list=group_sizes, output_dtype=output_dtype, **parameters
        )
    if group_list is not None and group_list.size(0) == 1:
        group_list_type = CUMSUM  # a length-1 list of counts is refused; the values are the same
    return torch.ops.npu.npu_grouped_matmul(
        x,
        weight,
        group_list=group_list,
        group_type=group_type,
        group_list_type=group_list_type,
        act_type=act_type,
        tuning_config=tuning_config,
        output_dtype=output_dtype,
        **parameters,
    )


def _fake(
    x: _Tensors,
    weight: _Tensors,
    bias: _Tensors | None,
    scale: _Tensors | None,
    antiquant_scale: _Tensors | None,
    antiquant_offset: _Tensors | None,
    per_token_scale: _Tensors | None,
    group_list: torch.Tensor | None,
    group_sizes: list[int] | None,
    split_item: int,
    group_type: int,
    group_list_type: int,
    act_type: int,
    tuning_config: list[int] | None,
    output_dtype: torch.dtype | None,
) -> _Tensors:
    return _allocate(x, weight, group_list, group_sizes, split_item, group_type, output_dtype)


# ---------------------------------------------------------------- gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    x, weight, bias, _, antiquant_scale, antiquant_offset, _, group_list, group_sizes = inputs[:9]
    ctx.group_sizes, ctx.split_item, ctx.group_type, ctx.group_list_type = inputs[8:12]
    ctx.has = [tensors is not None for tensors in inputs[:7]]
    ctx.is_differentiable = x[0].is_floating_point()
    ctx.bias_dtype = None if bias is None else bias[0].dtype
    ctx.is_pairs = _is_pairs(x, weight, group_list, group_sizes)
    ctx.num_x, ctx.num_weights = len(x), len(weight)
    antiquant = [] if antiquant_scale is None else [*antiquant_scale, *antiquant_offset]
    ctx.save_for_backward(group_list, *x, *weight, *antiquant)


def _backward(ctx: Any, grads: _Tensors) -> tuple[Any, ...]:
    group_list, *saved = ctx.saved_tensors
    x, weight, antiquant = (
        saved[: ctx.num_x],
        saved[ctx.num_x : ctx.num_x + ctx.num_weights],
        saved[ctx.num_x + ctx.num_weights :],
    )
    if antiquant:
        scales, offsets = antiquant[: ctx.num_weights], antiquant[ctx.num_weights :]
        weight = [_dequantize(*parts) for parts in zip(weight, scales, offsets, strict=True)]
    needs_dx, needs_dweight = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    bias_dtype = ctx.bias_dtype if ctx.has[2] and any(ctx.needs_input_grad[2]) else None
    grads = [grad.contiguous() for grad in grads]

    if ctx.group_type == _K_SPLIT:
        gradients = _k_split_gradients(ctx, x[0], weight[0], group_list, grads[0], needs_dx, needs_dweight)
    elif ctx.is_pairs or ctx.split_item in (0, 1):
        gradients = _pair_gradients(ctx, x, weight, grads, needs_dx, needs_dweight, bias_dtype)
    else:
        gradients = _row_gradients(ctx, x[0], weight, group_list, grads[0], needs_dx, needs_dweight, bias_dtype)

    lengths = [ctx.num_x] + [ctx.num_weights if has else 0 for has in ctx.has[1:6]] + [1 if ctx.has[6] else 0]
    # the structure that was passed: a list for each list, None for each None
    filled = [
        list(gradient) if gradient is not None else [None] * n for gradient, n in zip(gradients, lengths, strict=False)
    ]
    rest = [[None] * n for n in lengths[3:]]
    lists = [values if has else None for values, has in zip([*filled, *rest], ctx.has, strict=True)]
    return (*lists, *[None] * 8)


_Gradients = tuple[Sequence[torch.Tensor] | None, Sequence[torch.Tensor] | None, Sequence[torch.Tensor] | None]


def _k_split_gradients(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    dy: torch.Tensor,
    needs_dx: bool,
    needs_dweight: bool,
) -> _Gradients:
    # y[g] = x[:, g] @ weight[g] is the weight gradient of a grouped_mm whose rows are the K axis here
    counts = counts_from(group_list, ctx.group_list_type)
    dx = [grouped_mm(weight, dy.mT, counts).t()] if needs_dx else None
    dweight = [grouped_mm(x.t().contiguous(), dy, counts)] if needs_dweight else None
    return dx, dweight, None


def _row_gradients(
    ctx: Any,
    x: torch.Tensor,
    weight: _Tensors,
    group_list: torch.Tensor | None,
    dy: torch.Tensor,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    if group_list is None:
        group_list = torch.tensor(ctx.group_sizes, dtype=torch.int64, device=x.device)
    counts = counts_from(group_list, ctx.group_list_type)
    if weight[0].dim() == 3:
        gradients = grouped_mm_gradients(x, weight[0], counts, dy, needs_dx, needs_dweight, bias_dtype)
        dx, dweight, dbias = (None if gradient is None else [gradient] for gradient in gradients)
        return dx, dweight, dbias
    rows = None
    if needs_dx:
        rows = _times_transposed([dy], weight, counts)
    weights = grouped_mm_weight_grad(x, dy, counts).unbind() if needs_dweight else None
    biases = None
    if bias_dtype is not None:
        ones = dy.new_ones(dy.size(0), 1, dtype=bias_dtype)
        biases = grouped_mm_weight_grad(ones, dy.to(bias_dtype), counts).squeeze(1).unbind()
    return rows, weights, biases


def _times_transposed(dy: _Tensors, weight: _Tensors, counts: torch.Tensor | None) -> _Tensors:
    # a device wants all weights transposed or none: views with gaps among contiguous weights are copied
    transposed = [(tensor if is_transposed(tensor) else tensor.contiguous()).mT for tensor in weight]
    split_item, group_type = (0, -1) if counts is None else (3, 0)
    return _op(  # type: ignore[no-any-return]
        dy, transposed, *[None] * 5, counts, None, split_item, group_type, COUNTS, 0, None, None
    )


def _pair_gradients(
    ctx: Any,
    x: _Tensors,
    weight: _Tensors,
    grads: _Tensors,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    rest = 0
    if not ctx.is_pairs:  # one x, its rows cut by host integers
        starts = [0, *ctx.group_sizes[:-1]]
        sizes = [end - start for start, end in zip(starts, ctx.group_sizes, strict=True)]
        rest = x[0].size(0) - ctx.group_sizes[-1]
        rows = list(x[0][: ctx.group_sizes[-1]].split(sizes))
    else:
        rows = x
    if len(grads) < len(rows):  # one joint result
        grads = list(grads[0].split([tensor.size(0) for tensor in x]))
    dx: Sequence[torch.Tensor] | None = None
    if needs_dx:
        dx = _times_transposed(grads, weight, None)
        if not ctx.is_pairs:
            dx = [torch.cat([*dx, x[0].new_zeros(rest, x[0].size(1))])]
    pairs = [
        (tensor.reshape(-1, tensor.size(-1)), grad.view(-1, grad.size(-1)))
        for tensor, grad in zip(rows, grads, strict=True)
    ]
    dweight = dbias = None
    if needs_dweight:
        dweight = [
            grouped_mm_weight_grad(a, b, torch.full((1,), a.size(0), dtype=torch.int64, device=a.device)).squeeze(0)
            for a, b in pairs
        ]
    if bias_dtype is not None:
        sum_dtype = torch.promote_types(bias_dtype, torch.float32)
        dbias = [grad.sum(0, dtype=sum_dtype).to(bias_dtype) for _, grad in pairs]
    return dx, dweight, dbias


_op = register_op(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, Tensor[]? bias, Tensor[]? scale, Tensor[]? antiquant_scale,"
    " Tensor[]? antiquant_offset, Tensor[]? per_token_scale, Tensor? group_list, SymInt[]? group_sizes,"
    " int split_item, int group_type, int group_list_type, int act_type, int[]? tuning_config,"
    " ScalarType? output_dtype) -> Tensor[]",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)

# torch_npu passes dtypes as PyTorch's scalar type numbers (spec 0.10)
_DTYPE_CODES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def npu_grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Sequence[torch.Tensor] | None = None,
    scale: Sequence[torch.Tensor] | None = None,
    offset: Sequence[torch.Tensor] | None = None,
    antiquant_scale: Sequence[torch.Tensor] | None = None,
    antiquant_offset: Sequence[torch.Tensor] | None = None,
    per_token_scale: Sequence[torch.Tensor] | None = None,
    group_list: torch.Tensor | Sequence[int] | None = None,
    activation_input: Sequence[torch.Tensor] | None = None,
    activation_quant_scale: Sequence[torch.Tensor] | None = None,
    activation_quant_offset: Sequence[torch.Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = -1,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: torch.dtype | int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[torch.Tensor]:
    """The matrix products of all groups of rows, e.g. of all experts of a MoE layer, in one call.

    Both overloads of torch_npu: ``group_list`` a tensor or None, or a list of ints. The arguments are those of
    torch_npu 2.13 with the more permissive defaults of earlier releases: ``group_type`` omitted is -1.

    ==========  ==============================  =====================================  ==========  ===================
    group_type  x                               weight                                 split_item  result
    ==========  ==============================  =====================================  ==========  ===================
    -1          n tensors ``[..., K_i]``        n of ``[K_i, N_i]``                    0, 1        n of ``[..., N_i]``
    0           one ``[M, K]``                  one ``[E, K, N]`` or E of ``[K, N]``   2, 3        one ``[M, N]``
    0           n of ``[M_i, K_i]``             n of ``[K_i, N]``                      2, 3        one ``[sum M_i, N]``
    2           one ``[M, K]``, a view of       one ``[K, N]``                         2, 3        one ``[G, M, N]``
                contiguous ``[K, M]``
    list ints   one ``[M, K]``                  E of ``[K, N_i]``                      0, 1        E of ``[M_i, N_i]``
    ==========  ==============================  =====================================  ==========  ===================

    A list of ints also allows the first, second (weight as a list) and third form.

    ========  ===========  ===============  ==========================================  ============  =================
    x         weight       bias             scales                                      output_dtype  result
    ========  ===========  ===============  ==========================================  ============  =================
    float16   float16      float16                                                      None, same    float16
    bfloat16  bfloat16     float32                                                      None, same    bfloat16
    float32   float32      float32                                                      None, same    float32
    int8      int8         int32            scale int64 words                           None, int8    int8
    int8      int8         int32            scale bfloat16                              bfloat16      bfloat16
    int8      int8         int32            scale float32                               float16       float16
    int8      int8         int32, bfloat16  scale bfloat16, per_token_scale float32     bfloat16      bfloat16
    int8      int8         int32            scale float32, per_token_scale float32      float16       float16
    int8      int8         int32            (scale is ignored)                          int32         int32
    float16   int8, int4   float16          antiquant_scale, antiquant_offset float16   None, same    float16
    bfloat16  int8, int4   float32          antiquant_scale, antiquant_offset bfloat16  None, same    bfloat16
    ========  ===========  ===============  ==========================================  ============  =================

    int4 weights are int32 words of eight values: ``[..., K, N/8]``, or the transposed view of ``[..., N, K/8]``.
    Bias and scales have one tensor per weight, ``[N]`` each or ``[E, N]`` for a 3-D weight; antiquant parameters of
    int4 weights may also be ``[(E,) G, N]``, one row per group of K / G weight rows. float64 works like float32 on CPU.

    Differentiable with respect to float ``x``, ``weight`` and ``bias``; integer weights pass the gradient of ``x``.

    Args:
        x: 1 to 128 tensors.
        weight: 1 to 128 tensors; transposed views are read as they are.
        bias: see the table.
        scale: per output column, see the table.
        offset: must be None.
        antiquant_scale: scale of integer weights with float x, see the table.
        antiquant_offset: added to the integers before scaling; needed wherever ``antiquant_scale`` is.
        per_token_scale: one tensor ``[M]``.
        group_list: int64 ``[E]`` on the device of x, at most 1024 entries; or ints (cumulative sums).
        activation_input: must be None.
        activation_quant_scale: must be None.
        activation_quant_offset: must be None.
        split_item: 0 or 1 for one result per product, 2 or 3 for one in all.
        group_type: see the table; an explicit None is refused unless ``group_list`` is a list of ints.
        group_list_type: 0 cumulative sums, 1 counts.
        act_type: 0 none, 1 ReLU, 2 tanh GELU, 4 fast GELU, 5 SiLU, applied in float32; int8 products only.
        tuning_config: a hint; its first value, the expected rows per group, must not be negative.
        output_dtype: see the table.
        x_dtype: must be None.
        weight_dtype: must be None.
        scale_dtype: must be None.
        per_token_scale_dtype: must be None.

    Returns:
        A list of fresh contiguous tensors, also when it is one. Rows beyond the last group are zero on CPU and
        undefined on a device.

    Raises:
        OperatorError: any rule above is broken; on CPU also for the values of ``group_list``.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> weight = torch.stack([torch.eye(2), torch.ones(2, 2)])
        >>> group_list = torch.tensor([1, 3])
        >>> npu_grouped_matmul([x], [weight], group_list=group_list, group_type=0, split_item=3)[0]
        tensor([[ 1.,  2.],
                [ 7.,  7.],
                [11., 11.]])
    """
    rules.check_tensors("x", x)
    rules.check_tensors("weight", weight)
    is_list_overload = isinstance(group_list, (list, tuple))
    group_sizes = list(group_list) if isinstance(group_list, (list, tuple)) and group_list else None
    group_tensor = group_list if isinstance(group_list, torch.Tensor) else None
    if group_list is not None and not is_list_overload and group_tensor is None:
        reject(f"{_OP}: group_list must be a tensor, a list of ints or None, but is {type(group_list).__name__}")
    if group_type is None:
        require(is_list_overload, "Requires manual passing group_type, current is None.")
        group_type = -1
    split_item, group_list_type, act_type = split_item or 0, group_list_type or 0, act_type or 0
    rules.check_modes(split_item, group_type, group_list_type, act_type)
    if is_list_overload:
        rules.check_list_overload(group_list, per_token_scale, group_type, group_list_type, act_type)  # type: ignore[arg-type]
    for name, value in (
        ("offset", offset),
        ("activation_input", activation_input),
        ("activation_quant_scale", activation_quant_scale),
        ("activation_quant_offset", activation_quant_offset),
    ):
        require(rules.optional_tensors(name, value) is None, f"{_OP}: {name} must be None")
    for name, code in (
        ("x_dtype", x_dtype),
        ("weight_dtype", weight_dtype),
        ("scale_dtype", scale_dtype),
        ("per_token_scale_dtype", per_token_scale_dtype),
    ):
        require(code is None, f"{_OP}: {name} must be None, but is {code}; only later devices reinterpret dtypes")
    if tuning_config and tuning_config[0] < 0:
        reject(f"{_OP}: tuning_config[0] must not be negative, but is {tuning_config[0]}")
    if isinstance(output_dtype, int):
        require(output_dtype in _DTYPE_CODES, f"{_OP}: output_dtype {output_dtype} is not the number of a known dtype")
        output_dtype = _DTYPE_CODES[output_dtype]

    lists = {
        name: rules.optional_tensors(name, tensors)
        for name, tensors in (
            ("bias", bias),
            ("scale", scale),
            ("antiquant_scale", antiquant_scale),
            ("antiquant_offset", antiquant_offset),
            ("per_token_scale", per_token_scale),
        )
    }
    row = rules.check_dtypes(x, weight, **lists, output_dtype=output_dtype, act_type=act_type)
    if row.y == torch.int32:
        lists["scale"] = None  # the device ignores it here
    rules.check_scenario(
        row, x, weight, lists["bias"], group_tensor, group_sizes, is_list_overload, split_item, group_type
    )
    rules.check_shapes(row, x, weight, **lists, group_type=group_type, split_item=split_item)
    rules.check_gradients(row, **lists)
    return _op(
        list(x),
        list(weight),
        *lists.values(),
        group_tensor,
        group_sizes,
        split_item,
        group_type,
        group_list_type,
        act_type,
        None if tuning_config is None else list(tuning_config),
        output_dtype,
    )
