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

from typing import Any

from moe_npu.quant.scheme import QuantScheme, get_scheme

QUANT_METHOD = "moe_npu"
FORMAT_VERSION = 1
SCALE_SUFFIX = "_scale"


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
