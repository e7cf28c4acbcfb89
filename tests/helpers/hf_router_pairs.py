"""A router of transformers and ours with the same parameters, and what transformers chooses experts by."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_npu.layers import routers as ours
from tests.helpers.hf_routers import Case, Config, sizes

_WEIGHTS = (
    "weight",
    "gate.weight",
    "wg.weight",
    "classifier.weight",
    "layer.weight",
    "proj.weight",
    "router.layer.weight",
)
_BIASES = ("e_score_correction_bias", "moe_statics.e_score_correction_bias")


class Pair(NamedTuple):
    """A router of transformers, ours with the same parameters, and what the former takes besides tokens."""

    theirs: nn.Module
    ours: ours.LinearRouter
    bias: Tensor
    shared: dict[str, tuple[nn.Parameter, nn.Parameter]]


def _get(module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        try:
            owner = module.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            continue
        if isinstance(getattr(owner, name.rpartition(".")[2], None), Tensor):
            return getattr(owner, name.rpartition(".")[2])
    return None


def make_pair(case: Case, name: str, config: Config, dtype: torch.dtype, has_ties: bool = False) -> Pair:
    """Both routers with parameters of ``dtype``, or float32 where theirs asks for it; small integers for ties."""
    family, class_name = name.split(".")
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), class_name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        arguments = {
            "JetMoeTopKGating": sizes(config),
            "HunYuanMoEV1Gate": (config, 0),
        }.get(class_name, (config,))
        theirs = cls(*arguments)
        router = case.build(config)
    finally:
        torch.set_default_dtype(default)
    weight, linear_bias, correction = (_get(theirs, names) for names in (_WEIGHTS, ("bias",), _BIASES))
    shared = {"weight": (weight, router.weight)}
    if router.bias is not None:
        shared["bias"] = (linear_bias, router.bias)
    for extra in ("scale", "per_expert_scale"):
        if hasattr(router, extra):
            shared[extra] = (getattr(theirs, extra), getattr(router, extra))
    bias = 0.3 * torch.randn(config.num_experts) + config.mean_of_bias
    if has_ties:
        bias = torch.zeros(config.num_experts)
    with torch.no_grad():
        for key, (their, our) in shared.items():
            value = torch.randn(their.shape) / (math.sqrt(config.hidden_size) if key == "weight" else 1)
            their.copy_(value.round() if has_ties else value)
            if our.dtype != their.dtype:
                our.data = our.data.to(their.dtype)
            our.copy_(their)
        if correction is not None:
            correction.copy_(bias.view(correction.shape))
            bias = correction.reshape(-1).float()
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(bias)
        if isinstance(router, ours.HashRouter):
            table = torch.rand(config.vocab_size, config.num_experts).argsort(1)[:, : config.num_experts_per_tok]
            theirs.tid2eid.copy_(table)
            router.tid2eid.copy_(table)
    return Pair(theirs.eval(), router.eval(), bias, shared)


class Choices(TorchFunctionMode):
    """Records what ``topk`` is called with for the tokens; the last one is what experts are chosen by."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "topk" and args[0].dim() == 2:
            self.calls.append((args[0].detach().clone(), args[1] if len(args) > 1 else kwargs["k"]))
        return func(*args, **kwargs)

    def expected_ids(self) -> Tensor:
        """The best experts by what transformers ranks, ties to the lower expert."""
        ranking, k = self.calls[-1]
        return ranking.sort(dim=-1, descending=True, stable=True).indices[:, :k]

    def has_group_tie(self) -> Tensor:
        """Tokens for which transformers takes one of several equal groups."""
        ties = torch.zeros(len(self.calls[-1][0]), dtype=torch.bool)
        for scores, k in self.calls[:-1]:
            if k < scores.size(1):
                best = scores.sort(dim=-1, descending=True).values
                ties |= best[:, k - 1] == best[:, k]
        return ties
