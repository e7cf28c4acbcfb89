"""Casts of storage formats. Descriptors of tensors in tiles are read and written as such, so a cast is a copy."""

from __future__ import annotations

from moe_npu.sim.kernels.table import kernel

kernel("aclnnNpuFormatCast", "source:T >out:T", lambda source: source)
