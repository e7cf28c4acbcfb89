"""What a quantization scheme provides, and the registry of schemes.

A scheme says how the weight of an expert is stored and how rows are multiplied by it. The converter, the layers and
the tests enumerate the registry, so a new scheme is one new file in ``schemes/``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from moe_npu import ops


class QuantizedWeight(NamedTuple):
    """The stored form of a weight ``[..., N, K]``; leading dims, if any, are experts.

    Attributes:
        weight: the integers, ``[..., N, K]`` int8 or ``[..., N, K/8]`` int32 words of eight int4.
        scale: ``[..., N, G]``, one scale for each of G groups of consecutive values along K.
        offset: ``[..., N, G]`` zeros where a kernel wants them, in no file: made by :meth:`QuantScheme.prepare`.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None


class QuantizedRows(NamedTuple):
    """Rows of activations rounded to integers: ``codes * scale[:, None]``.

    Attributes:
        codes: ``[R, K]`` int8.
        scale: ``[R]`` float32.
        dtype: dtype of the rows before.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


class QuantScheme(ABC):
    """How weights are stored and multiplied: a frozen dataclass whose fields are the options of the scheme."""

    name: ClassVar[str]
    description: ClassVar[str]
    passes_gradient: ClassVar[bool]  # whether the rows that are multiplied get one
    takes_quantized_rows: ClassVar[bool] = False  # whether `gated_mlp` multiplies QuantizedRows

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The keyword arguments that make this scheme again: ``get_scheme(scheme.name, **scheme.options)``."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> QuantizedWeight:
        """The stored form of a float weight ``[..., N, K]``.

        Raises:
            ValueError: the weight is not finite or its shape cannot be stored.
        """

    @abstractmethod
    def dequantize(self, quantized: QuantizedWeight) -> torch.Tensor:
        """The float32 weight ``[..., N, K]`` that the stored form stands for."""

    @abstractmethod
    def empty(
        self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> QuantizedWeight:
        """Uninitialized storage for a weight of ``shape`` ``[..., N, K]`` of a model of ``dtype``.

        Raises:
            ValueError: the shape cannot be stored.
        """

    def prepare(self, quantized: QuantizedWeight) -> QuantizedWeight:
        """The same values as the kernels read them, for a weight that is multiplied many times."""
        return quantized

    @abstractmethod
    def grouped_mm(
        self,
        x: torch.Tensor,
        quantized: QuantizedWeight,
        expert_tokens: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows of x, sorted by expert, each multiplied by the weight of its expert with the scheme's arithmetic.

        Args:
            x: ``[R, K]``, bfloat16 or float16.
            quantized: of ``[E, N, K]``.
            expert_tokens: ``[E]`` int64, rows of each expert.
            bias: ``[E, N]``.

        Returns:
            ``[R, N]``, dtype of x.
        """

    def gated_mlp(
        self,
        x: torch.Tensor | QuantizedRows,
        gate_up_proj: QuantizedWeight,
        down_proj: QuantizedWeight,
        expert_tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Rows of x, sorted by expert, through the network of their expert: ``down(silu(gate(x)) * up(x))``.

        Args:
            x: ``[R, H]``, bfloat16 or float16; also quantized where the scheme takes that.
            gate_up_proj: of ``[E, 2I, H]``.
            down_proj: of ``[E, H, I]``.
            expert_tokens: ``[E]`` int64, rows of each expert.

        Returns:
            ``[R, H]``, dtype of x; bfloat16 for rows that were float32.
        """
        if isinstance(x, QuantizedRows):
            raise TypeError(f"{self.name} multiplies float rows, but got quantized ones")
        rows = ops.npu_swiglu(self.grouped_mm(x, gate_up_proj, expert_tokens))  # [R, I]
        return self.grouped_mm(rows, down_proj, expert_tokens)


_SCHEMES: dict[str, type[QuantScheme]] = {}
_Scheme = TypeVar("_Scheme", bound=type[QuantScheme])


def register_scheme(scheme: _Scheme) -> _Scheme:
    """Class decorator: make a scheme known by its ``name``."""
    if scheme.name in _SCHEMES:
        raise ValueError(f"a quantization scheme named {scheme.name!r} is registered already")
    _SCHEMES[scheme.name] = scheme
    return scheme


def get_scheme(name: str, /, **options: Any) -> QuantScheme:
    """The scheme called ``name``.

    Args:
        name: ``"w8a8"`` or ``"w4a16"``.
        **options: options of that scheme, e.g. ``group_size`` of ``"w4a16"``.

    Raises:
        ValueError: there is no such scheme, or it does not have such an option.

    Example:
        >>> get_scheme("w4a16", group_size=64)
        W4A16(group_size=64)
    """
    if name not in _SCHEMES:
        raise ValueError(f"there is no quantization scheme {name!r}; choose one of {', '.join(scheme_names())}")
    known = {field.name for field in fields(_SCHEMES[name])}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise ValueError(f"quantization scheme {name} does not take the option {unknown[0]}; it takes {takes}")
    return _SCHEMES[name](**options)


def scheme_names() -> tuple[str, ...]:
    """The names of all schemes, sorted."""
    return tuple(sorted(_SCHEMES))


def require_half(scheme: str, x: torch.Tensor) -> None:
    """Raise unless ``x`` is bfloat16 or float16, the dtypes quantized kernels compute in."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{scheme} computes on bfloat16 or float16 rows, but got {x.dtype}; load the model in torch.bfloat16"
        )


def refuse_gradient(x: torch.Tensor) -> None:
    """Raise if a gradient of ``x`` is asked for: rounding to integers has none."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "rows are rounded to int8, which has no gradient; run under torch.no_grad(), or use w4a16 to train through "
            "quantized experts"
        )
