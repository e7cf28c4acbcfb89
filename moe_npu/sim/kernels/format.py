"""Casts of storage formats. Descriptors of tensors in tiles are read and written as such, so a cast is a copy."""

from __future__ import annotations

from torch import Tensor

from moe_npu.sim.kernels.table import kernel


def _slice(source: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    for axis, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        source = source.narrow(axis, start, size)
    return source


kernel("aclnnNpuFormatCast", "source:T >out:T", lambda source: source)
# graph operators: what torch_npu launches for tensors in tiles
kernel("Identity", "source:T >out:T", lambda source: source)
kernel("Cast", "source:T >>out:T", lambda source, out: source.to(out.dtype))
kernel("Transpose", "source:T axes:T >out:T", lambda source, axes: source.permute(axes.tolist()))
kernel("Slice", "source:T starts:T sizes:T >out:T", _slice)
