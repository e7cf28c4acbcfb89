"""Gated activations by name: ``act(gate) * up`` of the two halves of the rows of ``gate_up_proj``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_npu import ops

GatedActivation = Callable[[torch.Tensor], torch.Tensor]


def _gelu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate) * up


def _gelu_tanh(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


_ACTIVATIONS: dict[str, GatedActivation] = {"silu": ops.npu_swiglu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


def get_activation(activation: str | GatedActivation) -> GatedActivation:
    """The gated activation called ``activation``, or ``activation`` itself if it is a callable.

    A gated activation takes rows ``[R, 2I]``, gate first, and returns ``[R, I]``.

    Raises:
        ValueError: there is none of that name.
    """
    if callable(activation):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(f"there is no activation {activation!r}; choose one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[activation]
