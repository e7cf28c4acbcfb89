"""The "moe_npu" experts implementation of transformers against the models' own eager code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_npu
from moe_npu.layers._routed_layers import is_transformers_experts
from moe_npu.layers.lora import experts_modules

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, intermediate_size=32, num_experts=6)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=6)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=16, num_experts=6)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            head_dim=8,
            intermediate_size=16,
            num_local_experts=6,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ),
}


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    torch.manual_seed(0)
    model = FAMILIES[request.param]()
    with torch.no_grad():  # initial biases are zero and initial weights tiny: make every term count
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    yield model


def loss_and_grads(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_eager_forward_and_backward(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model.to(dtype)
    ids = torch.randint(0, 96, (2, 17))
    model.set_experts_implementation("eager")
    expected, expected_grads = loss_and_grads(model, ids)
    model.set_experts_implementation("moe_npu")
    assert model.config._experts_implementation == "moe_npu"
    actual, grads = loss_and_grads(model, ids)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert (actual - expected).norm() <= bound * expected.norm()
    for name, grad in grads.items():
        # where every gradient is rounding noise (weights cancel exactly), there is nothing to compare
        assert (grad - expected_grads[name]).norm() <= bound * expected_grads[name].norm() + 1e-9, name


def test_equals_eager_under_autocast(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 96, (2, 9))
    results = {}
    for implementation in ("eager", "moe_npu"):
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[implementation] = model(input_ids=ids).logits
    difference = (results["eager"] - results["moe_npu"]).float().norm()
    assert difference <= 3e-2 * results["eager"].float().norm()


def test_generates_what_eager_generates(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 96, (1, 5))
    texts = []
    for implementation in ("eager", "moe_npu"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert texts[0] == texts[1]


def test_compiles_to_one_graph(model: PreTrainedModel) -> None:
    model.set_experts_implementation("moe_npu")
    experts = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    x, ids = torch.randn(7, 32), torch.randint(0, 6, (7, 2))
    weights = torch.rand(7, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights))


def experts_module(**flags: bool) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=4)
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, value in flags.items():
        setattr(experts, name, value)
    return experts


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_routing_weights_in_another_dtype(weights_dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    experts = experts_module().to(torch.bfloat16)
    x = torch.randn(9, 16, dtype=torch.bfloat16)
    ids, weights = torch.randint(0, 4, (9, 2)), torch.rand(9, 2, dtype=weights_dtype)
    experts.config._experts_implementation = "eager"
    expected = experts(x, ids, weights)
    experts.config._experts_implementation = "moe_npu"
    actual = experts(x, ids.to(ids_dtype), weights)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() <= 2e-2 * expected.norm()


def test_ungated_experts_with_a_norm() -> None:
    """The flags has_gate=False and has_post_expert_norm, which none of the models above sets."""
    experts = experts_module(has_gate=False, has_post_expert_norm=True, _is_expert_parallel=True)
    experts.up_proj = nn.Parameter(torch.randn(4, 8, 16))
    experts.post_expert_norm = nn.RMSNorm(16)
    x, ids, weights = torch.randn(6, 16), torch.randint(0, 5, (6, 2)), torch.rand(6, 2)
    experts.config._experts_implementation = "moe_npu"
    actual = experts(x, ids, weights)
    expected = torch.zeros_like(x)
    for t in range(6):
        for k in range(2):
            if ids[t, k] < 4:
                expert = ids[t, k]
                y = experts.down_proj[expert] @ experts.act_fn(experts.up_proj[expert] @ x[t])
                expected[t] += weights[t, k] * experts.post_expert_norm(y)
    torch.testing.assert_close(actual, expected)


def test_gradients_come_in_the_layout_of_the_parameters() -> None:
    experts = experts_module()
    experts.config._experts_implementation = "moe_npu"
    experts(torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad.stride() == parameter.stride()


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout.strip()


REGISTERED = "print('moe_npu' in __import__('transformers.integrations.moe', fromlist=['x']).ALL_EXPERTS_FUNCTIONS)"


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import moe_npu, transformers", id="ours-first"),
        pytest.param("import transformers, moe_npu", id="transformers-first"),
        pytest.param("import transformers.integrations.moe; import moe_npu", id="interface-loaded-already"),
        pytest.param("import moe_npu; from transformers import MixtralForCausalLM", id="through-a-model"),
        pytest.param("import moe_npu.layers.hf", id="explicitly"),
    ],
)
def test_registered_whichever_is_imported_first(imports: str) -> None:
    assert run(f"{imports}; {REGISTERED}") == "True"


def test_importing_us_does_not_import_transformers() -> None:
    assert run("import sys, moe_npu; print('transformers' in sys.modules)") == "False"


def test_the_hook_leaves_the_module_as_a_regular_import_does() -> None:
    code = (
        "import moe_npu, transformers.integrations.moe as m, inspect\n"
        "print(type(m.__spec__.loader).__name__, type(m.__loader__).__name__, 'Experts' in inspect.getsource(m))"
    )
    assert run(code) == "SourceFileLoader SourceFileLoader True"


def test_an_old_transformers_is_left_as_it_is(tmp_path: Path) -> None:
    """Whoever uses our operators only must not lose a transformers that our integration does not know."""
    package = tmp_path / "transformers" / "integrations"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.57.0'")
    (package / "__init__.py").touch()
    (package / "moe.py").write_text("usable = True")
    code = (
        f"import sys, warnings; sys.path.insert(0, {str(tmp_path)!r}); import moe_npu\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); import transformers.integrations.moe as m\n"
        "print(m.usable, *[w.message for w in caught])"
    )
    said = run(code)
    assert said.startswith("True experts_implementation='moe_npu' is not available: it needs transformers>=5.0, but ")
    assert "transformers 4.57.0 is installed" in said
    assert "moe_npu.ops and moe_npu.layers work without" in said


def test_gradient_checkpointing_changes_nothing() -> None:
    model = FAMILIES["qwen3_moe"]().train()
    model.set_experts_implementation("moe_npu")
    ids = torch.randint(0, 96, (2, 9))
    expected = loss_and_grads(model, ids)[1]
    # the newer name, of which the older one warns
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for name, grad in loss_and_grads(model, ids)[1].items():
        torch.testing.assert_close(grad, expected[name])


def test_an_unknown_implementation_is_still_refused() -> None:
    with pytest.raises(ValueError, match='"moe-npu"'):
        FAMILIES["mixtral"]().set_experts_implementation("moe-npu")


def test_quantizing_at_load_is_refused(tmp_path: Path) -> None:
    from moe_npu.layers.hf_quantizer import MoeNpuQuantizationConfig

    FAMILIES["qwen3_moe"]().save_pretrained(tmp_path)
    config = MoeNpuQuantizationConfig(scheme="w8a8", format_version=1)
    with pytest.raises(ValueError, match="moe-npu quantize"):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_public_names() -> None:
    assert moe_npu.__version__


NEED_TRANSFORMERS = ["Report", "accelerate", "mark_zero3_leaves", "report"]
WITHOUT_TRANSFORMERS = """
import sys

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
import moe_npu
"""


@pytest.mark.parametrize("name", NEED_TRANSFORMERS)
def test_names_that_need_transformers(name: str) -> None:
    assert getattr(moe_npu, name).__name__ == name
    assert getattr(moe_npu, name).__doc__
    assert name not in moe_npu.__all__


def test_without_transformers_these_names_say_what_to_install() -> None:
    code = (
        f"for name in {NEED_TRANSFORMERS}:\n"
        "    try:\n        getattr(moe_npu, name)\n"
        "    except ImportError as error:\n        print(error)"
    )
    said = run(WITHOUT_TRANSFORMERS + code).splitlines()
    assert len(said) == len(NEED_TRANSFORMERS)
    for name, line in zip(NEED_TRANSFORMERS, said, strict=True):
        assert line.startswith(f"moe_npu.{name} needs transformers (No module named 'transformers'): ")
        assert line.endswith(": pip install 'moe-npu[transformers]'")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moe_npu' has no attribute 'acelerate'"):
        _ = moe_npu.acelerate


def test_import_star_needs_no_transformers() -> None:
    assert run(WITHOUT_TRANSFORMERS + "from moe_npu import *; print(MoE.__name__)") == "MoE"
    assert run("import sys; from moe_npu import *; print('transformers' in sys.modules)") == "False"


def test_experts_are_found_by_their_attributes() -> None:
    experts = experts_module()
    for flag in ("has_gate", "has_post_expert_norm", "is_concatenated", "_is_expert_parallel"):
        vars(experts).pop(flag, None)  # the first releases do not set them
    assert is_transformers_experts(experts)
    assert [module for _, module in experts_modules(nn.Sequential(experts, nn.Linear(2, 2)))] == [experts]
    del experts.has_bias
    assert not is_transformers_experts(experts)
    assert not is_transformers_experts(moe_npu.GroupedExperts(2, 4, 4))


def test_accelerate_says_so_where_the_configuration_is_set_back() -> None:
    class Stubborn(Qwen3MoeConfig):
        """A configuration that does not let the implementation be changed."""

        def __setattr__(self, key: str, value: object) -> None:
            super().__setattr__(key, "eager" if key.startswith("_experts_implementation") else value)

    model = nn.Sequential(experts_module())
    model[0].config = Stubborn()
    with pytest.raises(RuntimeError, match=r"1 of its 1 MoE layers do not run it[\s\S]*  0 \(Qwen3MoeExperts\): exp"):
        moe_npu.accelerate(model)


def test_a_guess_covers_no_known_layer() -> None:
    class Networks(moe_npu.GroupedExperts):
        """Experts by their base class, not by their name."""

    class SomeMoE(nn.Module):
        """A MoE layer by its name."""

        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 2
            self.inner = nn.Sequential(Networks(2, 4, 4))
            self.inner1 = nn.Linear(4, 4)

    class OtherMoE(nn.Module):
        """A MoE layer by its name only."""

        num_experts = 2

    model = nn.ModuleDict({"a": SomeMoE(), "ab": OtherMoE()})
    assert [layer.name for layer in moe_npu.report(model).layers] == ["a.inner.0", "ab"]
