"""Mixture-of-Experts layers for Ascend NPUs, exact on CPU.

``moe_npu.ops`` are torch_npu's MoE operators, ``moe_npu.quant`` quantizes expert weights and whole checkpoints,
``moe_npu.layers`` are ``nn.Module``s. Importing the package registers the operators, and makes
``experts_implementation="moe_npu"`` known to transformers if that is or gets imported.
"""

from moe_npu import _torch, layers, ops, quant  # noqa: F401 - torch first
from moe_npu.layers import (
    GroupedExperts,
    LocalDispatcher,
    MoE,
    QuantizedExperts,
    RouterOutput,
    SharedExpert,
    SoftmaxTopKRouter,
)
from moe_npu.quant import get_scheme, quantize_checkpoint

__version__ = "0.1.0"

__all__ = [
    "GroupedExperts",
    "LocalDispatcher",
    "MoE",
    "QuantizedExperts",
    "RouterOutput",
    "SharedExpert",
    "SoftmaxTopKRouter",
    "get_scheme",
    "layers",
    "ops",
    "quant",
    "quantize_checkpoint",
]
