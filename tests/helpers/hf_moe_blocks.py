"""Every MoE block of the installed transformers, small and with random weights.

A *block* is a class in a modeling file that constructs experts. They are found in the sources, so that those of a later
release are found too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

MODELS = Path(transformers.__file__).parent / "models"
NO_EXPERTS_CLASS = {"doge.DogeCDMoE"}  # has experts, but not in a class of their own
WRAPPERS = {"ernie4_5_vl_moe.Ernie4_5_VLMoeMoeBlock"}  # constructs two blocks
CONFIGS = {  # of the files with several that have experts
    "dbrx.DbrxFFN": "DbrxConfig",
    "dots3_note.Dots3NoteTextMoE": "Dots3NoteTextConfig",
    "dots3_note.Dots3NoteVisionMoE": "Dots3NoteVisionConfig",
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextSparseMoeBlock": "Qwen3OmniMoeTalkerTextConfig",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextSparseMoeBlock": "Qwen3OmniMoeTextConfig",
}
EXPERTS_CLASS = re.compile(r"Experts$|NaiveMoe$")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TINY = {
    **dict.fromkeys(EXPERT_COUNTS, 8),
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 28,
    "moe_shared_expert_intermediate_size": 28,
    "shared_experts_intermediate_size": 12,
    "shared_intermediate_size": 28,
    "share_expert_dim": 28,
    "moe_hidden_size": 16,
    "moe_latent_size": 16,
    "num_experts_per_tok": 3,
    "top_k_experts": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "zero_expert_num": 3,
    "vocab_size": 50,
    "router_hidden_size": 16,
}


def block_names() -> list[str]:
    """``"<model>.<class>"`` of every MoE block."""
    names = set(NO_EXPERTS_CLASS | WRAPPERS)
    for file in MODELS.glob("*/modeling_*.py"):
        source = file.read_text()
        if "xperts" not in source and "NaiveMoe" not in source:
            continue
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        experts = {
            node.name
            for node in classes
            if EXPERTS_CLASS.search(node.name)
            or any("use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list)
        }
        for node in classes:
            called = {
                call.func.id
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            }
            if called & experts and node.name not in experts:
                names.add(f"{file.parent.name}.{node.name}")
    return sorted(names)


def config_class(name: str) -> type:
    """The class of the config that the block is made from."""
    model = name.partition(".")[0]
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    if name in CONFIGS:
        return getattr(module, CONFIGS[name])
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedConfig)
        and value.__module__ == module.__name__
        and set(EXPERT_COUNTS) & _entries(value)
    ]
    (config,) = found
    return config


def _entries(config: type) -> set[str]:
    """The names of what a class of configs adds; transformers 5.0 has no dataclasses."""
    return set(vars(config).get("__annotations__", {}) or inspect.signature(config.__init__).parameters)


class Case(NamedTuple):
    """A block with a config: the name of the block, and what is special about the config."""

    block: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.block}-{self.variant}" if self.variant else self.block


_TINY = {  # what the table of sizes does not cover
    "aria.AriaTextMoELayer": {"moe_topk": 3, "moe_num_shared_experts": 2},
    "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock": {"moe_k": 3},
    "ernie4_5_vl_moe.Ernie4_5_VLMoeSparseMoeBlock": {"moe_k": 3, "moe_intermediate_size": [24, 16]},
    "gemma4.Gemma4TextDecoderLayer": {"enable_moe_block": True},
    "phimoe.PhimoeSparseMoeBlock": {"num_experts_per_tok": 2, "router_jitter_noise": 0.3},
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextSparseMoeBlock": {"shared_expert_intermediate_size": 28},
}
_VARIANTS = {
    "aria.AriaTextMoELayer": {"bias": {"mlp_bias": True}},
    "axk2.AXK2MoE": {"no-groups": {"n_group": None, "topk_group": None}},
    "cohere2_moe.Cohere2MoeSparseMoeBlock": {
        "average": {"num_shared_experts": 2, "shared_expert_combination_strategy": "average"},
        "sum": {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum"},
        "sigmoid": {"expert_selection_fn": "sigmoid"},
        "sigmoid-unnormalized": {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    },
    "dbrx.DbrxFFN": {"unnormalized": {"moe_normalize_expert_weights": None}},
    "deepseek_v2.DeepseekV2Moe": {
        "groups": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5},
        "bias": {"mlp_bias": True},
    },
    "deepseek_v3.DeepseekV3MoE": {"unnormalized": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}},
    "deepseek_v4.DeepseekV4SparseMoeBlock": {"hash": {}},
    "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock": {"bias": {"use_bias": True}, "unshared": {"moe_num_shared_experts": 0}},
    "flint.FlintSparseMoeBlock": {"unnormalized": {"norm_topk_prob": False}},
    "hy_v3.HYV3MoE": {"bias": {"mlp_bias": True}},
    "inkling2.Inkling2SparseMoeBlock": {"softplus": {"scoring_func": "sqrtsoftplus"}},
    "jamba.JambaSparseMoeBlock": {"gelu": {"hidden_act": "gelu_pytorch_tanh"}},
    "laguna.LagunaSparseMoeBlock": {"softcap": {"moe_router_logit_softcapping": 0.7, "moe_routed_scaling_factor": 2.5}},
    "lfm2_moe.Lfm2MoeSparseMoeBlock": {"no-bias": {"use_expert_bias": False}},
    "longcat_flash.LongcatFlashMoE": {"router-bias": {"router_bias": True}, "no-zero": {"zero_expert_num": 0}},
    "mistral4.Mistral4MoE": {"unnormalized": {"norm_topk_prob": False}},
    "nemotron_h.NemotronHMoE": {"bias": {"mlp_bias": True}, "no-latent": {"moe_latent_size": None}},
    "qwen2_moe.Qwen2MoeSparseMoeBlock": {"unnormalized": {"norm_topk_prob": False}},
    "step3p7.Step3p7SparseMoeBlock": {
        "limits": {"swiglu_limits": [0.4] * 45, "swiglu_limits_shared": [0.3] * 45, "mlp_bias": True}
    },
}
_NOTE_LAYERS = [-1, -1, 4, 8, 8, 6, 10, 8]  # experts per layer of dots3_note's vision model


def cases(blocks: list[str]) -> list[Case]:
    """The blocks with their plain config, and with their variants."""
    return [Case(name, variant) for name in blocks for variant in ("", *_VARIANTS.get(name, {}))]


def tiny_config(case: Case, *, new: Mapping[str, Any] | None = None):
    """A config for the block with small sizes, made with ``new`` and all sizes where that is given."""
    values = TINY | _TINY.get(case.block, {}) | _VARIANTS.get(case.block, {}).get(case.variant, {})
    if case.block == "dots3_note.Dots3NoteVisionMoE":
        return config_class(case.block)(
            **{key: values[key] for key in ("hidden_size", "moe_intermediate_size")},
            num_attention_heads=2,
            adapter_in_dim=32,
            num_hidden_layers=len(_NOTE_LAYERS),
            pyramid_num_routed=_NOTE_LAYERS,
            router_scaling_factor=1.5,
        )
    config = config_class(case.block)()
    if new is not None:
        return type(config)(**{key: value for key, value in (values | new).items() if hasattr(config, key)})
    targets = [config]
    if case.block == "dbrx.DbrxFFN":
        config.d_model = values["hidden_size"]
        targets = [config.ffn_config]
        values = values | {"ffn_hidden_size": 24, "moe_top_k": 3}
    special = _TINY.get(case.block, {}).keys() | _VARIANTS.get(case.block, {}).get(case.variant, {}).keys()
    for target in targets:
        for key, value in values.items():
            if hasattr(target, key) or key in special:
                setattr(target, key, value)
    return config


def layer_index(case: Case) -> int:
    """The index of a MoE layer of the kind that the case asks for."""
    if case.block == "nemotron_h.NemotronHMoE":
        return 1
    return 0 if case.variant == "hash" else 5


def block_class(name: str) -> type:
    model, _, class_name = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), class_name)


def tiny_block(case: Case, config, *, seed: int = 0) -> nn.Module:
    """The block in evaluation mode with random weights."""
    cls = block_class(case.block)
    accepts = inspect.signature(cls.__init__).parameters
    config._experts_implementation = "eager"
    arguments = {"layer_idx": layer_index(case), "intermediate_size": 16}
    block = cls(config, **{name: value for name, value in arguments.items() if name in accepts})
    for module in block.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    fill(block, seed)
    return block.eval()


def fill(block: nn.Module, seed: int) -> None:
    """Random values of the size that a trained model has, also in buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if tensor.is_floating_point():
                scale = tensor.size(-1) ** -0.5 if tensor.dim() > 1 and tensor.size(0) > 1 else 0.1
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            elif name.endswith("tid2eid"):
                rows = [torch.randperm(8, generator=generator)[: tensor.size(1)] for _ in range(tensor.size(0))]
                tensor.copy_(torch.stack(rows))


def run_block(block: nn.Module, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """What the block of transformers, or the MoE branch of a Gemma layer, computes for ``[B, S, H]``."""
    if hasattr(block, "pre_feedforward_layernorm_2"):
        flat = hidden_states.flatten(0, 1)
        _, weights, ids = block.router(flat)
        experts = block.experts(block.pre_feedforward_layernorm_2(flat), ids, weights)
        output = block.post_feedforward_layernorm_2(experts)
    elif hasattr(block, "is_hash"):
        output = block(hidden_states, token_ids)
    else:
        output = block(hidden_states)
    return (output[0] if isinstance(output, tuple) else output).view(hidden_states.shape)
