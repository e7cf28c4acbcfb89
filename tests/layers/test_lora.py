"""Low-rank adapters of experts: forward, gradients, merging, and adapters of PEFT in both directions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moe_npu
from moe_npu.layers._lora import lora_settings
from moe_npu.layers.hf_lora import load_peft_adapter, save_peft_adapter
from moe_npu.layers.lora import (
    add_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from moe_npu.layers.quantized_experts import set_quantized_weight
from tests.helpers.assertions import assert_bits_equal, assert_close

E, H, INTER, RANK = 5, 32, 24, 3
COUNTS = [4, 0, 1, 7, 3]  # one expert has no rows
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fill_b(module: nn.Module) -> None:
    """B is zero at first, so that an adapter does nothing: make it count."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def make_experts(dtype: torch.dtype = F32, *, rank: int = RANK, alpha: float = 6, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    experts = moe_npu.GroupedExperts(E, H, INTER, dtype=dtype, **options)
    add_lora(experts, rank=rank, alpha=alpha)
    fill_b(experts)
    return experts


def reference(experts: nn.Module, rows: Tensor, scaling: float, act: Callable[[Tensor], Tensor]) -> Tensor:
    """In float64, expert by expert, with the weights that the adapters stand for."""
    parameters = {name: value.detach().double() for name, value in experts.named_parameters()}

    def weight(name: str, expert: int) -> Tensor:
        product = parameters[f"{name}_lora_B"][expert] @ parameters[f"{name}_lora_A"][expert]
        return parameters[name][expert] + scaling * product

    results = []
    up = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    for expert, part in enumerate(rows.detach().double().split(COUNTS)):
        hidden = part @ weight(up, expert).T
        if f"{up}_bias" in parameters:
            hidden = hidden + parameters[f"{up}_bias"][expert]
        result = act(hidden) @ weight("down_proj", expert).T
        if "down_proj_bias" in parameters:
            result = result + parameters["down_proj_bias"][expert]
        results.append(result)
    return torch.cat(results)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class TestForward:
    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("options", [{}, {"bias": True}, {"has_gate": False, "activation": "relu"}])
    def test_is_that_of_the_full_weights(self, options: dict[str, Any], use_rslora: bool) -> None:
        torch.manual_seed(0)
        experts = moe_npu.GroupedExperts(E, H, INTER, **options)
        add_lora(experts, rank=RANK, alpha=6, use_rslora=use_rslora)
        fill_b(experts)
        rows = torch.randn(sum(COUNTS), H)
        act = torch.relu if "has_gate" in options else swiglu
        expected = reference(experts, rows, 6 / 3**0.5 if use_rslora else 2.0, act)
        assert_close(experts(rows, torch.tensor(COUNTS)), expected, reduction=4 * H)

    def test_changes_nothing_at_first(self) -> None:
        experts = moe_npu.GroupedExperts(E, H, INTER)
        rows, counts = torch.randn(sum(COUNTS), H), torch.tensor(COUNTS)
        before = experts(rows, counts)
        add_lora(experts, rank=RANK, alpha=6)
        assert_bits_equal(experts(rows, counts), before)
        for name in ("gate_up_proj_lora_A", "down_proj_lora_A"):
            a = experts.get_parameter(name)
            assert 0.5 * a.size(2) ** -0.5 < a.abs().max() <= a.size(2) ** -0.5

    @pytest.mark.parametrize("rank", [1, 3, 16])
    def test_no_rows(self, rank: int) -> None:
        experts = make_experts(rank=rank)
        result = experts(torch.randn(0, H), torch.zeros(E, dtype=torch.int64))
        assert result.shape == (0, H)
        result.sum().backward()
        assert all(not parameter.grad.any() for parameter in lora_parameters(experts))

    def test_computes_in_the_dtype_of_the_base(self) -> None:
        experts = make_experts(BF16)
        assert {parameter.dtype for parameter in lora_parameters(experts)} == {F32}
        rows = torch.randn(sum(COUNTS), H, dtype=BF16)
        result = experts(rows, torch.tensor(COUNTS))
        assert result.dtype == BF16
        expected = reference(experts, rows, 2.0, swiglu)
        assert (result.double() - expected).norm() <= 2e-2 * expected.norm()
        result.float().sum().backward()
        assert {parameter.grad.dtype for parameter in lora_parameters(experts)} == {F32}

    def test_under_autocast(self) -> None:
        experts = make_experts()
        rows = torch.randn(sum(COUNTS), H)
        with torch.autocast("cpu", dtype=BF16):
            result = experts(rows, torch.tensor(COUNTS))
        assert result.dtype == BF16
        assert_bits_equal(result, copy.deepcopy(experts).to(BF16)(rows.to(BF16), torch.tensor(COUNTS)))

    def test_dropout_is_for_training(self) -> None:
        torch.manual_seed(0)
        experts = moe_npu.GroupedExperts(E, H, INTER)
        add_lora(experts, rank=RANK, alpha=6, dropout=0.5)
        fill_b(experts)
        rows, counts = torch.randn(sum(COUNTS), H), torch.tensor(COUNTS)
        assert not torch.equal(experts(rows, counts), experts(rows, counts))
        experts.eval()
        assert_close(experts(rows, counts), reference(experts, rows, 2.0, swiglu), reduction=4 * H)

    def test_compiles_to_one_graph(self) -> None:
        experts = make_experts(bias=True)
        rows, counts = torch.randn(sum(COUNTS), H), torch.tensor(COUNTS)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(rows, counts), experts(rows, counts))

    def test_on_meta(self) -> None:
        experts = moe_npu.GroupedExperts(E, H, INTER, device="meta")
        add_lora(experts, rank=RANK, alpha=6)
        assert experts(torch.empty(9, H, device="meta"), torch.empty(E, dtype=torch.int64, device="meta")).shape == (
            9,
            H,
        )


