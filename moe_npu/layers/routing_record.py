"""What routers decided, call by call, and the file that carries it from one process to another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_FORMAT = "moe_npu.routing.1"


@dataclass
class LayerRouting:
    """The routing of one layer.

    Attributes:
        num_experts: E.
        topk_ids: for each call ``[T, K]``, in the smallest of uint8, int16 and int32 that holds all E ids and the
            id E, which stands for no expert.
        topk_weights: for each call ``[T, K]``, in the dtype that the router gave.
    """

    num_experts: int
    topk_ids: list[torch.Tensor] = field(default_factory=list)
    topk_weights: list[torch.Tensor] = field(default_factory=list)

    @property
    def ids_dtype(self) -> torch.dtype:
        """The smallest dtype for the ids."""
        dtypes = (torch.uint8, torch.int16)
        return next((dtype for dtype in dtypes if self.num_experts <= torch.iinfo(dtype).max), torch.int32)


@dataclass
class RoutingRecord:
    """The routing of all MoE layers of a model in one or several forward calls.

    Attributes:
        layers: by name, in the order of the model. A native layer has the name of the transformers block that it
            replaces, and wrappers (compile, checkpointing, data parallelism, PEFT) leave the names alone, so that one
            process can record and another replay.
    """

    layers: dict[str, LayerRouting]

    def concatenate(self, *, batch_size: int = 1) -> RoutingRecord:
        """One call that stands for all: the tokens of each sequence in the order of the calls.

        A prefill of S tokens and n steps of decoding become one forward of S + n tokens for each sequence. The last
        token that was sampled is in no record, since the model did not see it.

        Args:
            batch_size: number of sequences in every call, which all have the same length there.

        Raises:
            ValueError: there is no call, calls have different K, or ``batch_size`` does not divide their tokens.
        """
        return RoutingRecord(
            {
                name: LayerRouting(
                    layer.num_experts,
                    [_concatenate(name, layer.topk_ids, batch_size)],
                    [_concatenate(name, layer.topk_weights, batch_size)],
                )
                for name, layer in self.layers.items()
            }
        )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {}
        for name, layer in self.layers.items():
            for call, (ids, weights) in enumerate(zip(layer.topk_ids, layer.topk_weights, strict=True)):
                tensors[f"{name}.{call}.topk_ids"] = ids.cpu().contiguous()
                tensors[f"{name}.{call}.topk_weights"] = weights.cpu().contiguous()
        layers = {name: [layer.num_experts, len(layer.topk_ids)] for name, layer in self.layers.items()}
        save_file(tensors, path, {"format": _FORMAT, "layers": json.dumps(layers)})

    @classmethod
    def load(cls, path: Path | str) -> RoutingRecord:
        """Read what :meth:`save` wrote, to the CPU; replaying moves each call to its device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is of another format, or has ids of experts that do not exist.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} must be a file of format {_FORMAT}, but is {metadata.get('format')}")
                record = cls(
                    {
                        name: LayerRouting(
                            num_experts,
                            [file.get_tensor(f"{name}.{call}.topk_ids") for call in range(num_calls)],
                            [file.get_tensor(f"{name}.{call}.topk_weights") for call in range(num_calls)],
                        )
                        for name, num_experts, num_calls in _sizes(path, metadata.get("layers", ""))
                    }
                )
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole record of routing: {error}") from None
        for name, layer in record.layers.items():
            for call in zip(layer.topk_ids, layer.topk_weights, strict=True):
                _check_call(f"{path}: a call of {name!r}", layer, *call)
        return record


def _sizes(path: Path | str, layers: str) -> list[tuple[str, int, int]]:
    """Name, number of experts and number of calls of each layer."""
    try:
        sizes = [(name, num_experts, num_calls) for name, (num_experts, num_calls) in json.loads(layers).items()]
    except (ValueError, TypeError, AttributeError, RecursionError):
        sizes = None
    if sizes is None or not all(type(size) is int and size >= 0 for _, *both in sizes for size in both):
        raise ValueError(f"{path} must say the numbers of experts and calls of each layer, but says {layers[:80]!r}")
    return sizes


def _check_call(where: str, layer: LayerRouting, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
    """Raise unless a device can be given these: there, nothing looks at the values of ids."""
    if topk_ids.dtype != layer.ids_dtype or topk_ids.dim() != 2 or not topk_weights.is_floating_point():
        raise ValueError(
            f"{where} must have ids [T, K] of {layer.ids_dtype} and float weights, but has {topk_ids.dtype} of shape "
            f"{tuple(topk_ids.shape)} and {topk_weights.dtype}"
        )
    if topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"{where} must have a weight for each id, but has {tuple(topk_weights.shape)} for {tuple(topk_ids.shape)}"
        )
    # the id E stands for no expert in models whose tokens may choose none
    if topk_ids.numel() and not (topk_ids.min() >= 0 and topk_ids.max() <= layer.num_experts):
        raise ValueError(
            f"{where} must have ids up to {layer.num_experts}, but has {topk_ids.min()} to {topk_ids.max()}"
        )


def _concatenate(name: str, calls: list[torch.Tensor], batch_size: int) -> torch.Tensor:
    shapes = [tuple(call.shape) for call in calls]
    if not shapes or any(shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"calls of {name!r} must be at least one and have the same K, but have shapes {shapes}")
    if batch_size < 1 or any(shape[0] % batch_size for shape in shapes):
        raise ValueError(
            f"batch_size = {batch_size} must divide the tokens of every call of {name!r}, but see {shapes}"
        )
    return torch.cat([call.unflatten(0, (batch_size, -1)) for call in calls], 1).flatten(0, 1)
