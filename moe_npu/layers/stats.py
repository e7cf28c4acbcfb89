"""How many tokens each expert gets: counters on the device, a report and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moe_npu.layers._routed_layers import DID_NOT_RUN, RoutingVisitor, is_recomputation, routed_layers, visit_routing
from moe_npu.layers._table import aligned
from moe_npu.ops._library import register_op


def count_expert_tokens(topk_ids: torch.Tensor, num_experts: int, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The number of (token, slot) pairs of each expert, int64 ``[E]``, counted on the device.

    Args:
        topk_ids: ``[T, K]`` integers; ids outside ``[0, E)`` are not counted.
        num_experts: E.
        mask: bool or 0 and 1, T elements of any shape; pairs of tokens where it is false are not counted.

    Raises:
        ValueError: ``topk_ids`` has not two dimensions, or ``mask`` not one element for each token.

    Example:
        >>> count_expert_tokens(torch.tensor([[0, 2], [2, 3]]), 4)
        tensor([1, 0, 2, 1])
    """
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must have shape [T, K], but has shape {tuple(topk_ids.shape)}")
    is_counted = (topk_ids >= 0) & (topk_ids < num_experts)  # [T, K]
    if mask is not None:
        if mask.numel() != topk_ids.size(0):
            raise ValueError(
                f"mask must have one element for each of the {topk_ids.size(0)} tokens of topk_ids, but has "
                f"{mask.numel()}"
            )
        is_counted = is_counted & mask.reshape(-1, 1).bool()
    ids = topk_ids.clamp(0, num_experts - 1).reshape(-1).long()  # what is not counted adds zero
    counts = torch.zeros(num_experts, dtype=torch.int64, device=topk_ids.device)  # [E]
    return counts.scatter_add(0, ids, is_counted.reshape(-1).long())


def _count(counts: torch.Tensor, topk_ids: torch.Tensor) -> None:
    if not is_recomputation():
        counts.add_(count_expert_tokens(topk_ids, counts.size(0)))


def _count_fake(counts: torch.Tensor, topk_ids: torch.Tensor) -> None:
    pass


# an operator, because only at run time can compiled code be told that it runs inside a backward pass
_count_op = register_op(
    "count_expert_tokens_(Tensor(a!) counts, Tensor topk_ids) -> ()",
    cpu=_count,
    npu=_count,
    fake=_count_fake,
    is_lowered=False,
)


class ExpertLoad(nn.Module):
    """Counts the tokens of each expert over all calls, in training and in evaluation alike, until :meth:`reset`.

    Nothing is read on the host. A forward that activation checkpointing repeats during backward is counted once, in
    eager mode and under ``torch.compile``. The counts are those of this process: add them over ranks with the ``group``
    of :func:`load_report` or of :func:`moe_npu.layers.losses.update_correction_bias`. They are a buffer, so that
    ``DistributedDataParallel`` needs ``broadcast_buffers=False``, or each rank counts on from the counts of the first.

    Args:
        num_experts: E.
        device: device of the counts.

    Attributes:
        counts: ``[E]`` int64, not part of the state dict.

    Example:
        >>> load = ExpertLoad(4)
        >>> load(torch.tensor([[0, 2], [2, 3]]))
        >>> load.counts
        tensor([1, 0, 2, 1])
    """

    counts: torch.Tensor

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be positive, but is {num_experts}")
        self.num_experts = num_experts
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    def forward(self, topk_ids: torch.Tensor) -> None:
        """Count ``topk_ids [T, K]``; ids outside ``[0, E)`` are not counted."""
        if topk_ids.dim() != 2:
            raise ValueError(f"topk_ids must have shape [T, K], but has shape {tuple(topk_ids.shape)}")
        _count_op(self.counts, topk_ids)

    def reset(self) -> None:
        """Start again at zero."""
        self.counts.zero_()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertLoad:
        was_meta = self.counts.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.counts.is_meta:
            self.reset()  # no state dict will fill what to_empty allocated
        return self

    def extra_repr(self) -> str:
        """The size."""
        return f"num_experts={self.num_experts}"


@contextmanager
def track_expert_load(model: nn.Module) -> Iterator[dict[str, ExpertLoad]]:
    """Count the tokens of each expert in every MoE layer of ``model`` while the context is open.

    Finds native routers and the experts of transformers, whatever their ``experts_implementation``. A model that is
    compiled must be compiled inside the context: compiled code does not notice hooks that come later.

    Args:
        model: any module with MoE layers.

    Yields:
        The counters by the names of the layers, which also remain after the context.

    Raises:
        ValueError: the model has no MoE layer that routes through a native router or experts of transformers.
        RuntimeError: at the end, no layer has run, or was compiled before.
    """
    layers = routed_layers(model)
    loads = {name: ExpertLoad(layer.num_experts, device=layer.device) for name, layer in layers.items()}

    handles = [visit_routing(layer, _counting(loads[name])) for name, layer in layers.items()]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()
    if not any(load.counts.is_meta or bool(load.counts.any()) for load in loads.values()):
        raise RuntimeError(f"no token was counted in {type(model).__name__}: {DID_NOT_RUN}")


