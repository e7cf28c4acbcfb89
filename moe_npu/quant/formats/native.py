"""The native format: a Hugging Face folder whose expert weights are integers, under their own names.

Files: ``config.json`` with an added ``quantization_config``, ``model.safetensors``, and the other files of the source
(tokenizer, generation settings). ``AutoModelForCausalLM.from_pretrained`` loads it once ``moe_npu`` is imported.

``config.json``::

    "quantization_config": {
        "quant_method": "moe_npu",
        "format_version": 1,
        "scheme": "w8a8" | "w4a16",
        "group_size": 128                       only for w4a16
    }

Tensors. Every tensor keeps its name; a quantized expert weight ``<p>.weight``, N output and K input features, becomes

    =================  ==================  ==================  =====================================================
    name               w8a8                w4a16               meaning
    =================  ==================  ==================  =====================================================
    <p>.weight         int8 ``[N, K]``     int32 ``[N, K/8]``  codes; int4 eight to a word, the first lowest
    <p>.weight_scale   ``[N, 1]``          ``[N, G]``          codes * scale is the weight; G = K / group size
    =================  ==================  ==================  =====================================================

The group size of a tensor is the largest even divisor of its K that is at most ``group_size``. Scales have the dtype
of the model (bfloat16 for float32 models); those of w8a8 are float32 in float16 models. Codes are symmetric, -127..127
and -7..7. Everything that is not the weight of a routed expert is copied bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from moe_npu.quant.checkpoint import TensorInfo
from moe_npu.quant.scheme import QuantScheme, get_scheme

QUANT_METHOD = "moe_npu"
FORMAT_VERSION = 1
SCALE_SUFFIX = "_scale"

# the weight of one projection of one routed expert, as transformers writes it
EXPERT_WEIGHT = re.compile(r"(^|\.)experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")


def check_tensors(tensors: Mapping[str, TensorInfo], scheme: QuantScheme) -> None:
    """Check the tensors of a quantized checkpoint before they are loaded.

    Raises:
        ValueError: there are no experts, one has a tensor of another dtype, or its scale is missing or does not fit.
    """
    weights = [info for info in tensors.values() if EXPERT_WEIGHT.search(info.name)]
    if not weights:
        raise ValueError("the quantized checkpoint holds no experts")
    announced = scheme.empty((8, 8), dtype=torch.bfloat16, device="meta")
    for info in weights:
        if info.dtype != announced.weight.dtype or len(info.shape) != 2:
            raise ValueError(
                f"{info.name} must be a {scheme.name} weight of {announced.weight.dtype}, but is {info.dtype} of shape "
                f"{list(info.shape)}"
            )
        scale = tensors.get(info.name + SCALE_SUFFIX)
        if scale is None:
            raise ValueError(f"{info.name} has no scale: {info.name + SCALE_SUFFIX} is missing")
        if not scale.dtype.is_floating_point or len(scale.shape) != 2 or scale.shape[0] != info.shape[0]:
            raise ValueError(
                f"{scale.name} must hold float scales [{info.shape[0]}, G], but is {scale.dtype} {list(scale.shape)}"
            )


def quantization_config(scheme: QuantScheme) -> dict[str, Any]:
    """The ``quantization_config`` entry of ``config.json``."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "scheme": scheme.name,
        **scheme.options,
    }


def scheme_from_config(config: dict[str, Any]) -> QuantScheme:
    """The scheme that a ``quantization_config`` names.

    Raises:
        ValueError: the entry is of another method, of a later version, or names no known scheme or option.
    """
    options = dict(config)
    method, version = options.pop("quant_method", None), options.pop("format_version", None)
    if method != QUANT_METHOD:
        raise ValueError(f"quant_method must be {QUANT_METHOD!r}, but is {method!r}")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}, but is {version!r}; a newer moe_npu may read it")
    name = options.pop("scheme", None)
    if not isinstance(name, str):
        raise ValueError(f"scheme must be the name of a quantization scheme, but is {name!r}")
    return get_scheme(name, **options)
