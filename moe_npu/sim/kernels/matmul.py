"""Matmuls with groups, scales and integer weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel

# ---------------------------------------------------------------- npu_grouped_matmul


def _grouped_matmul(
    x: list[Tensor], weight: list[Tensor], y: list[Tensor], group_list: Tensor | list[int] | None, **arguments: Any
) -> tuple[list[Tensor], None, None]:
    results = ops.npu_grouped_matmul(x, weight, group_list=group_list, output_dtype=_result(x[0], y[0]), **arguments)
    _spend_digits(x, weight)
    return results, None, None


def _grouped_matmul_ints(
    x: list[Tensor], weight: list[Tensor], y: list[Tensor], group_list: list[int], **arguments: Any
) -> list[Tensor]:
    return ops.npu_grouped_matmul(
        x, weight, group_list=group_list, output_dtype=_result(x[0], y[0]), group_type=None, **arguments
    )


def _result(x: Tensor, y: Tensor) -> torch.dtype | None:
    """The result's dtype as ``output_dtype``, which is None for the dtype of x."""
    return None if y.dtype == x.dtype else y.dtype


def _spend_digits(x: list[Tensor], weight: list[Tensor]) -> None:
    """Leave x as the device does where weights are int4 and x int8: its memory is used to split x in int4 digits."""
    for rows in x if weight[0].dtype == torch.int32 else ():
        if rows.dtype == torch.int8:
            rows.fill_(0x55)


_LISTS = "bias:L scale:L offset:L antiquant_scale:L antiquant_offset:L"
_V4 = (
    f"x:L weight:L {_LISTS} per_token_scale:L group_list:T activation_input:L activation_quant_scale:L"
    " activation_quant_offset:L split_item:i group_type:i group_list_type:i act_type:i"
)
_RESULTS = ">>y:L >_activation_feature_out:L >_dynamic_quant_scale_out:L"

kernel("aclnnGroupedMatmul", f"x:L weight:L {_LISTS} group_list:A split_item:i >>y:L", _grouped_matmul_ints)
kernel("aclnnGroupedMatmulV4", f"{_V4} {_RESULTS}", _grouped_matmul)
kernel("aclnnGroupedMatmulV5", f"{_V4} tuning_config:A {_RESULTS}", _grouped_matmul)
kernel("aclnnGroupedMatmulWeightNz", f"{_V4} tuning_config:A _quant_per_group_size:i {_RESULTS}", _grouped_matmul)

# ---------------------------------------------------------------- npu_grouped_matmul_add


def _add(self: Tensor, **arguments: Any) -> None:
    ops.npu_grouped_matmul_add_(self, **arguments)


_ADD = "x:T weight:T group_list:T =self:T transpose_x:b transpose_weight:b group_type:i"
kernel("aclnnGroupedMatmulAdd", _ADD, _add)
kernel("aclnnGroupedMatmulAddV2", f"{_ADD} group_list_type:i", _add)

# ---------------------------------------------------------------- npu_grouped_matmul_swiglu_quant

# aclDataType
_FLOATS = {0: torch.float32, 1: torch.float16, 27: torch.bfloat16}


