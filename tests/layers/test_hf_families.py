"""Every experts class that the installed transformers decorates, through "moe_npu", against the class's own code.

The yardstick is the class itself: its eager code in float64 is exact, and ours must not be further from it than what
transformers itself computes in the same precision.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_npu.layers import hf_gates
from moe_npu.layers.hf_gates import SWIGLU, FusedGate, fused_gate
from tests.helpers.hf_experts import (
    CONFIG,
    E,
    H,
    K,
    T,
    build,
    decorated_classes,
    exact_results,
    inputs,
    results,
    structure,
)

NAMES = decorated_classes()
KNOWN = """
    afmoe.AfmoeExperts aria.AriaExperts axk1.AXK1Experts axk2.AXK2Experts bailing_hybrid.BailingHybridExperts
    beam.BeamExperts cohere2_moe.Cohere2MoeExperts deepseek_ocr2.DeepseekOcr2TextExperts deepseek_v2.DeepseekV2Experts
    deepseek_v3.DeepseekV3Experts deepseek_v3.DeepseekV3NaiveMoe deepseek_v32.DeepseekV32Experts
    deepseek_v4.DeepseekV4Experts diffusion_gemma.DiffusionGemmaTextExperts dots1.Dots1Experts dots1.Dots1NaiveMoe
    dots3_note.Dots3NoteExperts ernie4_5_moe.Ernie4_5_MoeExperts ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts
    ernie4_5_vl_moe.Ernie4_5_VL_MoeMoeExperts exaone_moe.ExaoneMoeExperts flex_olmo.FlexOlmoExperts flint.FlintExperts
    gemma4.Gemma4TextExperts glm4_moe.Glm4MoeExperts glm4_moe.Glm4MoeNaiveMoe glm4_moe_lite.Glm4MoeLiteExperts
    glm4_moe_lite.Glm4MoeLiteNaiveMoe glm4v_moe.Glm4vMoeTextExperts glm4v_moe.Glm4vMoeTextNaiveMoe
    glm5_next.Glm5NextTextExperts glm_moe_dsa.GlmMoeDsaExperts glm_moe_dsa.GlmMoeDsaNaiveMoe gpt_oss.GptOssExperts
    granitemoe.GraniteMoeExperts granitemoe_swa.GraniteMoeSWAExperts granitemoehybrid.GraniteMoeHybridExperts
    granitemoeshared.GraniteMoeSharedExperts hunyuan_v1_moe.HunYuanMoEV1Experts hy_v3.HYV3Experts hy_v4.HYV4Experts
    hy_v4_vl.HYV4VLExperts inkling.InklingExperts inkling2.Inkling2Experts inkling2_loop.Inkling2LoopExperts
    jamba.JambaExperts kimi_linear.KimiLinearExperts kolibri1.Kolibri1Experts laguna.LagunaExperts
    lara_mini.LaraMiniExperts lfm2_moe.Lfm2MoeExperts mellum.MellumExperts mimo_v2_flash.MiMoV2FlashExperts
    minimax.MiniMaxExperts minimax_m2.MiniMaxM2Experts minimax_m3_vl.MiniMaxM3VLExperts mistral4.Mistral4Experts
    mistral4.Mistral4NaiveMoe mistral_large4.MistralLarge4TextExperts mixtral.MixtralExperts
    muse_spark.MuseSparkExperts nemotron_h.NemotronHExperts olmoe.OlmoeExperts
    openai_privacy_filter.OpenAIPrivacyFilterExperts phimoe.PhimoeExperts qwen2_moe.Qwen2MoeExperts
    qwen3_5_moe.Qwen3_5MoeExperts qwen3_moe.Qwen3MoeExperts qwen3_next.Qwen3NextExperts
    qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts
    qwen3_vl_moe.Qwen3VLMoeTextExperts qwen4_exp.Qwen4ExpTextExperts solar_open.SolarOpenExperts
    solar_open.SolarOpenNaiveMoe unlimited_ocr.UnlimitedOcrTextExperts zaya.ZayaExperts
""".split()  # noqa: SIM905 - of transformers 5.0 to 5.24

EVEN = range(0, E, 2)
ALPHA = CONFIG["swiglu_alpha"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_classes_are_known() -> None:
    new = sorted(set(NAMES) - set(KNOWN))
    print(f"not in transformers {transformers.__version__}: {sorted(set(KNOWN) - set(NAMES))}")
    assert not new, f"new in transformers {transformers.__version__}: {new}; the tests below ran for them: add to KNOWN"


# ---------------------------------------------------------------- numbers


def assert_as_exact_as_transformers(
    actual: dict[str, Tensor], exact: dict[str, Tensor], theirs: list[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Not further from `exact` than the worse of `theirs`, but for chance and one rounding to `dtype`.

    Each norm is that of T * K independent errors or more, of which the ratio of two varies by 1 / sqrt(T * K): five
    times that is no chance.
    """
    factor = 1 + 5 / math.sqrt(T * K)
    for key, expected in exact.items():
        error = (actual[key].double() - expected).norm()
        yardstick = max((each[key].double() - expected).norm() for each in theirs)
        rounding = torch.finfo(dtype).eps / 2 * expected.norm()
        assert error <= factor * yardstick + rounding, f"{key}: {error:.3g}, transformers {yardstick:.3g}"


