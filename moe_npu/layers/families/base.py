"""What a family says of a MoE layer, how configs are read, and the registry of families."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_npu.layers.activations import Activation, get_activation
from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.routers import GroupLimitedRouter, Router
from moe_npu.layers.shared_expert import SharedExpert
from moe_npu.layers.weight_layouts import ExpertLayout
from moe_npu.quant.checkpoint import read_json

# One meaning under the names of different models. transformers accepts some of them for each other (``attribute_map``),
# published config.json files use any.
_SYNONYMS = (
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    ("norm_topk_prob", "moe_renormalize"),
    ("n_group", "num_expert_group"),
    ("routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_routed_scaling_factor",
     "moe_router_scaling_factor"),
    ("moe_intermediate_size", "expert_ffn_hidden_size"),
    ("share_expert_dim", "share_expert_dims"),
    ("hidden_size", "d_model"),
    ("layers_block_type", "layer_types"),
    ("hidden_act", "hidden_activation"),
)  # fmt: skip
_MISSING = object()


def _check_value(name: str, value: Any) -> None:
    """Refuse sizes and factors that are none; lists have one for each layer."""
    if isinstance(value, (list, tuple, Mapping)):
        return
    if name.endswith("_size") or name.startswith("num_experts") or name in ("n_routed_experts", "n_shared_experts"):
        least = 1 if name in ("hidden_size", "moe_intermediate_size") else 0
        if type(value) is not int or value < least:
            raise ValueError(f"{name} of the config must be a whole number of at least {least}, but is {value!r}")
    if name.endswith("scaling_factor") and (type(value) not in (int, float) or not math.isfinite(value)):
        raise ValueError(f"{name} of the config must be a finite number, but is {value!r}")


class Config:
    """Reads a config of transformers, or a mapping with its entries.

    Args:
        source: the object or mapping.
        values: what takes the place of its entries.
    """

    def __init__(self, source: Any, **values: Any) -> None:
        self.source = source
        self.values = values

    def _read(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        if isinstance(self.source, Mapping):
            return self.source.get(name, _MISSING)
        return getattr(self.source, name, _MISSING)

    def _find(self, name: str) -> Any:
        names = next((group for group in _SYNONYMS if name in group), (name,))
        found = {key: value for key in names if (value := self._read(key)) is not _MISSING and value is not None}
        if len({json.dumps(value, default=str) for value in found.values()}) > 1:
            raise ValueError(f"the config has different values for one setting: {found}")
        for key, value in found.items():
            _check_value(key, value)
        return next(iter(found.values()), _MISSING)

    def __getitem__(self, name: str) -> Any:
        """The value of ``name`` or of a synonym.

        Raises:
            ValueError: there is none, or synonyms with different values.
        """
        value = self._find(name)
        if value is _MISSING:
            names = next((group for group in _SYNONYMS if name in group), (name,))
            raise ValueError(f"the config of {self.model_type!r} has no {' or '.join(names)}")
        return value

    def get(self, name: str, default: Any) -> Any:
        """The value of ``name`` or of a synonym, or what transformers assumes where there is none."""
        value = self._find(name)
        return default if value is _MISSING else value

    def exact(self, name: str, default: Any) -> Any:
        """The value of ``name`` itself, without synonyms."""
        value = self._read(name)
        return default if value is _MISSING else value

    def at(self, name: str, layer_idx: int) -> Any:
        """The entry of a list that has one for each layer.

        Raises:
            ValueError: it has none for ``layer_idx``.
        """
        values = self[name]
        if not 0 <= layer_idx < len(values):
            raise ValueError(f"layer_idx must be between 0 and {len(values) - 1}, as {name} says, but is {layer_idx}")
        return values[layer_idx]

    def of_layer(self, layer_idx: int | None) -> Config:
        """The config of one layer, where ``per_layer_config`` has entries for each; else this one, of one layer.

        Raises:
            ValueError: layers differ and ``layer_idx`` is None, or what a mapping has for layers is no mapping.
        """
        is_mapping = isinstance(self.source, Mapping)
        if not self.get("per_layer_config" if is_mapping else "is_heterogeneous", None):
            return self
        if layer_idx is None:
            raise ValueError(f"layer_idx is needed: every layer of this {self.model_type!r} has its own sizes")
        layers = self["per_layer_config"]
        if not is_mapping:
            return Config(layers[layer_idx])
        if not isinstance(layers, Mapping):
            raise ValueError(f"per_layer_config must map the indices of layers to entries, but is {layers!r:.80}")
        entries = layers.get(layer_idx, layers.get(str(layer_idx), {}))
        if not isinstance(entries, Mapping):
            raise ValueError(f"per_layer_config must have an object for layer {layer_idx}, but has {entries!r:.80}")
        return Config({**self.source, **entries})

    @property
    def model_type(self) -> str:
        """The name of the family.

        Raises:
            ValueError: the config has none.
        """
        value = self._read("model_type")
        if not isinstance(value, str):
            raise ValueError(
                "the config has no model_type; give a transformers config, its to_dict(), or the path of a config.json"
            )
        return value


@dataclass(frozen=True)
class Tensor:
    """A parameter or buffer of ours and what transformers has in its place.

    Attributes:
        ours: its name in :class:`MoE`.
        theirs: names in the block; several are concatenated along dim 0.
        stored_shape: the shape there, where it is another one with the same numbers.
    """

    ours: str
    theirs: tuple[str, ...]
    stored_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a model, not built yet: what takes ``device`` and ``dtype`` makes its parts.

    Attributes:
        router: makes the router.
        experts: makes the experts.
        layout: names and forms of the experts' tensors in the block of transformers.
        tensors: all other tensors of the block.
        checkpoint: ``layout`` of published checkpoints; None if it is that of the block.
        shared_expert: makes the shared expert.
        latent_down_proj: makes what the experts read through.
        latent_up_proj: makes what the sum of the experts goes through.
        output_transform: makes what is applied last.
        num_zero_experts: identity experts.
        has_zero_rows: the block has unused rows of ``gate_up_proj`` for its identity experts.
        routed_scaling_factor: factor of the sum of the experts.
        is_branch: the module of transformers that holds the MoE layer, its decoder layer, holds others as well.
        ignored: tensors of the block that its forward does not use.
    """

    router: Callable[..., Router]
    experts: Callable[..., GroupedExperts]
    layout: ExpertLayout
    tensors: tuple[Tensor, ...]
    checkpoint: ExpertLayout | None = None
    shared_expert: Callable[..., nn.Module] | None = None
    latent_down_proj: Callable[..., nn.Module] | None = None
    latent_up_proj: Callable[..., nn.Module] | None = None
    output_transform: Callable[..., nn.Module] | None = None
    num_zero_experts: int = 0
    has_zero_rows: bool = False
    routed_scaling_factor: float = 1.0
    is_branch: bool = False
    ignored: tuple[str, ...] = ()


