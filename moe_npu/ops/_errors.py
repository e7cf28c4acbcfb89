"""The one exception of the operators and the helpers that word it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch


class OperatorError(RuntimeError, ValueError):
    """Arguments that an operator refuses.

    A ``RuntimeError``, as the device raises, that is also a ``ValueError``, as Python users expect.
    """


class OperatorTypeError(OperatorError, TypeError):
    """An argument of a type that the operator does not take: a ``TypeError`` as well."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`OperatorError` with ``message`` unless ``condition`` holds.

    Not for messages with sizes or numbers among the arguments: a compiler formats the message even where the
    condition holds, which makes a constant of a dynamic size. Write ``if not condition: reject(message)`` there.
    """
    if not condition:
        raise OperatorError(message)


def reject(message: str) -> NoReturn:
    """Raise :class:`OperatorError` with ``message``."""
    raise OperatorError(message)


def dtype_name(dtype: torch.dtype | None) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def require_dtype(op: str, argument: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise unless ``tensor`` has one of the ``allowed`` dtypes; float64 passes on CPU wherever float32 does.

    float64 exists for ``gradcheck`` and for references; no device kernel takes it.
    """
    if tensor.dtype in allowed:
        return
    if tensor.dtype == torch.float64 and torch.float32 in allowed and tensor.device.type in ("cpu", "meta"):
        return
    names = ", ".join(dtype_name(dtype) for dtype in allowed)
    reject(f"{op}: {argument} must have dtype {names}, but has {dtype_name(tensor.dtype)} on {tensor.device.type}")


def require_device(op: str, argument: str, tensor: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raise unless ``tensor`` is None or on the device of ``x``: a kernel would read whatever is at its address."""
    if tensor is not None and tensor.device != x.device:
        reject(f"{op}: {argument} must be on {x.device} like the first argument, but is on {tensor.device}")


# torch_npu takes and passes dtypes as PyTorch's scalar type numbers too (spec: grouped matmul 0.10)
DTYPE_CODES = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
}


def as_dtype(op: str, argument: str, value: torch.dtype | int | None) -> torch.dtype | None:
    """The dtype that ``value`` names: a dtype, PyTorch's number of it, or None."""
    if value is None or isinstance(value, torch.dtype):
        return value
    if value not in DTYPE_CODES:
        reject(f"{op}: {argument} must be a dtype or the number of one, but is {value!r}")
    return DTYPE_CODES[value]


def require_dim(op: str, argument: str, tensor: torch.Tensor, allowed: Sequence[int]) -> None:
    """Raise unless the rank of ``tensor`` is one of ``allowed``."""
    if tensor.dim() not in allowed:
        ranks = " or ".join(str(rank) for rank in allowed)
        reject(f"{op}: {argument} must have {ranks} dimensions, but has shape {tuple(tensor.shape)}")


def require_no_gradient(op: str, argument: str, tensor: torch.Tensor | None) -> None:
    """Raise where a gradient is asked for that the operator does not have: it would silently never arrive."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        reject(f"{op}: {argument} requires a gradient, but has none; detach it")
