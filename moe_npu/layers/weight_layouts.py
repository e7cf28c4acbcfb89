"""How the weights of experts are stored elsewhere, and conversions to our parameters and back.

Checkpoints, transformers and serving engines store the same numbers in many ways: one tensor per expert or one for
all, gate and up apart, one after the other or alternating, transposed or not. An :class:`ExpertLayout` says which. It
is always given, never concluded from shapes: ``[E, 2I, H]`` does not say which half is the gate nor, where ``2I = H``,
what is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from moe_npu.layers.experts import GroupedExperts

Order = Literal["gate_first", "up_first", "interleaved"]
Part = Literal["gate", "up", "down"]


@dataclass(frozen=True)
class ExpertLayout:
    """Names and forms of the stored tensors of the experts of one layer.

    A name with ``{expert}`` in it, e.g. ``"{expert}.up_proj.weight"``, stands for one tensor per expert. The bias of a
    weight has its name with ``weight`` at the end replaced by ``bias``, or else with ``_bias`` appended.

    Attributes:
        down: name of the down projection.
        gate_up: name of the tensor that holds gate and up; None if each has its own, or there is no gate.
        gate: name of the gate projection, if it has its own tensor.
        up: name of the up projection, if it has its own tensor. Experts without a gate have this one only.
        order: how gate and up share ``gate_up``: one after the other, or alternating, beginning with the gate.
        is_transposed: gate and up are stored ``[H, I]``, ``gate_up [H, 2I]``, instead of ``[I, H]`` and ``[2I, H]``.
        is_down_transposed: down is stored ``[I, H]`` instead of ``[H, I]``.
        is_flat: the experts are merged with the dim that follows: ``[E * I, H]`` instead of ``[E, I, H]``.

    Raises:
        ValueError: the names or the order describe no experts.
    """

    down: str
    gate_up: str | None = None
    gate: str | None = None
    up: str | None = None
    order: Order = "gate_first"
    is_transposed: bool = False
    is_down_transposed: bool = False
    is_flat: bool = False

    def __post_init__(self) -> None:
        """Refuse what describes no experts."""
        if self.gate_up is None and self.up is None:
            raise ValueError("a layout names gate_up, or gate and up, or up alone for experts without a gate")
        if self.gate_up is not None and (self.gate is not None or self.up is not None):
            raise ValueError(
                f"gate_up={self.gate_up!r} holds gate and up, so the layout cannot name gate or up as well"
            )
        if self.order not in ("gate_first", "up_first", "interleaved"):
            raise ValueError(f"order must be gate_first, up_first or interleaved, but is {self.order!r}")

    @property
    def has_gate(self) -> bool:
        """Whether the experts have a gate."""
        return self.gate_up is not None or self.gate is not None

    def names(self, num_experts: int, *, bias: bool) -> list[str]:
        """The names of all stored tensors.

        Args:
            num_experts: E.
            bias: whether the projections have biases.
        """
        return [name for slot in _slots(self, bias) for name in slot.names(num_experts)]


_LAYOUTS: dict[str, ExpertLayout] = {
    # ours, and of most experts in transformers
    "stacked": ExpertLayout(gate_up="gate_up_proj", down="down_proj"),
    "stacked_transposed": ExpertLayout(  # Llama 4, Aria, openai-privacy-filter
        gate_up="gate_up_proj", down="down_proj", is_transposed=True, is_down_transposed=True
    ),
    "stacked_ungated": ExpertLayout(up="up_proj", down="down_proj"),  # Nemotron-H
    "interleaved": ExpertLayout(gate_up="gate_up_proj", down="down_proj", order="interleaved"),
    "interleaved_transposed": ExpertLayout(  # gpt-oss
        gate_up="gate_up_proj", down="down_proj", order="interleaved", is_transposed=True, is_down_transposed=True
    ),
    "separate": ExpertLayout(gate="gate_proj", up="up_proj", down="down_proj"),
    # most checkpoints, as nn.Linear stores each
    "per_expert": ExpertLayout(
        gate="{expert}.gate_proj.weight", up="{expert}.up_proj.weight", down="{expert}.down_proj.weight"
    ),
    "per_expert_transposed": ExpertLayout(
        gate="{expert}.gate_proj.weight",
        up="{expert}.up_proj.weight",
        down="{expert}.down_proj.weight",
        is_transposed=True,
        is_down_transposed=True,
    ),
    "per_expert_ungated": ExpertLayout(up="{expert}.up_proj.weight", down="{expert}.down_proj.weight"),
    "per_expert_w123": ExpertLayout(  # Mixtral
        gate="{expert}.w1.weight", up="{expert}.w3.weight", down="{expert}.w2.weight"
    ),
    # serving engines
    "w13": ExpertLayout(gate_up="w13_weight", down="w2_weight"),
    "w31": ExpertLayout(gate_up="w13_weight", down="w2_weight", order="up_first"),
    "dbrx": ExpertLayout(gate="w1", up="v1", down="w2", is_down_transposed=True, is_flat=True),
    "jetmoe": ExpertLayout(gate_up="input_linear.weight", down="output_linear.weight"),
}


def layout_names() -> tuple[str, ...]:
    """The names of all known layouts, sorted."""
    return tuple(sorted(_LAYOUTS))


def get_layout(layout: str | ExpertLayout) -> ExpertLayout:
    """The layout called ``layout``, or ``layout`` itself.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> get_layout("per_expert_w123").down
        '{expert}.w2.weight'
    """
    if isinstance(layout, ExpertLayout):
        return layout
    if layout not in _LAYOUTS:
        raise ValueError(f"there is no expert layout {layout!r}; choose one of {', '.join(layout_names())}")
    return _LAYOUTS[layout]


def stack_experts(
    tensors: Mapping[str, torch.Tensor],
    *,
    layout: str | ExpertLayout,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    bias: bool = False,
) -> dict[str, torch.Tensor]:
    """The parameters of :class:`GroupedExperts` from tensors in another layout.

    Args:
        tensors: the tensors of the experts of one layer by the names of the layout, and no others.
        layout: a name of :func:`layout_names`, or a layout of your own.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bias: whether the projections have biases.

    Returns:
        ``gate_up_proj [E, 2I, H]``, or without a gate ``up_proj [E, I, H]``, ``down_proj [E, H, I]``, and their biases;
        new tensors with dtype and device of the given ones.

    Raises:
        ValueError: a tensor is missing, unexpected, of a wrong shape, or not of the dtype and device of the others.

    Example:
        >>> tensors = {
        ...     f"{expert}.{name}.weight": torch.zeros(*shape)
        ...     for expert in range(4)
        ...     for name, shape in (("gate_proj", (3, 5)), ("up_proj", (3, 5)), ("down_proj", (5, 3)))
        ... }
        >>> stacked = stack_experts(
        ...     tensors, layout="per_expert", num_experts=4, hidden_size=5, intermediate_size=3
        ... )
        >>> {name: tuple(tensor.shape) for name, tensor in stacked.items()}
        {'gate_up_proj': (4, 6, 5), 'down_proj': (4, 5, 3)}
    """
    layout, sizes = get_layout(layout), _Sizes(num_experts, hidden_size, intermediate_size)
    slots = _slots(layout, bias)
    first = _check(tensors, slots, sizes)
    state = _empty(_slots(_own_layout(layout.has_gate), bias), sizes, first)
    _copy_into(state, tensors, slots, sizes)
    return state


def unstack_experts(state: Mapping[str, torch.Tensor], *, layout: str | ExpertLayout) -> dict[str, torch.Tensor]:
    """Tensors in another layout from the parameters of :class:`GroupedExperts`; the inverse of :func:`stack_experts`.

    Args:
        state: ``gate_up_proj [E, 2I, H]`` or ``up_proj [E, I, H]``, ``down_proj [E, H, I]``, and their biases if
            ``down_proj_bias`` is there, e.g. ``experts.state_dict()``.
        layout: a name of :func:`layout_names`, or a layout of your own.

    Returns:
        New contiguous tensors by the names of the layout.

    Raises:
        ValueError: a tensor is missing, unexpected, of a wrong shape, or not of the dtype and device of the others.
    """
    layout = get_layout(layout)
    if "down_proj" not in state or state["down_proj"].dim() != 3:
        got = f"of shape {tuple(state['down_proj'].shape)}" if "down_proj" in state else "missing"
        raise ValueError(f"down_proj must be there, of shape (E, H, I), but is {got}")
    sizes, bias = _Sizes(*state["down_proj"].shape), "down_proj_bias" in state
    own_slots, slots = _slots(_own_layout(layout.has_gate), bias), _slots(layout, bias)
    tensors = _empty(slots, sizes, _check(state, own_slots, sizes))
    _copy_out_of(state, tensors, slots, sizes)
    return tensors


def load_expert_weights(
    experts: GroupedExperts,
    tensors: Mapping[str, torch.Tensor],
    *,
    layout: str | ExpertLayout,
    cast: bool = False,
) -> None:
    """Copy tensors in another layout into ``experts``, expert by expert, into the memory of its parameters.

    Nothing of the size of a parameter is allocated. All tensors are checked before the first is copied, for which a
    mapping that reads them from a file reads them twice.

    Args:
        experts: what is loaded. It decides whether there are a gate and biases, and all sizes.
        tensors: the tensors of the experts of one layer by the names of the layout, and no others; on any device.
        layout: a name of :func:`layout_names`, or a layout of your own.
        cast: whether the tensors may have another dtype than the parameters, to which they are rounded.

    Raises:
        TypeError: ``experts`` are not :class:`GroupedExperts`.
        ValueError: the layout has a gate and the experts have not, or reverse; the parameters are on ``meta``; a tensor
            is missing, unexpected, of a wrong shape, or, without ``cast``, of another dtype than the parameters.
    """
    if not isinstance(experts, GroupedExperts):
        raise TypeError(f"experts must be GroupedExperts, but are {type(experts).__name__}")
    layout = get_layout(layout)
    if layout.has_gate != experts.has_gate:
        have = ("with", "without") if layout.has_gate else ("without", "with")
        raise ValueError(f"the layout is of experts {have[0]} a gate, but the experts are {have[1]} one")
    state = {name: parameter.detach() for name, parameter in experts.named_parameters(recurse=False)}
    if any(parameter.is_meta for parameter in state.values()):
        raise ValueError(
            'the experts are on "meta" and have no memory to copy to; call experts.to_empty(device=...) first'
        )
    sizes = _Sizes(experts.num_experts, experts.hidden_size, experts.intermediate_size)
    slots = _slots(layout, experts.down_proj_bias is not None)
    first = _check(tensors, slots, sizes)
    if first.dtype != experts.down_proj.dtype and not cast:
        raise ValueError(
            f"the tensors are {first.dtype} but the parameters are {experts.down_proj.dtype}; cast=True converts them"
        )
    _copy_into(state, tensors, slots, sizes)


class _Sizes(NamedTuple):
    num_experts: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class _Slot:
    """One stored tensor, or one for each expert."""

    name: str
    parts: tuple[Part, ...]
    order: Order
    is_transposed: bool
    is_flat: bool
    is_bias: bool

    @property
    def is_per_expert(self) -> bool:
        return "{expert}" in self.name

    def names(self, num_experts: int) -> list[str]:
        """The names it stands for."""
        return (
            [self.name.replace("{expert}", str(e)) for e in range(num_experts)] if self.is_per_expert else [self.name]
        )

    def shape(self, sizes: _Sizes) -> tuple[int, ...]:
        """The shape of the tensor, or of that of each expert."""
        if self.parts == ("down",):
            shape = [sizes.hidden_size, sizes.intermediate_size]
        else:
            shape = [len(self.parts) * sizes.intermediate_size, sizes.hidden_size]
        if self.is_bias:
            shape = shape[:1]
        elif self.is_transposed:
            shape.reverse()
        if self.is_per_expert:
            return tuple(shape)
        if self.is_flat:
            return (sizes.num_experts * shape[0], *shape[1:])
        return (sizes.num_experts, *shape)

    def views(self, tensor: torch.Tensor, expert: int, sizes: _Sizes) -> Iterator[tuple[Part, torch.Tensor]]:
        """What ``tensor`` holds of one expert, each ``[out, in]``, or ``[out]`` of a bias."""
        if self.is_flat and not self.is_per_expert:
            tensor = tensor.unflatten(0, (sizes.num_experts, -1))
        if not self.is_per_expert:
            tensor = tensor[expert]
        if self.is_transposed and not self.is_bias:
            tensor = tensor.mT
        if len(self.parts) == 1:
            yield self.parts[0], tensor
        elif self.order == "interleaved":
            yield "gate", tensor[0::2]
            yield "up", tensor[1::2]
        else:
            first, second = tensor.chunk(2)
            yield "gate", first if self.order == "gate_first" else second
            yield "up", second if self.order == "gate_first" else first


def _own_layout(has_gate: bool) -> ExpertLayout:
    return _LAYOUTS["stacked" if has_gate else "stacked_ungated"]


def _slots(layout: ExpertLayout, bias: bool) -> list[_Slot]:
    """What is stored, the weights before the biases."""
    stored: list[tuple[str | None, tuple[Part, ...], bool]] = [
        (layout.gate_up, ("gate", "up"), layout.is_transposed),
        (layout.gate, ("gate",), layout.is_transposed),
        (layout.up, ("up",), layout.is_transposed),
        (layout.down, ("down",), layout.is_down_transposed),
    ]
    return [
        _Slot(_bias_name(name) if is_bias else name, parts, layout.order, is_transposed, layout.is_flat, is_bias)
        for is_bias in ((False, True) if bias else (False,))
        for name, parts, is_transposed in stored
        if name is not None
    ]


def _bias_name(name: str) -> str:
    return f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"


def _check(tensors: Mapping[str, torch.Tensor], slots: list[_Slot], sizes: _Sizes) -> torch.Tensor:
    """Raise unless ``tensors`` are those of the slots; returns the first."""
    for size_name, size in zip(_Sizes._fields, sizes, strict=True):
        if size < 1:
            raise ValueError(f"{size_name} must be positive, but is {size}")
    expected = {name: slot.shape(sizes) for slot in slots for name in slot.names(sizes.num_experts)}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{missing[0]} is missing, of shape {expected[missing[0]]} ({len(missing)} tensors are missing)"
        )
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise ValueError(
            f"{unexpected[0]} is not a tensor of this layout, which has {', '.join(list(expected)[:4])} ..."
        )
    first_name = next(iter(expected))
    first = tensors[first_name]
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, but has {tuple(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but {first_name} is {first.dtype} on {first.device}"
            )
    return first


def _empty(slots: list[_Slot], sizes: _Sizes, like: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(slot.shape(sizes), dtype=like.dtype, device=like.device)
        for slot in slots
        for name in slot.names(sizes.num_experts)
    }


def _pairs(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], slots: list[_Slot], sizes: _Sizes
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of the same numbers: of our parameters, and of ``tensors``, of which one is held at a time."""
    own = {}
    for slot in _slots(_own_layout("gate_up_proj" in state), "down_proj_bias" in state):
        for part in slot.parts:
            own[part, slot.is_bias] = slot
    for slot in slots:
        for index, name in enumerate(slot.names(sizes.num_experts)):
            tensor = tensors[name]
            for expert in (index,) if slot.is_per_expert else range(sizes.num_experts):
                for part, view in slot.views(tensor, expert, sizes):
                    own_slot = own[part, slot.is_bias]
                    own_views = dict(own_slot.views(state[own_slot.name], expert, sizes))
                    yield own_views[part], view


@torch.no_grad()
def _copy_into(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], slots: list[_Slot], sizes: _Sizes
) -> None:
    for own, stored in _pairs(state, tensors, slots, sizes):
        own.copy_(stored)


@torch.no_grad()
def _copy_out_of(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], slots: list[_Slot], sizes: _Sizes
) -> None:
    for own, stored in _pairs(state, tensors, slots, sizes):
        stored.copy_(own)
