"""The report of a checkpoint from its ``config.json`` alone: :func:`report_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from moe_npu.layers.hf_accelerate import accelerate
from moe_npu.layers.hf_report import Report, report
from moe_npu.quant.checkpoint import read_json


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
        ValueError: there is no such file, it is not the configuration of a model that transformers knows, the
            implementation does not exist, or ``accelerated`` is asked for a model that cannot be.
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
    config = CONFIG_MAPPING[model_type].from_dict(values)
    quantization = values.get("quantization_config")
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        architectures = []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    with torch.device("meta"):
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            model_class: Any = cls  # its from_config is private, but what that of every auto class calls
            model: PreTrainedModel = model_class._from_config(config, experts_implementation=implementation)
        else:
            model = AutoModel.from_config(config, experts_implementation=implementation)
        if quantization is not None:
            # transformers puts the modules of the quantization in place before it loads weights into them
            try:
                AutoHfQuantizer.from_config(quantization, pre_quantized=True).preprocess_model(model)
            except ImportError as error:
                method = quantization.get("quant_method")
                raise ValueError(f"{path}: its quantization {method!r} cannot be shown: {error}") from None
    return model
