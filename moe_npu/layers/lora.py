"""LoRA on experts: low-rank adapters on stacked weights, trained over a frozen base that may be quantized.

The adapter of a weight ``[E, out, in]`` named ``w`` is two parameters with experts first, whatever the layout of the
weight: ``w_lora_A [E, r, in]`` and ``w_lora_B [E, out, r]``. They are kept in float32 (float64 for float64 weights) and
multiplied in the dtype in which the base multiplies: that of autocast, else that of float weights, and for quantized
weights that of the rows, bfloat16 for float32. The product of B and A is formed by :func:`merge_lora` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moe_npu.layers._lora import ATTRIBUTE, LoraSettings, base_name, lora_settings
from moe_npu.layers._routed_layers import IMPLEMENTATION, SCHEME_ATTRIBUTE, is_transformers_experts
from moe_npu.layers.experts import GroupedExperts
from moe_npu.layers.quantized_experts import QuantizedExperts
from moe_npu.quant import QuantScheme

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    target: Sequence[str] | None = None,
    use_rslora: bool = False,
    dropout: float = 0.0,
    trainable: bool = True,
) -> None:
    """Give the weights of all experts in ``module`` low-rank adapters, and freeze everything else in it.

    ``y = W x`` becomes ``y = W x + scaling * B (A x)`` with A random and B zero, so that nothing changes before the
    first step. Call it several times with other targets, or with parts of a model, for other ranks. The weights must
    be those of :class:`GroupedExperts`, :class:`QuantizedExperts` or an experts module of a transformers model with
    ``experts_implementation="moe_npu"``.

    Args:
        module: a model, a layer, or experts.
        rank: r.
        alpha: the numerator of ``scaling = alpha / rank``.
        target: names of weights among ``"gate_up_proj"``, ``"up_proj"`` (experts without a gate) and ``"down_proj"``;
            None for both weights of all experts.
        use_rslora: ``scaling = alpha / sqrt(rank)``.
        dropout: share of the input of A that is dropped in training mode. PEFT has none for experts.
        trainable: whether the adapters require a gradient.

    Raises:
        ValueError: there are no such experts or weights, a weight has an adapter already or cannot have one, or the
            adapters are to be trained over a quantization scheme that passes no gradient.

    Example:
        >>> import moe_npu
        >>> experts = moe_npu.GroupedExperts(num_experts=8, hidden_size=64, intermediate_size=32)
        >>> add_lora(experts, rank=4, alpha=8)
        >>> [name for name, parameter in experts.named_parameters() if parameter.requires_grad][:2]
        ['gate_up_proj_lora_A', 'gate_up_proj_lora_B']
    """
    settings = LoraSettings(rank, alpha, use_rslora, dropout)
    if isinstance(target, str):
        raise ValueError(f"target must be a sequence of names, but is the string {target!r}")
    if target is not None and (not target or not set(target) <= set(_WEIGHTS)):
        raise ValueError(f"target must hold names among {', '.join(_WEIGHTS)}, but is {tuple(target)}")
    chosen = [
        (experts, weight)
        for _, experts in experts_modules(module)
        for weight in weight_names(experts)
        if target is None or weight in target
    ]
    if not chosen:
        raise ValueError(f"{type(module).__name__} has no experts with a weight {' or '.join(target or _WEIGHTS)}")
    for experts, weight in chosen:
        require_adaptable(experts, weight, trainable=trainable)
    freeze_all_but_adapters(module)
    for experts, weight in chosen:
        set_adapter(experts, weight, settings, trainable=trainable)


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All A and B in ``module``: what an optimizer takes."""
    return [
        getattr(experts, f"{weight}_lora_{side}") for _, experts, weight in adapted_weights(module) for side in "AB"
    ]


