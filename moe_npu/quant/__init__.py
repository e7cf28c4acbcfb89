"""Quantized expert weights: schemes, pure functions and the streaming conversion of whole checkpoints."""

from moe_npu.quant.convert import QuantReport, quantize_checkpoint
from moe_npu.quant.functional import dequantize, group_size_for, pack_int4, quantize, unpack_int4
from moe_npu.quant.scheme import (
    QuantizedRows,
    QuantizedWeight,
    QuantScheme,
    get_scheme,
    register_scheme,
    scheme_names,
)
from moe_npu.quant.schemes import W4A16, W8A8

__all__ = [
    "W4A16",
    "W8A8",
    "QuantReport",
    "QuantScheme",
    "QuantizedRows",
    "QuantizedWeight",
    "dequantize",
    "get_scheme",
    "group_size_for",
    "pack_int4",
    "quantize",
    "quantize_checkpoint",
    "register_scheme",
    "scheme_names",
    "unpack_int4",
]