class TestGradients:
    def test_are_right(self) -> None:
        experts = make_experts(F64)
        rows = torch.randn(sum(COUNTS), H, dtype=F64, requires_grad=True)
        parameters = {name: value for name, value in experts.named_parameters() if value.requires_grad}
        assert set(parameters) == {f"{w}_lora_{s}" for w in ("gate_up_proj", "down_proj") for s in "AB"}

        def forward(rows: Tensor, *values: Tensor) -> Tensor:
            replaced = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(experts, replaced, (rows, torch.tensor(COUNTS)))

        assert torch.autograd.gradcheck(forward, (rows, *parameters.values()), fast_mode=True)

    def test_base_stays(self) -> None:
        experts = make_experts()
        before = {name: value.clone() for name, value in experts.state_dict().items()}
        optimizer = torch.optim.SGD(lora_parameters(experts), lr=0.1)
        experts(torch.randn(sum(COUNTS), H), torch.tensor(COUNTS)).square().sum().backward()
        optimizer.step()
        for name, value in experts.state_dict().items():
            assert torch.equal(value, before[name]) == ("lora" not in name), name

    def test_checkpointing(self) -> None:
        experts = make_experts()
        rows, counts = torch.randn(sum(COUNTS), H), torch.tensor(COUNTS)
        grads = [
            torch.autograd.grad(output.square().sum(), lora_parameters(experts))
            for output in (experts(rows, counts), checkpoint(experts, rows, counts, use_reentrant=False))
        ]
        for direct, recomputed in zip(*grads, strict=True):
            assert_bits_equal(recomputed, direct)


