"""report(): the table, what is active and why not, and that no MoE class of transformers is passed over."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import time
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
import transformers.models
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_npu
from moe_npu.layers.hf_accelerate import accelerate, mark_zero3_leaves
from moe_npu.layers.hf_adapters import UNDECORATED
from moe_npu.layers.hf_layers import _interface
from moe_npu.layers.hf_quantizer import _quantize_parameters
from moe_npu.layers.hf_report import report

IS_OLDEST = transformers.__version__.startswith("5.0.")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}


def qwen(implementation: str = "eager", **changes: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return Qwen3MoeForCausalLM._from_config(
            Qwen3MoeConfig(**(SIZES | changes)), experts_implementation=implementation
        )


def test_qwen3_30b_on_meta() -> None:
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )
    start = time.monotonic()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="moe_npu", dtype=torch.bfloat16)
    text = str(report(model))
    assert time.monotonic() - start < 10
    assert text.splitlines() == [
        "Qwen3MoeForCausalLM: moe_npu computes 48 of 48 MoE layers",
        "",
        "layer                             layers  class            runs     dtype     weights     experts  top-k"
        "  quantization",
        "model.layers.{0..47}.mlp.experts      48  Qwen3MoeExperts  moe_npu  bfloat16  [E, 2I, H]      128      8  -",
    ]


class TestWhatRuns:
    def test_implementations_by_name(self) -> None:
        for name in ("eager", "grouped_mm", "batched_mm", "moe_npu"):
            result = report(qwen(name))
            assert [layer.implementation for layer in result.layers] == [name] * 3
            assert result.is_active == (name == "moe_npu")
        assert "'batched_mm'; moe_npu.accelerate(model) changes it" in str(report(qwen("batched_mm")))

    def test_rows_for_programs(self) -> None:
        assert report(qwen("moe_npu")).to_dicts()[1] == {
            "name": "model.layers.1.mlp.experts",
            "class_name": "Qwen3MoeExperts",
            "implementation": "moe_npu",
            "dtype": "float32",
            "layout": "[E, 2I, H]",
            "num_experts": 6,
            "top_k": 2,
            "quantization": None,
            "reason": None,
        }

    def test_forward_of_an_instance_replaced(self) -> None:
        model = qwen("moe_npu")
        model.model.layers[1].mlp.experts.forward = types.MethodType(lambda self, x, *_: x, model)
        result = report(model)
        assert [layer.is_active for layer in result.layers] == [True, False, True]
        assert "model.layers.{0,2}.mlp.experts" in str(result)
        assert "the forward of model.layers.1.mlp.experts was replaced by tests.layers" in result.layers[1].reason

    def test_forward_of_the_block_replaced(self) -> None:
        model = qwen("moe_npu")
        model.model.layers[0].mlp.forward = lambda hidden_states: hidden_states
        result = report(model)
        assert "the forward of model.layers.0.mlp was replaced" in result.layers[0].reason
        with pytest.raises(ValueError, match="1 of 3 MoE layers"):
            accelerate(model)

    def test_subclass_with_a_forward_of_its_own(self) -> None:
        class Mine(Qwen3MoeExperts):
            def forward(self, hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
                return hidden_states

        model = qwen("moe_npu")
        model.model.layers[2].mlp.experts.__class__ = Mine
        layer = report(model).layers[2]
        assert (layer.implementation, layer.class_name) == ("own code", "Mine")
        assert "a forward of its own" in layer.reason

    def test_registry_without_moe_npu(self) -> None:
        if "experts_interface" not in inspect.signature(use_experts_implementation).parameters:
            pytest.skip(f"transformers {transformers.__version__} has one registry")

        class Registry(ExpertsInterface):
            _global_mapping: ClassVar[dict[str, Any]] = {}

        class OtherExperts(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(2, 3, 4))

            def forward(self, *_: torch.Tensor) -> None: ...

        decorated = use_experts_implementation(OtherExperts, experts_interface=Registry())
        model = nn.Sequential(decorated(qwen("moe_npu").config))
        assert report(model).layers[0].implementation == "an error"
        with pytest.raises(ValueError, match="moe_npu is not an implementation for OtherExperts, so that"):
            accelerate(model)

    def test_hooks_of_accelerate_call_the_original(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        model = qwen("moe_npu")
        add_hook_to_module(model.model.layers[0].mlp.experts, ModelHook())
        assert report(model).is_active

    def test_inside_of_wrappers(self) -> None:
        model = torch.compile(qwen("moe_npu"), backend="aot_eager")
        assert report(model).layers[0].name == "_orig_mod.model.layers.0.mlp.experts"
        assert report(model).is_active


class TestLayouts:
    def test_transposed_interleaved_with_bias(self) -> None:
        with torch.device("meta"):
            config = GptOssConfig(**{**SIZES, "num_local_experts": 6, "pad_token_id": None, "eos_token_id": None})
            model = GptOssForCausalLM(config)
        layer = report(model).layers[0]
        order = "" if IS_OLDEST else ", interleaved"  # there, no module says the order of its rows
        assert (layer.layout, layer.num_experts, layer.top_k) == (f"[E, H, 2I]{order}, bias", 6, 2)

    def test_ungated(self) -> None:
        if not hasattr(transformers, "NemotronHConfig"):
            pytest.skip(f"transformers {transformers.__version__} has no Nemotron-H")
        with torch.device("meta"):
            config = transformers.NemotronHConfig(
                vocab_size=96,
                hidden_size=32,
                layers_block_type=["moe", "attention", "moe"],
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                n_routed_experts=6,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                moe_shared_expert_intermediate_size=16,
            )
            model = transformers.NemotronHForCausalLM._from_config(config, experts_implementation="moe_npu")
        result = report(model)
        assert {layer.layout for layer in result.layers} == {"[E, I, H], ungated"}
        assert "layers.{0,2}.mixer.experts" in str(result)
        assert result.is_active

    def test_own_layers(self) -> None:
        router = moe_npu.SoftmaxTopKRouter(64, num_experts=4, top_k=2, norm_topk_prob=True)
        experts = moe_npu.GroupedExperts(4, 64, 64, bias=True, dtype=torch.bfloat16)
        scheme = moe_npu.get_scheme("w8a8")
        plain = moe_npu.GroupedExperts(4, 64, 64, dtype=torch.bfloat16)
        quantized = moe_npu.layers.QuantizedExperts.from_float(plain, scheme)
        model = nn.Sequential(moe_npu.MoE(router, experts), moe_npu.MoE(router, quantized))
        first, second = report(model).layers
        assert (first.name, first.layout, first.top_k) == ("0.experts", "[E, 2I, H], bias", 2)
        assert (second.class_name, second.dtype, second.quantization) == ("QuantizedExperts", "int8", "w8a8")
        assert report(model).is_active
        assert report(model[0]).layers[0].name == "experts"
        assert report(experts).layers[0].name == ""
        assert accelerate(model) == report(model)


class TestUnknownExperts:
    def test_list_of_experts(self) -> None:
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        block.num_experts_per_tok = 2
        layer = report(nn.ModuleDict({"mlp": block})).layers[0]
        assert (layer.name, layer.layout, layer.num_experts, layer.top_k) == ("mlp.experts", "list of 3", 3, 2)
        assert layer.reason.startswith("Module of torch.nn") and not layer.is_active

    def test_stacked_weights(self) -> None:
        class SomeSparseMoeBlock(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.num_local_experts = 3
                self.w1 = nn.Parameter(torch.empty(3, 4, 5))

        with pytest.raises(ValueError, match=r"SomeSparseMoeBlock of tests\.layers\.test_report does not take part"):
            accelerate(nn.Sequential(SomeSparseMoeBlock()))

    def test_models_without_experts(self) -> None:
        with torch.device("meta"):
            config = {k: v for k, v in SIZES.items() if "moe" not in k and "experts" not in k}
            model = LlamaForCausalLM(LlamaConfig(**config))
        assert str(report(model)) == "LlamaForCausalLM has no MoE layers"
        assert not report(model).is_active
        assert report(model).to_dicts() == []


class TestAccelerate:
    def test_multimodal_submodel(self) -> None:
        text = SIZES | {"pad_token_id": None, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
        vision |= {"deepstack_visual_indexes": []}
        with torch.device("meta"):
            model = Qwen3VLMoeForConditionalGeneration._from_config(
                Qwen3VLMoeConfig(text_config=text, vision_config=vision), experts_implementation="eager"
            )
        assert not report(model).is_active
        assert accelerate(model).is_active
        assert len(report(model).layers) == 3

    def test_subclass_defined_elsewhere(self) -> None:
        # transformers looks for its decorator in the source file of the model's class: here it finds none
        class Mine(Qwen3MoeForCausalLM):
            _can_set_experts_implementation_cached_value = None  # of the parent, if that was asked before

        with torch.device("meta"):
            model = Mine._from_config(Qwen3MoeConfig(**SIZES), experts_implementation="eager")
        names = {"__module__": __name__, "_can_set_experts_implementation_cached_value": None}
        model.model.__class__ = type("MineToo", (type(model.model),), names)
        model.set_experts_implementation("moe_npu")
        assert report(model).is_active == IS_OLDEST  # what transformers does alone; 5.0 looks for nothing
        assert accelerate(model).is_active

    def test_twice(self) -> None:
        model = qwen()
        assert accelerate(model) == accelerate(model)
        assert model.config._experts_implementation == "moe_npu"


class TestZero3:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        utils = types.ModuleType("deepspeed.utils")

        def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: list[type]) -> list[nn.Module]:
            calls.append((model, leaf_module_classes))
            return [module for module in model.modules() if isinstance(module, tuple(leaf_module_classes))]

        utils.set_z3_leaf_modules = set_z3_leaf_modules  # type: ignore[attr-defined]
        deepspeed = types.ModuleType("deepspeed")
        deepspeed.utils = utils  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
        monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
        return calls

    def test_marks_the_experts(self, calls: list[Any]) -> None:
        model = qwen()
        assert mark_zero3_leaves(model) == [layer.mlp.experts for layer in model.model.layers]
        assert calls == [(model, [Qwen3MoeExperts])]

    def test_marks_the_block_around_a_plain_list(self, calls: list[Any]) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        mark_zero3_leaves(nn.Sequential(Block(), nn.ModuleList([nn.Linear(2, 2)])))
        assert calls[0][1] == [Block]

    def test_accelerate_marks_for_zero3_only(self, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        accelerate(qwen())
        assert calls == []
        from moe_npu.layers import hf_accelerate

        monkeypatch.setattr(hf_accelerate, "is_deepspeed_zero3_enabled", lambda: True)
        accelerate(qwen())
        assert calls[0][1] == [Qwen3MoeExperts]

    def test_nothing_to_mark(self, calls: list[Any]) -> None:
        with pytest.raises(ValueError, match="Linear has no MoE layers"):
            mark_zero3_leaves(nn.Linear(2, 2))
        assert calls == []


# every class of transformers that may hold experts and that no decorator reaches: a new one must be looked at, and gets
# an entry in UNDECORATED or here
HOLDS_NO_ROUTED_EXPERTS = {
    "aria.AriaSharedExpertsMLP",
    "inkling.InklingSharedExperts",
}
EXPERTS_CLASS = re.compile(r"Experts|ExpertGLU|NaiveMoe|CDMoE|MoA$|SharedExpertsMLP")


def _parts_of_a_known_one(name: str) -> bool:
    """Submodules of layers in UNDECORATED."""
    return name in {"dbrx.DbrxExpertGLU", "jetmoe.JetMoeParallelExperts", "llama4.Llama4TextExperts"}


def _modeling_files() -> list[str]:
    root = transformers.models
    families = [info.name for info in pkgutil.iter_modules(root.__path__) if info.ispkg]
    return [f"{root.__name__}.{family}.modeling_{family}" for family in families]


def test_no_experts_class_of_transformers_is_unknown() -> None:
    decorated, undecorated = set(), set()
    for name in _modeling_files():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        source = Path(spec.origin).read_text()
        if not re.search(r"class \w*([eE]xpert|M[oO][eE]|MoA)", source):
            continue
        family, module = name.split(".")[2], importlib.import_module(name)
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == name:
                if _interface(cls) is not None:
                    decorated.add(f"{family}.{cls.__name__}")
                elif EXPERTS_CLASS.search(cls.__name__):
                    undecorated.add(f"{family}.{cls.__name__}")
        assert len(re.findall(rf"^@{use_experts_implementation.__name__}", source, re.M)) == sum(
            known.startswith(f"{family}.") for known in decorated
        )
    if IS_OLDEST:
        pytest.skip("what is listed here is of later releases")
    assert len(decorated) >= 65
    blocks = {name for name in UNDECORATED if not EXPERTS_CLASS.search(name)}  # found by their experts or by name only
    assert blocks == {"llama4.Llama4TextMoe", "jetmoe.JetMoeMoE"}
    unknown = {name for name in undecorated - HOLDS_NO_ROUTED_EXPERTS if not _parts_of_a_known_one(name)}
    assert unknown == set(UNDECORATED) - blocks


class TestWhatReallyRuns:
    """Changes that leave the configuration as it is, or that only look like a change."""

    def test_the_class_of_the_block_was_patched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        block = type(qwen().model.layers[0].mlp)
        monkeypatch.setattr(block, "forward", lambda self, hidden_states: hidden_states)
        assert not any(layer.is_active for layer in report(qwen("moe_npu")).layers)
        with pytest.raises(ValueError, match=r"replaced by .*lambda"):
            accelerate(qwen())

    @pytest.mark.parametrize("how", ["module", "forward"])
    def test_compiled_experts_are_active(self, how: str) -> None:
        model = qwen("moe_npu")
        for layer in model.model.layers:
            if how == "module":
                layer.mlp.experts = torch.compile(layer.mlp.experts, backend="eager")
            else:
                layer.mlp.experts.forward = torch.compile(layer.mlp.experts.forward, backend="eager")
        assert report(model).is_active
        assert accelerate(model).is_active

    def test_a_name_that_nobody_registered(self) -> None:
        model = qwen()
        model.config._experts_implementation = "nope"
        assert {layer.implementation for layer in report(model).layers} == {"an error"}
        assert accelerate(model).is_active

    def test_quantized_experts_with_another_implementation(self) -> None:
        model = qwen("moe_npu")
        scheme = moe_npu.get_scheme("w8a8")
        for layer in model.model.layers:
            _quantize_parameters(layer.mlp.experts, scheme)
        assert report(model).is_active
        model.set_experts_implementation("eager")
        (reason,) = {layer.reason for layer in report(model).layers}
        assert reason == (
            "experts_implementation 'eager' cannot multiply weights in w8a8, so that its forward raises an error; "
            "moe_npu.accelerate(model) changes it"
        )

    def test_experts_alone(self) -> None:
        assert "(itself)" in str(report(qwen("moe_npu").model.layers[0].mlp.experts))

    def test_shared_experts_are_not_a_layer(self) -> None:
        class SomeSharedExperts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(2, 4, 4))

        assert not report(nn.Sequential(SomeSharedExperts())).layers
