"""`npu_grouped_matmul`: the products of all groups in one call, with (de)quantisation (spec: grouped matmul 1).

    y = x @ weight + bias                                       float, or int8 with int32 result
    y = act(int32(x @ weight + bias) * scale * per_token_scale + bfloat16 bias)
    y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias
    y = clamp(round(int32(x @ weight + bias) * fp19(scale)) + offset)         int64 scale words, int8 result

Integer products are exact, float products accumulate in float32, every result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moe_npu.ops import _grouped_matmul_rules as rules
from moe_npu.ops._errors import as_dtype, reject, require
from moe_npu.ops._grouped_matmul_gradient import k_split_gradients, pair_gradients, row_gradients
from moe_npu.ops._groups import CUMSUM, counts_from, row_groups, split_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import (
    dense,
    dequantize_weight,
    int_matmul,
    matmul_into,
    requantize,
    unpack_int4_weight,
)
from moe_npu.ops._signature import typed

_OP = rules.OP
_Tensors = list[torch.Tensor]

# the reduction axis of the products of group g is cut by group_list, instead of the rows of x
_K_SPLIT = 2


class _Call(NamedTuple):
    """The arguments of one call, checked; the order is that of the operator's schema."""

    x: _Tensors
    weight: _Tensors
    bias: _Tensors | None
    scale: _Tensors | None
    antiquant_scale: _Tensors | None
    antiquant_offset: _Tensors | None
    per_token_scale: _Tensors | None
    group_list: torch.Tensor | None
    group_sizes: list[int] | None  # the cumulative sums of group_list where they are host integers
    split_item: int
    group_type: int
    group_list_type: int
    act_type: int
    tuning_config: list[int] | None
    output_dtype: torch.dtype | None

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


