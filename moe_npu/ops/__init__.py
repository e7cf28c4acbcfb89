"""torch_npu's MoE operators under their own names: exact on CPU, the real kernel on NPU, with checks and gradients."""

from moe_npu.ops._errors import OperatorError
from moe_npu.ops._library import npu_lowerings, register_kernel
from moe_npu.ops.alltoallv_gmm import npu_alltoallv_gmm, npu_gmm_alltoallv
from moe_npu.ops.clipped_swiglu import npu_clipped_swiglu
from moe_npu.ops.compute_expert_tokens import npu_moe_compute_expert_tokens
from moe_npu.ops.dequant_swiglu_quant import npu_dequant_swiglu_quant
from moe_npu.ops.distribute import npu_moe_distribute_dispatch, npu_moe_distribute_dispatch_v2
from moe_npu.ops.distribute_barrier import _npu_distribute_barrier
from moe_npu.ops.distribute_combine import npu_moe_distribute_combine, npu_moe_distribute_combine_v2
from moe_npu.ops.distribute_combine_norm import npu_moe_distribute_combine_add_rms_norm
from moe_npu.ops.dynamic_quant import npu_dynamic_quant, npu_dynamic_quant_asymmetric
from moe_npu.ops.finalize_routing import npu_moe_finalize_routing
from moe_npu.ops.format import get_npu_format, npu_format_cast, npu_format_cast_
from moe_npu.ops.gating import npu_moe_gating_top_k_softmax, npu_moe_gating_top_k_softmax_v2
from moe_npu.ops.gating_top_k import npu_moe_gating_top_k
from moe_npu.ops.gating_top_k_backward import npu_moe_gating_top_k_backward
from moe_npu.ops.grouped_matmul import npu_grouped_matmul
from moe_npu.ops.grouped_matmul_add import npu_grouped_matmul_add, npu_grouped_matmul_add_
from moe_npu.ops.grouped_matmul_finalize_routing import npu_grouped_matmul_finalize_routing
from moe_npu.ops.grouped_matmul_swiglu_quant import npu_grouped_matmul_swiglu_quant, npu_grouped_matmul_swiglu_quant_v2
from moe_npu.ops.grouped_mm import grouped_mm, grouped_mm_weight_grad
from moe_npu.ops.init_routing import npu_moe_init_routing
from moe_npu.ops.init_routing_quant import npu_moe_init_routing_quant
from moe_npu.ops.init_routing_v2 import npu_moe_init_routing_v2
from moe_npu.ops.permute import _npu_moe_token_unpermute, npu_moe_token_permute, npu_moe_token_unpermute
from moe_npu.ops.permute_grad import npu_moe_token_permute_grad, npu_moe_token_permute_grad_v2
from moe_npu.ops.quant_grouped_matmul_dequant import npu_quant_grouped_matmul_dequant
from moe_npu.ops.quant_matmul import npu_quant_matmul
from moe_npu.ops.quantize import npu_anti_quant, npu_quantize
from moe_npu.ops.re_routing import npu_moe_re_routing
from moe_npu.ops.routing_map import npu_moe_token_permute_with_routing_map, npu_moe_token_permute_with_routing_map_grad
from moe_npu.ops.swiglu import npu_swiglu, npu_swiglu_backward
from moe_npu.ops.swiglu_quant import npu_swiglu_quant
from moe_npu.ops.unpermute_grad import npu_moe_token_unpermute_grad, npu_moe_token_unpermute_grad_v2
from moe_npu.ops.unpermute_routing_map import (
    _npu_moe_token_unpermute_with_routing_map,
    npu_moe_token_unpermute_with_routing_map,
)
from moe_npu.ops.unpermute_routing_map_grad import npu_moe_token_unpermute_with_routing_map_grad
from moe_npu.ops.update_expert import npu_moe_update_expert
from moe_npu.ops.weight_quant_batchmatmul import npu_weight_quant_batchmatmul
from moe_npu.ops.words import npu_convert_weight_to_int4pack, npu_trans_quant_param

__all__ = [
    "OperatorError",
    "_npu_distribute_barrier",
    "_npu_moe_token_unpermute",
    "_npu_moe_token_unpermute_with_routing_map",
    "get_npu_format",
    "grouped_mm",
    "grouped_mm_weight_grad",
    "npu_alltoallv_gmm",
    "npu_anti_quant",
    "npu_clipped_swiglu",
    "npu_convert_weight_to_int4pack",
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_dynamic_quant_asymmetric",
    "npu_format_cast",
    "npu_format_cast_",
    "npu_gmm_alltoallv",
    "npu_grouped_matmul",
    "npu_grouped_matmul_add",
    "npu_grouped_matmul_add_",
    "npu_grouped_matmul_finalize_routing",
    "npu_grouped_matmul_swiglu_quant",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_lowerings",
    "npu_moe_compute_expert_tokens",
    "npu_moe_distribute_combine",
    "npu_moe_distribute_combine_add_rms_norm",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_backward",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_gating_top_k_softmax_v2",
    "npu_moe_init_routing",
    "npu_moe_init_routing_quant",
    "npu_moe_init_routing_v2",
    "npu_moe_re_routing",
    "npu_moe_token_permute",
    "npu_moe_token_permute_grad",
    "npu_moe_token_permute_grad_v2",
    "npu_moe_token_permute_with_routing_map",
    "npu_moe_token_permute_with_routing_map_grad",
    "npu_moe_token_unpermute",
    "npu_moe_token_unpermute_grad",
    "npu_moe_token_unpermute_grad_v2",
    "npu_moe_token_unpermute_with_routing_map",
    "npu_moe_token_unpermute_with_routing_map_grad",
    "npu_moe_update_expert",
    "npu_quant_grouped_matmul_dequant",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_swiglu",
    "npu_swiglu_backward",
    "npu_swiglu_quant",
    "npu_trans_quant_param",
    "npu_weight_quant_batchmatmul",
    "register_kernel",
]
