"""Step 3.7: experts like those that transformers decorates, only that these are not."""

from __future__ import annotations

from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from moe_npu.layers.hf import moe_npu_experts_forward
from moe_npu.layers.hf_adapters.base import Adapter


class GroupedStep3p7Experts(Adapter, Step3p7Experts):
    """``Step3p7Experts`` with the flags of transformers' interface."""

    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    _is_expert_parallel = False

    forward = moe_npu_experts_forward