FamilyFunction = Callable[[Config, "int | None"], Layer]
LayerTest = Callable[[Config, int], bool]


@dataclass(frozen=True)
class Family:
    """A registered family: the function that describes a layer of it, and which layers are MoE layers."""

    describe: FamilyFunction
    is_moe_layer: LayerTest


_FAMILIES: dict[str, Family] = {}
_UNSUPPORTED: dict[str, str] = {}
_UNSUPPORTED_BLOCKS: dict[str, str] = {}


def register_family(*model_types: str, is_moe_layer: LayerTest) -> Callable[[FamilyFunction], FamilyFunction]:
    """Register the decorated function for configs with one of these ``model_type``."""

    def register(describe: FamilyFunction) -> FamilyFunction:
        for model_type in model_types:
            assert model_type not in _FAMILIES, model_type
            _FAMILIES[model_type] = Family(describe, is_moe_layer)
        return describe

    return register


def register_unsupported(reason: str, *, model_types: tuple[str, ...] = (), blocks: tuple[str, ...] = ()) -> None:
    """Have lookups of these families and classes of transformers fail with ``reason``, a sentence."""
    _UNSUPPORTED.update(dict.fromkeys(model_types, reason))
    _UNSUPPORTED_BLOCKS.update(dict.fromkeys(blocks, reason))


