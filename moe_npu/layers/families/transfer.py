"""From a config or a block of transformers to a :class:`MoE`, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_npu.layers.families.base import (
    Config,
    Layer,
    Tensor,
    get_family,
    read_config,
    refuse_block,
)
from moe_npu.layers.moe import MoE
from moe_npu.layers.routers import Router
from moe_npu.layers.weight_layouts import stack_experts, unstack_experts

_BIASES = ("experts.gate_up_proj_bias", "experts.up_proj_bias", "experts.down_proj_bias")


def is_moe_layer(config: Any, layer_idx: int) -> bool:
    """Whether layer ``layer_idx`` of the model is a MoE layer.

    Args:
        config: a config of transformers, a mapping with the entries of a ``config.json``, or its path.
        layer_idx: index of the layer.

    Raises:
        ValueError: the family is not known, or has no native layer.
    """
    reader = read_config(config)
    family = get_family(reader.model_type)
    num_layers = reader.get("num_hidden_layers", None)
    if type(layer_idx) is not int or layer_idx < 0 or (num_layers is not None and layer_idx >= num_layers):
        last = "the number of layers - 1" if num_layers is None else num_layers - 1
        raise ValueError(f"layer_idx must be a whole number from 0 to {last}, but is {layer_idx!r}")
    return family.is_moe_layer(reader, layer_idx)


def describe(config: Any, layer_idx: int | None = None) -> Layer:
    """What :func:`from_config` builds: parts, and the names of tensors.

    Args:
        config: a config of transformers, a mapping with the entries of a ``config.json``, or its path.
        layer_idx: index of the layer; needed where layers differ.

    Raises:
        ValueError: the family is not known or has no native layer, the layer is none with experts, or the config lacks
            an entry or has one that no layer has.
    """
    reader = read_config(config)
    family = get_family(reader.model_type)
    if layer_idx is not None and not is_moe_layer(config, layer_idx):
        raise ValueError(f"layer_idx = {layer_idx} of this {reader.model_type!r} is a dense layer")
    return family.describe(reader, layer_idx)


def from_config(
    config: Any,
    layer_idx: int | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MoE:
    """A MoE layer of the model with this config; see :meth:`MoE.from_config`."""
    return _build(describe(config, layer_idx), device, dtype)


def from_hf(module: nn.Module, *, config: Any = None, layer_idx: int | None = None) -> MoE:
    """The MoE layer of ``module``, a block of transformers; see :meth:`MoE.from_hf`."""
    layer = _describe_block(module, config, layer_idx)
    state = {name: tensor.detach() for name, tensor in _tensors(module).items()}
    moe = _build(layer, "meta", None)
    loaded = _to_native(moe, layer, state)
    moe.load_state_dict(loaded, assign=True)
    for name, tensor in _tensors(moe).items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(_is_trained(module, layer, name))
    return moe.train(module.training)


def to_hf(moe: MoE, module: nn.Module, *, config: Any = None, layer_idx: int | None = None) -> None:
    """Copy the weights of ``moe`` into ``module``, a block of transformers; see :meth:`MoE.to_hf`."""
    layer = _describe_block(module, config, layer_idx)
    targets = _tensors(module)
    stored = _to_stored(moe, layer)
    for name, tensor in stored.items():
        if name not in targets:
            raise ValueError(f"{type(module).__name__} has no tensor {name}, which {type(moe).__name__} stores there")
        if targets[name].is_meta or tensor.is_meta:
            raise ValueError(f"{name} of {type(module).__name__} or of this layer is on meta: there is nothing to copy")
        _target(targets[name], tensor, layer, name)
    with torch.no_grad():
        for name, tensor in stored.items():
            _target(targets[name], tensor, layer, name).copy_(tensor)


def hf_state_dict(
    moe: MoE, config: Any, layer_idx: int | None = None, *, checkpoint: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of ``moe`` by the names and in the forms of the block in transformers.

    Args:
        moe: the layer.
        config: as for :meth:`MoE.from_config`.
        layer_idx: index of the layer; needed where layers differ.
        checkpoint: name and form the tensors of the experts as published checkpoints do, mostly one for each, instead
            of as the block does. The other tensors have the names of the block.

    Returns:
        New tensors for what is stored otherwise, the very tensors of ``moe`` for the rest. Names are relative to the
        block. Rows that transformers allocates for identity experts and never reads are left out.

    Raises:
        ValueError: ``moe`` is no layer of this config.
    """
    return _to_stored(moe, _with_layout(describe(config, layer_idx), checkpoint))


