"""W4A16: int4 weights with one scale per group of input features, float activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moe_npu import ops
from moe_npu.quant.functional import dequantize, group_size_for, pack_int4, quantize, unpack_int4
from moe_npu.quant.scheme import QuantizedWeight, QuantScheme, register_scheme, require_half


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


@register_scheme
@dataclass(frozen=True)
class W4A16(QuantScheme):
    """``y = x @ (w * scale)``, the int4 weights unpacked and scaled inside the matmul.

    Stored: weight int32 ``[..., N, K/8]``, eight int4 of one output channel per word, the first in the lowest bits;
    scale ``[..., N, G]``, float16 for float16 models, else bfloat16. Passes the gradient of x.

    Attributes:
        group_size: input features that share a scale, or the largest even divisor of K below it.
    """

    name: ClassVar[str] = "w4a16"
    description: ClassVar[str] = "int4 weights in groups of input features, float activations"
    passes_gradient: ClassVar[bool] = True
    group_size: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ValueError(f"group_size must be a whole number of at least 2, but is {self.group_size!r}")

    @property
    def options(self) -> dict[str, Any]:
        """``group_size``."""
        return {"group_size": self.group_size}

    def quantize(self, weight: torch.Tensor) -> QuantizedWeight:
        """See :meth:`QuantScheme.quantize`."""
        group_size = group_size_for(weight.size(-1), self.group_size)
        codes, scale = quantize(weight, bits=4, group_size=group_size, scale_dtype=_scale_dtype(weight.dtype))
        return QuantizedWeight(pack_int4(codes), scale)

    def dequantize(self, quantized: QuantizedWeight) -> torch.Tensor:
        """See :meth:`QuantScheme.dequantize`."""
        return dequantize(unpack_int4(quantized.weight), quantized.scale)

    def empty(
        self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> QuantizedWeight:
        """See :meth:`QuantScheme.empty`."""
        columns = shape[-1]
        groups = columns // group_size_for(columns, self.group_size)
        return QuantizedWeight(
            torch.empty(*shape[:-1], columns // 8, dtype=torch.int32, device=device),
            torch.empty(*shape[:-1], groups, dtype=_scale_dtype(dtype), device=device),
        )

    def prepare(self, quantized: QuantizedWeight) -> QuantizedWeight:
        """See :meth:`QuantScheme.prepare`: the scale in the memory of ``[..., G, N]``, and an offset of zeros."""
        scale = quantized.scale.detach().mT.contiguous().mT
        return QuantizedWeight(quantized.weight, scale, torch.zeros_like(scale))

    def grouped_mm(
        self,
        x: torch.Tensor,
        quantized: QuantizedWeight,
        expert_tokens: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`QuantScheme.grouped_mm`.

        Raises:
            ValueError: x is not half precision.
        """
        require_half(self.name, x)
        # symmetric, but the kernel wants an offset
        offset = torch.zeros_like(quantized.scale) if quantized.offset is None else quantized.offset
        if bias is not None:
            bias = bias.to(torch.float16 if x.dtype == torch.float16 else torch.float32)
        (y,) = ops.npu_grouped_matmul(
            [x],
            [quantized.weight.mT],
            bias=None if bias is None else [bias],
            antiquant_scale=[quantized.scale.to(x.dtype).mT],  # [E, G, N]
            antiquant_offset=[offset.to(x.dtype).mT],
            group_list=expert_tokens,
            group_list_type=1,
            group_type=0,
            split_item=3,
        )
        return y