class TestQuantized:
    def quantized(self, scheme: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        experts = moe_npu.GroupedExperts(E, H, INTER, dtype=BF16)
        quantized = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme(scheme))
        add_lora(quantized, rank=RANK, alpha=6, **options)
        fill_b(quantized)
        return quantized

    def full(self, experts: nn.Module) -> moe_npu.GroupedExperts:
        """Float experts with the weights that the quantized ones and their adapters stand for."""
        float_experts = moe_npu.GroupedExperts(E, H, INTER, dtype=F64)
        for name in ("gate_up_proj", "down_proj"):
            stored = moe_npu.quant.QuantizedWeight(getattr(experts, name), getattr(experts, f"{name}_scale"))
            a, b = (experts.get_parameter(f"{name}_lora_{side}").detach().double() for side in "AB")
            getattr(float_experts, name).data = experts.scheme.dequantize(stored).double() + 2.0 * (b @ a)
        return float_experts

    @pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
    @pytest.mark.parametrize("dtype", [BF16, F32])
    def test_forward(self, scheme: str, dtype: torch.dtype) -> None:
        experts = self.quantized(scheme, trainable=False)
        assert not experts.takes_quantized_rows
        rows, counts = torch.randn(sum(COUNTS), H, dtype=dtype), torch.tensor(COUNTS)
        expected = self.full(experts)(rows.double(), counts)
        result = experts(rows, counts)
        assert result.dtype == dtype
        assert (result.double() - expected).norm() <= 3e-2 * expected.norm()

    def test_gradients_over_w4a16(self) -> None:
        experts = self.quantized("w4a16")
        counts = torch.tensor(COUNTS)
        rows = torch.randn(sum(COUNTS), H, dtype=BF16, requires_grad=True)
        grads = torch.autograd.grad(experts(rows, counts).float().square().sum(), [rows, *lora_parameters(experts)])
        full = self.full(experts)
        wide = rows.detach().double().requires_grad_()
        expected = torch.autograd.grad(full(wide, counts).square().sum(), [wide, full.gate_up_proj, full.down_proj])
        assert (grads[0].double() - expected[0]).norm() <= 5e-2 * expected[0].norm()
        for index, name in enumerate(("gate_up_proj", "down_proj")):
            a, b = (experts.get_parameter(f"{name}_lora_{side}").detach().double() for side in "AB")
            dweight = expected[1 + index]
            for actual, wanted in (
                (grads[1 + 2 * index], 2 * b.mT @ dweight),
                (grads[2 + 2 * index], 2 * dweight @ a.mT),
            ):
                assert (actual.double() - wanted).norm() <= 5e-2 * wanted.norm()

    def test_learns_over_w4a16(self) -> None:
        experts = self.quantized("w4a16")
        rows, counts = torch.randn(sum(COUNTS), H, dtype=BF16), torch.tensor(COUNTS)
        optimizer = torch.optim.Adam(lora_parameters(experts), lr=1e-2)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (experts(rows, counts).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]

    def test_w8a8_is_refused_for_training(self) -> None:
        with pytest.raises(ValueError, match="w8a8, which passes no gradient"):
            self.quantized("w8a8")

    def test_is_not_merged(self) -> None:
        experts = self.quantized("w4a16")
        with pytest.raises(ValueError, match="stored as w4a16, which cannot hold the sum"):
            merge_lora(experts)