def family_names() -> tuple[str, ...]:
    """The ``model_type`` of all families, sorted."""
    return tuple(sorted(_FAMILIES))


def unsupported_blocks() -> dict[str, str]:
    """Classes of transformers that :meth:`MoE.from_hf` refuses, and why."""
    return dict(_UNSUPPORTED_BLOCKS)


def get_family(model_type: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        ValueError: there is none of that name, or its layers cannot be a :class:`MoE`.
    """
    if model_type in _UNSUPPORTED:
        raise ValueError(f"{model_type!r} has no native layer: {_UNSUPPORTED[model_type]}")
    if model_type not in _FAMILIES:
        raise ValueError(f"there is no family {model_type!r}; choose one of {', '.join(family_names())}")
    return _FAMILIES[model_type]


def refuse_block(class_name: str) -> None:
    """Raise with the reason if the blocks of this class cannot be a :class:`MoE`."""
    if class_name in _UNSUPPORTED_BLOCKS:
        raise ValueError(f"{class_name} has no native layer: {_UNSUPPORTED_BLOCKS[class_name]}")


def read_config(config: Any) -> Config:
    """A reader of ``config``, or of the text model in it.

    Args:
        config: a config of transformers, a mapping with the entries of a ``config.json``, or its path.

    Raises:
        ValueError: the file is not a JSON object, it has no ``model_type``, or holds several text models.
        TypeError: it is none of these.
    """
    if isinstance(config, (str, Path)):
        config = read_json(Path(config))
    if not isinstance(config, Mapping) and not hasattr(config, "model_type"):
        raise TypeError(f"config must be a transformers config, a mapping or a path, but is {type(config).__name__}")
    reader = Config(config)
    if reader.model_type in _FAMILIES or reader.model_type in _UNSUPPORTED:
        return reader
    if reader.exact("thinker_config", None) is not None:
        raise ValueError(f"the config of {reader.model_type!r} holds several text models; give the config of one")
    text_config = reader.exact("text_config", None)
    return reader if text_config is None else read_config(text_config)


# ---------------------------------------------------------------- which layers are MoE layers


def every_layer(config: Config, layer_idx: int) -> bool:
    """All layers are."""
    return True


def by_sparse_step(config: Config, layer_idx: int) -> bool:
    """``decoder_sparse_step`` and ``mlp_only_layers``, as in Qwen."""
    step = config.get("decoder_sparse_step", 1)
    return layer_idx not in config.get("mlp_only_layers", []) and (layer_idx + 1) % step == 0


def after_dense_layers(num_dense: int, *, name: str = "first_k_dense_replace") -> LayerTest:
    """``mlp_layer_types``, or else all but the first ``config[name]`` layers, ``num_dense`` by default.

    ``moe_layer_freq`` may be a list in place of both.
    """

    def is_moe_layer(config: Config, layer_idx: int) -> bool:
        if config.get("mlp_layer_types", None) is not None:
            return bool(config.at("mlp_layer_types", layer_idx) == "sparse")
        if isinstance(config.get("moe_layer_freq", None), (list, tuple)):
            return bool(config.at("moe_layer_freq", layer_idx))
        return bool(layer_idx >= config.get(name, num_dense))

    return is_moe_layer


def after_first_layers(num_dense: int, name: str) -> LayerTest:
    """All but the first ``config[name]`` layers, ``num_dense`` by default, whatever else the config says."""
    return lambda config, layer_idx: bool(layer_idx >= config.get(name, num_dense))


# ---------------------------------------------------------------- parts that many families share


def router_tensors(
    module: str = "gate", *, bias: bool = False, correction_bias: str | None = None
) -> tuple[Tensor, ...]:
    """The weight of a router in ``module``, and its biases."""
    tensors = [Tensor("router.weight", (f"{module}.weight",))]
    if bias:
        tensors.append(Tensor("router.bias", (f"{module}.bias",)))
    if correction_bias is not None:
        tensors.append(Tensor("router.e_score_correction_bias", (correction_bias,)))
    return tuple(tensors)


def shared_expert_tensors(module: str, *, bias: bool = False, has_gate: bool = True) -> tuple[Tensor, ...]:
    """A shared expert whose projections are linear layers of ``module``."""
    first = ("gate_proj", "up_proj") if has_gate else ("up_proj",)
    return tuple(
        Tensor(f"shared_expert.{ours}.{kind}", tuple(f"{module}.{name}.{kind}" for name in theirs))
        for ours, theirs in (("gate_up_proj" if has_gate else "up_proj", first), ("down_proj", ("down_proj",)))
        for kind in (("weight", "bias") if bias else ("weight",))
    )


STACKED = ExpertLayout(gate_up="experts.gate_up_proj", down="experts.down_proj")
STACKED_TRANSPOSED = replace(STACKED, is_transposed=True, is_down_transposed=True)
PER_EXPERT = ExpertLayout(
    gate="experts.{expert}.gate_proj.weight",
    up="experts.{expert}.up_proj.weight",
    down="experts.{expert}.down_proj.weight",
)
PER_EXPERT_W123 = ExpertLayout(
    gate="experts.{expert}.w1.weight", up="experts.{expert}.w3.weight", down="experts.{expert}.w2.weight"
)


def grouped_experts(
    config: Config,
    intermediate_size: int,
    *,
    activation: str | Activation | None = None,
    num_experts: int | None = None,
) -> Callable[..., GroupedExperts]:
    """Gated experts without bias, of ``hidden_act`` by default."""
    return partial(
        GroupedExperts,
        config["num_experts"] if num_experts is None else num_experts,
        config["hidden_size"],
        intermediate_size,
        activation=activation_of(config) if activation is None else activation,
    )


def shared_expert(
    config: Config,
    intermediate_size: int,
    *,
    activation: str | Activation | None = None,
    bias: bool = False,
    has_output_gate: bool = False,
) -> Callable[..., SharedExpert]:
    """A gated shared expert, of ``hidden_act`` by default."""
    return partial(
        SharedExpert,
        config["hidden_size"],
        intermediate_size,
        activation=activation_of(config) if activation is None else activation,
        bias=bias,
        has_output_gate=has_output_gate,
    )


def activation_of(config: Config, name: str = "hidden_act", *, has_gate: bool = True) -> str:
    """The activation that the config names.

    Raises:
        ValueError: we have none of that name.
    """
    activation = config.get(name, "silu")
    get_activation(activation, has_gate=has_gate)
    return str(activation)


def routing_sizes(config: Config) -> tuple[int, int, int]:
    """H, E and K."""
    return config["hidden_size"], config["num_experts"], config["num_experts_per_tok"]


def grouped_sigmoid_router(
    config: Config, *, norm_topk_prob: bool | None = None, routed_scaling_factor: float | None = None
) -> Callable[..., Router]:
    """The router of DeepSeek-V3: sigmoid, a correction bias, and groups by the sum of their two best experts."""
    return partial(
        GroupLimitedRouter,
        *routing_sizes(config),
        num_groups=config.get("n_group", 1),
        topk_groups=config.get("topk_group", 1),
        score_function="sigmoid",
        group_score="top2_sum",
        norm_topk_prob=config["norm_topk_prob"] if norm_topk_prob is None else norm_topk_prob,
        has_correction_bias=True,
        routed_scaling_factor=(
            config["routed_scaling_factor"] if routed_scaling_factor is None else routed_scaling_factor
        ),
    )


class Scale(nn.Module):
    """Multiplies by a number.

    Args:
        factor: the number.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]``, times the factor."""
        return hidden_states * self.factor

    def extra_repr(self) -> str:
        """The factor."""
        return f"{self.factor}"
