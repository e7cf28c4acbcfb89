"""The quantization schemes, one file each."""

from moe_npu.quant.schemes.w4a16 import W4A16
from moe_npu.quant.schemes.w8a8 import W8A8

__all__ = ["W4A16", "W8A8"]
