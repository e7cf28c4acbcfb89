"""torch_npu's MoE operators under their own names: exact on CPU, the real kernel on NPU, with checks and gradients."""

from moe_npu.ops._errors import OperatorError
from moe_npu.ops._library import npu_lowerings, register_kernel
from moe_npu.ops.gating import npu_moe_gating_top_k_softmax
from moe_npu.ops.grouped_matmul import npu_grouped_matmul
from moe_npu.ops.grouped_mm import grouped_mm, grouped_mm_weight_grad
from moe_npu.ops.permute import npu_moe_token_permute, npu_moe_token_unpermute
from moe_npu.ops.quantize import npu_convert_weight_to_int4pack, npu_dynamic_quant
from moe_npu.ops.swiglu import npu_swiglu, npu_swiglu_backward

__all__ = [
    "OperatorError",
    "grouped_mm",
    "grouped_mm_weight_grad",
    "npu_convert_weight_to_int4pack",
    "npu_dynamic_quant",
    "npu_grouped_matmul",
    "npu_lowerings",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_token_permute",
    "npu_moe_token_unpermute",
    "npu_swiglu",
    "npu_swiglu_backward",
    "register_kernel",
]