class TestMerge:
    @pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
    def test_rounds_once_and_back_to_every_bit(self, dtype: torch.dtype) -> None:
        experts = make_experts(dtype)
        rows, counts = torch.randn(sum(COUNTS), H, dtype=dtype), torch.tensor(COUNTS)
        base = {name: experts.get_parameter(name).detach().clone() for name in ("gate_up_proj", "down_proj")}
        storages = [experts.get_parameter(name).data_ptr() for name in base]
        before = experts(rows, counts)
        merge_lora(experts)
        for name, weight in base.items():
            a, b = (experts.get_parameter(f"{name}_lora_{side}").detach().double() for side in "AB")
            exact = weight.double() + 2.0 * (b @ a)
            error = (experts.get_parameter(name).double() - exact).abs()
            # half a unit in the last place, and the rounding of the float32 sum before it
            assert bool((error <= exact.abs() * (torch.finfo(dtype).eps / 2 + 4e-7) + 1e-6).all())
        merged = experts(rows, counts)
        assert not torch.equal(merged, before) or dtype == F32
        assert (merged - before).float().norm() <= 20 * torch.finfo(dtype).eps * before.float().norm()
        assert set(lora_state_dict(experts)) == {f"{w}_lora_{s}" for w in base for s in "AB"}
        unmerge_lora(experts)
        for name, weight in base.items():
            assert_bits_equal(experts.get_parameter(name), weight)
        assert storages == [experts.get_parameter(name).data_ptr() for name in base]
        assert_bits_equal(experts(rows, counts), before)

    def test_without_a_way_back(self) -> None:
        experts = make_experts()
        rows, counts = torch.randn(sum(COUNTS), H), torch.tensor(COUNTS)
        names = set(moe_npu.GroupedExperts(E, H, INTER).state_dict())
        expected = reference(experts, rows, 2.0, swiglu)
        merge_lora(experts, keep_base=False)
        assert set(experts.state_dict()) == names
        assert_close(experts(rows, counts), expected, reduction=4 * H)
        with pytest.raises(ValueError, match="has no adapters"):
            unmerge_lora(experts)

    def test_a_merged_state_does_not_load_as_adapters_to_be_added(self) -> None:
        def adapted() -> moe_npu.GroupedExperts:
            experts = moe_npu.GroupedExperts(4, 16, 8)
            add_lora(experts, rank=2, alpha=2)
            return experts

        merged, other = adapted(), adapted()
        merge_lora(merged)
        with pytest.raises(RuntimeError, match="gate_up_proj_lora_base"):
            other.load_state_dict(merged.state_dict())
        with pytest.raises(RuntimeError, match="gate_up_proj_lora_base"):
            merged.load_state_dict(other.state_dict())
        merge_lora(other)
        other.load_state_dict(merged.state_dict())

    def test_order_of_calls(self) -> None:
        experts = make_experts()
        with pytest.raises(ValueError, match="is not merged"):
            unmerge_lora(experts)
        merge_lora(experts)
        for call in (merge_lora, remove_lora):
            with pytest.raises(ValueError, match="merged"):
                call(experts)
        unmerge_lora(experts)
        remove_lora(experts)
        with pytest.raises(ValueError, match="has no adapters"):
            remove_lora(experts)
        add_lora(experts, rank=2, alpha=1)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"rank": 0}, "rank must be a whole number of at least 1, but is 0"),
            ({"rank": 2.0}, "rank must be a whole number"),
            ({"alpha": float("nan")}, "alpha must be a finite number, but is nan"),
            ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, but is 1.0"),
            ({"target": "down_proj"}, "target must be a sequence of names"),
            ({"target": ["w1"]}, "target must hold names among gate_up_proj, up_proj, down_proj"),
            ({"target": ["up_proj"]}, "GroupedExperts has no experts with a weight up_proj"),
        ],
    )
    def test_are_checked(self, options: dict[str, Any], words: str) -> None:
        experts = moe_npu.GroupedExperts(E, H, INTER)
        with pytest.raises(ValueError, match=words):
            add_lora(experts, **{"rank": 2, "alpha": 4, **options})
        assert all(parameter.requires_grad for parameter in experts.parameters())

    def test_twice(self) -> None:
        experts = moe_npu.GroupedExperts(E, H, INTER)
        add_lora(experts, rank=2, alpha=4, target=["down_proj"])
        with pytest.raises(ValueError, match="down_proj has an adapter already"):
            add_lora(experts, rank=2, alpha=4)
        add_lora(experts, rank=3, alpha=4, target=["gate_up_proj"])
        assert [tuple(parameter.shape) for parameter in lora_parameters(experts)] == [
            (E, 2, INTER), (E, H, 2), (E, 3, H), (E, 2 * INTER, 3),
        ]  # fmt: skip
        assert all(parameter.requires_grad for parameter in lora_parameters(experts))

    def test_state_dict_round_trip(self) -> None:
        model = nn.Sequential(make_experts(), make_experts())
        state = lora_state_dict(model)
        assert len(state) == 8
        other = nn.Sequential(make_experts(), make_experts())
        nn.init.zeros_(other[1].down_proj_lora_B)
        assert not other.load_state_dict(state, strict=False).unexpected_keys
        for name, value in lora_state_dict(other).items():
            assert_bits_equal(value, state[name])


SIZES = {
    "vocab_size": 96,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=INTER, intermediate_size=32, num_experts=6)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=INTER, num_local_experts=6)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            head_dim=8,
            intermediate_size=INTER,
            num_local_experts=6,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ),
}
CONFIGS = {
    "same": {"target_parameters": TARGETS},
    "one": {"target_parameters": ["experts.down_proj"]},
    "rslora": {"target_parameters": TARGETS, "use_rslora": True},
    "patterns": {
        "target_parameters": TARGETS,
        "rank_pattern": {"mlp.experts.down_proj": 2, r".*1\.mlp.experts.gate_up_proj": 5},
        "alpha_pattern": {"down_proj": 3},
    },
    "one-layer": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]},
}
# PEFT compares the patterns with names of modules only, and warns about those of parameters
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


def make_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_experts_implementation("eager")
    return model


def ours(family: str) -> PreTrainedModel:
    model = make_model(family)
    model.set_experts_implementation("moe_npu")
    return model


def peft_model(model: PreTrainedModel, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **{"target_modules": [], **options})).eval()
    fill_b(model)
    return model


def quantize_parameters(experts: nn.Module, scheme: moe_npu.quant.QuantScheme) -> None:
    """What the loader of quantized checkpoints leaves in an experts module of transformers."""
    for name in ("gate_up_proj", "down_proj"):
        set_quantized_weight(experts, name, scheme.prepare(scheme.quantize(experts.get_parameter(name).detach())))
    experts.moe_npu_scheme = scheme


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(34).view(2, 17) * 7 % 96
    return model(input_ids=ids).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
