"""``experts_implementation="moe_npu"`` in the life of a model: generate, compile, export, train, save, sync weights."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import moe_npu.layers.hf  # noqa: F401 - registers the implementation

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, intermediate_size=32, num_experts=6)
    return Qwen3MoeForCausalLM(config)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=6))


def gpt_oss() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**SIZES, head_dim=8, intermediate_size=16, num_local_experts=6, rope_parameters=rope)
    return GptOssForCausalLM(config)


def deepseek_v3() -> PreTrainedModel:
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        intermediate_size=32,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


def qwen3_vl_moe() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        **SIZES,
        "head_dim": 8,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=93,
        video_token_id=94,
        vision_start_token_id=95,
        vision_end_token_id=92,
    )
    return Qwen3VLMoeForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "qwen3_vl_moe": qwen3_vl_moe,
}
families = pytest.mark.parametrize("name", FAMILIES)


def make(name: str, experts: str = "moe_npu") -> PreTrainedModel:
    """A small model whose weights all matter; the same for each implementation."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_experts_implementation(experts)
    assert experts_config(model)._experts_implementation == experts
    return model.eval()


def experts_config(model: PreTrainedModel) -> Any:
    """The config that the experts read."""
    return next(module.config for module in model.modules() if type(module).__name__.endswith("Experts"))


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, ids: Tensor, **options: Any) -> list[list[int]]:
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0, **options
    )
    return output[:, ids.size(1) :].tolist()


def loss_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (actual[name] - wanted).norm() <= bound * wanted.norm() + 1e-9, name


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    yield
    transformers.logging.set_verbosity(verbosity)


