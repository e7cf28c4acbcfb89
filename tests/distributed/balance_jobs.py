"""What the workers compute of the balance of a batch that is spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from moe_npu.layers.losses import load_balancing_loss, pooled_load_balancing_loss, update_correction_bias
from moe_npu.layers.stats import load_report
from tests.helpers.gloo import World


def _group(world: World, name: str) -> dist.ProcessGroup:
    return _resolve_process_group(world.groups[name])


def loss_and_gradient(
    world: World, name: str, logits: list[Tensor], ids: list[Tensor], options: dict[str, Any], compiles: bool
) -> tuple[Tensor, ...]:
    """The loss of the global batch, and the gradient of this rank's logits for each layer."""
    group = _group(world, name)
    logits = [layer.requires_grad_() for layer in logits]

    def loss(logits: list[Tensor], ids: list[Tensor]) -> Tensor:
        if len(logits) == 1:
            return load_balancing_loss(logits[0], ids[0], group=group, **options)
        return pooled_load_balancing_loss(logits, ids, group=group, **options)

    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiles else loss
    value = run(logits, ids)
    return value.detach(), *torch.autograd.grad(value, logits)


def update_bias(world: World, name: str, biases: list[Tensor], loads: list[Tensor]) -> list[Tensor]:
    update_correction_bias(biases, loads, rate=0.5, group=_group(world, name))
    return biases


def report(world: World, name: str, loads: dict[str, Tensor]) -> Any:
    return load_report(loads, group=_group(world, name))