class TestPeft:
    def test_loads_what_peft_saved(self, family: str, config: str, tmp_path: Path) -> None:
        theirs = peft_model(make_model(family), **CONFIGS[config])
        theirs.save_pretrained(tmp_path)
        model = ours(family)
        base = logits(model)
        load_peft_adapter(model, tmp_path)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            expected = logits(theirs)
            assert (base - expected).norm() >= 0.05 * expected.norm()
            assert_same(logits(model), expected)

    def test_peft_loads_what_was_saved(self, family: str, config: str, tmp_path: Path) -> None:
        peft_model(make_model(family), **CONFIGS[config]).save_pretrained(tmp_path / "peft")
        model = ours(family)
        load_peft_adapter(model, tmp_path / "peft", trainable=True)
        save_peft_adapter(model, tmp_path / "ours")
        first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert_bits_equal(second[name], value)
        again = ours(family)
        load_peft_adapter(again, tmp_path / "ours")
        for module, other in zip(model.modules(), again.modules(), strict=True):
            assert lora_settings(module) == lora_settings(other)
        theirs = PeftModel.from_pretrained(make_model(family), tmp_path / "ours")
        with torch.no_grad():
            assert_same(logits(theirs), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
class TestModels:
    def test_peft_trains_over_our_implementation(self, family: str) -> None:
        results = []
        for implementation in ("eager", "moe_npu"):
            model = make_model(family)
            model.set_experts_implementation(implementation)
            model = peft_model(model, target_parameters=TARGETS).train()
            output = logits(model)
            output.square().mean().backward()
            results.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(results[0]) == 1 + 2 * 2 * 2
        for expected, actual in zip(*results, strict=True):
            assert_same(actual, expected)

    def test_trains_as_peft_does(self, family: str, tmp_path: Path) -> None:
        theirs = peft_model(make_model(family), target_parameters=TARGETS).train()
        theirs.save_pretrained(tmp_path)
        model = ours(family).train()
        load_peft_adapter(model, tmp_path, trainable=True)
        optimizers = [
            torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
            for m in (theirs, model)
        ]
        for _ in range(3):
            for one, optimizer in zip((theirs, model), optimizers, strict=True):
                optimizer.zero_grad()
                logits(one).square().mean().backward()
                optimizer.step()
        with torch.no_grad():
            assert_same(logits(model), logits(theirs))

    def test_compiles_and_merges(self, family: str) -> None:
        model = ours(family)
        add_lora(model, rank=RANK, alpha=6)
        fill_b(model)
        experts = model.model.layers[0].mlp.experts
        x, ids, weights = torch.randn(7, H), torch.randint(0, 6, (7, 2)), torch.rand(7, 2)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights))
        with torch.no_grad():
            before = logits(model)
            merge_lora(model)
            assert_same(logits(model), before)
            model.set_experts_implementation("eager")  # merged weights are weights like others
            assert_same(logits(model), before)

    def test_other_implementations_are_refused(self, family: str) -> None:
        model = make_model(family)
        with pytest.raises(ValueError, match=r"experts_implementation='eager', which applies no adapters"):
            add_lora(model, rank=RANK, alpha=6)
        model.set_experts_implementation("moe_npu")
        add_lora(model, rank=RANK, alpha=6)
        model.set_experts_implementation("eager")
        with pytest.raises(ValueError, match="which applies no adapters"):
            logits(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])  # the layouts that are quantized
