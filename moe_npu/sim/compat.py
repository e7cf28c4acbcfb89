"""Compatibility with scripts for earlier releases of torch_npu: the defaults that 2.13 has withdrawn."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch

VARIABLE = "MOE_NPU_SIM_COMPAT"
_warned = False


def is_requested() -> bool:
    """Whether ``MOE_NPU_SIM_COMPAT`` is set to anything but the empty string or 0."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


# Dynamo calls it while it traces
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "torch_npu.npu_grouped_matmul without group_type: taken as -1, the default of earlier releases; "
            "torch_npu 2.13 itself requires it",
            stacklevel=3,
        )


def npu_grouped_matmul(x: Any, weight: Any, **kwargs: Any) -> Any:
    """torch_npu's operator, with group_type -1 where it is left out."""
    # lengths instead of a tensor: an overload of its own, which takes no group_type
    if "group_type" not in kwargs and not isinstance(kwargs.get("group_list"), (list, tuple)):
        _warn_once()
        kwargs["group_type"] = -1
    return torch.ops.npu.npu_grouped_matmul(x, weight, **kwargs)


def install() -> None:
    """Give ``torch_npu`` the defaults of earlier releases; ``torch.ops.npu`` stays as it is."""
    for name in torch.ops.npu.npu_grouped_matmul.overloads():
        setattr(npu_grouped_matmul, name, getattr(torch.ops.npu.npu_grouped_matmul, name))
    sys.modules["torch_npu"].npu_grouped_matmul = npu_grouped_matmul  # type: ignore[attr-defined]
