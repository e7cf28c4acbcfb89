"""Makes moe_npu compute the MoE layers of a loaded model: :func:`accelerate`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from moe_npu.layers import hf_adapters
from moe_npu.layers.hf import NAME
from moe_npu.layers.hf_layers import Change, MoELayer, find_moe_layers
from moe_npu.layers.hf_report import Report, report


def accelerate(model: nn.Module, *, strict: bool = True) -> Report:
    """Let moe_npu compute the MoE layers of a loaded model, and check that it does.

    Experts that transformers lets choose an implementation get ``"moe_npu"``, in every sub-model; those of families
    that ignore the choice (Llama 4, DBRX, LongCat-Flash, JetMoE, Step 3.7, Switch Transformers, ViTPose) get a grouped
    forward in place of their own. Parameters stay where they are, under their names: optimizers, ``state_dict`` and
    ``save_pretrained`` do not notice. A second call changes nothing.

    Call it after the model was quantized and before it is wrapped (PEFT, where the family ignores the choice; FSDP,
    DDP, DeepSpeed). Where transformers loaded the model for DeepSpeed ZeRO-3, the experts become leaf
    modules, see :func:`mark_zero3_leaves`.

    Args:
        model: a model of transformers, or a module that holds some; on any device, also ``meta``.
        strict: whether one layer that cannot be changed is an error. Otherwise all others are changed, and the report
            says which were not and why.

    Returns:
        :func:`moe_npu.report` of the changed model.

    Raises:
        ValueError: the model has no MoE layers, or one of them (all of them, if not ``strict``) cannot be computed by
            moe_npu; nothing has been changed. The message names each layer and the reason.
        RuntimeError: layers that were changed are not computed by moe_npu afterwards, because other code changes the
            model or its configuration back. The message names each and the reason; the model stays changed.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers: there is nothing to accelerate")
    impossible = [layer for layer in layers if layer.change is Change.IMPOSSIBLE]
    if len(impossible) == len(layers) or (strict and impossible):
        raise ValueError(_refusal(model, {layer.name for layer in impossible}))
    if any(layer.change is Change.CONFIG for layer in layers):
        _set_implementation(model, layers)
    for layer in layers:
        if layer.change is Change.ADAPTER:
            hf_adapters.adapt(layer.module)
    after = report(model)
    names = {layer.name for layer in impossible}
    unchanged = {layer.name for layer in after.layers if not layer.is_active} - names
    if unchanged:
        raise RuntimeError(_incomplete(after, unchanged))
    if is_deepspeed_zero3_enabled():
        mark_zero3_leaves(model)
    return after


def mark_zero3_leaves(model: nn.Module) -> list[nn.Module]:
    """Tell DeepSpeed ZeRO-3 to gather the parameters of each experts module at once; returns these modules.

    ZeRO-3 brings the parameters of a module just before its forward. Experts that are several modules are computed
    here by one call, before which none of their forwards runs: without the mark ZeRO-3 fetches their parameters one by
    one when they are read, and cannot prefetch. With the models' own code, ranks whose tokens chose different experts
    would even fetch in different orders. :func:`accelerate` calls this by itself for a model that transformers loads
    for ZeRO-3. Otherwise call it before ``deepspeed.initialize``.

    Args:
        model: a model with MoE layers.

    Raises:
        ValueError: the model has no MoE layers.
        ModuleNotFoundError: DeepSpeed is not installed.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layers that could be leaf modules")
    # DeepSpeed is imported by those who train with it only
    from deepspeed.utils import set_z3_leaf_modules

    leaves = [_leaf(model, layer) for layer in layers]
    # by class, as DeepSpeed offers it; one that is not of the leaves' own would take other modules as well
    marked: list[nn.Module] = set_z3_leaf_modules(model, list(dict.fromkeys(type(leaf) for leaf in leaves)))
    return marked


def _leaf(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The experts, or the block around experts in a plain list."""
    is_plain = type(layer.module).__module__.startswith("torch.")
    return model.get_submodule(layer.name.rpartition(".")[0]) if is_plain else layer.module


def _set_implementation(model: nn.Module, layers: list[MoELayer]) -> None:
    """Set it as transformers does, and where that does not reach."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_experts_implementation(NAME)
    # transformers passes over models whose source file has no decorated class: subclasses defined elsewhere, models
    # composed of others'; the experts read their own configuration
    for layer in layers:
        if layer.change is Change.CONFIG:
            config: Any = layer.module.config
            if getattr(config, "_experts_implementation", None) != NAME:
                config._experts_implementation = NAME


def _refusal(model: nn.Module, impossible: set[str]) -> str:
    everything = report(model)
    refused = _part(everything, impossible)
    hint = "" if len(impossible) == len(everything.layers) else "; strict=False changes the others"
    return (
        f"moe_npu cannot compute {len(impossible)} of {len(everything.layers)} MoE layers of {everything.model_class}, "
        f"nothing was changed{hint}:\n" + "\n".join(refused.reasons())
    )


def _incomplete(after: Report, unchanged: set[str]) -> str:
    return (
        f"moe_npu changed {after.model_class}, but {len(unchanged)} of its {len(after.layers)} MoE layers do not run "
        "it (something sets their configuration or forward back); load the model anew:\n"
        + "\n".join(_part(after, unchanged).reasons())
    )


def _part(everything: Report, names: set[str]) -> Report:
    return Report(everything.model_class, tuple(layer for layer in everything.layers if layer.name in names))