@pytest.mark.parametrize("in_use", [range(E), EVEN], ids=["all-experts", "half-of-the-experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_gradients(name: str, dtype: torch.dtype, in_use: range) -> None:
    arguments = inputs(dtype, in_use)
    experts = build(name, dtype)
    actual = results(experts, arguments, "moe_npu")
    assert actual["y"].dtype == dtype
    # batched_mm too: a class whose eager code computes in float32 does so in none of the other implementations
    theirs = [results(experts, arguments, each) for each in ("eager", "batched_mm")]
    assert_as_exact_as_transformers(actual, exact_results(name, arguments), theirs, dtype)
    for key, parameter in experts.named_parameters():
        assert actual[key].stride() == parameter.stride()
        if in_use is EVEN and parameter.dim() > 1:
            assert not actual[key][1::2].any()


def test_autocast(name: str) -> None:
    arguments = inputs(torch.float32)
    experts = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(experts, arguments, "moe_npu")
        theirs = [results(experts, arguments, each) for each in ("eager", "batched_mm")]
    assert_as_exact_as_transformers(actual, exact_results(name, arguments), theirs, torch.bfloat16)


def test_absent_experts(name: str) -> None:
    """Ids of E and beyond belong to experts elsewhere: no result, no gradient, as if their weights were zero."""
    hidden_states, ids, weights = inputs(torch.float32)
    is_absent = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    experts = build(name)
    here = [hidden_states, ids, weights.detach().masked_fill(is_absent, 0).requires_grad_()]
    expected = results(experts, here, "eager")
    expected["weights"] = expected["weights"].masked_fill(is_absent, 0)
    experts._is_expert_parallel = True
    actual = results(experts, [hidden_states, ids.masked_fill(is_absent, E), weights], "moe_npu")
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], msg=lambda message, key=key: f"{key}: {message}")


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(name: str, num_tokens: int) -> None:
    arguments = inputs(torch.float32, num_tokens=num_tokens)
    experts = build(name)
    actual = results(experts, arguments, "moe_npu")
    if num_tokens == 0:  # eager has no graph then
        assert actual["y"].shape == (0, H)
        assert not any(value.any() for value in actual.values())
        return
    expected = results(experts, arguments, "eager")
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key])


def test_gradient_checkpointing(name: str) -> None:
    arguments = inputs(torch.float32)
    experts = build(name)
    expected = results(experts, arguments, "moe_npu")
    hf_gates._recognize_once.cache_clear()  # what the first call saves must be what the recomputation saves

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.config = experts, experts.config

        def forward(self, *arguments: Tensor) -> Tensor:
            return checkpoint(self.experts, *arguments, use_reentrant=False)

    actual = results(Checkpointed(), arguments, "moe_npu")
    for key in expected:
        assert torch.equal(actual[key if key in ("y", "hidden_states", "weights") else f"experts.{key}"], expected[key])


