"""Imports torch before anything else of the package, also where torch_npu is installed and CANN is not.

torch imports torch_npu by itself, which fails without CANN. On a machine that has torch_npu for the simulated device
only, every ``import torch`` would fail, that of ``moe-npu sim`` included; so there, and only there, torch is asked not
to. ``import torch_npu`` still says what is missing.
"""

import ctypes
import importlib.util
import os
import sys

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _would_fail() -> bool:
    if "torch" in sys.modules or _AUTOLOAD in os.environ or os.environ.get("MOE_NPU_SIM") == "1":
        return False
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return True
    return False


if _would_fail():
    os.environ[_AUTOLOAD] = "0"
    import torch

    del os.environ[_AUTOLOAD]
else:
    import torch

__all__ = ["torch"]
