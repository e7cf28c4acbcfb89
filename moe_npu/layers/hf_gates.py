"""Which fused operator computes the gate of a transformers experts module: decided by value, not by name.

A gate may be any code. It is run once on rows that reach every branch of the formulas we know; where its results are
those of ``npu_clipped_swiglu`` (of which SwiGLU is a case) with the parameters of the module, the operator takes its
place. A release that changes a gate, or a gate that reads anything we do not know, is run as it is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.utils._python_dispatch import _disable_current_modes
from transformers.activations import SiLUActivation

from moe_npu import ops

# what a gate may read besides act_fn; values, None included, come from the module
_PARAMETERS = ("alpha", "swiglu_alpha", "limit", "swiglu_limit", "gate_softcap", "up_softcap")
_NO_LIMIT = torch.finfo(torch.float32).max


class FusedGate(NamedTuple):
    """Arguments of ``ops.npu_clipped_swiglu``."""

    alpha: float
    limit: float
    bias: float
    interleaved: bool


SWIGLU = FusedGate(1.0, _NO_LIMIT, 0.0, False)


def apply_fused_gate(gate: FusedGate, gate_up: torch.Tensor) -> torch.Tensor:
    """The result of the operator, plain ``npu_swiglu`` where it is enough.

    Args:
        gate: what :func:`fused_gate` found.
        gate_up: ``[R, 2I]``.

    Returns:
        ``[R, I]``, dtype of ``gate_up``.
    """
    if gate == SWIGLU:
        return ops.npu_swiglu(gate_up)
    alpha, limit, bias, interleaved = gate
    return ops.npu_clipped_swiglu(gate_up, alpha=alpha, limit=limit, bias=bias, interleaved=interleaved)


def fused_gate(experts: Any) -> FusedGate | None:
    """The operator that computes ``experts._apply_gate``, or None where none does.

    Args:
        experts: a gated experts module of transformers.
    """
    if "_apply_gate" in experts.__dict__:
        return None  # set on this instance, bound to who knows what
    # Everything the answer depends on is read here, so that Dynamo guards it; compiled code asks again for other values
    values = [_constant(getattr(experts, name, None)) for name in _PARAMETERS]
    return _recognize(type(experts)._apply_gate, is_silu(getattr(experts, "act_fn", None)), *values)


def _constant(value: float | None) -> float | None:
    # Dynamo makes a float that changed once symbolic, which no operator takes
    return None if value is None else guard_scalar(value)


def is_silu(act_fn: Any) -> bool:
    """Whether a function or module is SiLU and nothing else: a subclass may compute something of its own."""
    return act_fn is F.silu or type(act_fn) in (nn.SiLU, SiLUActivation)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _recognize(apply_gate: Callable[..., torch.Tensor], is_silu: bool, *values: float | None) -> FusedGate | None:
    return _recognize_once(apply_gate, is_silu, values)


@functools.cache
def _recognize_once(
    apply_gate: Callable[..., torch.Tensor], is_silu: bool, values: tuple[float | None, ...]
) -> FusedGate | None:
    module = SimpleNamespace(**dict(zip(_PARAMETERS, values, strict=True)))
    if is_silu:
        module.act_fn = F.silu  # a gate that needs another activation does not find it
    alphas, limits = ([value for value in values[at : at + 2] if value is not None] for at in (0, 2))
    return _recognize_by_value(apply_gate, module, alphas, limits)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _recognize_by_value(
    apply_gate: Callable[..., torch.Tensor], module: SimpleNamespace, alphas: list[float], limits: list[float]
) -> FusedGate | None:
    # no_grad: activation checkpointing counts what autograd saves. Modes: the first call may be under a tracer
    with _disable_current_modes(), torch.no_grad():
        rows = _probe(limits)
        try:
            expected = apply_gate(module, rows)
        except AttributeError:
            return None
        for alpha, limit, bias, interleaved in itertools.product(
            (1.0, *alphas), (_NO_LIMIT, *limits), (0.0, 1.0), (False, True)
        ):
            gate = FusedGate(float(alpha), float(limit), bias, interleaved)
            if _equal(apply_fused_gate(gate, rows), expected):
                return gate
    return None


def _probe(limits: list[float]) -> torch.Tensor:
    """float64 rows ``[R, 4]``, in which each pair of columns holds all pairs of values that matter."""
    edges = {edge for limit in limits if math.isfinite(limit) for edge in (limit * 0.99, limit * 1.01, limit * 2)}
    # up to the largest of float16: a gate that clamps anywhere below is another one
    sizes = sorted({0.1, 0.7, 1.5, 3.0, 11.0, 40.0, 250.0, 2e3, 6.5e4} | {abs(edge) for edge in edges})
    values = [0.0, *sizes, *(-size for size in sizes)]
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64, device="cpu")
    return torch.cat((pairs, pairs.flip(0).roll(7, 0)), 1)


def _equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    # some gates compute in float32
    return actual.shape == expected.shape and torch.allclose(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-6)
