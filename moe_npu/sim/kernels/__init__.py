"""The device kernels of the simulator, one file per family."""

from moe_npu.sim.kernels import core, distribute, format, gating, matmul, permute, quantize, routing, swiglu
from moe_npu.sim.kernels.table import KERNELS, Argument, Kernel

__all__ = [
    "KERNELS",
    "Argument",
    "Kernel",
    "core",
    "distribute",
    "format",
    "gating",
    "matmul",
    "permute",
    "quantize",
    "routing",
    "swiglu",
]
