"""Mixture-of-Experts layers for Ascend NPUs, exact on CPU.

``moe_npu.ops`` are torch_npu's MoE operators, ``moe_npu.quant`` quantizes expert weights and whole checkpoints,
``moe_npu.layers`` are ``nn.Module``s. Importing the package registers the operators, and makes
``experts_implementation="moe_npu"`` known to transformers if that is or gets imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # the names of __getattr__, for type checkers and editors
    from moe_npu.layers.hf_accelerate import accelerate as accelerate
    from moe_npu.layers.hf_accelerate import mark_zero3_leaves as mark_zero3_leaves
    from moe_npu.layers.hf_report import Report as Report
    from moe_npu.layers.hf_report import report as report

__version__ = "0.1.0"

_NEEDS_TRANSFORMERS = {
    "Report": "hf_report",
    "accelerate": "hf_accelerate",
    "mark_zero3_leaves": "hf_accelerate",
    "report": "hf_report",
}


def __getattr__(name: str) -> Any:
    """The names that need transformers, which is imported for those who use one."""
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"moe_npu.layers.{_NEEDS_TRANSFORMERS[name]}")
    except ImportError as error:  # it is missing, or too old
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        message = f"moe_npu.{name} needs transformers ({error}): pip install 'moe-npu[transformers]'"
        raise ImportError(message, name=error.name) from error
    return getattr(module, name)


# without the names that need transformers: `from moe_npu import *` would import it, and fail where there is none
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
