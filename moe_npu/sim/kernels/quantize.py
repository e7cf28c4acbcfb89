"""Quantization with given and with own scales, and back again."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel

# aclDataType of codes
_INTEGERS = {2: torch.int8, 3: torch.int32, 4: torch.uint8}
# here int32 stands for eight int4 codes
_PACKED = {2: torch.int8, 3: torch.quint4x2}
_FLOATS = {1: torch.float16, 27: torch.bfloat16}


def _dtype(dtypes: dict[int, torch.dtype], number: int) -> torch.dtype:
    if number not in dtypes:
        raise NotImplementedError(f"aclDataType {number} as dst_type is not implemented")
    return dtypes[number]


def _quantize(x: Tensor, scales: Tensor, zero_points: Tensor | None, dst_type: int, axis: int) -> Tensor:
    return ops.npu_quantize(x, scales, zero_points, _dtype(_INTEGERS, dst_type), axis, div_mode=True)


def _ascend_quant(x: Tensor, scale: Tensor, offset: Tensor | None, dst_type: int, axis: int) -> Tensor:
    return ops.npu_quantize(x, scale, offset, _dtype(_PACKED, dst_type), axis, div_mode=False)


def _dynamic_quant(
    x: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int,
    offset: Tensor | None,
    is_symmetrical: bool | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if is_symmetrical is None:
        is_symmetrical = offset is None
    compute = ops.npu_dynamic_quant if is_symmetrical else ops.npu_dynamic_quant_asymmetric
    y, scale, *offsets = compute(
        x,
        smooth_scales=smooth_scales,
        group_index=group_index,
        dst_type=_dtype(_PACKED, dst_type),
        quant_mode=quant_mode,
        dst_type_max=dst_type_max,
    )
    return y, scale, offsets[0] if offsets else None


def _anti_quant(x: Tensor, scale: Tensor, offset: Tensor | None, dst_type: int) -> Tensor:
    return ops.npu_anti_quant(x, scale, offset=offset, dst_dtype=_dtype(_FLOATS, dst_type))


kernel("aclnnQuantize", "x:T scales:T zero_points:T dst_type:e axis:i >y:T", _quantize)
kernel(
    "aclnnAscendQuantV3",
    "x:T scale:T offset:T _sqrt_mode:b _round_mode:s dst_type:e axis:i >y:T",
    _ascend_quant,
)
kernel(
    "aclnnDynamicQuantV2",
    "x:T smooth_scales:T group_index:T dst_type:e >y:T >scale:T >>offset:T",
    _dynamic_quant,
)
kernel(
    "aclnnDynamicQuantV4",
    "x:T smooth_scales:T group_index:T dst_type:e is_symmetrical:b quant_mode:s dst_type_max:f "
    ">y:T >scale:T >>offset:T",
    _dynamic_quant,
)
kernel("aclnnAscendAntiQuant", "x:T scale:T offset:T dst_type:e _sqrt_mode:b >y:T", _anti_quant)
kernel("aclnnTransQuantParamV2", "scale:T offset:T >out:T", ops.npu_trans_quant_param)
kernel("aclnnTransQuantParamV3", "scale:T offset:T round_mode:i >out:T", ops.npu_trans_quant_param)