def test_first_call_compiled_one_class_of_each_structure() -> None:
    seen: set[tuple[str, ...]] = set()
    for name in NAMES:
        if structure(name) in seen:
            continue
        seen.add(structure(name))
        arguments = inputs(torch.float32)
        experts = build(name)
        torch._dynamo.reset()
        hf_gates._recognize_once.cache_clear()
        gates: set[str] = set()

        def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor], gates: set[str] = gates) -> Any:
            gates.update(gate_name(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return lookup_backend("aot_eager")(graph, example_inputs)

        actual = results(torch.compile(experts, fullgraph=True, backend=backend), arguments, "moe_npu")
        with Ran() as eager:
            expected = results(experts, arguments, "moe_npu")
        for key in expected:
            same = actual[key if key in ("y", "hidden_states", "weights") else f"_orig_mod.{key}"]
            torch.testing.assert_close(same, expected[key], msg=lambda message, name=name: f"{name}: {message}")
        assert gates - {""} == eager.gates, name


# ---------------------------------------------------------------- gates


def gate_name(operator: Any) -> str:
    """Of a fused gate, forward; empty for any other operator."""
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else ""
    return name.removeprefix("moe_npu::") if name.startswith("moe_npu::") and name.endswith("swiglu") else ""


class Ran(TorchDispatchMode):
    """The gates among the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gates |= {gate_name(func)} - {""}
        return func(*args, **(kwargs or {}))


# alpha, name of the limit, bias, interleaved
FUSED = {
    "afmoe.AfmoeExperts": SWIGLU,
    "aria.AriaExperts": SWIGLU,
    "beam.BeamExperts": SWIGLU,
    "deepseek_v4.DeepseekV4Experts": (1.0, "limit", 0.0, False),
    "glm5_next.Glm5NextTextExperts": (1.0, "swiglu_limit", 0.0, False),
    "gpt_oss.GptOssExperts": (ALPHA, "limit", 1.0, True),
    "hy_v4.HYV4Experts": (1.0, "swiglu_limit", 0.0, False),
    "inkling2.Inkling2Experts": None,
    "lfm2_moe.Lfm2MoeExperts": SWIGLU,
    "minimax_m3_vl.MiniMaxM3VLExperts": (ALPHA, "swiglu_limit", 1.0, False),
    "mixtral.MixtralExperts": SWIGLU,
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": (ALPHA, "limit", 1.0, False),
}


@pytest.mark.parametrize("known", [each for each in FUSED if each in NAMES])
def test_recognized_gates(known: str) -> None:
    experts, gate = build(known), FUSED[known]
    if gate not in (None, SWIGLU):
        alpha, limit, bias, interleaved = gate
        gate = FusedGate(alpha, getattr(experts, limit), bias, interleaved)
    assert fused_gate(experts) == gate
    with Ran() as ran:
        results(experts, inputs(torch.float32), "moe_npu")
    assert ran.gates == (set() if gate is None else {"npu_swiglu" if gate == SWIGLU else "npu_clipped_swiglu"})


def test_layouts_that_no_class_has() -> None:
    """An interleaved SwiGLU, and a clipped one of gpt-oss whose limit is beyond every value."""
    experts = build("qwen3_moe.Qwen3MoeExperts")

    class Interleaved(type(experts)):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return F.silu(gate_up[..., ::2]) * gate_up[..., 1::2]

    experts.__class__ = Interleaved
    alpha, limit, bias, interleaved = fused_gate(experts)
    assert (alpha, bias, interleaved) == (1.0, 0.0, True)
    assert limit > 1e38
    arguments = inputs(torch.float32)
    experts.config._experts_implementation = "moe_npu"
    hidden_states, ids, weights = arguments
    gate_up = torch.einsum("th,tkih->tki", hidden_states, experts.gate_up_proj[ids])
    rows = torch.einsum("tki,tkhi->tkh", F.silu(gate_up[..., ::2]) * gate_up[..., 1::2], experts.down_proj[ids])
    torch.testing.assert_close(experts(*arguments), (rows * weights.unsqueeze(-1)).sum(1))


GPT_OSS, QWEN = "gpt_oss.GptOssExperts", "qwen3_moe.Qwen3MoeExperts"


def gpt_oss_gate(
    self: Any, gate_up: Tensor, *, slope: float = 1.0, lower: float = -math.inf, bias: float = 1.0, swap: bool = False
) -> Tensor:
    a, b = gate_up[..., ::2], gate_up[..., 1::2]
    if swap:
        a, b = b, a
    a, b = a.clamp(lower, self.limit), b.clamp(-self.limit, self.limit)
    return a * torch.sigmoid(a * self.alpha * slope) * (b + bias)


CHANGES = {
    "slope": {"slope": 1.001},
    "lower-bound": {"lower": -2.0},
    "bias": {"bias": 1.001},
    "other-half": {"swap": True},
}


def with_gate(name: str, gate: Any, **config: Any) -> nn.Module:
    experts = build(name, **config)
    experts.__class__ = type("Changed", (type(experts),), {"_apply_gate": gate})
    return experts


def test_a_gate_is_recognized_by_what_it_computes() -> None:
    assert fused_gate(with_gate(GPT_OSS, lambda self, x: gpt_oss_gate(self, x))) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_a_gate_that_a_release_changed_is_run_as_it_is(change: str) -> None:
    experts = with_gate(GPT_OSS, lambda self, x: gpt_oss_gate(self, x, **CHANGES[change]))
    experts.limit = 100.0
    assert fused_gate(experts) is None
    arguments = inputs(torch.float32)
    expected, actual = (results(experts, arguments, each) for each in ("eager", "moe_npu"))
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key])


def test_a_parameter_of_another_name_is_never_guessed() -> None:
    def gate(self: Any, gate_up: Tensor) -> Tensor:
        a, b = gate_up.chunk(2, -1)
        return F.silu(a.clamp(max=self.another_limit)) * b

    experts = with_gate(QWEN, gate)
    experts.another_limit = 3.0
    assert fused_gate(experts) is None


def test_the_first_call_may_be_under_a_mode_that_dynamo_skips() -> None:
    experts = build(QWEN)
    experts.config._experts_implementation = "moe_npu"
    torch._dynamo.reset()
    hf_gates._recognize_once.cache_clear()
    with Ran() as ran:
        torch.compile(experts, backend="eager")(*inputs(torch.float32))
    assert ran.gates == {"npu_swiglu"}


def test_parameters_that_change_are_seen_also_in_compiled_code() -> None:
    arguments = inputs(torch.float32)
    experts = build("deepseek_v4.DeepseekV4Experts" if "deepseek_v4.DeepseekV4Experts" in NAMES else GPT_OSS)
    experts.config._experts_implementation = "moe_npu"
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    outputs = []
    for limit in (0.8, 0.1, 0.4):
        experts.limit = limit
        torch.testing.assert_close(compiled(*arguments), experts(*arguments))
        outputs.append(experts(*arguments))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("act_fn", [nn.GELU(), F.gelu, nn.ReLU(), lambda x: F.silu(x) * 1.5])
def test_another_activation_is_seen_also_in_compiled_code(act_fn: Any) -> None:
    arguments = inputs(torch.float32)
    experts = build(QWEN)
    experts.config._experts_implementation = "moe_npu"
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    compiled(*arguments)
    del experts.act_fn  # a function cannot take the place of a module otherwise
    experts.act_fn = act_fn
    assert fused_gate(experts) is None
    actual = compiled(*arguments)
    torch.testing.assert_close(actual, experts(*arguments))
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(actual, experts(*arguments))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "swish", "tanh", "quick_gelu"])
def test_activations_by_name(act: str) -> None:
    experts = build(QWEN, hidden_act=act)
    assert (fused_gate(experts) == SWIGLU) == (act in ("silu", "swish"))
    expected, actual = (results(experts, inputs(torch.float32), each) for each in ("eager", "moe_npu"))
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key])


# ---------------------------------------------------------------- weights are read where they are

LAYOUTS = {
    "concatenated": QWEN,
    "transposed": "aria.AriaExperts",
    "interleaved-biased": GPT_OSS,
    "ungated": "nemotron_h.NemotronHExperts",
}


class ReadsOf(TorchDispatchMode):
    """Which operators, views aside, get the memory of each parameter, forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
        self.reads: dict[str, list[str]] = {name: [] for name in self.names.values()}
        self.largest_copy = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() != "aten::detach":
            for argument in args:
                if isinstance(argument, Tensor) and argument.data_ptr() in self.names:
                    self.reads[self.names[argument.data_ptr()]].append(func.name())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [layout for layout, name in LAYOUTS.items() if name in NAMES])
def test_only_grouped_matmuls_read_weights(layout: str, dtype: torch.dtype) -> None:
    experts = build(LAYOUTS[layout], dtype)
    with ReadsOf(experts) as seen:
        grads = results(experts, inputs(dtype), "moe_npu")
    for name, parameter in experts.named_parameters():
        # once forward, once for the gradient of the rows
        times = 1 if name.endswith("bias") else 2
        assert seen.reads[name] == ["moe_npu::grouped_mm"] * times, name
        assert grads[name].stride() == parameter.stride()


def test_a_copy_would_be_seen() -> None:
    experts = build(QWEN)
    with ReadsOf(experts) as seen:
        experts.gate_up_proj.mT.contiguous()
        experts.down_proj.to(torch.bfloat16)
    assert seen.reads == {"gate_up_proj": ["aten::clone"], "down_proj": ["aten::_to_copy"]}


def copied_in_place(experts: nn.Module, new: dict[str, Tensor]) -> None:
    for name, parameter in experts.named_parameters():
        parameter.data.copy_(new[name])


def replaced_data(experts: nn.Module, new: dict[str, Tensor]) -> None:
    for name, parameter in experts.named_parameters():
        parameter.data = new[name].clone()


def replaced_parameters(experts: nn.Module, new: dict[str, Tensor]) -> None:
    for name in dict(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(new[name].clone()))


def loaded(experts: nn.Module, new: dict[str, Tensor]) -> None:
    experts.load_state_dict(new)


def loaded_by_assignment(experts: nn.Module, new: dict[str, Tensor]) -> None:
    experts.load_state_dict(new, assign=True)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("update", [copied_in_place, replaced_data, replaced_parameters, loaded, loaded_by_assignment])
def test_new_weights_are_used_at_the_next_call(update: Any, is_compiled: bool) -> None:
    arguments = inputs(torch.float32)
    experts = build(GPT_OSS)
    experts.config._experts_implementation = "moe_npu"
    torch._dynamo.reset()
    call = torch.compile(experts, fullgraph=True, backend="aot_eager") if is_compiled else experts
    before = call(*arguments)
    update(experts, {name: parameter.detach() * 0.5 for name, parameter in experts.named_parameters()})
    after = call(*arguments)
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(after, experts(*arguments))
    assert not torch.allclose(after, before)
