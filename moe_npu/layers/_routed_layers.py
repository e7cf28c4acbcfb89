"""The MoE layers of any model: native routers and the experts modules of transformers, and hooks on their routing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_npu.layers.routers.base import Router, RouterOutput

# modules that only wrap another one: torch.compile, activation checkpointing, FSDP, PEFT
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}
# what wrappers of whole models put in front: DistributedDataParallel, PEFT
_PREFIXES = (["module"], ["base_model", "model"])
# what transformers' decorator use_experts_implementation gives to experts in all releases; other flags only in some
_EXPERTS_FLAGS = ("_apply_gate", "has_bias", "is_transposed")

IMPLEMENTATION = "moe_npu"  # our experts_implementation: the one that runs quantized weights and adapters
SCHEME_ATTRIBUTE = "moe_npu_scheme"  # of an experts module of transformers: the scheme of its quantized weights

DID_NOT_RUN = (
    "it did not run in the context, or runs code that was compiled before, which does not notice hooks that come "
    "later; compile inside the context, or call torch.compiler.reset() at its beginning"
)

RoutingVisitor = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RoutedLayer:
    """One MoE layer.

    Attributes:
        name: path of the block that contains the router or experts, without what wrappers add. A native layer in the
            place of one of transformers has the same name.
        module: the native router, or the experts module of transformers.
        block: the module that contains it.
        num_experts: E.
    """

    name: str
    module: nn.Module
    block: nn.Module
    num_experts: int

    @property
    def device(self) -> torch.device | None:
        """Where its parameters are."""
        parameter = next(self.module.parameters(), None)
        return None if parameter is None else parameter.device


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The MoE layers of ``model`` by name, in the order of its modules.

    Raises:
        ValueError: there is none.
    """
    modules = dict(model.named_modules())
    found = {
        path: module
        for path, module in modules.items()
        if isinstance(module, Router) or is_transformers_experts(module)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer with a moe_npu router or with experts that transformers decorates"
        )
    blocks = {path: _block(path) for path in found}
    layers: dict[str, RoutedLayer] = {}
    for path, module in found.items():
        block = blocks[path]
        # two in one block need names of their own
        name = _without_wrappers(block if list(blocks.values()).count(block) == 1 else path)
        num_experts: Any = module.num_experts
        layers[name] = RoutedLayer(name, module, modules[block], int(num_experts))
    return layers


def is_transformers_experts(module: nn.Module) -> bool:
    """Whether this is an experts module as transformers decorates them, by its attributes: imports no transformers.

    Whether its forward asks for an implementation is another question: a subclass may have a forward of its own.
    """
    return all(hasattr(module, flag) for flag in _EXPERTS_FLAGS)


def is_recomputation() -> bool:
    """Whether this runs inside a backward pass: then a forward is one that activation checkpointing repeats.

    Compiled code cannot ask while it is traced: operators do, when they run.
    """
    return torch._C._current_graph_task_id() != -1


def _block(path: str) -> str:
    """The path of the module that contains the one at ``path`` and what wraps it."""
    parts = path.split(".")
    while parts and parts[-1] in _WRAPPERS:
        parts.pop()
    return ".".join(parts[:-1])


def _without_wrappers(path: str) -> str:
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    for prefix in _PREFIXES:
        if parts[: len(prefix)] == prefix:
            parts = parts[len(prefix) :]
    return ".".join(parts)


def visit_routing(layer: RoutedLayer, visitor: RoutingVisitor) -> RemovableHandle:
    """Let ``visitor`` see and replace what ``layer`` has routed, at every call, until the hook is removed.

    ``visitor(topk_ids [T, K], topk_weights [T, K])`` returns both, or others of the same shapes.
    """

    def after_router(module: nn.Module, args: tuple[Any, ...], output: RouterOutput) -> RouterOutput:
        topk_ids, topk_weights = visitor(output.topk_ids, output.topk_weights)
        return RouterOutput(output.router_logits, topk_weights, topk_ids)

    def before_experts(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, ids, weights = names
        given = dict(zip(names, args, strict=False)) | kwargs
        return (given[hidden_states], *visitor(given[ids], given[weights])), {}

    if isinstance(layer.module, Router):
        return layer.module.register_forward_hook(after_router)
    names = tuple(inspect.signature(type(layer.module).forward).parameters)[1:]
    if len(names) != 3:
        raise ValueError(
            f"the experts of {layer.name} must take hidden states, expert ids and weights, but "
            f"{type(layer.module).__name__}.forward takes {', '.join(names)}"
        )
    return layer.module.register_forward_pre_hook(before_experts, with_kwargs=True)
