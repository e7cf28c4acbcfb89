"""SwiGLU, alone and with quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel

_QUANT_MODES = {"static": 0, "dynamic": 1}
_DST_TYPES = {2: torch.int8, 29: torch.quint4x2}  # aclDataType


def _swiglu_quant(quant_mode: str, dst_type: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    if dst_type not in _DST_TYPES:
        raise NotImplementedError(f"aclDataType {dst_type} as dst_type is not implemented")
    return ops.npu_swiglu_quant(quant_mode=_QUANT_MODES[quant_mode], dst_type=_DST_TYPES[dst_type], **arguments)


def _dequant_swiglu_quant(quant_mode: str, **arguments: Any) -> tuple[Tensor, Tensor]:
    return ops.npu_dequant_swiglu_quant(quant_mode=_QUANT_MODES[quant_mode], **arguments)


kernel("aclnnSwiGlu", "input:T dim:i >out:T", ops.npu_swiglu)
kernel("aclnnSwiGluGrad", "grad_output:T input:T dim:i >out:T", ops.npu_swiglu_backward)
kernel(
    "aclnnClippedSwiglu",
    "x:T group_index:T dim:i alpha:d limit:d bias:d interleaved:b >out:T",
    ops.npu_clipped_swiglu,
)
kernel(
    "aclnnSwiGluQuantV2",
    "x:T smooth_scales:T offsets:T group_index:T activate_left:b quant_mode:s group_list_type:i dst_type:e "
    ">y:T >scale:T",
    _swiglu_quant,
)
kernel(
    "aclnnDequantSwigluQuantV2",
    "x:T weight_scale:T activation_scale:T bias:T quant_scale:T quant_offset:T group_index:T activate_left:b "
    # int8, rint, the last dim: torch_npu passes no other
    "quant_mode:s _dst_type:i _round_mode:s _activate_dim:i "
    "swiglu_mode:i clamp_limit:d glu_alpha:d glu_bias:d >y:T >scale:T",
    _dequant_swiglu_quant,
)
