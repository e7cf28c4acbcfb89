"""Mixture-of-Experts layers for Ascend NPUs, exact on CPU.

``moe_npu.ops`` are torch_npu's MoE operators, ``moe_npu.quant`` quantizes expert weights and whole checkpoints,
``moe_npu.layers`` are ``nn.Module``s. Importing the package registers the operators, and makes
``experts_implementation="moe_npu"`` known to transformers if that is or gets imported.
"""

import importlib
from typing import Any

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

_NEEDS_TRANSFORMERS = {
    "Report": "hf_report",
    "accelerate": "hf_accelerate",
    "mark_zero3_leaves": "hf_accelerate",
    "report": "hf_report",
}


def __getattr__(name: str) -> Any:
    """The names that need transformers, which is imported for those who use one."""
    if name in _NEEDS_TRANSFORMERS:
        return getattr(importlib.import_module(f"moe_npu.layers.{_NEEDS_TRANSFORMERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GroupedExperts",
    "LocalDispatcher",
    "MoE",
    "QuantizedExperts",
    "Report",
    "RouterOutput",
    "SharedExpert",
    "SoftmaxTopKRouter",
    "accelerate",
    "get_scheme",
    "layers",
    "mark_zero3_leaves",
    "ops",
    "quant",
    "quantize_checkpoint",
    "report",
]
