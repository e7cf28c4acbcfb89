"""MoE layers as ``nn.Module``s, and the ``"moe_npu"`` experts implementation of transformers (``layers/hf.py``)."""

from moe_npu.layers._transformers_hook import register_with_transformers
from moe_npu.layers.activations import clamped_swiglu, clipped_swiglu, gated, get_activation, softcapped_swiglu
from moe_npu.layers.dispatch import CapacityDispatcher, Dispatched, LocalDispatcher, TokenDispatcher
from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.families import (
    family_names,
    hf_state_dict,
    is_moe_layer,
    load_hf_state_dict,
    router_from_hf,
    unsupported_blocks,
)
from moe_npu.layers.hf_lora import load_peft_adapter, save_peft_adapter
from moe_npu.layers.lora import add_lora, lora_parameters, lora_state_dict, merge_lora, remove_lora, unmerge_lora
from moe_npu.layers.losses import (
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_probabilities,
    router_z_loss,
    sequence_balance_loss,
    update_correction_bias,
)
from moe_npu.layers.moe import MoE
from moe_npu.layers.quantized_experts import QuantizedExperts
from moe_npu.layers.replay import force_balanced, record_routing, replay_routing
from moe_npu.layers.routers import (
    Gemma4Router,
    GroupLimitedRouter,
    HashRouter,
    LinearRouter,
    Llama4Router,
    Router,
    RouterOutput,
    SigmoidTopKRouter,
    SoftmaxTopKRouter,
    SparseMixerRouter,
    SqrtSoftplusRouter,
    TopKSoftmaxRouter,
)
from moe_npu.layers.routing_record import LayerRouting, RoutingRecord
from moe_npu.layers.shared_expert import SharedExpert
from moe_npu.layers.stats import (
    ExpertLoad,
    LayerLoad,
    LoadReport,
    count_expert_tokens,
    load_report,
    plot_expert_load,
    track_expert_load,
)
from moe_npu.layers.weight_layouts import (
    ExpertLayout,
    get_layout,
    layout_names,
    load_expert_weights,
    stack_experts,
    unstack_experts,
)

__all__ = [
    "CapacityDispatcher",
    "Dispatched",
    "ExpertLayout",
    "ExpertLoad",
    "Gemma4Router",
    "GroupLimitedRouter",
    "GroupedExperts",
    "HashRouter",
    "LayerLoad",
    "LayerRouting",
    "LinearRouter",
    "Llama4Router",
    "LoadReport",
    "LocalDispatcher",
    "MoE",
    "QuantizedExperts",
    "Router",
    "RouterOutput",
    "RoutingRecord",
    "SharedExpert",
    "SigmoidTopKRouter",
    "SoftmaxTopKRouter",
    "SparseMixerRouter",
    "SqrtSoftplusRouter",
    "TokenDispatcher",
    "TopKSoftmaxRouter",
    "add_lora",
    "clamped_swiglu",
    "clipped_swiglu",
    "count_expert_tokens",
    "family_names",
    "force_balanced",
    "gated",
    "get_activation",
    "get_layout",
    "hf_state_dict",
    "is_moe_layer",
    "layout_names",
    "load_balancing_loss",
    "load_expert_weights",
    "load_hf_state_dict",
    "load_peft_adapter",
    "load_report",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "plot_expert_load",
    "pooled_load_balancing_loss",
    "record_routing",
    "remove_lora",
    "replay_routing",
    "router_from_hf",
    "router_probabilities",
    "router_z_loss",
    "save_peft_adapter",
    "sequence_balance_loss",
    "softcapped_swiglu",
    "stack_experts",
    "track_expert_load",
    "unmerge_lora",
    "unstack_experts",
    "unsupported_blocks",
    "update_correction_bias",
]

register_with_transformers()
