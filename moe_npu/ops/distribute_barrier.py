"""A barrier with a tensor to pass through, so that its place among other operators is kept (spec: routing 5.9)."""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import OperatorError
from moe_npu.ops._expert_exchange import agree, named_group
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

_OP = "_npu_distribute_barrier"


def _cpu(
    x_ref: torch.Tensor,
    group: str,
    world_size: int,
    time_out: torch.Tensor | None,
    elastic_info: torch.Tensor | None,
) -> torch.Tensor:
    process_group, problem = named_group(_OP, "group", group, ("world_size", world_size))
    _, problem = agree(_OP, process_group, {}, problem=problem)
    if problem is not None:
        raise OperatorError(problem)
    return x_ref.clone(memory_format=torch.contiguous_format)


def _npu(
    x_ref: torch.Tensor,
    group: str,
    world_size: int,
    time_out: torch.Tensor | None,
    elastic_info: torch.Tensor | None,
) -> torch.Tensor:
    # the kernel may hand back the memory that it was given, which an operator must not
    x = x_ref.clone(memory_format=torch.contiguous_format)
    return torch.ops.npu._npu_distribute_barrier(x, group, world_size, time_out=time_out, elastic_info=elastic_info)


def _fake(
    x_ref: torch.Tensor,
    group: str,
    world_size: int,
    time_out: torch.Tensor | None,
    elastic_info: torch.Tensor | None,
) -> torch.Tensor:
    return x_ref.new_empty(x_ref.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pass


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    return grad, None, None, None, None


_op = register_op(
    "_npu_distribute_barrier(Tensor x_ref, str group, int world_size, Tensor? time_out, Tensor? elastic_info)"
    " -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x_ref",),
)


@typed
def _npu_distribute_barrier(
    x_ref: torch.Tensor,
    group: str,
    world_size: int,
    *,
    time_out: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
) -> torch.Tensor:
    """Wait until every rank of a group has called it; returns the values of ``x_ref``.

    Args:
        x_ref: any tensor.
        group: name of the process group.
        world_size: its size.
        time_out: int32 ``[1]`` or None; no effect on CPU.
        elastic_info: int32 ``[4 + 2 * world_size]`` or None; no effect on CPU.

    Returns:
        Fresh memory with the values, shape and dtype of ``x_ref``.

    Raises:
        OperatorError: on CPU, where there is no such group, it has another size, or a rank calls another operator.
    """
    return _op(x_ref, group, world_size, time_out, elastic_info)
