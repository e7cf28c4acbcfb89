"""Reads and writes the adapters of experts as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT adapts stacked weights by ``target_parameters``. For a weight of E experts it stores A flat as ``[E * r, in]``,
expert by expert, and B as ``[out, r * E]``, in whose columns the expert is the faster index. Neither PEFT nor
transformers is imported. Files are untrusted: shapes are compared with the model before anything is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from moe_npu.layers._lora import LoraSettings, lora_settings
from moe_npu.layers.lora import (
    adapted_weights,
    experts_modules,
    features,
    freeze_all_but_adapters,
    require_adaptable,
    set_adapter,
    weight_names,
)
from moe_npu.quant.checkpoint import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOATS = ("F64", "F32", "F16", "BF16")
# options that change what an adapter computes, or which weights the base has
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# A pattern is a regular expression of a stranger. Without groups and with few repetitions it cannot run for long.
_PATTERN = re.compile(r"[\w.\-\\\[\]^$|*+?]{1,300}")
_MAX_REPETITIONS = 2
_READABLE_INITS = ("gaussian", "eva", "orthogonal")
_TURNED_AROUND_BEFORE = (0, 19, 1)


class _Entry(NamedTuple):
    """One adapter in a file: where it belongs, how it is applied, and its two tensors."""

    experts: nn.Module
    weight: str
    settings: LoraSettings
    key: str  # of both tensors, without the ending
    is_turned_around: bool  # A has the outputs of the weight, B its inputs

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shapes of both tensors by their names."""
        out_features, in_features = features(self.experts, self.weight)
        if self.is_turned_around:
            out_features, in_features = in_features, out_features
        flat = self.settings.rank * self.experts.get_parameter(self.weight).size(0)
        return {f"{self.key}lora_A.weight": [flat, in_features], f"{self.key}lora_B.weight": [out_features, flat]}