class TestGenerate:
    @families
    def test_dynamic_and_static_cache(self, name: str) -> None:
        ids = tokens()
        expected = greedy(make(name, "eager"), ids)
        model = make(name)
        assert greedy(model, ids) == expected
        assert greedy(model, ids, cache_implementation="static", disable_compile=True) == expected
        assert experts_config(model)._experts_implementation == "moe_npu"
        assert len({token for row in expected for token in row}) > 2

    @families
    def test_sampling_beams_and_padding(self, name: str) -> None:
        ids = tokens()
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        results = {}
        for experts in ("eager", "moe_npu"):
            model = make(name, experts)
            torch.manual_seed(3)
            options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0}
            results[experts] = [
                model.generate(ids, do_sample=True, top_k=20, **options).tolist(),
                model.generate(ids, num_beams=3, do_sample=False, **options).tolist(),
            ]
        assert results["moe_npu"] == results["eager"]

    # torch's own, when it imports Inductor
    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize(
        ("name", "backend"),
        [(name, "aot_eager") for name in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")]
        + [pytest.param("qwen3_moe", "inductor", marks=pytest.mark.slow)],
    )
    def test_one_compiled_graph_decodes(self, name: str, backend: str) -> None:
        model, ids = make(name), tokens()
        expected = greedy(make(name, "eager"), ids)
        torch.compiler.reset()
        compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
        assert decode(model, compiled, ids, 6) == expected


@torch.no_grad()
def decode(model: PreTrainedModel, step: Callable[..., Any], ids: Tensor, number: int) -> list[list[int]]:
    """Greedy tokens with a static cache; ``step`` computes all but the prompt."""
    cache = StaticCache(config=model.config, max_cache_len=ids.size(1) + number)
    # the cache is the fourth argument; its name depends on the release of transformers
    output = [model(ids, None, None, cache).logits[:, -1:].argmax(-1)]
    for index in range(number - 1):
        position = torch.full((ids.size(0), 1), ids.size(1) + index)
        output.append(step(output[-1], None, position, cache).logits[:, -1:].argmax(-1))
    return torch.cat(output, 1).tolist()


@families
def test_export_to_a_program_for_any_length(name: str) -> None:
    model = make(name)
    model.set_attn_implementation("eager")
    model.config.get_text_config().use_cache = model.config.use_cache = False

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(Logits(), (tokens(),), dynamic_shapes={"input_ids": {1: length}}, strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    num_layers = sum(type(module).__name__.endswith("Experts") for module in model.modules())
    assert sum("moe_npu.grouped_mm" in target for target in targets) == 2 * num_layers
    for size in (7, 3, 12):
        ids = tokens(length=size)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(program.module()(ids), model(input_ids=ids).logits)


class TestTraining:
    @families
    def test_trainer(self, name: str, tmp_path: Path) -> None:
        """Loss of each step and final weights as with eager experts, with accumulation and clipping."""
        data = [{"input_ids": row, "labels": row} for row in tokens(batch=16, length=9)]
        results = {}
        for experts in ("eager", "moe_npu"):
            model = make(name, experts)
            before = copy.deepcopy(model.state_dict())
            args = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                optim="sgd",  # Adam makes a difference of rounding in a tiny gradient a whole step
                max_grad_norm=1.0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                seed=0,
            )
            trainer = Trainer(model=model, args=args, train_dataset=data)
            trainer.pop_callback(transformers.PrinterCallback)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            changes = {key: value - before[key] for key, value in model.state_dict().items()}
            results[experts] = losses, changes
        assert len(results["eager"][0]) == 4
        assert results["moe_npu"][0] == pytest.approx(results["eager"][0], rel=1e-5)
        assert all(change.any() for key, change in results["moe_npu"][1].items() if "experts" in key)
        assert_same(results["moe_npu"][1], results["eager"][1], bound=1e-3)

    @families
    def test_accumulated_gradients_are_those_of_one_batch(self, name: str) -> None:
        model, ids = make(name), tokens(batch=4)
        loss_of(model, ids).backward()
        expected = gradients(model)
        model.zero_grad()
        for part in ids.chunk(2):
            (loss_of(model, part) / 2).backward()
        assert_same(gradients(model), expected)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @families
    def test_gradient_checkpointing(self, name: str, use_reentrant: bool) -> None:
        model, ids = make(name).train(), tokens()
        loss_of(model, ids).backward()
        expected = gradients(model)
        model.zero_grad()
        calls = count_calls(model)
        # the name depends on the release of transformers
        name = "activation_checkpointing_enable"
        enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        loss_of(model, ids).backward()
        assert set(calls.values()) == {2}  # once more in backward
        assert_same(gradients(model), expected, bound=1e-6)

    @families
    def test_clipping(self, name: str) -> None:
        norms, grads = [], []
        for experts in ("eager", "moe_npu"):
            model = make(name, experts)
            loss_of(model, tokens()).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            grads.append(gradients(model))
        torch.testing.assert_close(norms[1], norms[0])
        assert_same(grads[1], grads[0], bound=1e-4)

    def test_compiled_training_step(self) -> None:
        model, ids = make("qwen3_moe"), tokens()
        loss_of(model, ids).backward()
        expected = gradients(model)
        model.zero_grad()
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(input_ids=ids, labels=ids).loss.backward()
        assert_same(gradients(model), expected)


def count_calls(model: PreTrainedModel) -> dict[str, int]:
    """How often each experts module runs from now on."""
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            module.register_forward_pre_hook(count)
    return calls


ORIGINAL_KEYS = {
    "qwen3_moe": "model.layers.0.mlp.experts.5.gate_proj.weight",
    "mixtral": "model.layers.0.block_sparse_moe.experts.5.w2.weight",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj_bias",
    "deepseek_v3": "model.layers.1.mlp.experts.7.up_proj.weight",
    "qwen3_vl_moe": "model.language_model.layers.1.mlp.experts.gate_up_proj",
}


class TestSaving:
    @families
    def test_files_are_those_of_eager_byte_for_byte(self, name: str, tmp_path: Path) -> None:
        ids = tokens()
        for experts in ("eager", "moe_npu"):
            model = make(name, experts)
            with torch.no_grad():
                model(input_ids=ids)  # a forward leaves nothing behind
            model.save_pretrained(tmp_path / experts)
        files = sorted(file.name for file in (tmp_path / "eager").iterdir())
        assert files == sorted(file.name for file in (tmp_path / "moe_npu").iterdir())
        assert {"config.json", "model.safetensors"} <= set(files)
        for file in files:
            assert (tmp_path / "eager" / file).read_bytes() == (tmp_path / "moe_npu" / file).read_bytes(), file
        assert "moe_npu" not in (tmp_path / "moe_npu" / "config.json").read_text()
        assert ORIGINAL_KEYS[name] in load_file(tmp_path / "moe_npu" / "model.safetensors")

    @families
    def test_round_trip(self, name: str, tmp_path: Path) -> None:
        model, ids = make(name), tokens()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, experts_implementation="moe_npu").eval()
        assert experts_config(loaded)._experts_implementation == "moe_npu"
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

    def test_what_we_save_loads_without_us(self, tmp_path: Path) -> None:
        model, ids = make("qwen3_moe"), tokens()
        model.save_pretrained(tmp_path / "model")
        code = (
            "import sys, torch\n"
            "from transformers import AutoModelForCausalLM\n"
            "from transformers.integrations.moe import ExpertsInterface\n"
            # where the device is simulated, moe_npu is imported in every child
            "ours = ExpertsInterface._global_mapping.pop('moe_npu', None)\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}).eval()\n"
            f"logits = model(torch.tensor({ids.tolist()})).logits\n"
            f"torch.save(logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
            "assert ours or not any(name.split('.')[0] == 'moe_npu' for name in sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        with torch.no_grad():
            torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(input_ids=ids).logits)

    @pytest.mark.parametrize("key", ["experts_implementation", "_experts_implementation"])
    def test_an_implementation_written_into_the_config_is_honoured(self, key: str, tmp_path: Path) -> None:
        make("qwen3_moe", "eager").save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: "moe_npu"}))
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
        assert model.config._experts_implementation == "moe_npu"


