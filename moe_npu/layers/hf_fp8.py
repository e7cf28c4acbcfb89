"""The ``"moe_npu"`` experts implementation for models whose linear layers transformers stores in float8 blocks.

Importing this module registers it; ``import moe_npu`` does so once transformers loads its float8 integration.
"""

from __future__ import annotations

import warnings

import transformers
from transformers.integrations import finegrained_fp8

from moe_npu.layers.hf import NAME, moe_npu_experts_forward

if hasattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS"):
    finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, moe_npu_experts_forward)
else:
    warnings.warn(
        f"transformers {transformers.__version__} computes float8 experts in its own way whatever "
        "experts_implementation says; 'moe_npu' takes them from transformers 5.6 on",
        RuntimeWarning,
        stacklevel=2,
    )
