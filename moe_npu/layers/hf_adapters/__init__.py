"""MoE modules of transformers that ignore ``experts_implementation``, and adapters for those that can be grouped.

transformers asks a model's experts for an implementation only where it decorates their class. The classes below it
does not: whatever the configuration says, they run their own code. For most of them a file of this package holds a
subclass with the same parameters and a grouped forward, and :func:`adapt` makes a module an instance of it.

Why the class of the module is exchanged and not its ``forward``: parameters, their names and storage, hooks and
``training`` stay what they are; a copy or a pickle of the model is adapted as well, because the class is found by
name; ``isinstance`` checks of transformers (initialization, recording of router logits) still hold; and wrappers that
replace ``forward`` on the instance (hooks of accelerate) or derive from the class (FSDP) come on top, not in between.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

from torch import nn

from moe_npu.layers.hf_adapters.base import Adapter

_MODELING = re.compile(r"transformers\.models\.(\w+)\.modeling_\w+")


@dataclass(frozen=True)
class Undecorated:
    """A MoE class of transformers that ignores ``experts_implementation``.

    Attributes:
        layout: how its experts are stored.
        adapter: ``"file:class"`` in this package, or None.
        reason: why there is no adapter, or None.
    """

    layout: str
    adapter: str | None = None
    reason: str | None = None


UNDECORATED = {
    "llama4.Llama4TextMoe": Undecorated("[E, H, 2I]", "llama4:GroupedLlama4TextMoe"),
    "dbrx.DbrxExperts": Undecorated("flat [E*I, H]", "dbrx:GroupedDbrxExperts"),
    "longcat_flash.LongcatFlashExperts": Undecorated(
        "[E, 2I, H], identity experts", "longcat_flash:GroupedLongcatFlashExperts"
    ),
    "jetmoe.JetMoeMoE": Undecorated("[E, 2I, H]", "jetmoe:GroupedJetMoeMoE"),
    "jetmoe.JetMoeMoA": Undecorated("attention, [E, N, H]", "jetmoe:GroupedJetMoeMoA"),
    "step3p7.Step3p7Experts": Undecorated("[E, 2I, H]", "step3p7:GroupedStep3p7Experts"),
    "switch_transformers.SwitchTransformersExperts": Undecorated(
        "list of E, ungated", "expert_lists:GroupedSwitchTransformersExperts"
    ),
    "vitpose_backbone.VitPoseNaiveMoe": Undecorated("list of E linear layers", "expert_lists:GroupedVitPoseNaiveMoe"),
    "doge.DogeCDMoE": Undecorated(
        "rows of embeddings",
        reason="its experts are single neurons, rows of two embedding tables that are looked up and multiplied without "
        "a loop: there are no matrices to group",
    ),
    "nllb_moe.NllbMoeExperts": Undecorated(
        "list of E, ungated, bias",
        reason="its code sends every token through experts 0 and 1 whatever the router chose (it takes the one-hot of "
        "a one-hot mask), so a grouped forward could not equal it",
    ),
}


def find_class(cls: type) -> Undecorated | None:
    """The entry of ``UNDECORATED`` of a class, None for any other, also for a subclass with code of its own."""
    match = _MODELING.fullmatch(cls.__module__)
    return UNDECORATED.get(f"{match[1]}.{cls.__name__}") if match else None


def obstacle(module: nn.Module) -> str | None:
    """Why a module of a class in ``UNDECORATED`` cannot be adapted; None if it can."""
    family = _family(module)
    if family.adapter is None:
        return family.reason
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return _adapter_class(family.adapter).obstacle(module)


def adapt(module: nn.Module) -> None:
    """Give a module of a class in ``UNDECORATED`` without an :func:`obstacle` its grouped forward."""
    adapter = _family(module).adapter
    assert adapter is not None
    _adapter_class(adapter).install(module)


def _family(module: nn.Module) -> Undecorated:
    family = find_class(type(module))
    assert family is not None
    return family


def _adapter_class(adapter: str) -> type[Adapter]:
    file, name = adapter.split(":")
    # one file per family, imported when it is met: it imports the modeling file of transformers
    cls: type[Adapter] = getattr(importlib.import_module(f"{__name__}.{file}"), name)
    return cls
