"""What adapters have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_npu import ops
from moe_npu.layers.dispatch import LocalDispatcher
from moe_npu.layers.hf_gates import is_silu
from moe_npu.quant import QuantizedRows


class Adapter:
    """Mixin of the classes that ``adapt`` gives to modules; each also derives from the class it stands for."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Why this very module cannot be adapted, or None."""
        return None

    @classmethod
    def install(cls, module: Any) -> None:
        """Make the module, and submodules that it calls, instances of adapters."""
        module.__class__ = cls


def dispatch_rows(
    dispatcher: LocalDispatcher, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Rows ``[R, H]``, ``expert_tokens [E]`` and the state for ``combine``, see :class:`LocalDispatcher`."""
    rows, expert_tokens, state = dispatcher.dispatch(hidden_states, topk_ids, topk_weights)
    assert not isinstance(rows, QuantizedRows)  # not asked for
    return rows, expert_tokens, state


def apply_gate(act_fn: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor) -> torch.Tensor:
    """``act_fn(gate) * up`` of ``[R, 2I]``, gates first; ``[R, I]``. One launch where it is SwiGLU."""
    if is_silu(act_fn):
        return ops.npu_swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * up
