"""Operators that communicate by themselves: dispatch, combine, all-to-all with grouped matmul, barrier."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_npu.sim.kernels.table import kernel


def _pad(x: Tensor, pad: list[int], value: float) -> Tensor:
    return torch.constant_pad_nd(x, pad, value)


# with which torch_npu pads what a group gathers
kernel("aclnnConstantPadNd", "x:T pad:A value:S >out:T", _pad)
