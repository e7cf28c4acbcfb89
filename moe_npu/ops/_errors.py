"""The one exception of the operators and the helpers that word it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch


class OperatorError(RuntimeError, ValueError):
    """Arguments that an operator refuses.

    A ``RuntimeError``, as the device raises, that is also a ``ValueError``, as Python users expect.
    """


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


def require_dim(op: str, argument: str, tensor: torch.Tensor, allowed: Sequence[int]) -> None:
    """Raise unless the rank of ``tensor`` is one of ``allowed``."""
    if tensor.dim() not in allowed:
        ranks = " or ".join(str(rank) for rank in allowed)
        reject(f"{op}: {argument} must have {ranks} dimensions, but has shape {tuple(tensor.shape)}")
