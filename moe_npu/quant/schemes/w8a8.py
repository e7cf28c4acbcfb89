"""W8A8: int8 weights with one scale per output channel, int8 activations with one scale per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moe_npu import ops
from moe_npu.quant.functional import dequantize, quantize
from moe_npu.quant.scheme import (
    QuantizedRows,
    QuantizedWeight,
    QuantScheme,
    refuse_gradient,
    register_scheme,
    require_half,
)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    # what the kernel takes: float32 scales for float16 results, bfloat16 scales for bfloat16 results
    return torch.float32 if dtype == torch.float16 else torch.bfloat16


@register_scheme
@dataclass(frozen=True)
class W8A8(QuantScheme):
    """``y = int32(q(x) @ w) * weight_scale * token_scale``, q(x) the rows rounded to int8 as they come.

    Stored: weight int8 ``[..., N, K]``; scale ``[..., N, 1]``, bfloat16, or float32 for float16 models.
    Inference only: rounding x to int8 has no gradient.
    """

    name: ClassVar[str] = "w8a8"
    description: ClassVar[str] = "int8 weights per output channel, int8 activations per token, int8 arithmetic"
    passes_gradient: ClassVar[bool] = False
    takes_quantized_rows: ClassVar[bool] = True

    @property
    def options(self) -> dict[str, Any]:
        """No options."""
        return {}

    def quantize(self, weight: torch.Tensor) -> QuantizedWeight:
        """See :meth:`QuantScheme.quantize`."""
        return QuantizedWeight(*quantize(weight, bits=8, scale_dtype=_scale_dtype(weight.dtype)))

    def dequantize(self, quantized: QuantizedWeight) -> torch.Tensor:
        """See :meth:`QuantScheme.dequantize`."""
        return dequantize(quantized.weight, quantized.scale)

    def empty(
        self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> QuantizedWeight:
        """See :meth:`QuantScheme.empty`."""
        return QuantizedWeight(
            torch.empty(shape, dtype=torch.int8, device=device),
            torch.empty(*shape[:-1], 1, dtype=_scale_dtype(dtype), device=device),
        )

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
            ValueError: x is not half precision, or a gradient of x is asked for; a bias with float16 x.
        """
        if bias is not None and x.dtype == torch.float16:
            raise ValueError("w8a8 adds a bias to bfloat16 results only, but x is float16")
        return _multiply(_quantized(x), quantized, expert_tokens, x.dtype, bias)

    def gated_mlp(
        self,
        x: torch.Tensor | QuantizedRows,
        gate_up_proj: QuantizedWeight,
        down_proj: QuantizedWeight,
        expert_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """See :meth:`QuantScheme.gated_mlp`.

        Raises:
            ValueError: x is not half precision, or a gradient of x is asked for.
        """
        rows = x if isinstance(x, QuantizedRows) else _quantized(x)
        dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
        gate_up = _multiply(rows, gate_up_proj, expert_tokens, dtype)  # [R, 2I]
        codes, scale = ops.npu_dequant_swiglu_quant(gate_up, activate_left=True, quant_mode=1)  # [R, I], [R]
        return _multiply(QuantizedRows(codes, scale, dtype), down_proj, expert_tokens, dtype)


def _quantized(x: torch.Tensor) -> QuantizedRows:
    require_half(W8A8.name, x)
    refuse_gradient(x)
    return QuantizedRows(*ops.npu_dynamic_quant(x), x.dtype)


def _multiply(
    rows: QuantizedRows,
    quantized: QuantizedWeight,
    expert_tokens: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    (y,) = ops.npu_grouped_matmul(
        [rows.codes],
        [quantized.weight.mT],
        bias=None if bias is None else [bias.to(torch.bfloat16)],
        scale=[quantized.scale.squeeze(-1).to(_scale_dtype(dtype))],
        per_token_scale=[rows.scale],
        group_list=expert_tokens,
        group_list_type=1,
        group_type=0,
        split_item=3,
        output_dtype=dtype,
    )
    return y