def save_peft_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write all adapters in ``model`` as a folder that ``peft.PeftModel.from_pretrained(model, folder)`` loads.

    Merged adapters are written like others. Dropout is not written: it plays no part after training, and PEFT takes
    none for experts. Where weights differ in rank or alpha, PEFT (0.21) loads the patterns that say so, but warns that
    they match nothing.

    Args:
        model: the whole model, with the names that it has in transformers.
        folder: is made; the two files in it are overwritten.

    Raises:
        ValueError: there are no adapters, or ``model`` is the experts themselves, which have no name.
    """
    adapted = adapted_weights(model)
    if not adapted:
        raise ValueError(f"save_peft_adapter: {type(model).__name__} has no adapters; add_lora adds some")
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, LoraSettings] = {}
    for path, experts, weight in adapted:
        if not path:
            raise ValueError("save_peft_adapter: model must be the whole model, but is its experts")
        settings[f"{path}.{weight}"] = lora_settings(experts)[weight]
        key = _key(path, weight, lora_settings(experts), experts)
        tensors[f"{key}lora_A.weight"] = rearrange(experts.get_parameter(f"{weight}_lora_A"), "e r i -> (e r) i")
        tensors[f"{key}lora_B.weight"] = rearrange(experts.get_parameter(f"{weight}_lora_B"), "e o r -> o (r e)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(everything, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(settings, [name for name, _ in model.named_parameters()])
    config["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_peft_adapter(
    model: nn.Module, folder: Path | str, *, experts_only: bool = False, trainable: bool = False
) -> None:
    """Put the adapters that PEFT, or :func:`save_peft_adapter`, saved on the experts of ``model``.

    Adapters of PEFT before 0.19.1, which took inputs for outputs, are turned around. As in PEFT, everything else in
    the model is frozen. Nothing is changed where an error is raised.

    Args:
        model: the whole model, with the names that it has in transformers and ``experts_implementation="moe_npu"``.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        experts_only: leave out whatever the adapter has for other parts of the model, which are not supported here.
        trainable: whether the adapters require a gradient.

    Raises:
        FileNotFoundError: the folder or a file in it does not exist.
        ValueError: the adapter does not fit this model, has tensors for other parts of it, or uses an option that is
            not supported; or weights have an adapter already.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            is_pickle = name == WEIGHTS and (folder / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is a pickle, which can run code: save it as safetensors" if is_pickle else ""
            raise FileNotFoundError(f"{folder} has no {name}{hint}")
    config = _checked_config(folder / CONFIG)
    entries = list(_entries(model, config))
    if not entries:
        raise ValueError(
            f"{folder}: target_parameters {config['target_parameters']} match no weight of experts in "
            f"{type(model).__name__}"
        )
    for entry in entries:
        require_adaptable(entry.experts, entry.weight, trainable=trainable)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            _check_tensors(file, entries, experts_only, [path for path, _ in experts_modules(model)])
            values = [_values(file, entry) for entry in entries]
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a valid safetensors file: {error}") from None
    freeze_all_but_adapters(model)
    for entry, value in zip(entries, values, strict=True):
        set_adapter(entry.experts, entry.weight, entry.settings, trainable=trainable, values=value)


def _key(path: str, weight: str, targeted: Iterable[str], experts: nn.Module) -> str:
    """Start of the names of the tensors of a weight: PEFT wraps the experts once for each, the first innermost."""
    order = [name for name, _ in experts.named_parameters(recurse=False) if name in set(targeted)]
    return f"{_PREFIX}{path}." + "base_layer." * (len(order) - 1 - order.index(weight))


def _config(settings: Mapping[str, LoraSettings], parameters: list[str]) -> dict[str, Any]:
    is_rslora = all(one.use_rslora for one in settings.values())  # PEFT knows one answer for all
    alphas = {
        name: one.alpha if one.use_rslora == is_rslora else one.scaling * one.rank for name, one in settings.items()
    }
    ranks = {name: one.rank for name, one in settings.items()}
    rank, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(alphas)
    # names as people write them, "mlp.experts.down_proj", where they mean no weight without an adapter
    targets = sorted({re.sub(r".*\.\d+\.", "", name) for name in settings})
    if {name for name in parameters if _matches(name, targets)} != set(settings):
        targets = sorted(settings)
    return {
        "peft_type": "LORA",
        "peft_version": "0.21.2",  # whose layout this is
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": is_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": targets,
    }


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the others by the escaped name of their parameter."""
    ((common, _),) = Counter(values.values()).most_common(1)
    return common, {re.escape(name): value for name, value in values.items() if value != common}


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _checked_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, but is {config.get('peft_type')!r}")
    targets = config.get("target_parameters")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path}: target_parameters must be a list of names of stacked weights, but is {targets!r}")
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"{path}: {option}={config[option]!r} is not supported for adapters of experts")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization not in _READABLE_INITS:
        raise ValueError(
            f"{path}: init_lora_weights={initialization!r} changes the weights of the base, which the adapter alone "
            "cannot do"
        )
    if not isinstance(config.setdefault("use_rslora", False), bool):
        raise ValueError(f"{path}: use_rslora must be true or false, but is {config['use_rslora']!r}")
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {option} must be an object, but is {patterns!r}")
        config[option] = {_compiled(path, option, pattern): value for pattern, value in patterns.items()}
    return config


def _compiled(path: Path, option: str, pattern: str) -> re.Pattern[str]:
    is_simple = _PATTERN.fullmatch(pattern) and sum(map(pattern.count, "*+?")) <= _MAX_REPETITIONS
    try:
        if is_simple:
            return re.compile(rf"(.*\.)?({pattern})$")  # as PEFT matches it
    except re.error:
        pass
    raise ValueError(
        f"{path}: {option} has the pattern {pattern[:80]!r}; it must be a name or a simple regular expression: no "
        f"groups, and at most {_MAX_REPETITIONS} of * + ?"
    )


def _entries(model: nn.Module, config: Mapping[str, Any]) -> Iterator[_Entry]:
    for path, experts in experts_modules(model):
        targeted = [
            name
            for name, _ in experts.named_parameters(recurse=False)
            if _matches(f"{path}.{name}", config["target_parameters"])
        ]
        for weight in targeted:
            name = f"{path}.{weight}"
            if weight not in weight_names(experts):
                raise ValueError(f"target_parameters match {name}, which is no stacked weight of experts")
            if not path:
                raise ValueError("load_peft_adapter: model must be the whole model, but is its experts")
            rank = _first_match(config["rank_pattern"], name, config.get("r"))
            alpha = _first_match(config["alpha_pattern"], name, config.get("lora_alpha"))
            settings = LoraSettings(rank, alpha, config["use_rslora"])
            is_turned_around = _is_turned_around(config.get("peft_version"), getattr(experts, "is_transposed", False))
            yield _Entry(experts, weight, settings, _key(path, weight, targeted, experts), is_turned_around)


def _first_match(patterns: Mapping[re.Pattern[str], Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern.match(name)), default)


def _is_turned_around(version: Any, is_transposed: bool) -> bool:
    """PEFT took the second axis of all stacked weights for their inputs, 0.19.0 that of the wrong ones for outputs."""
    if version is not None and not isinstance(version, str):
        raise ValueError(f"peft_version must be a string, but is {version!r}")
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version or "0.17.0")  # written since 0.18
    if numbers is None:
        raise ValueError(f"peft_version must begin with three numbers, but is {version!r}")
    release = tuple(map(int, numbers.groups()))
    return release < _TURNED_AROUND_BEFORE and (release >= (0, 19, 0) or not is_transposed)


def _check_tensors(file: Any, entries: list[_Entry], experts_only: bool, paths: list[str]) -> None:
    rest = set(file.keys())
    for entry in entries:
        for name, shape in entry.shapes.items():
            if name not in rest:
                raise ValueError(f"the adapter has no tensor {name}; was it made for another model?")
            part = file.get_slice(name)
            if list(part.get_shape()) != shape or part.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{name} must be a float tensor of shape {shape} for rank {entry.settings.rank} and this model, "
                    f"but is {part.get_dtype()} {list(part.get_shape())}"
                )
            rest.remove(name)
    unknown = sorted(name for name in rest if any(name.startswith(f"{_PREFIX}{path}.") for path in paths))
    if unknown:
        raise ValueError(f"the adapter has the tensor {unknown[0]}, which target_parameters do not explain")
    if rest and not experts_only:
        raise ValueError(
            f"the adapter has {len(rest)} tensors for other parts of the model, such as {min(rest)}; adapters of "
            "experts only are loaded here: give experts_only=True to leave out the others"
        )


def _values(file: Any, entry: _Entry) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[E, r, in]`` and B ``[E, out, r]``."""
    first, second = (file.get_tensor(name) for name in entry.shapes)
    num_experts = entry.experts.get_parameter(entry.weight).size(0)
    first = rearrange(first, "(e r) f -> e r f", e=num_experts)
    second = rearrange(second, "f (r e) -> e f r", e=num_experts)
    return (second.mT, first.mT) if entry.is_turned_around else (first, second)
