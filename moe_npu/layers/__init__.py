"""MoE layers as ``nn.Module``s, and the ``"moe_npu"`` experts implementation of transformers (``layers/hf.py``)."""

from moe_npu.layers._transformers_hook import register_with_transformers
from moe_npu.layers.activations import get_activation
from moe_npu.layers.dispatch import Dispatched, LocalDispatcher, TokenDispatcher
from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.moe import MoE
from moe_npu.layers.quantized_experts import QuantizedExperts
from moe_npu.layers.routers import Router, RouterOutput, SoftmaxTopKRouter
from moe_npu.layers.shared_expert import SharedExpert

__all__ = [
    "Dispatched",
    "GroupedExperts",
    "LocalDispatcher",
    "MoE",
    "QuantizedExperts",
    "Router",
    "RouterOutput",
    "SharedExpert",
    "SoftmaxTopKRouter",
    "TokenDispatcher",
    "get_activation",
]

register_with_transformers()
