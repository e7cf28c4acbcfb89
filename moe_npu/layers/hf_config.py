"""The report of a checkpoint from its ``config.json`` alone: :func:`report_config`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from moe_npu.layers.hf_accelerate import accelerate
from moe_npu.layers.hf_report import Report, report
from moe_npu.quant.checkpoint import read_json

# By the end of a name in config.json, more than published models have: on meta as well, each layer is made of modules,
# and a config has a list entry for each layer and a name for each label.
_LIMITS = {r"layers?$": 1000, r"depths?$": 1000, r"num_labels$": 1_000_000}
_MAX_MODULES = 400_000  # a model with 2048 experts in each of 30 layers, all of them modules, has 300 thousand


def report_config(path: str | Path, *, implementation: str = "moe_npu", accelerated: bool = False) -> Report:
    """What would run in the MoE layers of a checkpoint, from its configuration.

    The model is built on ``meta``: no weight is read or allocated, and no code that comes with a checkpoint runs.

    Args:
        path: a folder with ``config.json``, or such a file.
        implementation: the ``experts_implementation`` to load it with.
        accelerated: whether :func:`moe_npu.accelerate` is applied after that, to all layers that it can change.

    Returns:
        :func:`moe_npu.report` of the model.

    Raises:
        ValueError: there is no such file, it is not the configuration of a model that transformers knows and can build,
            the model has too many layers or modules, the implementation does not exist, or ``accelerated`` is asked for
            a model that cannot be.
    """
    model = _meta_model(_read(Path(path)), path, implementation)
    result = report(model)
    if accelerated and result.layers and not result.is_active:
        result = accelerate(model, strict=False)
    return result


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is neither a folder with config.json nor such a file")
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file} is not the configuration of a model: it has no model_type")
    return config


def _meta_model(values: dict[str, Any], path: str | Path, implementation: str) -> PreTrainedModel:
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model_type {model_type!r}, and code that comes "
            "with a checkpoint is not run"
        )
    quantization = values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(f"{path}: quantization_config must be an object, but is {quantization!r:.80}")
    _check_counts(values, path)
    try:
        model = _build(values, implementation)
    except Exception as error:  # code of transformers, with values that it does not check
        raise _cannot_build(path, error) from error
    if quantization is not None:
        # transformers puts the modules of the quantization in place before it loads weights into them
        try:
            with torch.device("meta"), _limited_modules():
                AutoHfQuantizer.from_config(quantization, pre_quantized=True).preprocess_model(model)
        except ImportError as error:
            method = quantization.get("quant_method")
            raise ValueError(f"{path}: its quantization {method!r} cannot be shown: {error}") from None
        except Exception as error:
            raise _cannot_build(path, error) from error
    return model


def _build(values: dict[str, Any], implementation: str) -> PreTrainedModel:
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        architectures = []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    with torch.device("meta"), _limited_modules():
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            model_class: Any = cls  # its from_config is private, but what that of every auto class calls
            model: PreTrainedModel = model_class._from_config(config, experts_implementation=implementation)
        else:
            model = AutoModel.from_config(config, experts_implementation=implementation)
    return model


def _cannot_build(path: str | Path, error: Exception) -> ValueError:
    text = " ".join(str(error).split())
    return ValueError(f"{path}: transformers cannot build this: {type(error).__name__}: {text}")


def _check_counts(values: dict[str, Any], path: str | Path) -> None:
    """Raise where a number would have configs or models fill lists without end."""
    entries: list[tuple[str, Any]] = list(values.items())
    while entries:
        key, value = entries.pop()
        if isinstance(value, dict):
            entries.extend(value.items())
        elif isinstance(value, list):
            entries.extend((key, item) for item in value)
        elif isinstance(value, (int, float)):
            limit = next((limit for name, limit in _LIMITS.items() if re.search(name, key)), value)
            if value > limit:
                raise ValueError(f"{path}: {key} must be at most {limit} for a report, but is {value:.6g}")


@contextmanager
def _limited_modules() -> Iterator[None]:
    """Have more than ``_MAX_MODULES`` modules raise ValueError, which bounds products and lists of counts as well."""
    numbers = itertools.count(1)

    def count(*_: Any) -> None:
        if next(numbers) > _MAX_MODULES:
            raise ValueError(f"it has more than {_MAX_MODULES} modules, the limit of a report")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
