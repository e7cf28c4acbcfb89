"""Finds the MoE layers of a model by what its modules are, and says what runs in each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from moe_npu.layers import hf_adapters
from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.hf import NAME, SCHEME_ATTRIBUTE, flag
from moe_npu.layers.hf_adapters.base import Adapter
from moe_npu.layers.moe import MoE
from moe_npu.layers.quantized_experts import QuantizedExperts
from moe_npu.quant import QuantScheme

OWN_CODE = "own code"
_NUM_EXPERTS = ("num_experts", "num_local_experts", "num_routed_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "experts_top_k")
# a word of a class name: Experts, MoE, MoeBlock, SparseMLP; not the Moe that names a family (Qwen3MoeAttention), nor
# experts that every token passes
_MOE_CLASS = re.compile(r"((?<!Shared)Experts|SparseMLP|M[oO][eE](MLP|Layer|Block|Mlp)?|MoA)$")


class Change(Enum):
    """What makes moe_npu compute a layer."""

    NONE = "it does already"
    CONFIG = "the experts implementation of its configuration"
    ADAPTER = "an adapter"
    IMPOSSIBLE = "nothing"


@dataclass(frozen=True)
class MoELayer:
    """A MoE layer of a model; :class:`moe_npu.layers.hf_report.LayerReport` says what the attributes mean."""

    name: str
    module: nn.Module
    implementation: str
    layout: str
    num_experts: int | None
    top_k: int | None
    quantization: str | None
    change: Change
    reason: str | None


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in its order."""
    modules = dict(model.named_modules())
    found: dict[str, MoELayer] = {}
    around: set[str] = set()  # modules that contain a layer
    for describe in (_described, _guessed):  # what is known first: a guess must not cover it
        inside: set[str] = set()  # modules of a layer, and what they contain
        for name, module in modules.items():
            parent = name.rpartition(".")[0]  # comes before, and the empty one of the root is its own
            if name in found or parent in inside:
                inside.add(name)
            elif name not in around:
                layer = describe(name, module, modules)
                if layer is not None:
                    found[layer.name] = layer
                    around.update(_containing(layer.name))
                    if layer.name == name:
                        inside.add(name)
    return [found[name] for name in modules if name in found]