def lora_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The part of ``module.state_dict()`` that is A and B; ``load_state_dict(..., strict=False)`` takes it back."""
    names = {
        f"{path}.{weight}_lora_{side}".removeprefix(".") for path, _, weight in adapted_weights(module) for side in "AB"
    }
    return {name: value for name, value in module.state_dict().items() if name in names}


@torch.no_grad()
def merge_lora(module: nn.Module, *, keep_base: bool = True) -> None:
    """Add ``scaling * B @ A`` to the weights of all experts in ``module``, rounded to their dtype once.

    The adapters then take no part in the forward, and cost nothing. The sum is formed in float32.

    Args:
        module: a model, a layer, or experts.
        keep_base: keep a copy of the weights, for :func:`unmerge_lora`, which is part of the ``state_dict``: that loads
            into merged adapters only. Without, the adapters are removed: the module is left as if it had been trained
            without them, which is what to save.

    Raises:
        ValueError: there are no adapters, they are merged already, or they are on quantized weights.
    """
    adapted = _require_adapted("merge_lora", module)
    for _, experts, weight in adapted:
        if hasattr(experts, base_name(weight)):
            raise ValueError("merge_lora: the adapters are merged already; call unmerge_lora first")
        scheme = scheme_of(experts)
        if scheme is not None:
            raise ValueError(
                f"merge_lora: {weight} is stored as {scheme.name}, which cannot hold the sum; merge into the float "
                "weights and quantize those, or keep the adapters"
            )
    for _, experts, weight in adapted:
        stacked: torch.Tensor = getattr(experts, weight)
        if keep_base:
            # persistent: without it a saved state would load as weights and adapters that are to be added once more
            experts.register_buffer(base_name(weight), stacked.detach().clone())
        _add_product(experts, weight, stacked)
    if not keep_base:
        _remove(adapted)


@torch.no_grad()
def unmerge_lora(module: nn.Module) -> None:
    """Put back the weights that :func:`merge_lora` kept, bit by bit; changes made to the merged weights are lost.

    Raises:
        ValueError: there are no adapters, or they are not merged.
    """
    adapted = _require_adapted("unmerge_lora", module)
    for _, experts, weight in adapted:
        if not hasattr(experts, base_name(weight)):
            raise ValueError(f"unmerge_lora: the adapter of {weight} is not merged; call merge_lora first")
    for _, experts, weight in adapted:
        getattr(experts, weight).copy_(getattr(experts, base_name(weight)))
        delattr(experts, base_name(weight))


def remove_lora(module: nn.Module) -> None:
    """Remove all adapters from ``module`` and leave its base, which stays frozen.

    Raises:
        ValueError: there are no adapters, or they are merged.
    """
    adapted = _require_adapted("remove_lora", module)
    if any(hasattr(experts, base_name(weight)) for _, experts, weight in adapted):
        raise ValueError("remove_lora: the adapters are merged; call unmerge_lora, or merge_lora with keep_base=False")
    _remove(adapted)


def experts_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The path of every experts module in ``module`` and the module."""
    for path, part in module.named_modules():
        # without a configuration no implementation can be asked for: Step 3.7's, which `accelerate` gave its forward
        is_dispatched = is_transformers_experts(part) and hasattr(part, "config")
        if isinstance(part, (GroupedExperts, QuantizedExperts)) or is_dispatched:
            yield path, part


def weight_names(experts: nn.Module) -> list[str]:
    """The names of the weights that an adapter may be on, in the order in which they are registered."""
    return [name for name, _ in experts.named_parameters(recurse=False) if name in _WEIGHTS]


