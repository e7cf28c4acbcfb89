"""Dense matmul of integers with scales (spec: grouped matmul 2.9, 1.8.3).

    acc = x1 @ x2 + bias                              exact; bias here only if it is int32
    v = acc * scale, v = v * pertoken_scale           float32, in this order
    v = v + bias                                      if it is a float
    y = v, rounded once to a float; or round(v) clamped to nine bits, + offset, saturated to int8; or acc as int32

Without pertoken_scale a float32 scale of int8 and float16 results is cut to ten bits of mantissa, as in scale words.
With int4 values, pertoken_scale and a scale per group of K the weight has an offset in each group, which is subtracted:

    y = pertoken_scale * sum over groups of (x1 @ x2 - (sum of the values of x1) * offset) * scale
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_npu.ops._errors import (
    as_dtype,
    dtype_name,
    reject,
    require,
    require_device,
    require_dtype,
    require_no_gradient,
)
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import (
    INT4_PER_WORD,
    int_matmul,
    is_transposed,
    requantize,
    scale_of_words,
    unpack_int4,
    unpack_int4_weight,
)
from moe_npu.ops._signature import typed
from moe_npu.ops.words import scale_words

_OP = "npu_quant_matmul"
_MAX_SIZE = 65535
_I8, _I32, _I64, _U64 = torch.int8, torch.int32, torch.int64, torch.uint64
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32


class _Row(NamedTuple):
    """A combination of dtypes that there is; int32 x are int4 words."""

    x: torch.dtype
    y: torch.dtype
    scale: tuple[torch.dtype, ...]
    bias: tuple[torch.dtype, ...] = (_I32,)
    per_token: tuple[bool, ...] = (False,)  # given or not
    has_offset: bool = False
    is_grouped: bool = False  # scale and offset per group of K


_ROWS = (
    _Row(_I8, _F16, (_I64, _U64, _F32)),
    _Row(_I8, _I8, (_I64, _U64, _F32), has_offset=True),
    _Row(_I8, _BF16, (_F32, _BF16), (_I32, _BF16, _F32), per_token=(False, True)),
    _Row(_I8, _F16, (_F32,), (_I32, _F16, _F32), per_token=(True,)),
    _Row(_I8, _I32, (_F32, _BF16)),
    _Row(_I32, _F16, (_I64, _U64, _F32)),
    _Row(_I32, _F16, (_F32,), (), per_token=(True,), has_offset=True, is_grouped=True),
    _Row(_I32, _BF16, (_F32,), (), per_token=(True,), has_offset=True, is_grouped=True),
)


class _Sizes(NamedTuple):
    """Logical sizes, int4 values counted one by one."""

    batch: tuple[int, ...]
    m: int
    k: int
    n: int


def _sizes(x1: torch.Tensor, x2: torch.Tensor) -> _Sizes:
    batch = tuple(_broadcast_batch(x1, x2))
    k, n = x1.size(-1), x2.size(-1)
    if x1.dtype == _I32:
        k = k * INT4_PER_WORD
        if x2.size(-2) == k:  # words along N, otherwise along K
            n = n * INT4_PER_WORD
    return _Sizes(batch, x1.size(-2), k, n)


def _broadcast_batch(x1: torch.Tensor, x2: torch.Tensor) -> list[int]:
    shapes = (list(x1.shape[:-2]), list(x2.shape[:-2]))
    length = max(len(shape) for shape in shapes)
    first, second = ([1] * (length - len(shape)) + shape for shape in shapes)
    batch = []
    for a, b in zip(first, second, strict=True):
        if a != b and a != 1 and b != 1:
            reject(
                f"{_OP}: the batch shape cannot be broadcast, x1 has shape {tuple(x1.shape)} and x2 {tuple(x2.shape)}"
            )
        batch.append(b if a == 1 else a)
    return batch


def _check_operands(x1: torch.Tensor, x2: torch.Tensor) -> _Sizes:
    if x1.dtype not in (_I8, _I32) or x2.dtype != x1.dtype:
        reject(
            f"{_OP}: x1 and x2 must both be int8, or both int32 words of int4 values, "
            f"but are {dtype_name(x1.dtype)} and {dtype_name(x2.dtype)}"
        )
    for name, tensor in (("x1", x1), ("x2", x2)):
        if not 2 <= tensor.dim() <= 6:
            reject(f"{_OP}: {name} dim num should be 2 ~ 6, but {name} has shape {tuple(tensor.shape)}")
    sizes = _sizes(x1, x2)
    fits = x2.size(-2) == sizes.k
    if x1.dtype == _I32 and not fits:
        fits = x2.size(-2) == x1.size(-1) and is_transposed(x2)
    if not fits:
        reject(
            f"{_OP}: k dim of x1 and x2 need be same (int4 words of x2 run along its last axis, or along K in a "
            f"transposed view), but their shapes are {tuple(x1.shape)} and {tuple(x2.shape)}"
        )
    if sizes.k < 1:
        reject(f"{_OP}: k must be a positive integer, but x1 has shape {tuple(x1.shape)}")
    if sizes.k > _MAX_SIZE or sizes.n > _MAX_SIZE:
        reject(f"{_OP}: the last dims of x1 and x2 must be at most {_MAX_SIZE}, but are {sizes.k} and {sizes.n}")
    return sizes


def _find_row(x: torch.dtype, y: torch.dtype, has_per_token: bool) -> _Row:
    rows = [row for row in _ROWS if row.x == x and has_per_token in row.per_token]
    fitting = [row for row in rows if row.y == y]
    if not fitting:
        results = " or ".join(dtype_name(row.y) for row in rows)
        reject(
            f"{_OP}: output_dtype must be {results} for {'int8' if x == _I8 else 'int4'} operands "
            f"{'with' if has_per_token else 'without'} pertoken_scale, but is {dtype_name(y)}"
        )
    return fitting[0]


def _check_parameters(
    row: _Row,
    sizes: _Sizes,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    if scale.dtype not in row.scale:
        allowed_scales = ", ".join(dtype_name(dtype) for dtype in row.scale)
        reject(f"{_OP}: scale must have dtype {allowed_scales}, but has {dtype_name(scale.dtype)}")
    if row.is_grouped:
        if scale.dim() != 2 or scale.size(0) < 1 or sizes.k % scale.size(0) != 0 or scale.size(1) != sizes.n:
            reject(
                f"{_OP}: scale must have shape [G, {sizes.n}] where G divides K = {sizes.k}, "
                f"but has {tuple(scale.shape)}"
            )
        if offset is None or offset.dtype != _F16 or offset.shape != scale.shape:
            given = None if offset is None else f"{dtype_name(offset.dtype)} of shape {tuple(offset.shape)}"
            reject(f"{_OP}: offset must be float16 of shape {tuple(scale.shape)} like scale per group, but is {given}")
    else:
        _check_per_channel("scale", scale, sizes.n)
        if offset is not None:
            require(row.has_offset, f"{_OP}: offset must be None unless the result is int8")
            if offset.dtype != _F32:
                reject(f"{_OP}: offset must have dtype float32, but has {dtype_name(offset.dtype)}")
            _check_per_channel("offset", offset, sizes.n)
    if pertoken_scale is not None:
        if pertoken_scale.dtype != _F32:
            reject(f"{_OP}: pertoken_scale must have dtype float32, but has {dtype_name(pertoken_scale.dtype)}")
        if pertoken_scale.shape != (sizes.m,):
            reject(f"{_OP}: pertoken_scale must have shape {(sizes.m,)}, but has {tuple(pertoken_scale.shape)}")
    if bias is not None:
        require(bool(row.bias), f"{_OP}: bias must be None with scales per group")
        require_dtype(_OP, "bias", bias, row.bias)
        allowed: list[tuple[int, ...]] = [(sizes.n,)]
        if not sizes.batch:
            allowed.append((1, sizes.n))
        if len(sizes.batch) == 1:
            allowed.append((sizes.batch[0], 1, sizes.n))
        if tuple(bias.shape) not in allowed:
            reject(f"{_OP}: bias must have one of the shapes {allowed}, but has {tuple(bias.shape)}")


def _check_per_channel(name: str, tensor: torch.Tensor, columns: int) -> None:
    if tensor.dim() != 1 or tensor.size(0) not in (1, columns):
        reject(f"{_OP}: {name} must have shape (1,) or {(columns,)}, but has {tuple(tensor.shape)}")


def _check_group_sizes(row: _Row, sizes: _Sizes, scale: torch.Tensor, group_sizes: Sequence[int] | None) -> None:
    if group_sizes is None:
        return
    length = sizes.k // scale.size(0) if row.is_grouped else 0
    if len(group_sizes) != 3 or tuple(group_sizes[:2]) not in ((0, 0), (1, 1)) or group_sizes[2] not in (0, length):
        reject(f"{_OP}: group_sizes must be None or [0, 0, {length}] for these scales, but is {list(group_sizes)}")


def _matrices(x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 ``[B, M, K]`` and ``[B, K, N]``."""
    sizes = _sizes(x1, x2)
    if x1.dtype == _I32:
        x1, x2 = unpack_int4(x1), unpack_int4_weight(x2, sizes.n)
    if x2.dim() == 2:  # one weight for all
        return x1.reshape(1, -1, sizes.k), x2.unsqueeze(0)
    x1 = x1.expand(*sizes.batch, sizes.m, sizes.k)
    x2 = x2.expand(*sizes.batch, sizes.k, sizes.n)
    return x1.reshape(-1, sizes.m, sizes.k), x2.reshape(-1, sizes.k, sizes.n)


