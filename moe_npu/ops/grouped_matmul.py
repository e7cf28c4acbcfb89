"""`npu_grouped_matmul`: the products of all groups in one call, with (de)quantization (spec: grouped matmul 1).

    y = x @ weight + bias                                       float, or int8 with int32 result
    y = act(int32(x @ weight + bias) * scale * per_token_scale + bfloat16 bias)
    y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias
    y = clamp(round(int32(x @ weight + bias) * fp19(scale)) + offset)         int64 scale words, int8 result
    y = sum over groups of K of fp16(int32(x @ weight) * fp19(scale)), * per_token_scale            int4 x int4
    y = (16 * that of x // 16 + that of x % 16 - 8 + bias + sum(x) * offset) * per_token_scale      int8 x int4

Integer products are exact, float products accumulate in float32, every result is rounded once; only sums over groups of
K are rounded to float16 at each step, as on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moe_npu.ops import _grouped_matmul_rules as rules
from moe_npu.ops._errors import as_dtype, reject, require
from moe_npu.ops._grouped_matmul_call import K_SPLIT_TYPE, PER_WEIGHT, Call, TensorList, allocate, dequantize
from moe_npu.ops._grouped_matmul_gradient import backward, setup_context
from moe_npu.ops._grouped_matmul_rows import OP, check_dtypes
from moe_npu.ops._grouped_matmul_shapes import check_shapes, logical_shape
from moe_npu.ops._groups import CUMSUM, PAIRS, row_groups, split_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import (
    dense,
    int4_matmul,
    int8_int4_matmul,
    int_matmul,
    matmul_into,
    requantize,
    signed_words,
    unpack_int4,
)
from moe_npu.ops._signature import typed

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


def _multiply(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, own: dict[str, torch.Tensor | None], act_type: int
) -> None:
    """One group: ``out [M, N]`` of ``x [M, K]`` and ``weight [K, N]`` (or packed) with ``own`` parameters."""
    bias, scale, row_scale = own["bias"], own["scale"], own["per_token_scale"]
    antiquant_scale, antiquant_offset = own["antiquant_scale"], own["antiquant_offset"]
    if antiquant_scale is not None and antiquant_offset is not None:
        weight = dequantize(weight, antiquant_scale, antiquant_offset)
    if x.is_floating_point():
        matmul_into(out, x, weight, bias)
        return
    if weight.dtype == torch.int32:
        out.copy_(_int4_product(x, weight, own))
        return
    accumulator = int_matmul(x, weight)
    if bias is not None and bias.dtype == torch.int32:
        accumulator += bias
    if scale is None:
        out.copy_(accumulator)
    elif scale.dtype == torch.int64:
        out.copy_(requantize(accumulator, scale))
    else:
        values = accumulator.float().mul_(scale.float())
        if row_scale is not None:
            values.mul_(row_scale.unsqueeze(1))
        if bias is not None and bias.dtype == torch.bfloat16:
            values.add_(bias.float())
        out.copy_(_activate(values, act_type))


def _int4_product(x: torch.Tensor, weight: torch.Tensor, own: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """Float32 ``[M, N]`` of packed weights and int8 or packed x (spec 1.8.7 and 1.8.8)."""
    scale, bias, offset, row_scale = own["scale"], own["bias"], own["offset"], own["per_token_scale"]
    assert scale is not None
    weight, words = unpack_int4(weight), scale.reshape(-1, scale.size(-1))
    if bias is None:
        values = int4_matmul(unpack_int4(x), weight, words).float()
    else:
        values = int8_int4_matmul(x, weight, words, bias, None if offset is None else offset.flatten())
    return values if row_scale is None else values * row_scale.view(-1, 1)


def _cpu(*arguments: Any) -> TensorList:
    call = Call(*arguments)
    x, outputs = call.x, allocate(call)
    if call.group_type == K_SPLIT_TYPE:
        assert call.group_list is not None
        outputs[0].zero_()
        for group, start, end in row_groups(OP, call.group_list, call.group_list_type, x[0].size(1)):
            matmul_into(outputs[0][group], x[0][:, start:end], call.weight[0][start:end])
        return outputs
    if call.is_pairs:
        targets = outputs
        if call.is_joint:
            _check_rows_match(call)
            targets = list(outputs[0].split([tensor.size(0) for tensor in x]))
        for group, (target, rows) in enumerate(zip(targets, x, strict=True)):
            _multiply_group(call, group, target.view(-1, target.size(-1)), rows.reshape(-1, rows.size(-1)), slice(None))
        return outputs
    if call.group_sizes is not None:
        groups = split_groups(OP, call.group_sizes, x[0].size(0))
    else:
        assert call.group_list is not None
        groups = row_groups(OP, call.group_list, call.group_list_type, x[0].size(0))
    for group, start, end in groups:
        target = outputs[0][start:end] if call.is_joint else outputs[group]
        _multiply_group(call, group, target, x[0][start:end], slice(start, end))
    if call.is_joint:
        outputs[0][groups[-1].end if groups else 0 :].zero_()
    return outputs


def _multiply_group(call: Call, group: int, out: torch.Tensor, rows: torch.Tensor, part: slice) -> None:
    """``out`` of ``rows`` and the weight and parameters of ``group``; ``part`` is where the rows are in x."""
    if out.numel() == 0:
        return
    is_stacked = call.weight[0].dim() == 3
    weight, *own = (
        None if tensors is None else tensors[0][group] if is_stacked else tensors[group]
        for tensors in (call.weight, *(call.parameters[name] for name in PER_WEIGHT))
    )
    assert weight is not None
    parameters = dict(zip(PER_WEIGHT, own, strict=True))
    parameters["per_token_scale"] = None if call.per_token_scale is None else call.per_token_scale[0][part]
    _multiply(out, rows, weight, parameters, call.act_type)


def _check_rows_match(call: Call) -> None:
    """The device takes the rows from x and ignores the list; here it must be right."""
    if call.group_list is not None:
        sizes = [tensor.size(0) for tensor in call.x]
        counts = [0] * len(sizes)
        for group, start, end in row_groups(OP, call.group_list, call.group_list_type, sum(sizes)):
            counts[group] = end - start
        if counts != sizes:
            reject(f"{OP}: group_list must describe the rows of x {sizes}, but its counts are {counts}")


# ---------------------------------------------------------------- NPU and fake


def _npu(*arguments: Any) -> TensorList:
    call = Call(*arguments)
    x, weight = call.x, call.weight
    if all(math.prod(tensor.shape[:-1]) == 0 for tensor in x) or (
        call.group_type == K_SPLIT_TYPE and x[0].numel() == 0
    ):
        return [y.zero_() for y in allocate(call)]
    parameters: dict[str, Any] = {
        # read as contiguous memory
        name: None if tensors is None else [tensor.contiguous() for tensor in tensors]
        for name, tensors in call.parameters.items()
    }
    parameters |= {
        "act_type": call.act_type,
        "tuning_config": call.tuning_config,
        # None is the default; the shape function of torch_npu refuses an explicit int8
        "output_dtype": None if call.output_dtype == x[0].dtype else call.output_dtype,
    }
    if call.group_type == K_SPLIT_TYPE:
        group_list, group_list_type = _npu_list(call)
        parameters |= {"group_list": group_list, "group_list_type": group_list_type}
        return _npu_op([dense(x[0].t()).t()], [dense(weight[0])], split_item=3, group_type=2, **parameters)
    if call.group_list is not None and not call.is_pairs:
        rows, (group_list, group_list_type) = dense(x[0]), _npu_list(call)
        if rows.dtype == torch.int8 and weight[0].dtype == torch.int32:
            rows = rows.clone()  # the device kernel splits int8 into int4 digits in the memory of x itself
            # counts, also where there is one
            group_list, group_list_type = call.group_list, call.group_list_type
            for name in ("scale", "offset"):  # documented as [E, G, N] only
                values = parameters[name]
                parameters[name] = values and [
                    tensor if tensor.dim() == 3 else tensor.unsqueeze(1) for tensor in values
                ]
        return _npu_rows(rows, weight, group_list, group_list_type, parameters)
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


def _npu_op(x: TensorList, weight: TensorList, **arguments: Any) -> TensorList:
    return torch.ops.npu.npu_grouped_matmul.default(x, weight, **arguments)


def _npu_list(call: Call) -> tuple[torch.Tensor, int]:
    """The group list and its type."""
    assert call.group_list is not None
    if call.group_list.size(0) > 1:
        return call.group_list, call.group_list_type
    # other forms of length 1 are refused; the size is the cumulative sum
    return call.group_list[:, 1] if call.group_list_type == PAIRS else call.group_list, CUMSUM


def _npu_rows(
    x: torch.Tensor, weight: TensorList, group_list: torch.Tensor, group_list_type: int, parameters: dict[str, Any]
) -> TensorList:
    """The rows of one x in groups, one result."""
    if len(weight) == 1 and weight[0].dim() == 2:  # a list of one is taken for the 3-D form
        weight = [weight[0].unsqueeze(0)]
        parameters = {
            name: [values[0].unsqueeze(0)] if name in PER_WEIGHT and values is not None else values
            for name, values in parameters.items()
        }
    return _npu_op(
        [x], weight, group_list=group_list, split_item=3, group_type=0, group_list_type=group_list_type, **parameters
    )


def _npu_int4_pair(x: TensorList, weight: TensorList, index: int, parameters: dict[str, Any]) -> torch.Tensor:
    rows = x[index].reshape(-1, x[index].size(-1))
    if rows.size(0) == 0:
        return rows.new_empty(*x[index].shape[:-1], logical_shape(weight[index], rows.size(1))[1])
    own = {
        name: [values[index]] if name in PER_WEIGHT and values is not None else values
        for name, values in parameters.items()
    }
    group_list = torch.full((1,), rows.size(0), dtype=torch.int64, device=rows.device)
    (y,) = _npu_rows(rows, [weight[index]], group_list, CUMSUM, own)
    return y.view(*x[index].shape[:-1], y.size(-1))


def _fake(*arguments: Any) -> TensorList:
    return allocate(Call(*arguments))


_op = register_op(
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, Tensor[]? bias, Tensor[]? scale, Tensor[]? offset,"
    " Tensor[]? antiquant_scale, Tensor[]? antiquant_offset, Tensor[]? per_token_scale, Tensor? group_list,"
    " SymInt[]? group_sizes, int split_item, int group_type, int group_list_type, int act_type, int[]? tuning_config,"
    " ScalarType? output_dtype) -> Tensor[]",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=setup_context,
    backward=backward,
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
    x_dtype: torch.dtype | int | None = None,
    weight_dtype: torch.dtype | int | None = None,
    scale_dtype: torch.dtype | int | None = None,
    per_token_scale_dtype: torch.dtype | int | None = None,
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

    ========  ========  =================================================  ====================================
    x         weight    with                                               result
    ========  ========  =================================================  ====================================
    float     as x                                                         as x
    int8      int8      scale: int64 words                                 int8
    int8      int8      scale, per_token_scale or not                      bfloat16, float16 (scale float32)
    int8      int8                                                         int32 (output_dtype; scale is ignored)
    half      int8      antiquant_scale, antiquant_offset as x             as x
    half      int4      antiquant_scale, antiquant_offset as x             as x
    int4      int4      scale: int64 words, per_token_scale or not         float16, bfloat16 (output_dtype)
    int8      int4      scale: int64 words, per_token_scale, bias, counts  float16, bfloat16 (output_dtype)
    int8      int4      as above, offset                                   float16
    ========  ========  =================================================  ====================================

    ``python -m moe_npu.ops`` prints every legal combination of dtypes. int4 operands are int32 words of eight values
    along the last axis, weights of float x also the transposed view of ``[..., N, K/8]``. Bias and scales have one
    tensor per weight, ``[N]`` each or ``[E, N]`` for a 3-D weight; scales of int4 weights may also be ``[(E,) G, N]``,
    one row per group of K / G weight rows. The scale words of int4 weights are the bits of float32 values. float64
    works like float32 on CPU.

    The bias of int8 x and int4 weight is ``8 * sum over k of weight * scale``, prepared by the caller: the kernel
    multiplies two int4 digits of ``x - 8``, in x's own memory: on a device this function therefore passes a copy.

    Differentiable with respect to float ``x``, ``weight`` and ``bias``; integer weights pass the gradient of ``x``.

    Args:
        x: 1 to 128 tensors.
        weight: 1 to 128 tensors; transposed views are read as they are.
        bias: see the table.
        scale: per output column, see the table.
        offset: float32 ``[E, 1, N]``, of asymmetric int4 weights with int8 x: offset of the weight times its scale.
        antiquant_scale: scale of integer weights with float x, see the table.
        antiquant_offset: added to the integers before scaling; needed wherever ``antiquant_scale`` is.
        per_token_scale: one float32 tensor ``[M]``; ``[M, 1]`` with ``offset``, and allowed for int8 x int4.
        group_list: int64 ``[E]`` on the device of x, at most 1024 entries; pairs ``[E, 2]``; or ints (cumulative sums).
        activation_input: must be None.
        activation_quant_scale: must be None.
        activation_quant_offset: must be None.
        split_item: 0 or 1 for one result per product, 2 or 3 for one in all.
        group_type: see the table; an explicit None is refused unless ``group_list`` is a list of ints.
        group_list_type: 0 cumulative sums, 1 counts, 2 pairs of group and size in the order of the rows, up to the
            first size of 0; pairs for int8 x int8 only, int8 x int4 takes counts only.
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
    given = {
        "bias": bias,
        "scale": scale,
        "offset": offset,
        "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset,
        "per_token_scale": per_token_scale,
    }
    parameters = {name: rules.optional_tensors(name, tensors) for name, tensors in given.items()}
    is_list_overload = isinstance(group_list, (list, tuple))
    group_type = rules.check_group_type(group_type, is_list_overload)
    split_item, group_list_type, act_type = split_item or 0, group_list_type or 0, act_type or 0
    rules.check_split_item(split_item)
    _check_reserved(
        {
            "activation_input": activation_input,
            "activation_quant_scale": activation_quant_scale,
            "activation_quant_offset": activation_quant_offset,
        },
        {
            "x_dtype": x_dtype,
            "weight_dtype": weight_dtype,
            "scale_dtype": scale_dtype,
            "per_token_scale_dtype": per_token_scale_dtype,
        },
    )
    rules.check_modes(act_type, group_list_type)
    if isinstance(group_list, (list, tuple)):
        rules.check_list_overload(
            group_list, parameters["per_token_scale"], tuning_config, group_type, group_list_type, act_type
        )
    if tuning_config and tuning_config[0] < 0:
        reject(f"{OP}: tuning_config[0] must not be negative, but is {tuning_config[0]}")
    output_dtype = as_dtype(OP, "output_dtype", output_dtype)
    group_sizes = list(group_list) if isinstance(group_list, (list, tuple)) and group_list else None
    group_tensor = group_list if isinstance(group_list, torch.Tensor) else None

    if parameters["scale"] is not None:  # the same bits
        parameters["scale"] = [signed_words(words) for words in parameters["scale"]]
    blank = None
    if per_token_scale and parameters["per_token_scale"] is None and x[0].dim() > 0 and x[0].size(0) == 0:
        blank = per_token_scale[0].dtype  # no rows, hence an empty scale: given all the same
    row = check_dtypes(x, weight, parameters, blank, output_dtype, act_type)
    if blank is not None and None not in row.per_token_scale:
        parameters["per_token_scale"] = list(per_token_scale or ())
    if output_dtype == torch.int32:
        parameters["scale"] = None  # the device ignores it here
    scenario = rules.check_scenario(
        row,
        x,
        weight,
        parameters["bias"],
        group_tensor,
        group_sizes,
        is_list_overload,
        split_item,
        group_type,
        group_list_type,
    )
    check_shapes(row, scenario, x, weight, parameters, split_item in (2, 3))
    rules.check_gradients(row, parameters)
    return _op(
        list(x),
        list(weight),
        *parameters.values(),
        group_tensor,
        group_sizes,
        split_item,
        group_type,
        group_list_type,
        act_type,
        None if tuning_config is None else list(tuning_config),
        output_dtype,
    )


def _check_reserved(
    lists: dict[str, Sequence[torch.Tensor] | None], codes: dict[str, torch.dtype | int | None]
) -> None:
    for name, tensors in lists.items():
        require(rules.optional_tensors(name, tensors) is None, f"{OP}: {name} must be None")
    for name, code in codes.items():
        require(code is None, f"{OP}: {name} must be None, but is {code}; only later devices reinterpret dtypes")