def _containing(name: str) -> Iterator[str]:
    """The paths of the modules that contain the one at ``name``, up to the root."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _described(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> MoELayer | None:
    """A layer of a kind that is known, or None."""
    if isinstance(module, MoE):
        experts = module.experts
        name = f"{name}.experts" if name else "experts"
        return _layer(name, experts, modules, NAME, _own_layout(experts), Change.NONE, None)
    if isinstance(module, (GroupedExperts, QuantizedExperts)):
        return _layer(name, module, modules, NAME, _own_layout(module), Change.NONE, None)
    if isinstance(module, Adapter):
        family = next(filter(None, map(hf_adapters.find_class, type(module).__mro__)))
        return _with_forward(name, module, modules, NAME, family.layout, Change.NONE, None)
    family_or_none = hf_adapters.find_class(type(module))
    if family_or_none is not None:
        reason = hf_adapters.obstacle(module)
        change = Change.ADAPTER if reason is None else Change.IMPOSSIBLE
        reason = "the class ignores experts_implementation; " + (
            "moe_npu.accelerate(model) puts an adapter in its place" if reason is None else f"no adapter: {reason}"
        )
        return _layer(name, module, modules, OWN_CODE, family_or_none.layout, change, reason)
    if any(_interface(cls) is not None for cls in type(module).__mro__):
        return _decorated(name, module, modules)
    return None


def _decorated(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> MoELayer:
    """Experts that transformers decorates with ``use_experts_implementation``."""
    interface = _interface(type(module))
    layout = _decorated_layout(module)
    if interface is None:
        reason = f"{type(module).__name__} has a forward of its own, which does not ask for an implementation"
        return _layer(name, module, modules, OWN_CODE, layout, Change.IMPOSSIBLE, reason)
    config: Any = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None) or "eager"
    if NAME not in interface:
        reason = f"moe_npu is not an implementation for {type(module).__name__}"
        if implementation == NAME:
            implementation, reason = "an error", f"{reason}, so that its forward raises an error"
        return _with_forward(name, module, modules, implementation, layout, Change.IMPOSSIBLE, reason)
    if implementation == NAME:
        return _with_forward(name, module, modules, NAME, layout, Change.NONE, None)
    obstacle = None
    if implementation != "eager" and implementation not in interface:
        obstacle = f"there is no experts_implementation {implementation!r}"
    elif hasattr(module, SCHEME_ATTRIBUTE):
        obstacle = f"experts_implementation {implementation!r} cannot multiply weights in {_quantization(module)}"
    if obstacle is not None:
        reason = f"{obstacle}, so that its forward raises an error; moe_npu.accelerate(model) changes it"
        return _with_forward(name, module, modules, "an error", layout, Change.CONFIG, reason)
    reason = f"experts_implementation is {implementation!r}; moe_npu.accelerate(model) changes it"
    return _with_forward(name, module, modules, implementation, layout, Change.CONFIG, reason)


def _interface(cls: type) -> ExpertsInterface | None:
    """The registry that the forward of a decorated class asks.

    transformers keeps it in the closure of that forward and nowhere else, so this is where to look: a subclass that
    overrides ``forward`` has flags, base class and configuration of its parent, and ignores all of them.
    """
    forward = vars(cls).get("forward") or getattr(cls, "forward", None)
    code = getattr(forward, "__code__", None)
    names = getattr(code, "co_freevars", ())
    if "original_forward" in names and "ALL_EXPERTS_FUNCTIONS" in getattr(code, "co_names", ()):
        return ALL_EXPERTS_FUNCTIONS  # releases with one registry name it in the code
    for name, cell in zip(names, getattr(forward, "__closure__", None) or (), strict=True):
        if name == "experts_interface" and isinstance(cell.cell_contents, ExpertsInterface):
            return cell.cell_contents
    return None


def _replaced_forward(module: nn.Module) -> str | None:
    """The function that stands on the instance, or on its class, in place of the forward of the class, or None.

    Three wrappers call the original: the hooks of accelerate, which keep it, transformers' expert parallelism, and
    torch.compile.
    """
    if isinstance(module, OptimizedModule):
        return None
    cls = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    own: Any = vars(cls)["forward"]
    if cls.__module__.startswith("transformers.") and own.__module__ != cls.__module__:  # decorators keep it
        return f"{own.__module__}.{own.__qualname__}"
    values = vars(module)
    forward = values["_old_forward"] if "_hf_hook" in values else values.get("forward")
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    source = f"{getattr(forward, '__module__', '')}"
    if source.startswith("transformers.distributed."):
        return None
    return f"{source}.{getattr(forward, '__qualname__', type(forward).__name__)}"


def _with_forward(
    name: str,
    module: nn.Module,
    modules: dict[str, nn.Module],
    implementation: str,
    layout: str,
    change: Change,
    reason: str | None,
) -> MoELayer:
    """A layer of a class that does as ``implementation`` says, unless this instance or its parent was changed."""
    parent = name.rpartition(".")[0]
    for owner_name, owner in ((name, module), (parent, modules.get(parent))):
        replaced = None if owner is None else _replaced_forward(owner)
        if replaced is not None:
            reason = f"the forward of {owner_name or 'the model'} was replaced by {replaced}"
            return _layer(name, module, modules, OWN_CODE, layout, Change.IMPOSSIBLE, reason)
    return _layer(name, module, modules, implementation, layout, change, reason)


def _guessed(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> MoELayer | None:
    """A layer that looks like experts: nothing that might be a MoE layer is passed over in silence."""
    layout = _guessed_layout(name, module, modules)
    if layout is None:
        return None
    source, class_name = type(module).__module__, type(module).__name__
    if source.startswith("torch."):
        parent = modules[name.rpartition(".")[0]]
        source, class_name = type(parent).__module__, type(parent).__name__
    reason = f"{class_name} of {source} does not take part in experts_implementation, and moe_npu has no adapter for it"
    return _layer(name, module, modules, OWN_CODE, layout, Change.IMPOSSIBLE, reason)


def _guessed_layout(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """How weights are stored in a module that looks like experts, None for one that does not."""
    class_name, attribute = type(module).__name__, name.rpartition(".")[2]
    children = list(module.children())
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        is_list = len(children) > 1 and len({type(child) for child in children}) == 1
        if not is_list or not ("expert" in attribute.lower() or _MOE_CLASS.search(class_name)):
            return None
        return f"list of {len(children)}"
    if not _MOE_CLASS.search(class_name):
        return None
    is_stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    if not is_stacked and _first_int(module, _NUM_EXPERTS) is None:
        return None
    if any(_guessed_layout(path, part, modules) is not None for path, part in _inside(name, modules)):
        return None  # the experts within are the layer
    return "stacked" if is_stacked else "unknown"


def _inside(name: str, modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    # one that has another path in the model is not counted here
    return ((path, part) for path, part in modules[name].named_modules(prefix=name) if path != name and path in modules)


def _layer(
    name: str,
    module: nn.Module,
    modules: dict[str, nn.Module],
    implementation: str,
    layout: str,
    change: Change,
    reason: str | None,
) -> MoELayer:
    num_experts = _first_int(module, _NUM_EXPERTS)
    if num_experts is None:
        num_experts = next(filter(None, (_first_int(child, _NUM_EXPERTS) for child in module.children())), None)
    if num_experts is None and isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        num_experts = len(module)
    return MoELayer(
        name=name,
        module=module,
        implementation=implementation,
        layout=layout,
        num_experts=num_experts,
        top_k=_top_k(name, module, modules),
        quantization=_quantization(module),
        change=change,
        reason=reason,
    )


def _first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if type(value := getattr(owner, name, None)) is int), None)


def _top_k(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> int | None:
    """From the module, its router or those of its block; then from a configuration."""
    parent = modules.get(name.rpartition(".")[0]) if name else None
    owners = [module, *module.children()]
    if parent is not None:
        owners += [parent, *parent.children()]
    candidates: list[Any] = owners + [getattr(owner, "config", None) for owner in owners]
    return next((value for owner in candidates if (value := _first_int(owner, _TOP_K)) is not None), None)


def _quantization(module: nn.Module) -> str | None:
    for part in module.modules():
        # not getattr: nn.Module takes microseconds to say that it has no such attribute
        scheme = vars(part).get(SCHEME_ATTRIBUTE) or vars(part).get("scheme")
        if isinstance(scheme, QuantScheme):
            return scheme.name
    if type(module).__module__.startswith("transformers.integrations."):
        block = getattr(module, "block_size", None)
        return type(module).__module__.rpartition(".")[2] + (f", {block[0]} x {block[1]} blocks" if block else "")
    parameter = max(module.parameters(), key=lambda parameter: parameter.numel(), default=None)
    if parameter is None or (parameter.is_floating_point() and parameter.element_size() > 1):
        return None
    return str(parameter.dtype).removeprefix("torch.")


def _own_layout(experts: nn.Module) -> str:
    for part in experts.modules():
        if isinstance(part, (GroupedExperts, QuantizedExperts)):
            has_bias = any("bias" in name for name, _ in part.named_parameters(recurse=False))
            return _layout(
                getattr(part, "has_gate", True), is_transposed=False, is_interleaved=False, has_bias=has_bias
            )
    return "unknown"


def _decorated_layout(module: Any) -> str:
    return _layout(
        flag(module, "has_gate"),
        is_transposed=flag(module, "is_transposed"),
        is_interleaved=not flag(module, "is_concatenated"),
        has_bias=flag(module, "has_bias"),
    )


def _layout(has_gate: bool, *, is_transposed: bool, is_interleaved: bool, has_bias: bool) -> str:
    width = "2I" if has_gate else "I"
    shape = f"[E, H, {width}]" if is_transposed else f"[E, {width}, H]"
    details = (("interleaved", is_interleaved), ("ungated", not has_gate), ("bias", has_bias))
    return ", ".join([shape, *(detail for detail, applies in details if applies)])