def test_quantized_models_train(family: str) -> None:
    model = ours(family).to(BF16)
    for module in [m for m in model.modules() if hasattr(m, "_apply_gate")]:
        quantize_parameters(module, moe_npu.get_scheme("w4a16"))
    add_lora(model, rank=RANK, alpha=6)
    before = logits(model)
    fill_b(model)
    after = logits(model)
    assert (after - before).float().norm() >= 0.05 * before.float().norm()
    after.float().square().mean().backward()
    for parameter in lora_parameters(model):
        assert parameter.grad is not None and bool(parameter.grad.any())


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = ours("qwen3_moe")
        add_lora(model, rank=RANK, alpha=6)
        fill_b(model)
        save_peft_adapter(model, tmp_path)
        return tmp_path

    def edit(self, folder: Path, **entries: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    @pytest.mark.parametrize(
        ("entries", "words"),
        [
            ({"peft_type": "LOHA"}, "peft_type must be LORA"),
            ({"target_parameters": None}, "target_parameters must be a list"),
            ({"target_parameters": ["w1"]}, "match no weight of experts"),
            ({"use_dora": True}, "use_dora=True is not supported"),
            ({"init_lora_weights": "pissa"}, "changes the weights of the base"),
            ({"use_rslora": "no"}, "use_rslora must be true or false"),
            ({"r": 4}, r"must be a float tensor of shape \[24, 32\] for rank 4"),
            ({"r": 10**12}, "must be a float tensor of shape"),
            ({"r": -1}, "rank must be a whole number"),
            ({"lora_alpha": "8"}, "alpha must be a finite number"),
            ({"rank_pattern": {"(a+)+": 4}}, "a simple regular expression"),
            ({"rank_pattern": {"[": 4}}, "a simple regular expression"),
            ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
            ({"peft_version": "new"}, "must begin with three numbers"),
            ({"peft_version": "0.18.1"}, r"must be a float tensor of shape \[18, 48\]"),
        ],
    )
    def test_a_bad_config_changes_nothing(self, folder: Path, entries: dict[str, Any], words: str) -> None:
        self.edit(folder, **entries)
        model = ours("qwen3_moe")
        names = set(model.state_dict())
        with pytest.raises(ValueError, match=words):
            load_peft_adapter(model, folder)
        assert set(model.state_dict()) == names
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_a_pickle_is_refused(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match="is a pickle, which can run code"):
            load_peft_adapter(ours("qwen3_moe"), folder)

    def test_a_damaged_file(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 99)
        with pytest.raises(ValueError, match="not a valid safetensors file"):
            load_peft_adapter(ours("qwen3_moe"), folder)

    def test_another_model(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"has no tensor base_model.model.layers.0.mlp.experts\S+; was it made"):
            load_peft_adapter(ours("qwen3_moe").model, folder)

    def test_tensors_that_nothing_explains(self, folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.model.layers.1.mlp.experts.base_layer.base_layer.lora_A.weight"] = torch.ones(2, 2)
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="which target_parameters do not explain"):
            load_peft_adapter(ours("qwen3_moe"), folder, experts_only=True)

    def test_other_parts_only_on_request(self, tmp_path: Path) -> None:
        theirs = peft_model(make_model("qwen3_moe"), target_modules=["q_proj"], target_parameters=TARGETS)
        theirs.save_pretrained(tmp_path)
        model = ours("qwen3_moe")
        with pytest.raises(ValueError, match=r"4 tensors for other parts of the model, such as \S+q_proj"):
            load_peft_adapter(model, tmp_path)
        load_peft_adapter(model, tmp_path, experts_only=True)
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if "q_proj.lora_B" in name:
                    value.zero_()
            assert_same(logits(model), logits(theirs))

    @pytest.mark.parametrize(
        ("family", "version"), [("qwen3_moe", "0.18.1"), ("qwen3_moe", None), ("gpt_oss", "0.19.0")]
    )
    def test_adapters_of_older_peft_are_turned_around(self, family: str, version: str | None, tmp_path: Path) -> None:
        model = ours(family)
        add_lora(model, rank=RANK, alpha=6)
        fill_b(model)
        save_peft_adapter(model, tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        for name in [name for name in tensors if "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            a = tensors[name].view(6, RANK, -1)
            b = tensors[other].view(-1, RANK, 6)
            # A then holds the outputs, expert by expert, and B the inputs, the expert the fastest index
            tensors[name] = b.permute(2, 1, 0).reshape(6 * RANK, -1).contiguous()
            tensors[other] = a.permute(2, 1, 0).reshape(-1, RANK * 6).contiguous()
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        self.edit(tmp_path, peft_version=version)
        loaded = ours(family)
        load_peft_adapter(loaded, tmp_path)
        for expected, actual in zip(lora_parameters(model), lora_parameters(loaded), strict=True):
            assert_bits_equal(actual, expected)

    def test_experts_have_no_name(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="must be the whole model"):
            save_peft_adapter(make_experts(), tmp_path)
        with pytest.raises(ValueError, match="has no adapters"):
            save_peft_adapter(ours("mixtral"), tmp_path)
