"""Lets the releases of transformers before 5.7 take ``experts_implementation="moe_npu"``.

They compare the name with a list in their code instead of asking the interface where it is registered. Importing this
module changes that; ``import moe_npu`` does so whenever transformers is imported, and later releases stay as they are.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_utils import PreTrainedModel

from moe_npu.layers.hf import NAME

_original = PreTrainedModel.get_correct_experts_implementation


def _get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
    return NAME if requested_experts == NAME else _original(self, requested_experts)


if "ALL_EXPERTS_FUNCTIONS" not in _original.__code__.co_names:
    PreTrainedModel.get_correct_experts_implementation = _get_correct_experts_implementation