def load_hf_state_dict(
    moe: MoE,
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    layer_idx: int | None = None,
    *,
    checkpoint: bool = False,
) -> None:
    """Copy tensors that :func:`hf_state_dict` would return into ``moe``, converted to its dtype and device.

    Args:
        moe: the layer, not on ``meta``.
        tensors: all tensors of the block and no others, by names relative to it.
        config: as for :meth:`MoE.from_config`.
        layer_idx: index of the layer; needed where layers differ.
        checkpoint: the tensors of the experts are those of published checkpoints.

    Raises:
        ValueError: a tensor is missing, unexpected, or of a wrong shape.
    """
    moe.load_state_dict(_to_native(moe, _with_layout(describe(config, layer_idx), checkpoint), tensors))


def router_from_hf(module: nn.Module, *, config: Any = None, layer_idx: int | None = None) -> Router:
    """A copy of the router of ``module``, a MoE block of transformers, as a native one.

    Args:
        module: the block.
        config: the config of the model, where the block does not hold it.
        layer_idx: index of the layer; needed where layers differ.

    Raises:
        ValueError: as for :meth:`MoE.from_hf`.
    """
    layer = _describe_block(module, config, layer_idx)
    router = layer.router(device="meta", dtype=None)
    state = {name: tensor.detach() for name, tensor in _tensors(module).items()}
    targets = {f"router.{name}": tensor for name, tensor in _tensors(router).items()}
    try:
        loaded = {
            tensor.ours.removeprefix("router."): _join(tensor, state, targets[tensor.ours])
            for tensor in layer.tensors
            if tensor.ours in targets
        }
    except KeyError as error:
        raise ValueError(f"module must be a MoE block, but {type(module).__name__} has no tensor {error}") from None
    router.load_state_dict(loaded, assign=True)
    return router.train(module.training)


# ---------------------------------------------------------------- building


def _build(layer: Layer, device: torch.device | str | None, dtype: torch.dtype | None) -> MoE:
    def part(make: Callable[..., Any] | None) -> Any:
        return None if make is None else make(device=device, dtype=dtype)

    return MoE(
        part(layer.router),
        part(layer.experts),
        shared_expert=part(layer.shared_expert),
        latent_down_proj=part(layer.latent_down_proj),
        latent_up_proj=part(layer.latent_up_proj),
        num_zero_experts=layer.num_zero_experts,
        routed_scaling_factor=layer.routed_scaling_factor,
        output_transform=part(layer.output_transform),
    )


def _describe_block(module: nn.Module, config: Any, layer_idx: int | None) -> Layer:
    refuse_block(type(module).__name__)
    if config is None:
        config = _config_of(module)
    if layer_idx is None:
        layer_idx = getattr(module, "layer_idx", None)
    reader = read_config(config)
    family = get_family(reader.model_type)
    if isinstance(reader.get("moe_intermediate_size", None), (list, tuple)):  # one per kind of block of a layer
        reader = Config(reader.source, moe_intermediate_size=_of_experts(module, "intermediate_dim"))
    if layer_idx is None and hasattr(module, "is_hash"):  # DeepSeek-V4: a block that knows its kind, not its index
        layer_idx = list(reader["mlp_layer_types"]).index("hash_moe" if module.is_hash else "moe")
    return family.describe(reader, layer_idx)


def _config_of(module: nn.Module) -> Any:
    for child in module.modules():
        config = getattr(child, "config", None)
        if hasattr(config, "model_type"):
            return config
    raise ValueError(
        f"{type(module).__name__} does not hold its config; give config=model.config. The module must be the MoE block "
        "of a layer, e.g. model.model.layers[0].mlp"
    )


def _of_experts(module: nn.Module, name: str) -> Any:
    return getattr(module.experts, name)


def _with_layout(layer: Layer, checkpoint: bool) -> Layer:
    return replace(layer, layout=layer.checkpoint) if checkpoint and layer.checkpoint is not None else layer


