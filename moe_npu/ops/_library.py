"""Registration with the PyTorch dispatcher: the only file that uses ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_NAMESPACE = "moe_npu"
_lib = torch.library.Library(_NAMESPACE, "FRAGMENT")


class Registration(NamedTuple):
    """One operator and what it can do."""

    op: torch._ops.OpOverload
    npu: Callable[..., Any]
    differentiable: tuple[str, ...]  # arguments that have a gradient
    is_lowered: bool
    cpu_gradient: tuple[str, ...]  # those of them that have it on CPU only


REGISTRATIONS: dict[str, Registration] = {}


def register_op(
    schema: str,
    *,
    cpu: Callable[..., Any],
    npu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    differentiable: Sequence[str] = (),
    is_lowered: bool = True,
    cpu_gradient: Sequence[str] = (),
) -> torch._ops.OpOverload:
    """Define ``moe_npu::<schema>`` with its CPU, NPU and fake kernels and, if given, its gradient.

    Args:
        schema: operator schema without namespace, all arguments positional and without defaults: keyword-only
            tensors cannot have a gradient, and trailing defaults would be dropped from what backward must return.
        cpu: the definition; trusts its arguments, which the public function has checked.
        npu: the same computation as a call of ``torch.ops.npu``.
        fake: allocates outputs of the right shape, dtype and strides.
        setup_context: saves for backward what ``backward`` needs.
        backward: gradient formula, written with differentiable operators.
        differentiable: names of the arguments that ``backward`` has a gradient for.
        cpu_gradient: names among ``differentiable`` that have no gradient on a device.
        is_lowered: whether graphs may be lowered to what ``npu`` calls; not where torch_npu has no shape function.
    """
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _lib.impl(name, cpu, "CPU")
    # the dispatch key, not the device name: "npu" is unknown until torch_npu renames PrivateUse1
    _lib.impl(name, npu, "PrivateUse1")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_lib)
    if backward is not None:
        torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_lib)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, _NAMESPACE), name).default
    REGISTRATIONS[name] = Registration(op, npu, tuple(differentiable), is_lowered, tuple(cpu_gradient))
    return op


def register_kernel(name: str, dispatch_key: str, kernel: Callable[..., Any]) -> None:
    """Add the kernel of one more backend to operator ``moe_npu::<name>``, e.g. ``("grouped_mm", "CUDA", fn)``."""
    _lib.impl(name, kernel, dispatch_key)


def npu_lowerings() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Each of our operators with the function that computes it by ``torch.ops.npu`` calls.

    Usable as a decomposition table: ``exported_program.run_decompositions(npu_lowerings())`` gives a graph of pure
    npu operators.
    """
    return {registration.op: registration.npu for registration in REGISTRATIONS.values() if registration.is_lowered}