def _allocate(call: _Call) -> _Tensors:
    """The results, uninitialised (spec 1.9)."""
    x = call.x
    dtype = x[0].dtype if call.output_dtype is None else call.output_dtype
    columns = [n for _, n in rules.logical_shapes(x, call.weight)]
    if call.group_type == _K_SPLIT:
        return [x[0].new_empty(call.num_groups, x[0].size(0), columns[0], dtype=dtype)]
    if call.is_joint:
        return [x[0].new_empty(sum(tensor.size(0) for tensor in x), columns[0], dtype=dtype)]
    if call.is_pairs:
        return [tensor.new_empty(*tensor.shape[:-1], n, dtype=dtype) for tensor, n in zip(x, columns, strict=True)]
    return [
        x[0].new_empty(end - start, n, dtype=dtype) for (start, end), n in zip(call.host_bounds, columns, strict=True)
    ]


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


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Float ``[..., K, N]`` of int8 or packed int4 weights and parameters ``[..., N]`` or ``[..., G, N]``."""
    if not rules.is_per_group(scale, weight):
        scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
    return dequantize_weight(
        weight if weight.dtype == torch.int8 else unpack_int4_weight(weight, scale.size(-1)), scale, offset
    )


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
        out.copy_(requantize(accumulator, scale))
    else:
        values = accumulator.float().mul_(scale.float())
        if per_token_scale is not None:
            values.mul_(per_token_scale.unsqueeze(1))
        if bias is not None and bias.dtype == torch.bfloat16:
            values.add_(bias.float())
        out.copy_(_activate(values, act_type))


def _cpu(*arguments: Any) -> _Tensors:
    call = _Call(*arguments)
    x, outputs = call.x, _allocate(call)
    if call.group_type == _K_SPLIT:
        assert call.group_list is not None
        outputs[0].zero_()
        for group, start, end in row_groups(_OP, call.group_list, call.group_list_type, x[0].size(1)):
            matmul_into(outputs[0][group], x[0][:, start:end], call.weight[0][start:end])
        return outputs
    if call.is_pairs:
        targets = outputs
        if call.is_joint:
            _check_rows_match(call)
            targets = list(outputs[0].split([tensor.size(0) for tensor in x]))
        for group, (target, rows) in enumerate(zip(targets, x, strict=True)):
            _multiply_group(call, group, target.view(-1, target.size(-1)), rows.reshape(-1, rows.size(-1)), None)
        return outputs
    if call.group_sizes is not None:
        groups = split_groups(_OP, call.group_sizes, x[0].size(0))
    else:
        assert call.group_list is not None
        groups = row_groups(_OP, call.group_list, call.group_list_type, x[0].size(0))
    for group, start, end in groups:
        target = outputs[0][start:end] if call.is_joint else outputs[group]
        row_scale = None if call.per_token_scale is None else call.per_token_scale[0][start:end]
        _multiply_group(call, group, target, x[0][start:end], row_scale)
    if call.is_joint:
        outputs[0][groups[-1].end if groups else 0 :].zero_()
    return outputs


def _multiply_group(
    call: _Call, group: int, out: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor | None
) -> None:
    if out.numel() == 0:
        return
    is_stacked = call.weight[0].dim() == 3
    weight, bias, scale, antiquant_scale, antiquant_offset = (
        None if tensors is None else tensors[0][group] if is_stacked else tensors[group] for tensors in call[1:6]
    )
    assert weight is not None
    _multiply(out, rows, weight, bias, scale, antiquant_scale, antiquant_offset, row_scale, call.act_type)


def _check_rows_match(call: _Call) -> None:
    """The device takes the rows from x and ignores the list; here it must be right."""
    if call.group_list is not None:
        counts = counts_from(call.group_list, call.group_list_type).tolist()
        sizes = [tensor.size(0) for tensor in call.x]
        if counts != sizes:
            reject(f"{_OP}: group_list must describe the rows of x {sizes}, but its counts are {counts}")


# ---------------------------------------------------------------- NPU and fake


def _npu(*arguments: Any) -> _Tensors:
    call = _Call(*arguments)
    x, weight = call.x, call.weight
    if all(tensor.numel() == 0 for tensor in x):
        return [y.zero_() for y in _allocate(call)]
    parameters: dict[str, Any] = {
        # read as contiguous memory
        name: None if tensors is None else [tensor.contiguous() for tensor in tensors]
        for name, tensors in zip(call._fields[2:7], call[2:7], strict=True)
    }
    parameters |= {
        "act_type": call.act_type,
        "tuning_config": call.tuning_config,
        # None is the default; the shape function of torch_npu refuses an explicit int8
        "output_dtype": None if call.output_dtype == x[0].dtype else call.output_dtype,
    }
    if call.group_type == _K_SPLIT:
        parameters |= {"group_list": call.group_list, "group_list_type": _npu_list_type(call)}
        return _npu_op([dense(x[0].t()).t()], weight, split_item=3, group_type=2, **parameters)
    if call.group_list is not None and not call.is_pairs:
        return _npu_rows(dense(x[0]), weight, call.group_list, _npu_list_type(call), parameters)
    if not call.is_pairs:
        # slices of the rows, each with its weight: the overload that takes host integers lacks float32 and int4, and
        # its shape function refuses an output_dtype
        x = [x[0][start:end] for start, end in call.host_bounds]
    x = [dense(tensor) for tensor in x]
    if weight[0].dtype == torch.int32:
        # torch_npu allocates results of the packed width (or eight times the width) for pairs
        results = [_npu_int4_pair(x, weight, index, parameters) for index in range(len(x))]
        return [torch.cat(results)] if call.is_joint and len(results) > 1 else results
    if call.is_joint and len(x) > 1:
        return _npu_op(x, weight, split_item=3, group_type=0, **parameters)
    return _npu_op(x, weight, split_item=0, group_type=-1, **parameters)


def _npu_op(x: _Tensors, weight: _Tensors, **arguments: Any) -> _Tensors:
    return torch.ops.npu.npu_grouped_matmul.default(x, weight, **arguments)


def _npu_list_type(call: _Call) -> int:
    # a length-1 list of counts is refused; the cumulative sum is the same
    return CUMSUM if call.num_groups == 1 else call.group_list_type


def _npu_rows(
    x: torch.Tensor, weight: _Tensors, group_list: torch.Tensor, group_list_type: int, parameters: dict[str, Any]
) -> _Tensors:
    """The rows of one x in groups, one result."""
    if len(weight) == 1 and weight[0].dim() == 2:  # a list of one is taken for the 3-D form
        weight = [weight[0].unsqueeze(0)]
        parameters = {
            name: [values[0].unsqueeze(0)] if name in _PER_WEIGHT and values is not None else values
            for name, values in parameters.items()
        }
    return _npu_op(
        [x], weight, group_list=group_list, split_item=3, group_type=0, group_list_type=group_list_type, **parameters
    )


_PER_WEIGHT = ("bias", "scale", "antiquant_scale", "antiquant_offset")


def _npu_int4_pair(x: _Tensors, weight: _Tensors, index: int, parameters: dict[str, Any]) -> torch.Tensor:
    rows = x[index].reshape(-1, x[index].size(-1))
    if rows.size(0) == 0:
        return rows.new_empty(*x[index].shape[:-1], rules.logical_shape(weight[index], rows.size(1))[1])
    own = {
        name: [values[index]] if name in _PER_WEIGHT and values is not None else values
        for name, values in parameters.items()
    }
    group_list = torch.full((1,), rows.size(0), dtype=torch.int64, device=rows.device)
    (y,) = _npu_rows(rows, [weight[index]], group_list, CUMSUM, own)
    return y.view(*x[index].shape[:-1], y.size(-1))


def _fake(*arguments: Any) -> _Tensors:
    return _allocate(_Call(*arguments))


# ---------------------------------------------------------------- gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    call = _Call(*inputs)
    antiquant = (
        [*call.antiquant_scale, *call.antiquant_offset] if call.antiquant_scale and call.antiquant_offset else []
    )
    ctx.save_for_backward(call.group_list, *call.x, *call.weight, *antiquant)
    ctx.lengths = [None if tensors is None else len(tensors) for tensors in call[:7]]
    ctx.bias_dtype = None if call.bias is None else call.bias[0].dtype
    ctx.group_type, ctx.group_list_type, ctx.group_sizes = call.group_type, call.group_list_type, call.group_sizes
    ctx.bounds = None if call.group_sizes is None else call.host_bounds
    ctx.is_pairs, ctx.is_joint = call.is_pairs, call.is_joint


def _backward(ctx: Any, grads: _Tensors) -> tuple[Any, ...]:
    group_list, *saved = ctx.saved_tensors
    num_x, num_weights = ctx.lengths[:2]
    x, weight, antiquant = saved[:num_x], saved[num_x : num_x + num_weights], saved[num_x + num_weights :]
    if antiquant:
        scales, offsets = antiquant[:num_weights], antiquant[num_weights:]
        weight = [_dequantize(*parts) for parts in zip(weight, scales, offsets, strict=True)]
    needs_dx, needs_dweight, needs_dbias = (
        isinstance(needs, list) and any(needs) for needs in ctx.needs_input_grad[:3]
    )
    grads = [grad.contiguous() for grad in grads]
    if ctx.group_type == _K_SPLIT:
        counts = counts_from(group_list, ctx.group_list_type)
        gradients = k_split_gradients(x[0], weight[0], counts, grads[0], needs_dx, needs_dweight)
    elif ctx.is_pairs or not ctx.is_joint:
        bounds = None if ctx.is_pairs else ctx.bounds
        gradients = pair_gradients(
            x, weight, grads, bounds, needs_dx, needs_dweight, ctx.bias_dtype if needs_dbias else None
        )
    else:
        if group_list is None:
            group_list = torch.tensor(ctx.group_sizes, dtype=torch.int64, device=x[0].device)
        counts = counts_from(group_list, ctx.group_list_type)
        gradients = row_gradients(
            x[0], weight, counts, grads[0], needs_dx, needs_dweight, ctx.bias_dtype if needs_dbias else None
        )
    # the structure that was passed: a list for each list, None for everything else
    passed: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            passed[index] = list(gradient)
    return (*passed, *[None] * (len(_Call._fields) - len(passed)))


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
    differentiable=("x", "weight", "bias"),
)


@typed
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
    if group_type is None:
        require(is_list_overload, "Requires manual passing group_type, current is None.")
        group_type = -1
    split_item, group_list_type, act_type = split_item or 0, group_list_type or 0, act_type or 0
    rules.check_modes(split_item, group_type, group_list_type, act_type)
    if isinstance(group_list, (list, tuple)):
        rules.check_list_overload(group_list, per_token_scale, group_type, group_list_type, act_type)
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
    output_dtype = as_dtype(_OP, "output_dtype", output_dtype)

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
    if per_token_scale and x[0].size(0) == 0:
        lists["per_token_scale"] = list(per_token_scale)  # no rows, hence an empty scale: given all the same
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
