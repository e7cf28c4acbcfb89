"""Loads quantized checkpoints in the native format into transformers models.

``AutoModelForCausalLM.from_pretrained(folder)`` finds ``"quant_method": "moe_npu"`` in ``config.json`` and comes here:
the float parameters of every experts module are replaced by integers and scales, transformers' own rules merge the
per-expert tensors into them, and ``moe_npu_experts_forward`` multiplies by them. Importing this module registers it;
``import moe_npu`` does so whenever transformers is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_npu.layers import hf
from moe_npu.layers._routed_layers import is_transformers_experts
from moe_npu.layers.quantized_experts import WEIGHTS, prepare_quantized_weights, set_quantized_weight
from moe_npu.quant.checkpoint import Checkpoint
from moe_npu.quant.formats import native


@register_quantization_config(native.QUANT_METHOD)
class MoeNpuQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint in the native format.

    Args:
        **config: the entries of :mod:`moe_npu.quant.formats.native`.
    """

    def __init__(self, **config: Any) -> None:
        self.scheme = native.scheme_from_config({"quant_method": native.QUANT_METHOD, **config})
        self.quant_method = native.QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``config.json``."""
        return native.quantization_config(self.scheme)


@register_quantizer(native.QUANT_METHOD)
class MoeNpuHfQuantizer(HfQuantizer):
    """Replaces the experts' parameters of a model by those of a quantization scheme before its weights are loaded."""

    quantization_config: MoeNpuQuantizationConfig
    serialized_names = {"weight": ["weight", f"weight{native.SCALE_SUFFIX}"]}  # noqa: RUF012 - as the base class has it

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize at load."""
        if not self.pre_quantized:
            raise ValueError(
                "moe_npu loads quantized checkpoints; make one with `moe-npu quantize SRC DST --scheme ...`"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        scheme = self.quantization_config.scheme
        folders = {Path(file).parent for file in kwargs.get("checkpoint_files") or ()}
        if len(folders) == 1:
            native.check_tensors(Checkpoint(folders.pop()).tensors, scheme)
        found = False
        for module in model.modules():
            if not is_transformers_experts(module):
                continue
            if module.is_transposed or module.has_bias or not hf.flag(module, "has_gate"):
                raise ValueError(
                    f"{type(module).__name__} cannot be loaded quantized: its weights are transposed, ungated or biased"
                )
            _quantize_parameters(module, scheme)
            found = True
        if not found:
            raise ValueError(f"{type(model).__name__} has no experts that transformers lets us replace")
        model.set_experts_implementation(hf.NAME)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        scheme = self.quantization_config.scheme
        for module in model.modules():
            if hasattr(module, hf.SCHEME_ATTRIBUTE):
                prepare_quantized_weights(module, scheme)  # not trainable, while the loader makes scales so
        if not scheme.passes_gradient:
            model.requires_grad_(False)
        return model

    def is_serializable(self) -> bool:
        """Saving needs nothing more than the parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers are not trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Every operator has a fake kernel."""
        return True


def _quantize_parameters(module: nn.Module, scheme: Any) -> None:
    for name in WEIGHTS:
        weight: torch.Tensor = getattr(module, name)
        set_quantized_weight(module, name, scheme.empty(tuple(weight.shape), dtype=weight.dtype, device=weight.device))
    setattr(module, hf.SCHEME_ATTRIBUTE, scheme)