def adapted_weights(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The path of its experts, the experts and the name of every weight in ``module`` that has an adapter."""
    return [(path, experts, weight) for path, experts in experts_modules(module) for weight in lora_settings(experts)]


def scheme_of(experts: nn.Module) -> QuantScheme | None:
    """The scheme of quantized experts."""
    scheme: QuantScheme | None = getattr(experts, "scheme", None) or getattr(experts, SCHEME_ATTRIBUTE, None)
    return scheme


def features(experts: nn.Module, weight: str) -> tuple[int, int]:
    """``(out, in)`` of a weight, stored ``[E, out, in]``, transposed or quantized."""
    stacked: torch.Tensor = getattr(experts, weight)
    if scheme_of(experts) is None:
        first, second = stacked.shape[1:]
        return (second, first) if getattr(experts, "is_transposed", False) else (first, second)
    if weight != "down_proj":  # words hold several values of the input, but one row per output
        return stacked.size(1), experts.get_parameter("down_proj").size(1)
    has_gate = hasattr(experts, "gate_up_proj")
    rows = experts.get_parameter("gate_up_proj" if has_gate else "up_proj").size(1)
    return stacked.size(1), rows // 2 if has_gate else rows


def freeze_all_but_adapters(module: nn.Module) -> None:
    """Let no parameter of ``module`` require a gradient, except those of adapters as they are."""
    adapters = {id(parameter) for parameter in lora_parameters(module)}
    for parameter in module.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def require_adaptable(experts: nn.Module, weight: str, *, trainable: bool) -> None:
    """Raise ValueError unless an adapter can be put on a weight, and trained if it is to be."""
    if weight in lora_settings(experts):
        raise ValueError(f"{weight} has an adapter already; call remove_lora or merge_lora first")
    if any(hasattr(experts, base_name(other)) for other in lora_settings(experts)):
        raise ValueError("the adapters of these experts are merged; call unmerge_lora first")
    _require_implementation(experts)
    stacked: torch.Tensor = getattr(experts, weight)
    scheme = scheme_of(experts)
    if scheme is None and (stacked.dim() != 3 or stacked.dtype not in _FLOATS):
        raise ValueError(
            f"{weight} must be a float weight [E, out, in] or quantized by moe_npu, but is {stacked.dtype} of shape "
            f"{tuple(stacked.shape)}"
        )
    if trainable and scheme is not None and not scheme.passes_gradient:
        raise ValueError(
            f"{weight} is stored as {scheme.name}, which passes no gradient to adapters before it; quantize with w4a16 "
            "to train, or give trainable=False to run an adapter"
        )


def set_adapter(
    experts: nn.Module,
    weight: str,
    settings: LoraSettings,
    *,
    trainable: bool,
    values: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Put an adapter on a weight that :func:`require_adaptable` accepted: ``values`` (A, B), or a fresh one."""
    stacked: torch.Tensor = getattr(experts, weight)
    out_features, in_features = features(experts, weight)
    dtype = torch.promote_types(stacked.dtype, torch.float32) if scheme_of(experts) is None else torch.float32
    empty = {"dtype": dtype, "device": stacked.device}
    lora_a = torch.empty(stacked.size(0), settings.rank, in_features, **empty)  # type: ignore[call-overload]
    lora_b = torch.zeros(stacked.size(0), out_features, settings.rank, **empty)  # type: ignore[call-overload]
    if values is None:
        nn.init.uniform_(lora_a, -(in_features**-0.5), in_features**-0.5)  # as nn.Linear, for each expert
    else:
        lora_a.copy_(values[0])
        lora_b.copy_(values[1])
    for side, value in (("A", lora_a), ("B", lora_b)):
        experts.register_parameter(f"{weight}_lora_{side}", nn.Parameter(value, requires_grad=trainable))
    if not hasattr(experts, ATTRIBUTE):
        setattr(experts, ATTRIBUTE, {})
        experts.register_forward_pre_hook(_check_before_forward)
    getattr(experts, ATTRIBUTE)[weight] = settings


def _require_implementation(experts: Any) -> None:
    if is_transformers_experts(experts) and experts.config._experts_implementation != IMPLEMENTATION:
        raise ValueError(
            f"{type(experts).__name__} runs experts_implementation={experts.config._experts_implementation!r}, which "
            f"applies no adapters; call model.set_experts_implementation({IMPLEMENTATION!r})"
        )


def _check_before_forward(experts: nn.Module, _: Any) -> None:
    """The implementation can be switched at any time, and others would leave out the adapters in silence."""
    if any(not hasattr(experts, base_name(weight)) for weight in lora_settings(experts)):
        _require_implementation(experts)


def _require_adapted(caller: str, module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    adapted = adapted_weights(module)
    if not adapted:
        raise ValueError(f"{caller}: {type(module).__name__} has no adapters; add_lora or load_peft_adapter adds some")
    return adapted


def _add_product(experts: nn.Module, weight: str, stacked: torch.Tensor) -> None:
    scaling = lora_settings(experts)[weight].scaling
    is_transposed = getattr(experts, "is_transposed", False)
    lora_a, lora_b = (experts.get_parameter(f"{weight}_lora_{side}") for side in "AB")
    dtype = torch.promote_types(stacked.dtype, torch.float32)
    for expert in range(stacked.size(0)):  # one at a time: the float32 product of all is larger than the weight
        product = lora_b[expert].to(dtype) @ lora_a[expert].to(dtype) * scaling  # [out, in]
        stacked[expert].copy_(stacked[expert].to(dtype) + (product.mT if is_transposed else product))


def _remove(adapted: list[tuple[str, nn.Module, str]]) -> None:
    for _, experts, weight in adapted:
        for side in "AB":
            delattr(experts, f"{weight}_lora_{side}")
        del lora_settings(experts)[weight]
