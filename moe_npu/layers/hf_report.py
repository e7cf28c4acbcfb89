"""What really runs in the MoE layers of a model: :func:`report`."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from moe_npu.layers._table import aligned
from moe_npu.layers.hf_layers import MoELayer, find_moe_layers

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_COLUMNS = ("layer", "layers", "class", "runs", "dtype", "weights", "experts", "top-k", "quantization")
_NUMBERS = [_COLUMNS.index(name) for name in ("layers", "experts", "top-k")]


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer.

    Attributes:
        name: of the module, as ``model.get_submodule`` takes it.
        class_name: of the module.
        implementation: what computes it: the name of an experts implementation, ``"own code"``, or ``"an error"`` where
            transformers would refuse the one that was chosen.
        dtype: of the largest parameter.
        layout: how the weights are stored, ``[E, 2I, H]`` being that of most models; E experts, I intermediate and H
            hidden size.
        num_experts: E on this device, None where the module does not say.
        top_k: experts per token, None where the module does not say.
        quantization: of the experts' weights, or None.
        reason: why moe_npu does not compute it; None where it does.
    """

    name: str
    class_name: str
    implementation: str
    dtype: str
    layout: str
    num_experts: int | None
    top_k: int | None
    quantization: str | None
    reason: str | None

    @property
    def is_active(self) -> bool:
        """Whether moe_npu computes this layer."""
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """The MoE layers of a model, in its order; ``print(report)`` shows a table.

    Attributes:
        model_class: of the model.
        layers: one entry per MoE layer.
    """

    model_class: str
    layers: tuple[LayerReport, ...]

    @property
    def is_active(self) -> bool:
        """Whether there are MoE layers and moe_npu computes all of them."""
        return bool(self.layers) and all(layer.is_active for layer in self.layers)

    def to_dicts(self) -> list[dict[str, str | int | None]]:
        """One dict per layer, with the attributes of :class:`LayerReport`."""
        return [dataclasses.asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.model_class} has no MoE layers"
        num_active = sum(layer.is_active for layer in self.layers)
        lines = [f"{self.model_class}: moe_npu computes {num_active} of {len(self.layers)} MoE layers", ""]
        lines.extend(aligned([_COLUMNS, *(_cells(*group) for group in _collapse(self.layers))], right=_NUMBERS))
        if num_active < len(self.layers):
            lines.extend(["", "Not computed by moe_npu:", *self.reasons()])
        return "\n".join(lines)

    def reasons(self) -> list[str]:
        """Why moe_npu does not compute some layers: a line per kind of layer, none where it computes all."""
        inactive = [layer for layer in self.layers if not layer.is_active]
        return [f"  {name} ({layer.class_name}): {layer.reason}" for name, _, layer in _collapse(inactive)]


def report(model: nn.Module) -> Report:
    """The MoE layers of a model and what really computes each of them.

    It looks at the modules, not at the configuration: a class that ignores ``experts_implementation``, a ``forward``
    that was replaced, or experts of an unknown kind are named together with the reason. Reads no values: a model on
    ``meta`` gives the same table.

    Args:
        model: any module: a model of transformers, also inside of wrappers, or one with layers of ``moe_npu``.

    Returns:
        The report; ``print`` it, or use ``to_dicts()``.

    Example:
        >>> import moe_npu
        >>> router = moe_npu.SoftmaxTopKRouter(64, num_experts=8, top_k=2, norm_topk_prob=True)
        >>> moe = moe_npu.MoE(router, moe_npu.GroupedExperts(8, 64, 32))
        >>> print(report(nn.Sequential(moe)))
        Sequential: moe_npu computes 1 of 1 MoE layers
        <BLANKLINE>
        layer      layers  class           runs     dtype    weights     experts  top-k  quantization
        0.experts       1  GroupedExperts  moe_npu  float32  [E, 2I, H]        8      2  -
    """
    return Report(type(model).__name__, tuple(_layer_report(layer) for layer in find_moe_layers(model)))


def _layer_report(layer: MoELayer) -> LayerReport:
    # of equally large ones the first, which is a weight and not what came with it
    parameter = max(layer.module.parameters(), key=lambda parameter: parameter.numel(), default=None)
    return LayerReport(
        name=layer.name,
        class_name=type(layer.module).__name__,
        implementation=layer.implementation,
        dtype="-" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        layout=layer.layout,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        quantization=layer.quantization,
        reason=layer.reason,
    )


def _collapse(layers: Iterable[LayerReport]) -> Iterator[tuple[str, int, LayerReport]]:
    """Layers that differ in one index of their name only, as one: name with a range, how many, one of them."""
    groups: dict[tuple[str, LayerReport], list[LayerReport]] = {}
    for layer in layers:
        template = _INDEX.sub("*", layer.name)
        groups.setdefault((template, dataclasses.replace(layer, name="")), []).append(layer)
    for group in groups.values():
        yield _common_name([layer.name for layer in group]) or "(itself)", len(group), group[0]


def _common_name(names: list[str]) -> str:
    columns = list(zip(*(_INDEX.findall(name) for name in names), strict=True))
    ranges = iter([_ranges(sorted({int(index) for index in column})) for column in columns])
    return _INDEX.sub(lambda _: next(ranges), names[0])


def _ranges(indices: list[int]) -> str:
    """``5``, ``{0..4}``, ``{1,3..47}``, ``{0..4,6..9}``."""
    if len(indices) == 1:
        return str(indices[0])
    steps = {after - before for before, after in itertools.pairwise(indices)}
    if len(steps) == 1 and steps != {1} and len(indices) > 2:
        return f"{{{indices[0]},{indices[1]}..{indices[-1]}}}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = (f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return "{" + ",".join(texts) + "}"


def _cells(name: str, number: int, layer: LayerReport) -> tuple[str, ...]:
    optional = (layer.num_experts, layer.top_k, layer.quantization)
    return (
        name,
        str(number),
        layer.class_name,
        layer.implementation,
        layer.dtype,
        layer.layout,
        *("-" if value is None else str(value) for value in optional),
    )