# ---------------------------------------------------------------- names and forms


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers; not detached."""
    return dict(module.state_dict(keep_vars=True))


def _to_native(moe: MoE, layer: Layer, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict from the tensors of a block: copies."""
    targets = _tensors(moe)
    experts: Any = moe.experts
    has_bias = experts.down_proj_bias is not None
    names = layer.layout.names(experts.num_experts, bias=has_bias)
    theirs = [name for tensor in layer.tensors for name in tensor.theirs] + names
    missing = [name for name in theirs if name not in state]
    if missing:
        raise ValueError(
            f"there is no tensor {missing[0]} ({len(missing)} are missing); these must be the tensors of a MoE block, "
            f"but are {_some(state)}"
        )
    unexpected = sorted(set(state) - set(theirs) - set(layer.ignored))
    if unexpected and not layer.is_branch:
        raise ValueError(f"{unexpected[0]} belongs to no part of this layer ({len(unexpected)} tensors are left over)")
    stored = {name: state[name] for name in names}
    if layer.has_zero_rows and layer.layout.gate_up is not None:
        stored[layer.layout.gate_up] = stored[layer.layout.gate_up][: experts.num_experts]
    stacked = stack_experts(
        stored,
        layout=layer.layout,
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        bias=has_bias,
    )
    loaded = {f"experts.{name}": tensor for name, tensor in stacked.items()}
    return loaded | {tensor.ours: _join(tensor, state, targets[tensor.ours]) for tensor in layer.tensors}


def _join(tensor: Tensor, state: Mapping[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    parts = [state[name] for name in tensor.theirs]
    joined = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
    if tensor.stored_shape is not None and tuple(joined.shape) == tensor.stored_shape:
        joined = joined.reshape(target.shape)
    if joined.shape != target.shape:
        raise ValueError(
            f"{' and '.join(tensor.theirs)} must be {tuple(target.shape)} for this config, "
            f"but {'are' if len(parts) > 1 else 'is'} {tuple(joined.shape)}"
        )
    return joined


def _to_stored(moe: MoE, layer: Layer) -> dict[str, torch.Tensor]:
    """The tensors of a block from ours."""
    state = {name: tensor.detach() for name, tensor in _tensors(moe).items()}
    prefix = "experts."
    experts = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    stored = unstack_experts(experts, layout=layer.layout)
    for tensor in layer.tensors:
        if tensor.ours not in state:
            raise ValueError(f"this MoE has no {tensor.ours}, so it is no layer of this config")
        value = state[tensor.ours]
        if tensor.stored_shape is not None:
            value = value.reshape(tensor.stored_shape)
        stored.update(zip(tensor.theirs, value.chunk(len(tensor.theirs)), strict=True))
    left_over = sorted(set(state) - {tensor.ours for tensor in layer.tensors} - {prefix + name for name in experts})
    if left_over:
        raise ValueError(f"{left_over[0]} has no place in a block of this config")
    return stored


def _target(target: torch.Tensor, tensor: torch.Tensor, layer: Layer, name: str) -> torch.Tensor:
    """Where ``tensor`` goes in ``target``."""
    if layer.has_zero_rows and name == layer.layout.gate_up:
        target = target[: tensor.size(0)]
    if target.shape != tensor.shape:
        raise ValueError(f"{name} of the block is {tuple(target.shape)}, but the layer has {tuple(tensor.shape)}")
    return target


def _is_trained(module: nn.Module, layer: Layer, name: str) -> bool:
    """Whether what becomes the parameter of ours called ``name`` has a gradient in the block.

    Raises:
        ValueError: a part of it has and another one has not.
    """
    parameters = dict(module.named_parameters())
    trained = {one: parameters[one].requires_grad for one in _sources(layer, name) if one in parameters}
    if len(set(trained.values())) > 1:
        frozen, free = ([one for one, value in trained.items() if value is wanted] for wanted in (False, True))
        raise ValueError(
            f"{' and '.join(frozen)} must be trained or frozen like {' and '.join(free)}, since MoE has one parameter "
            f"{name} for them, but only the former does not require gradients"
        )
    return any(trained.values())


def _sources(layer: Layer, name: str) -> tuple[str, ...]:
    """The tensors of a block that become the parameter of ours called ``name``."""
    theirs = next((tensor.theirs for tensor in layer.tensors if tensor.ours == name), None)
    if theirs is not None:
        return theirs
    # blocks hold stacked experts, so that each name stands for all: weights, then biases, those of down_proj at the end
    is_bias = name in _BIASES
    names = tuple(layer.layout.names(1, bias=is_bias))
    own = names[len(names) // 2 :] if is_bias else names
    return own[-1:] if name.startswith("experts.down_proj") else own[:-1]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