class TestWeightsThatChange:
    """Nothing is packed or kept: what is in the parameters when the model runs is what it computes with."""

    @families
    def test_in_place(self, name: str) -> None:
        model, other, ids = make(name), make(name, "eager"), tokens()
        with torch.no_grad():
            before = model(input_ids=ids).logits
            for parameter in other.parameters():
                parameter.mul_(1.3).add_(0.02)
            addresses = [parameter.data_ptr() for parameter in model.parameters()]
            for parameter, source in zip(model.parameters(), other.parameters(), strict=True):
                parameter.copy_(source)  # as a trainer sends weights to the model that rolls out
            assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
            after = model(input_ids=ids).logits
            torch.testing.assert_close(after, other(input_ids=ids).logits)
        assert (after - before).abs().max() > 1e-2

    def test_compiled_and_between_tokens(self) -> None:
        model, other, ids = make("qwen3_moe"), make("qwen3_moe", "eager"), tokens()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.3)
        torch.compiler.reset()
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        first = decode(model, compiled, ids, 4)
        model.load_state_dict(other.state_dict())
        assert decode(model, compiled, ids, 4) == [row[:4] for row in greedy(other, ids)]
        assert first == [row[:4] for row in greedy(make("qwen3_moe", "eager"), ids)]

    @families
    def test_replaced(self, name: str) -> None:
        """New tensors in place of the old parameters, and a part of one expert only."""
        model, other, ids = make(name), make(name, "eager"), tokens()
        experts, theirs = (
            next(module for module in m.modules() if type(module).__name__.endswith("Experts")) for m in (model, other)
        )
        with torch.no_grad():
            model(input_ids=ids)
            theirs.gate_up_proj.mul_(0.5)
            theirs.down_proj[1].zero_()
            experts.gate_up_proj.data = theirs.gate_up_proj.clone()
            experts.down_proj = nn.Parameter(theirs.down_proj.clone())
            torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


class TestMoving:
    @families
    def test_to_bfloat16(self, name: str) -> None:
        ids = tokens()
        with torch.no_grad():
            expected = make(name, "eager").to(torch.bfloat16)(input_ids=ids).logits.float()
            logits = make(name).to(torch.bfloat16)(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).norm() <= 3e-2 * expected.norm()

    @families
    def test_deepcopy_is_independent(self, name: str) -> None:
        model, ids = make(name), tokens()
        clone = copy.deepcopy(model)
        assert experts_config(clone)._experts_implementation == "moe_npu"
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(clone(input_ids=ids).logits, expected)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=["cpu", "auto", "dict"])
    def test_device_map(self, device_map: Any, tmp_path: Path) -> None:
        model, ids = make("qwen3_moe"), tokens()
        model.save_pretrained(tmp_path)
        loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path, device_map=device_map, experts_implementation="moe_npu")
        with torch.no_grad():
            logits = loaded(
                input_ids=ids.to(loaded.device)
            ).logits.cpu()  # "auto" is a simulated NPU where there is one
            torch.testing.assert_close(logits, model(input_ids=ids).logits)

    def test_weights_that_accelerate_offloads_to_disk(self, tmp_path: Path) -> None:
        from accelerate import disk_offload

        model, ids = make("qwen3_moe"), tokens()
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
            assert model.model.layers[0].mlp.experts.down_proj.device.type == "meta"
            assert torch.equal(model(input_ids=ids).logits, expected)