def _counting(load: ExpertLoad) -> RoutingVisitor:
    def visitor(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        load(topk_ids)
        return topk_ids, topk_weights

    return visitor


@dataclass(frozen=True)
class LayerLoad:
    """The load of the experts of one layer.

    Attributes:
        name: of the layer.
        num_pairs: (token, slot) pairs counted.
        num_experts: E.
        max_over_mean: pairs of the busiest expert relative to an even split; 1 is even, E is the worst.
        variation: standard deviation over mean of the counts.
        entropy: of the distribution of the pairs, relative to that of an even one: 1 is even, 0 is one expert.
        dead_experts: those that got nothing.
    """

    name: str
    num_pairs: int
    num_experts: int
    max_over_mean: float
    variation: float
    entropy: float
    dead_experts: tuple[int, ...]

    @classmethod
    def of(cls, name: str, counts: torch.Tensor) -> LayerLoad:
        """The numbers of ``counts [E]``, which are on the host; those of a layer without tokens are NaN."""
        values: list[int] = counts.tolist()
        total, size = sum(values), len(values)
        dead = tuple(expert for expert, count in enumerate(values) if count == 0)
        if total == 0:
            return cls(name, 0, size, math.nan, math.nan, math.nan, dead)
        mean = total / size
        deviation = math.sqrt(sum((count - mean) ** 2 for count in values) / size)
        entropy = sum(count / total * math.log(total / count) for count in values if count)
        relative = entropy / math.log(size) if size > 1 else 1.0
        return cls(name, total, size, max(values) / mean, deviation / mean, relative, dead)


@dataclass(frozen=True)
class LoadReport:
    """The load of all layers; ``str()`` of it is a table."""

    layers: tuple[LayerLoad, ...]

    def __str__(self) -> str:
        """One line per layer."""
        lines: list[tuple[str, ...]] = [
            ("layer", "experts", "pairs", "max/mean", "variation", "entropy", "dead experts")
        ]
        for layer in self.layers:
            dead = ", ".join(map(str, layer.dead_experts[:8])) + (", ..." if len(layer.dead_experts) > 8 else "")
            numbers = [f"{value:.3f}" for value in (layer.max_over_mean, layer.variation, layer.entropy)]
            summary = f"{len(layer.dead_experts)} ({dead})" if dead else "0"
            lines.append((layer.name, str(layer.num_experts), f"{layer.num_pairs:,}", *numbers, summary))
        return "\n".join(aligned(lines, right=range(1, 6)))


def load_report(
    loads: nn.Module | Mapping[str, ExpertLoad | torch.Tensor], *, group: dist.ProcessGroup | None = None
) -> LoadReport:
    """How evenly the tokens of each layer are spread over its experts. Reads the counts on the host.

    Args:
        loads: counters or counts ``[E]`` by layer, or a model with :class:`ExpertLoad` modules.
        group: ranks whose counts are added, all of which must call this.

    Raises:
        ValueError: there are no counters.

    Example:
        >>> print(load_report({"first": torch.tensor([2, 1, 1, 0])}))
        layer  experts  pairs  max/mean  variation  entropy  dead experts
        first        4      4     2.000      0.707    0.750  1 (3)
    """
    return LoadReport(tuple(LayerLoad.of(name, counts) for name, counts in _counts(loads, group).items()))


def _counts(
    loads: nn.Module | Mapping[str, ExpertLoad | torch.Tensor], group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The counts of each layer on the host."""
    if isinstance(loads, nn.Module):
        loads = {
            name.rpartition(".")[0] or name: module
            for name, module in loads.named_modules()
            if isinstance(module, ExpertLoad)
        }
    if not loads:
        raise ValueError("there are no expert loads to report: give MoE layers an ExpertLoad, or use track_expert_load")
    counts = {name: load.counts if isinstance(load, ExpertLoad) else load for name, load in loads.items()}
    for name, tensor in counts.items():
        if tensor.dim() != 1 or tensor.is_floating_point():
            raise ValueError(
                f"loads[{name!r}] must be integers of shape [E], but is {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    if group is not None:
        together = torch.cat([tensor.reshape(-1).long() for tensor in counts.values()])
        dist.all_reduce(together, group=group)
        sizes = [tensor.numel() for tensor in counts.values()]
        counts = dict(zip(counts, together.split(sizes), strict=True))
    return {name: tensor.cpu() for name, tensor in counts.items()}


def plot_expert_load(
    loads: nn.Module | Mapping[str, ExpertLoad | torch.Tensor],
    path: Path | str,
    *,
    title: str = "Tokens per expert, relative to an even split",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a heat map of layers and experts: white is an even share, blue less, red more.

    Args:
        loads: as for :func:`load_report`; layers may have different numbers of experts.
        path: of the picture; its ending chooses the format.
        title: above the picture.
        group: ranks whose counts are added, all of which must call this; each writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no counters.
    """
    counts = _counts(loads, group)
    try:  # an optional dependency of this function only
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_expert_load needs matplotlib: pip install 'moe-npu[plot]'") from error
    num_experts = max(tensor.numel() for tensor in counts.values())
    load = torch.full((len(counts), num_experts), torch.nan)
    for layer, tensor in enumerate(counts.values()):
        load[layer, : tensor.numel()] = tensor / tensor.float().mean()
    has_numbers = num_experts <= 32
    width = 0.45 * num_experts if has_numbers else min(0.09 * num_experts, 24.0)
    height = 0.5 if has_numbers else 0.25
    # the names of the layers stand left of the picture
    width += 0.075 * max(len(name) for name in counts)
    figure = Figure(figsize=(max(6.0, width + 2), max(height * len(counts), 0.5) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot alone
    axes = figure.subplots()
    axes.set_facecolor("0.8")  # of experts that a layer does not have
    image = axes.imshow(load.numpy(), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    if has_numbers:
        for layer, row in enumerate(load.tolist()):
            for expert, value in enumerate(row):
                if not math.isnan(value):
                    shade = "white" if abs(value - 1) > 0.6 else "black"
                    axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
        axes.set_xticks(range(num_experts))
    axes.set_yticks(range(len(counts)), list(counts))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="load (1 = even)", extend="max")
    figure.savefig(path, dpi=150)
