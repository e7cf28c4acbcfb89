"""Activations of experts: by name, and factories for those that have numbers.

A *gated* activation takes rows ``[R, 2I]``, gate first, and returns ``[R, I]``, mostly ``act(gate) * up``. An
*ungated* one, for experts without a gate, keeps the shape ``[R, I]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moe_npu import ops

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(rows: torch.Tensor) -> torch.Tensor:
    return F.gelu(rows, approximate="tanh")


def _relu2(rows: torch.Tensor) -> torch.Tensor:
    return F.relu(rows).square()


@dataclass(frozen=True)
class _Gated:
    """``function(gate) * up``."""

    function: Activation
    in_float32: bool = False

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = (_at_least_float32(gate_up) if self.in_float32 else gate_up).chunk(2, -1)  # [R, I]
        return (self.function(gate) * up).to(gate_up.dtype)


@dataclass(frozen=True)
class _ClippedSwiglu:
    """``npu_clipped_swiglu`` of a gate in the first half of a row."""

    alpha: float
    limit: float
    bias: float

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        return ops.npu_clipped_swiglu(gate_up, alpha=self.alpha, limit=self.limit, bias=self.bias, interleaved=False)


@dataclass(frozen=True)
class _SoftcappedSwiglu:
    """``cap(gate) * sigmoid(gate) * cap(up)``."""

    gate_softcap: float
    up_softcap: float

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = _at_least_float32(gate_up).chunk(2, -1)  # [R, I]
        gate_factor = self.gate_softcap * torch.tanh(gate / self.gate_softcap)
        up_factor = self.up_softcap * torch.tanh(up / self.up_softcap)
        return (gate_factor * torch.sigmoid(gate) * up_factor).to(gate_up.dtype)


def _at_least_float32(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


_UNGATED: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}
_GATED: dict[str, Activation] = {name: _Gated(function) for name, function in _UNGATED.items()}
_GATED["silu"] = ops.npu_swiglu


def gated(function: Activation, *, in_float32: bool = False) -> Activation:
    """The gated activation ``function(gate) * up``.

    Args:
        function: ``[R, I] -> [R, I]``, elementwise.
        in_float32: compute in float32 and round once. ``"silu"`` by name always does.

    Raises:
        ValueError: ``function`` is a gated activation already.

    Example:
        >>> gated(torch.sigmoid)(torch.tensor([[0.0, 0.0, 3.0, -1.0]]))
        tensor([[ 1.5000, -0.5000]])
    """
    if _has_gate(function):
        raise ValueError(f"gated takes an elementwise function, but {function!r} is a gated activation already")
    return _Gated(function, in_float32)


def clipped_swiglu(*, alpha: float = 1.702, limit: float = 7.0) -> Activation:
    """The gated activation of gpt-oss: ``gate * sigmoid(alpha * gate) * (up + 1)``, both operands clipped before.

    ``gate`` is bounded by ``limit`` from above, ``up`` from both sides. Computed in float32 and rounded once.

    Args:
        alpha: factor in the sigmoid.
        limit: the bound, positive.

    Raises:
        ValueError: ``limit`` is not positive.

    Example:
        >>> clipped_swiglu()(torch.tensor([[8.0, -1.0, -9.0, 0.5]]))
        tensor([[-41.9997,  -0.2313]])
    """
    return _ClippedSwiglu(alpha, _positive("limit", limit), 1.0)


def clamped_swiglu(*, limit: float) -> Activation:
    """The gated activation of DeepSeek-V4: ``silu(min(gate, limit)) * clamp(up, -limit, limit)``.

    Computed in float32 and rounded once.

    Args:
        limit: the bound, positive.

    Raises:
        ValueError: ``limit`` is not positive.

    Example:
        >>> clamped_swiglu(limit=2.0)(torch.tensor([[8.0, -1.0, -9.0, 0.5]]))
        tensor([[-3.5232, -0.1345]])
    """
    return _ClippedSwiglu(1.0, _positive("limit", limit), 0.0)


def softcapped_swiglu(*, gate_softcap: float, up_softcap: float) -> Activation:
    """SwiGLU whose linear factors are bounded smoothly: ``cap(gate) * sigmoid(gate) * cap(up)`` (Inkling 2).

    ``cap(x) = softcap * tanh(x / softcap)``; the sigmoid sees the gate as it is. Computed in float32 and rounded once.

    Args:
        gate_softcap: bound of the gate's linear factor, positive.
        up_softcap: bound of up, positive.

    Raises:
        ValueError: a softcap is not positive.

    Example:
        >>> softcapped_swiglu(gate_softcap=2.0, up_softcap=3.0)(torch.tensor([[8.0, -1.0, -9.0, 0.5]]))
        tensor([[-5.9643, -0.1231]])
    """
    return _SoftcappedSwiglu(_positive("gate_softcap", gate_softcap), _positive("up_softcap", up_softcap))


def get_activation(activation: str | Activation, *, has_gate: bool = True) -> Activation:
    """The activation called ``activation``, or ``activation`` itself if it is a callable.

    Args:
        activation: a name, or a callable: ``[R, 2I] -> [R, I]``, gate first, with ``has_gate``; else
            ``[R, I] -> [R, I]``.
        has_gate: whether the experts have a gate.

    Raises:
        ValueError: there is none of that name, or the callable is known to be of the other kind.

    Example:
        >>> get_activation("relu2", has_gate=False)(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """
    if callable(activation):
        if _has_gate(activation) is (not has_gate):
            raise ValueError(
                f"experts with a gate take an activation [R, 2I] -> [R, I], but {activation!r} keeps the shape of its "
                "rows; make it gated(...)"
                if has_gate
                else f"experts without a gate take an activation that keeps [R, I], but {activation!r} is gated"
            )
        return activation
    known = _GATED if has_gate else _UNGATED
    if activation not in known:
        raise ValueError(f"there is no activation {activation!r}; choose one of {', '.join(sorted(known))}")
    return known[activation]


def _has_gate(activation: Activation) -> bool | None:
    """Whether a callable is gated, None if only its author knows."""
    if isinstance(activation, (_Gated, _ClippedSwiglu, _SoftcappedSwiglu)):
        return True
    if activation is ops.npu_swiglu or activation is ops.npu_clipped_swiglu:
        return True
    if isinstance(activation, (nn.GELU, nn.ReLU, nn.SiLU)) or activation in _UNGATED.values():
        return False
    return None


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, but is {value}")
    return float(value)
