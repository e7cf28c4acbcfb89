"""A simulated Ascend device: the unmodified torch_npu on a machine without an NPU and without CANN.

``moe-npu sim script.py`` runs a program on it; :func:`activate` gives it to a running process, e.g. of pytest. The
operators are computed by the CPU kernels of ``moe_npu.ops``; see docs/simulated_npu.md for what that proves.
"""

from moe_npu.sim.device import activate, is_active
from moe_npu.sim.installation import SimulatorError
from moe_npu.sim.trace import Launch, Region, Trace, trace

__all__ = ["Launch", "Region", "SimulatorError", "Trace", "activate", "is_active", "trace"]
