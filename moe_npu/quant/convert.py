"""Quantize the experts of a whole checkpoint, one tensor at a time.

1. Plan: from names, dtypes and shapes alone, which tensors are experts, what each becomes, and how large the result is.
2. Write: read a tensor, quantize or copy it, append it; at most one tensor and its codes are held.
3. Finish: everything is written to a hidden folder beside the destination and renamed to it at the very end.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_npu.quant import schemes as _schemes  # noqa: F401 - fills the registry
from moe_npu.quant.checkpoint import WEIGHTS, Checkpoint, SafetensorsWriter, TensorInfo, num_bytes
from moe_npu.quant.formats import native
from moe_npu.quant.scheme import QuantizedWeight, QuantScheme

_EXPERT_TENSOR = re.compile(r"(^|\.)experts\.")
_LAYER = re.compile(r"^(.*?\blayers\.\d+)\.")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# carried over beside the weights; never a pickle
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".py")


@dataclass
class _Power:
    """Signal and noise power of the weights of one layer."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, weight: torch.Tensor, restored: torch.Tensor) -> None:
        self.signal += float(weight.double().square().sum())
        self.noise += float((weight.double() - restored.double()).square().sum())

    @property
    def snr_db(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclass(frozen=True)
class QuantReport:
    """What :func:`quantize_checkpoint` did.

    Attributes:
        scheme: name of the scheme.
        num_quantized: weights of experts that are integers now.
        num_copied: tensors that were copied as they are.
        bytes_before: size of all tensors of the source.
        bytes_after: size of all tensors written.
        snr_db: per layer, by the prefix of its tensors' names, ``10 log10(sum w^2 / sum (w - restored)^2)`` over the
            weights of its experts.
    """

    scheme: str
    num_quantized: int
    num_copied: int
    bytes_before: int
    bytes_after: int
    snr_db: dict[str, float] = field(default_factory=dict)


def expert_weights(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The routed experts' weights of a checkpoint.

    Raises:
        ValueError: there are none, or an experts tensor is not a float ``[N, K]`` weight under a per-expert name: it
            would be left unquantized.
    """
    weights, left = [], []
    for info in checkpoint.tensors.values():
        if native.EXPERT_WEIGHT.search(info.name) and len(info.shape) == 2 and info.dtype in _FLOATS:
            weights.append(info)
        elif _EXPERT_TENSOR.search(info.name):
            left.append(info)
    if left:
        first = left[0]
        raise ValueError(
            f"{len(left)} experts tensor(s) would be left unquantized, the first is {first.name} "
            f"({str(first.dtype).removeprefix('torch.')} {list(first.shape)}); supported are float weights named "
            f"...experts.<i>.(gate_proj|up_proj|down_proj|w1|w2|w3).weight"
        )
    if not weights:
        raise ValueError(f"{checkpoint.folder} has no experts: no tensor is named ...experts.<i>.<projection>.weight")
    return weights


def quantize_checkpoint(
    src: Path | str,
    dst: Path | str,
    scheme: QuantScheme,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> QuantReport:
    """Write ``dst``, the checkpoint ``src`` with its routed experts quantized, in the native format.

    Router, attention, shared experts, embeddings and norms are copied bit for bit. Memory is bounded by the largest
    tensor. ``dst`` appears when it is complete, or not at all. Its format is :mod:`moe_npu.quant.formats.native`.

    Args:
        src: folder of a Hugging Face checkpoint: ``config.json`` and safetensors with per-expert weights.
        dst: folder to write; must not exist.
        scheme: how to quantize, e.g. ``get_scheme("w8a8")``.
        on_progress: called after each tensor with the bytes read so far, the bytes in all and the tensor's name.

    Returns:
        A report of sizes and of the signal-to-noise ratio of each layer.

    Raises:
        FileNotFoundError: ``src`` is not a checkpoint folder.
        FileExistsError: ``dst`` exists.
        ValueError: ``src`` is quantized already, has no experts or experts that would be left unquantized, holds
            weights that are not finite, or shapes that the scheme cannot store.
    """
    dst = Path(os.path.abspath(dst))  # noqa: PTH100 - "new/.." names an existing folder and must be seen as that
    if dst.exists() or dst.is_symlink():
        raise FileExistsError(f"{dst} exists already; choose another destination or remove it first")
    checkpoint = Checkpoint(src)
    if checkpoint.folder.resolve() in dst.resolve().parents:
        raise ValueError(f"{dst} lies inside the source {checkpoint.folder}; choose a destination beside it")
    method = checkpoint.config.get("quantization_config")
    if method is not None:
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(
            f"{checkpoint.folder} is quantized already (quant_method {method!r}); quantize the float model"
        )
    quantized = {info.name for info in expert_weights(checkpoint)}
    layout = _layout(checkpoint, quantized, scheme)

    dst.parent.mkdir(parents=True, exist_ok=True)
    partial = dst.parent / f".{dst.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        _carry_over(checkpoint.folder, partial)
        powers = _write_weights(checkpoint, quantized, scheme, layout, partial / WEIGHTS, on_progress)
        config = {**checkpoint.config, "quantization_config": native.quantization_config(scheme)}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return QuantReport(
        scheme=scheme.name,
        num_quantized=len(quantized),
        num_copied=len(checkpoint.tensors) - len(quantized),
        bytes_before=checkpoint.num_bytes,
        bytes_after=sum(num_bytes(dtype, shape) for _, dtype, shape in layout),
        snr_db={layer: power.snr_db for layer, power in powers.items()},
    )


_Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


def _layout(checkpoint: Checkpoint, quantized: set[str], scheme: QuantScheme) -> _Layout:
    """Name, dtype and shape of every tensor of the result."""
    layout: _Layout = []
    for info in checkpoint.tensors.values():
        if info.name not in quantized:
            layout.append((info.name, info.dtype, info.shape))
            continue
        scale_name = info.name + native.SCALE_SUFFIX
        if scale_name in checkpoint.tensors:
            raise ValueError(f"{checkpoint.folder} already holds {scale_name}; quantize the float model")
        try:
            parts = scheme.empty(info.shape, dtype=info.dtype, device="meta")
        except ValueError as error:
            raise ValueError(f"{info.name} {list(info.shape)}: {error}") from None
        layout.append((info.name, parts.weight.dtype, tuple(parts.weight.shape)))
        layout.append((scale_name, parts.scale.dtype, tuple(parts.scale.shape)))
    return layout


def _write_weights(
    checkpoint: Checkpoint,
    quantized: set[str],
    scheme: QuantScheme,
    layout: _Layout,
    path: Path,
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, _Power]:
    powers: dict[str, _Power] = {}
    done = 0
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, layout)
        for info in checkpoint.tensors.values():
            tensor = checkpoint.read(info.name)
            if info.name in quantized:
                try:
                    parts: QuantizedWeight = scheme.quantize(tensor)
                except ValueError as error:
                    raise ValueError(f"{info.name}: {error}") from None
                writer.write(info.name, parts.weight)
                writer.write(info.name + native.SCALE_SUFFIX, parts.scale)
                layer = _LAYER.search(info.name)
                powers.setdefault(layer.group(1) if layer else "", _Power()).add(tensor, scheme.dequantize(parts))
            else:
                writer.write(info.name, tensor)
            done += info.num_bytes
            if on_progress is not None:
                on_progress(done, checkpoint.num_bytes, info.name)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())
    return powers


def _carry_over(src: Path, dst: Path) -> None:
    """Copy tokenizer, generation settings, model code and the like; never weights, their index, or a pickle."""
    for file in sorted(src.iterdir()):
        is_ours = file.name == "config.json" or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _CARRIED_SUFFIXES and not is_ours:
            shutil.copyfile(file, dst / file.name)
