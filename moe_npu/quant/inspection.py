"""What a checkpoint holds, from its config and the headers of its files alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moe_npu.quant.checkpoint import Checkpoint
from moe_npu.quant.formats import native

_EXPERT = re.compile(r"(?:^|\.)experts\.(?:(\d+)\.)?")
_LAYER = re.compile(r"^(.*?(?:^|\.)layers\.\d+)\.")
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in the numbers in their names."""

    kind: str
    dtype: str
    shape: str
    number: int
    num_bytes: int


@dataclass(frozen=True)
class Inspection:
    """The summary of a checkpoint."""

    model_type: str
    num_layers: int
    num_experts: int
    quantization: str
    num_bytes: int
    rows: list[TensorGroup]


def inspect_checkpoint(src: Path | str) -> Inspection:
    """Summarise a checkpoint without reading its weights.

    Raises:
        FileNotFoundError: ``src`` is not a checkpoint folder.
        ValueError: one of its files is damaged.
    """
    checkpoint = Checkpoint(src)
    layers: set[str] = set()
    experts: set[int] = set()
    fused = 0
    groups: dict[tuple[str, str, str], list[int]] = {}
    for info in checkpoint.tensors.values():
        expert = _EXPERT.search(info.name)
        if expert is not None:
            layer = _LAYER.match(info.name)
            layers.add(layer.group(1) if layer else "")
            if expert.group(1) is not None:
                experts.add(int(expert.group(1)))
            elif info.shape:
                fused = max(fused, info.shape[0])
        key = (_NUMBERS.sub("*", info.name), str(info.dtype).removeprefix("torch."), str(list(info.shape)))
        groups.setdefault(key, []).append(info.num_bytes)
    config = checkpoint.config.get("quantization_config")
    quantization = "not quantized"
    if isinstance(config, dict):
        if config.get("quant_method") == native.QUANT_METHOD:
            scheme = native.scheme_from_config(config)
            options = "".join(f", {name} {value}" for name, value in scheme.options.items())
            quantization = f"quantized by moe_npu to {scheme.name}{options}"
        else:
            quantization = f"quantized by {config.get('quant_method')}"
    return Inspection(
        model_type=str(checkpoint.config.get("model_type", "unknown model")),
        num_layers=len(layers),
        num_experts=len(experts) or fused,
        quantization=quantization,
        num_bytes=checkpoint.num_bytes,
        rows=[
            TensorGroup(kind, dtype, shape, len(sizes), sum(sizes)) for (kind, dtype, shape), sizes in groups.items()
        ],
    )