def _grouped_sum(x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Float32 ``[M, N]``: the groups of K, each with its own scale and offset of the weight."""
    length = x1.size(1) // scale.size(0)
    total = torch.zeros(x1.size(0), x2.size(1))
    for group in range(scale.size(0)):
        terms = slice(group * length, (group + 1) * length)
        sums = x1[:, terms].sum(1, keepdim=True).float()
        total += (int_matmul(x1[:, terms], x2[terms]).float() - sums * offset[group].float()) * scale[group]
    return total


def _cpu(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: torch.dtype,
    group_sizes: Sequence[int] | None,
) -> torch.Tensor:
    y = _fake(x1, x2, scale, offset, pertoken_scale, bias, output_dtype, group_sizes)
    if y.numel() == 0:
        return y
    pairs = list(zip(*_matrices(x1, x2), strict=True))
    if scale.dim() == 2:
        assert offset is not None and pertoken_scale is not None
        values = torch.stack([_grouped_sum(a, b, scale, offset) for a, b in pairs]).view(y.shape)
        return y.copy_(values * pertoken_scale.unsqueeze(1))
    accumulator = torch.stack([int_matmul(a, b) for a, b in pairs]).view(y.shape)
    if bias is not None and bias.dtype == _I32:
        accumulator = accumulator + bias
    if output_dtype == _I32:
        return y.copy_(accumulator)
    if scale.dtype == _F32 and pertoken_scale is None and output_dtype in (_I8, _F16):
        scale = scale_words(scale, offset, 0)
    if output_dtype == _I8:
        return requantize(accumulator, scale)
    values = accumulator.float() * (scale_of_words(scale) if scale.dtype in (_I64, _U64) else scale.float())
    if pertoken_scale is not None:
        values *= pertoken_scale.unsqueeze(1)
    if bias is not None and bias.dtype != _I32:
        values += bias
    return y.copy_(values)


def _npu(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: torch.dtype,
    group_sizes: Sequence[int] | None,
) -> torch.Tensor:
    sizes = _sizes(x1, x2)
    y = _fake(x1, x2, scale, offset, pertoken_scale, bias, output_dtype, group_sizes)
    if y.numel() == 0:
        return y
    if scale.dtype == _F32 and pertoken_scale is None and output_dtype in (_I8, _F16):
        # eager torch_npu does the same; graphs do not take float32 here
        scale, offset = torch.ops.npu.npu_trans_quant_param(scale.contiguous(), offset, 0), None
    if scale.dtype in (_I64, _U64):
        scale, offset = scale.view(_I64), None
    if bias is not None and bias.dim() == 2:
        bias = bias.flatten()
    # of views the device reads transposed ones only, and takes them for words along K
    keeps_x1 = x1.dtype == _I8 and is_transposed(x1)
    keeps_x2 = is_transposed(x2) and not (x2.dtype == _I32 and x2.size(-2) == sizes.k)
    return torch.ops.npu.npu_quant_matmul(
        x1 if keeps_x1 else x1.contiguous(),
        x2 if keeps_x2 else x2.contiguous(),
        scale,
        offset=offset,
        pertoken_scale=pertoken_scale,
        bias=bias,
        output_dtype=output_dtype,
        group_sizes=group_sizes,
    )


def _fake(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    pertoken_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_dtype: torch.dtype,
    group_sizes: Sequence[int] | None,
) -> torch.Tensor:
    sizes = _sizes(x1, x2)
    return x1.new_empty([*sizes.batch, sizes.m, sizes.n], dtype=output_dtype)


_op = register_op(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, Tensor? offset, Tensor? pertoken_scale, Tensor? bias,"
    " ScalarType output_dtype, int[]? group_sizes) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
)


@typed
def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | int | None = None,
    x1_dtype: torch.dtype | int | None = None,
    x2_dtype: torch.dtype | int | None = None,
    pertoken_scale_dtype: torch.dtype | int | None = None,
    scale_dtype: torch.dtype | int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of int8 or int4 matrices, scaled. The result is int8 unless ``output_dtype`` says otherwise.

    ======  ==============  ==================  ======================  ==============  =================
    x1, x2  scale           offset              bias                    pertoken_scale  output_dtype
    ======  ==============  ==================  ======================  ==============  =================
    int8    words, float32  None                int32                   None            float16
    int8    words, float32  float32             int32                   None            None, int8
    int8    float32, bf16   None                int32, bf16, float32    float32         bfloat16
    int8    float32         None                int32, float16, f32     float32, given  float16
    int8    (has no effect) None                int32                   None            int32
    int4    words, float32  None                int32                   None            float16
    int4    float32 [G, N]  float16 [G, N]      None                    float32, given  float16, bfloat16
    ======  ==============  ==================  ======================  ==============  =================

    Everything but x1, x2 and scale may be None where the table does not say "given" (and the offset in the last row).
    Words are those of :func:`npu_trans_quant_param`; they hold an offset, and ``offset`` has no effect beside them.

    No argument has a gradient: integer results are detached, and scales that require one are refused otherwise.

    Args:
        x1: ``[..., M, K]`` of 2 to 6 dimensions, int8; or int32 words of int4 values along K.
        x2: ``[..., K, N]`` of the same dtype, its batch broadcast with that of x1; words along N, or along K in a
            transposed view.
        scale: ``[1]`` or ``[N]``; in the last row one per group of K / G terms.
        offset: ``[1]`` or ``[N]``, or as scale; added after rounding (in the last row subtracted from the weight).
        pertoken_scale: ``[M]``.
        bias: ``[N]``; also ``[1, N]`` for a result of two dimensions and ``[B, 1, N]`` for one of three. Integers are
            added before scaling, floats after it.
        output_dtype: see the table.
        x1_dtype: must be None.
        x2_dtype: must be None.
        pertoken_scale_dtype: must be None.
        scale_dtype: must be None.
        group_sizes: None or ``[0, 0, 0]``; in the last row also ``[0, 0, K / G]`` or ``[1, 1, K / G]``.
        y_scale: must be None.

    Returns:
        ``[..., M, N]``, contiguous.

    Raises:
        OperatorError: a combination that is not in the table, or a wrong shape.

    Example:
        >>> x1 = torch.tensor([[1, 2]], dtype=torch.int8)
        >>> x2 = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
        >>> npu_quant_matmul(x1, x2, torch.tensor([0.5]), output_dtype=torch.bfloat16)
        tensor([[3.5000, 3.0000]], dtype=torch.bfloat16)
        >>> npu_quant_matmul(x1, x2, torch.tensor([0.5]))
        tensor([[4, 3]], dtype=torch.int8)
    """
    for name, tensor in (
        ("x2", x2),
        ("scale", scale),
        ("offset", offset),
        ("pertoken_scale", pertoken_scale),
        ("bias", bias),
    ):
        require_device(_OP, name, tensor, x1)
    for name, code in (
        ("x1_dtype", x1_dtype),
        ("x2_dtype", x2_dtype),
        ("pertoken_scale_dtype", pertoken_scale_dtype),
        ("scale_dtype", scale_dtype),
        ("y_scale", y_scale),
    ):
        require(code is None, f"{_OP}: {name} must be None; only later devices have it")
    sizes = _check_operands(x1, x2)
    row = _find_row(x1.dtype, as_dtype(_OP, "output_dtype", output_dtype) or _I8, pertoken_scale is not None)
    _check_parameters(row, sizes, scale, offset, pertoken_scale, bias)
    _check_group_sizes(row, sizes, scale, group_sizes)
    parameters = (scale, offset, pertoken_scale, bias)
    if not row.y.is_floating_point:
        parameters = tuple(None if tensor is None else tensor.detach() for tensor in parameters)  # type: ignore[assignment]
    for name, tensor in zip(("scale", "offset", "pertoken_scale", "bias"), parameters, strict=True):
        require_no_gradient(_OP, name, tensor)
    return _op(x1, x2, *parameters, row.y, None if group_sizes is None else list(group_sizes))
