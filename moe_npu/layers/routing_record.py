"""What routers decided, call by call, and the file that carries it from one process to another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_FORMAT = "moe_npu.routing.1"


@dataclass
class LayerRouting:
    """The routing of one layer.

    Attributes:
        num_experts: E.
        topk_ids: for each call ``[T, K]``, in the smallest of uint8, int16 and int32 that holds all E ids.
        topk_weights: for each call ``[T, K]``, in the dtype that the router gave.
    """

    num_experts: int
    topk_ids: list[torch.Tensor] = field(default_factory=list)
    topk_weights: list[torch.Tensor] = field(default_factory=list)

    @property
    def ids_dtype(self) -> torch.dtype:
        """The smallest dtype for the ids."""
        if self.num_experts <= 256:
            return torch.uint8
        return torch.int16 if self.num_experts <= 2**15 else torch.int32


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
            ValueError: the file is of another format.
        """
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} must be a file of format {_FORMAT}, but is {metadata.get('format')}")
            return cls(
                {
                    name: LayerRouting(
                        num_experts,
                        [file.get_tensor(f"{name}.{call}.topk_ids") for call in range(num_calls)],
                        [file.get_tensor(f"{name}.{call}.topk_weights") for call in range(num_calls)],
                    )
                    for name, (num_experts, num_calls) in json.loads(metadata["layers"]).items()
                }
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
