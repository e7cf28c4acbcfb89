"""What torch_npu itself launches outside the adapters of operators: copies and casts."""

from __future__ import annotations

from moe_npu.sim.kernels.table import kernel


kernel("aclnnInplaceCopy", ">destination:T source:T", lambda source: source)
kernel("aclnnCast", "self:T _dtype:e >out:T", lambda self: self)