def _swiglu_quant(x: Tensor, weight: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    results = ops.npu_grouped_matmul_swiglu_quant(x, weight, **arguments)
    _spend_digits([x], [weight])
    return results


def _swiglu_quant_v2(x: Tensor, weight: list[Tensor], dequant_dtype: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    if dequant_dtype not in _FLOATS:
        raise NotImplementedError(f"aclDataType {dequant_dtype} as dequant_dtype is not implemented")
    results = ops.npu_grouped_matmul_swiglu_quant_v2(x, weight, dequant_dtype=_FLOATS[dequant_dtype], **arguments)
    _spend_digits([x], weight)
    return results


_V2 = (
    "x:T weight:L weight_scale:L weight_assist_matrix:L bias:T x_scale:T smooth_scale:T group_list:T dequant_mode:i"
    " dequant_dtype:i quant_mode:i group_list_type:i tuning_config:A >output:T >output_scale:T"
)
kernel(
    "aclnnGroupedMatmulSwigluQuantWeightNZ",
    "x:T weight:T bias:T offset:T weight_scale:T x_scale:T group_list:T >output:T >output_scale:T >output_offset:T",
    _swiglu_quant,
)
kernel("aclnnGroupedMatmulSwigluQuantV2", _V2, _swiglu_quant_v2)
kernel("aclnnGroupedMatmulSwigluQuantWeightNzV2", _V2, _swiglu_quant_v2)

# ---------------------------------------------------------------- npu_grouped_matmul_finalize_routing


def _finalize_routing(x: Tensor, w: Tensor, out: Tensor, **arguments: Any) -> Tensor:
    y = ops.npu_grouped_matmul_finalize_routing(x, w, output_bs=out.size(0), **arguments)
    _spend_digits([x], [w])
    return y


_FACTORS = "x:T w:T scale:T bias:T"
_OFFSETS = "offset:T _antiquant_scale:T _antiquant_offset:T"
_ROUTING = (
    "pertoken_scale:T group_list:T shared_input:T logit:T row_index:T _dtype:i shared_input_weight:f"
    " shared_input_offset:i _transpose_x:b _transpose_w:b group_list_type:i"
)
for _name, _arguments in {
    "aclnnGroupedMatmulFinalizeRoutingV2": f"{_FACTORS} {_OFFSETS} {_ROUTING}",
    "aclnnGroupedMatmulFinalizeRoutingV3": f"{_FACTORS} {_OFFSETS} {_ROUTING} tuning_config:A",
    "aclnnGroupedMatmulFinalizeRoutingWeightNz": f"{_FACTORS} {_ROUTING}",
    "aclnnGroupedMatmulFinalizeRoutingWeightNzV2": f"{_FACTORS} {_OFFSETS} {_ROUTING} tuning_config:A",
}.items():
    kernel(_name, f"{_arguments} >>out:T", _finalize_routing)

# ---------------------------------------------------------------- npu_quant_grouped_matmul_dequant

_DEQUANT = (
    "x:T quantized_weight:T weight_scale:T group_list:T bias:T x_scale:T x_offset:T smooth_scale:T quant_mode:s"
    " _trans:b >out:T"
)
kernel("aclnnQuantGroupedMatmulDequant", _DEQUANT, ops.npu_quant_grouped_matmul_dequant)
kernel("aclnnQuantGroupedMatmulDequantWeightNZ", _DEQUANT, ops.npu_quant_grouped_matmul_dequant)

# ---------------------------------------------------------------- npu_quant_matmul


def _quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_scale: Tensor | None,
    x2_scale: Tensor,
    y_scale: Tensor | None,
    x2_offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out: Tensor,
) -> Tensor:
    sizes = [group_size >> 32, group_size >> 16 & 0xFFFF, group_size & 0xFFFF]
    return ops.npu_quant_matmul(
        x1,
        x2,
        x2_scale,
        offset=x2_offset,
        pertoken_scale=x1_scale,
        bias=bias,
        output_dtype=out.dtype,
        group_sizes=sizes if group_size else None,
        y_scale=y_scale,
    )


# torch_npu passes offsets of x1 and y without elements
_QUANT_MATMUL = (
    "x1:T x2:T x1_scale:T x2_scale:T y_scale:T _x1_offset:T x2_offset:T _y_offset:T bias:T _transpose1:b _transpose2:b"
    " group_size:i >>out:T"
)
kernel("aclnnQuantMatmulV5", _QUANT_MATMUL, _quant_matmul)
kernel("aclnnQuantMatmulWeightNz", _QUANT_MATMUL, _quant_matmul)

# ---------------------------------------------------------------- npu_weight_quant_batchmatmul


def _weight_quant(quant_scale: Tensor | None, quant_offset: Tensor | None, **arguments: Any) -> Tensor:
    # torch_npu makes words of float scales and passes the offset, which they hold, once more
    has_words = quant_scale is not None and quant_scale.dtype == torch.int64
    return ops.npu_weight_quant_batchmatmul(
        quant_scale=quant_scale, quant_offset=None if has_words else quant_offset, **arguments
    )


_WEIGHT_QUANT = (
    "x:T weight:T antiquant_scale:T antiquant_offset:T quant_scale:T quant_offset:T bias:T antiquant_group_size:e"
)
kernel("aclnnWeightQuantBatchMatmulV2", f"{_WEIGHT_QUANT} >y:T", _weight_quant)
kernel("aclnnWeightQuantBatchMatmulV3", f"{_WEIGHT_QUANT} inner_precise:i >y:T", _weight_quant)
