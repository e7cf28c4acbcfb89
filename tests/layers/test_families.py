"""Native layers against every MoE block of the installed transformers: outputs, gradients, weights there and back."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_npu
from moe_npu.layers import families
from moe_npu.layers.moe import MoE
from tests.helpers import hf_moe_blocks as hf
from tests.helpers.assertions import assert_bits_equal, assert_close

BLOCKS = hf.block_names()
UNSUPPORTED = families.unsupported_blocks()
SUPPORTED = [name for name in BLOCKS if name.partition(".")[2] not in UNSUPPORTED]
CASES = hf.cases(SUPPORTED)
# their modules do not hold the config
NEEDS_CONFIG = {"dbrx.DbrxFFN", "jetmoe.JetMoeMoE"}
# transformers' own loop over experts computes them in float32, its other implementations do not
COMPUTED_IN_FLOAT32 = {"openai_privacy_filter.OpenAIPrivacyFilterMLP"}
# keep the weight of their router in float32 and multiply it with float32
FLOAT32_ROUTER = {"inkling2.Inkling2SparseMoeBlock", "inkling2_loop.Inkling2LoopSparseMoeBlock"}
# parameters that never get a gradient: selection biases, and a bias that is not used
WITHOUT_GRADIENT = ("e_score_correction_bias", "expert_bias", "router.classifier.bias")


SUPPORTED_QWEN = "qwen3_moe.Qwen3MoeSparseMoeBlock"
ERNIE_VL = "ernie4_5_vl_moe.Ernie4_5_VLMoeSparseMoeBlock"


def make(case: hf.Case) -> tuple[nn.Module, object, MoE]:
    config = hf.tiny_config(case)
    block = hf.tiny_block(case, config)
    moe = native(case, block, config)
    if case.block == ERNIE_VL:  # the config has two sizes, the block is of one of them
        config = {**config.to_dict(), "moe_intermediate_size": block.experts.intermediate_dim}
    return block, config, moe


def native(case: hf.Case, block: nn.Module, config: object) -> MoE:
    given = config if case.block in NEEDS_CONFIG else None
    return MoE.from_hf(block, config=given, layer_idx=hf.layer_index(case))


def inputs(num_tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(2, num_tokens // 2, 32, generator=generator)
    return hidden_states, torch.randint(50, (2, num_tokens // 2), generator=generator)


def run(forward, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and gradient of the input; those of the parameters are left in them."""
    hidden_states = hidden_states.clone().requires_grad_()
    output = forward(hidden_states, token_ids)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    output.backward(grad)
    return output.detach(), hidden_states.grad


def gradients(moe: MoE, config: object, layer_idx: int) -> dict[str, torch.Tensor]:
    """The gradients of a native layer by the names of the block."""
    grads = copy.deepcopy(moe)
    for parameter, own in zip(grads.parameters(), moe.parameters(), strict=True):
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    return families.hf_state_dict(grads, config, layer_idx)


@pytest.mark.parametrize("case", CASES, ids=str)
class TestBlocks:
    def test_outputs_and_gradients_are_equal(self, case: hf.Case) -> None:
        block, config, moe = make(case)
        hidden_states, token_ids = inputs()
        expected, expected_grad = run(lambda x, ids: hf.run_block(block, x, ids), hidden_states, token_ids)
        output, grad = run(lambda x, ids: moe(x, token_ids=ids), hidden_states, token_ids)
        assert_close(output, expected.double(), reduction=64)
        assert_close(grad, expected_grad.double(), reduction=64)
        own = gradients(moe, config, hf.layer_index(case))
        compared = 0
        for name, parameter in block.named_parameters():
            if name not in own:
                assert parameter.grad is None or name.endswith(WITHOUT_GRADIENT), name
            elif parameter.grad is not None:
                expected_grad = parameter.grad[: own[name].size(0)]  # without the rows of identity experts
                assert_close(own[name], expected_grad.double(), reduction=64)
                assert not parameter.grad[own[name].size(0) :].any()
                compared += 1
            else:
                assert name.endswith(WITHOUT_GRADIENT), name
        assert compared >= 3

    def test_half_precision_errs_no_more_than_transformers(self, case: hf.Case) -> None:
        block, config, _ = make(case)
        to_bfloat16(case, block)
        moe = native(case, block, config)
        exact = copy.deepcopy(block).float()
        hidden_states, token_ids = inputs(64)
        hidden_states = hidden_states.bfloat16()
        keep = same_choice(moe, native(case, exact, config), hidden_states, token_ids)
        assert keep.sum() >= 32
        hidden_states, token_ids = hidden_states[keep].unsqueeze(0), token_ids[keep].unsqueeze(0)
        if case.block in COMPUTED_IN_FLOAT32:
            block.experts.config._experts_implementation = "grouped_mm"
        reference = run(lambda x, ids: hf.run_block(exact, x, ids), hidden_states.float(), token_ids)
        theirs = run(lambda x, ids: hf.run_block(block, x, ids), hidden_states, token_ids)
        ours = run(lambda x, ids: moe(x, token_ids=ids), hidden_states, token_ids)
        for own, other, right in zip(ours, theirs, reference, strict=True):
            assert own.dtype == torch.bfloat16
            assert rms(own.float() - right) <= 1.25 * rms(other.float() - right)

    def test_weights_there_and_back(self, case: hf.Case) -> None:
        block, config, moe = make(case)
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        with torch.no_grad():
            for name, tensor in block.state_dict().items():
                if name in families.hf_state_dict(moe, config, hf.layer_index(case)):
                    tensor.zero_()
        moe.to_hf(block, config=config if case.block in NEEDS_CONFIG else None, layer_idx=hf.layer_index(case))
        after = block.state_dict()
        rows = moe.num_experts  # rows of identity experts have no counterpart
        for name, tensor in before.items():
            if name == "experts.gate_up_proj":
                assert_bits_equal(after[name][:rows], tensor[:rows])
            else:
                assert_bits_equal(after[name], tensor)
        for tensor, own in zip(
            moe.state_dict().values(), native(case, block, config).state_dict().values(), strict=True
        ):
            assert_bits_equal(tensor, own)

    def test_the_config_alone_makes_the_same_layer(self, case: hf.Case) -> None:
        _, config, moe = make(case)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in moe.state_dict().items()}
        serialized = config if isinstance(config, dict) else config.to_dict()
        for source in (config, json.loads(json.dumps(serialized, default=str))):
            made = MoE.from_config(source, hf.layer_index(case), device="meta")
            assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.state_dict().items()} == shapes
            assert repr(made) == repr(moe)

    def test_checkpoints_are_loaded(self, case: hf.Case) -> None:
        _, config, moe = make(case)
        index = hf.layer_index(case)
        tensors = families.hf_state_dict(moe, config, index, checkpoint=True)
        copied = MoE.from_config(config, index)
        families.load_hf_state_dict(copied, tensors, config, index, checkpoint=True)
        for tensor, own in zip(copied.state_dict().values(), moe.state_dict().values(), strict=True):
            assert_bits_equal(tensor, own)

    def test_half_precision_routes_as_transformers(self, case: hf.Case) -> None:
        if case.block in ("jetmoe.JetMoeMoE", "llama4.Llama4TextMoe"):
            pytest.skip("its experts do not take the choice of the router as arguments")
        block, config, _ = make(case)
        to_bfloat16(case, block)
        moe = native(case, block, config)
        chosen = []
        block.experts.register_forward_pre_hook(lambda _, args, kwargs: chosen.append(args[1:3]), with_kwargs=True)
        hidden_states, token_ids = inputs()
        hidden_states = hidden_states.bfloat16()
        hf.run_block(block, hidden_states, token_ids)
        (ids, weights), order = chosen[0], chosen[0][0].argsort()
        routing = moe.forward_with_routing(hidden_states, token_ids=token_ids)[1]
        own_order = routing.topk_ids.argsort()
        assert torch.equal(routing.topk_ids.gather(1, own_order), ids.gather(1, order).int())
        # there they are divided by K, and the sum of the experts is multiplied by it
        factor = 3 if case.block == "openai_privacy_filter.OpenAIPrivacyFilterMLP" else 1
        assert routing.topk_weights.dtype == weights.dtype
        assert_close(routing.topk_weights.gather(1, own_order), weights.gather(1, order).double() * factor, reduction=4)


def to_bfloat16(case: hf.Case, block: nn.Module) -> None:
    for name, parameter in block.named_parameters():  # buffers stay float32, as from_pretrained leaves them
        if case.block not in FLOAT32_ROUTER or name != "gate.weight":
            parameter.data = parameter.data.bfloat16()


def rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def same_choice(moe: MoE, exact: MoE, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Tokens for which half precision does not change the choice of experts ``[B, S]``."""
    ids = [
        layer.forward_with_routing(hidden_states.to(dtype), token_ids=token_ids)[1].topk_ids.sort().values
        for layer, dtype in ((moe, torch.bfloat16), (exact, torch.float32))
    ]
    return (ids[0] == ids[1]).all(-1).view(token_ids.shape)


class TestEnumeration:
    def test_every_block_of_transformers_is_known(self) -> None:
        """Fails on new MoE blocks, by name: register a family for their configs, or a reason why there is none."""
        model_types = {name: hf.config_class(name).model_type for name in SUPPORTED}
        unknown = {name: kind for name, kind in model_types.items() if (kind or "dbrx") not in families.family_names()}
        assert not unknown

    def test_what_is_unsupported_exists_and_says_why(self) -> None:
        assert set(UNSUPPORTED) <= {name.partition(".")[2] for name in BLOCKS}
        for name in sorted(set(BLOCKS) - set(SUPPORTED)):
            cls = hf.block_class(name)
            block = cls.__new__(cls)  # not built: it is refused for what it is
            with pytest.raises(ValueError, match=r"has no native layer: .*\."):
                MoE.from_hf(block)

    @pytest.mark.skipif(not transformers.__version__.startswith("5.24."), reason="numbers of transformers 5.24")
    def test_the_documentation_has_the_numbers(self) -> None:
        folders, of_folders = (len({name.partition(".")[0] for name in names}) for names in (SUPPORTED, BLOCKS))
        root = Path(__file__).parents[2]
        for file, sentence in (
            ("README.md", f"{len(SUPPORTED)} of the {len(BLOCKS)} MoE blocks of transformers 5.24"),
            ("docs/layers.md", f"{folders} of the {of_folders} model folders of transformers 5.24"),
        ):
            assert sentence in " ".join((root / file).read_text().split())

    @pytest.mark.parametrize("name", ["inkling_text", "zaya", "doge", "switch_transformers"])
    def test_unsupported_configs_say_why(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"'{name}' has no native layer: "):
            MoE.from_config({"model_type": name})


# their default configs do not build, or AutoModel does not know them
NOT_BUILT = {
    "dbrx.DbrxFFN",
    "deepseek_ocr2.DeepseekOcr2TextMoe",
    "diffusion_gemma.DiffusionGemmaDecoderTextLayer",
    "diffusion_gemma.DiffusionGemmaEncoderTextLayer",
    "dots1.Dots1MoE",
    "dots3_note.Dots3NoteVisionMoE",
    "ernie4_5_vl_moe.Ernie4_5_VLMoeSparseMoeBlock",  # two in a layer
    "gemma4.Gemma4TextDecoderLayer",  # the decoder layer itself
    "hunyuan_v1_moe.HunYuanMoEV1Moe",
    "lfm2_moe.Lfm2MoeSparseMoeBlock",
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextSparseMoeBlock",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextSparseMoeBlock",
    "qwen4_exp.Qwen4ExpTextSparseMoeBlock",
    "step3p7.Step3p7SparseMoeBlock",
    "unlimited_ocr.UnlimitedOcrTextMoe",
}


def moe_layers(config: object, block: str) -> tuple[set[int], int]:
    """The layers of transformers' model that have the block, and the number of layers."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    paths = [(re.fullmatch(r"(?:.*\.)?layers\.(\d+)(\..*)?", name), module) for name, module in model.named_modules()]
    indices = [(int(match[1]), module) for match, module in paths if match]
    found = {index for index, module in indices if isinstance(module, hf.block_class(block))}
    return found, max(index for index, _ in indices) + 1


SMALL = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    "num_hidden_layers": 3,
    "head_dim": 16,
    "v_head_dim": 16,
}
SAVED = [
    "afmoe.AfmoeSparseMoeBlock", "aria.AriaTextMoELayer", "cohere2_moe.Cohere2MoeSparseMoeBlock",
    "deepseek_v2.DeepseekV2Moe", "deepseek_v4.DeepseekV4SparseMoeBlock", "dots1.Dots1MoE",
    "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock", "exaone_moe.ExaoneMoeSparseMoEBlock", "flint.FlintSparseMoeBlock",
    "glm4_moe.Glm4MoeMoE", "gpt_oss.GptOssMLP", "granitemoe.GraniteMoeMoE", "granitemoe_swa.GraniteMoeSWAMoE",
    "granitemoeshared.GraniteMoeSharedMoE", "hunyuan_v1_moe.HunYuanMoEV1Moe", "hy_v3.HYV3MoE",
    "inkling2.Inkling2SparseMoeBlock", "jamba.JambaSparseMoeBlock", "jetmoe.JetMoeMoE",
    "kolibri1.Kolibri1SparseMoeBlock", "laguna.LagunaSparseMoeBlock", "lara_mini.LaraMiniSparseMoeBlock",
    "llama4.Llama4TextMoe", "longcat_flash.LongcatFlashMoE", "mellum.MellumSparseMoeBlock",
    "mimo_v2_flash.MiMoV2FlashMoE", "minimax.MiniMaxSparseMoeBlock", "minimax_m2.MiniMaxM2SparseMoeBlock",
    "mistral4.Mistral4MoE", "mistral_large4.MistralLarge4TextMoE", "mixtral.MixtralSparseMoeBlock",
    "muse_spark.MuseSparkMoE", "nemotron_h.NemotronHMoE", "olmoe.OlmoeSparseMoeBlock", "phimoe.PhimoeSparseMoeBlock",
    "qwen2_moe.Qwen2MoeSparseMoeBlock", "qwen3_moe.Qwen3MoeSparseMoeBlock", "solar_open.SolarOpenMoE",
]  # fmt: skip


@pytest.mark.parametrize("block", SAVED)
def test_checkpoints_have_the_names_that_transformers_saves(block: str, tmp_path: Path) -> None:
    model = AutoModel.from_config(hf.tiny_config(hf.Case(block), new=SMALL))
    model.save_pretrained(tmp_path)
    saved = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, hf.block_class(block))}
    path, module = list(modules.items())[-1]
    index = int(re.search(r"layers\.(\d+)\.", path)[1])
    moe = MoE.from_hf(module, config=model.config, layer_idx=index)
    block_names = families.hf_state_dict(moe, model.config, index)
    tensors = families.hf_state_dict(moe, model.config, index, checkpoint=True)
    other_names = {*block_names} - {"experts.down_proj", "output_linear.weight"}
    expert_names = [name for name in tensors if name not in other_names]
    assert expert_names
    for name in expert_names:
        keys = [key for key in saved if f"layers.{index}." in key and key.endswith(f".{name}")]
        (key,) = [key for key in keys if "self_attention" not in key and "shared_mlp" not in key]
        assert_bits_equal(saved[key][: len(tensors[name])], tensors[name])


class TestWhichLayers:
    @pytest.mark.parametrize("block", sorted(set(SUPPORTED) - NOT_BUILT))
    def test_as_in_a_model_of_the_default_config(self, block: str) -> None:
        config = hf.config_class(block)()
        expected, num_layers = moe_layers(config, block)
        assert {index for index in range(num_layers) if families.is_moe_layer(config, index)} == expected
        # a published config.json may leave out what has its default value
        rules = ("mlp_layer_types", "first_k_dense_replace", "num_dense_layers", "moe_layers", "decoder_sparse_step")
        published = {key: value for key, value in config.to_dict().items() if key not in rules}
        assert {index for index in range(num_layers) if families.is_moe_layer(published, index)} == expected

    @pytest.mark.parametrize(
        ("block", "values"),
        [
            ("qwen3_moe.Qwen3MoeSparseMoeBlock", {"decoder_sparse_step": 2, "mlp_only_layers": [1, 4]}),
            ("llama4.Llama4TextMoe", {"interleave_moe_layer_step": 3}),
            ("llama4.Llama4TextMoe", {"moe_layers": [0, 3]}),
            ("jamba.JambaSparseMoeBlock", {"expert_layer_period": 3, "expert_layer_offset": 2}),
            ("ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock",
             {"moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 2}),
            ("deepseek_v3.DeepseekV3MoE", {"first_k_dense_replace": 5}),
            ("afmoe.AfmoeSparseMoeBlock", {"num_dense_layers": 4}),
        ],
    )  # fmt: skip
    def test_as_in_a_model_of_another_config(self, block: str, values: dict[str, object]) -> None:
        config = hf.config_class(block)(num_hidden_layers=8, **values)
        expected, num_layers = moe_layers(config, block)
        assert num_layers == 8
        assert {index for index in range(8) if families.is_moe_layer(config, index)} == expected
        # a published config.json has what was given, not what transformers concludes
        published = {"model_type": config.model_type, "num_hidden_layers": 8, "num_experts": 8, **values}
        assert {index for index in range(8) if families.is_moe_layer(published, index)} == expected


# What the published config.json of real models say of their MoE layers, and the parameters of one of them.
REAL = {
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "hidden_act": "silu", "num_hidden_layers": 48,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
        128 * 3 * 2048 * 768 + 128 * 2048,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8,
            "num_experts_per_tok": 2, "hidden_act": "silu", "num_hidden_layers": 32,
        },
        8 * 3 * 4096 * 14336 + 8 * 4096,
    ),
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "hidden_act": "silu", "num_hidden_layers": 61,
            "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
        },
        257 * 3 * 7168 * 2048 + 256 * 7168,
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
            "num_experts_per_tok": 4, "experts_per_token": 4, "swiglu_limit": 7.0, "hidden_act": "silu",
            "num_hidden_layers": 24,
        },
        32 * (2880 * 5760 + 5760 + 2880 * 2880 + 2880) + 32 * 2880 + 32,
    ),
    "GLM-4.5-Air": (
        {
            "model_type": "glm4_moe", "hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "hidden_act": "silu", "num_hidden_layers": 46,
        },
        129 * 3 * 4096 * 1408 + 128 * 4096,
    ),
    "OLMoE": (
        {
            "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64,
            "num_experts_per_tok": 8, "norm_topk_prob": False, "hidden_act": "silu", "num_hidden_layers": 16,
        },
        64 * 3 * 2048 * 1024 + 64 * 2048,
    ),
    "Llama-4-Scout": (
        {
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "num_local_experts": 16,
                "num_experts_per_tok": 1, "hidden_act": "silu", "interleave_moe_layer_step": 1, "num_hidden_layers": 48,
            },
        },
        17 * 3 * 5120 * 8192 + 16 * 5120,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", REAL)
def test_layers_of_real_size(model: str, tmp_path: Path) -> None:
    config, num_parameters = REAL[model]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    moe = MoE.from_config(file, 5, device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in moe.parameters()) == num_parameters
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe(torch.empty(3, moe.router.hidden_size, device="meta", dtype=torch.bfloat16)).shape == (
        3,
        moe.router.hidden_size,
    )


class TestRouterAlone:
    @pytest.mark.parametrize(
        "block", ["qwen3_moe.Qwen3MoeSparseMoeBlock", "hy_v3.HYV3MoE", "jetmoe.JetMoeMoE", "gpt_oss.GptOssMLP"]
    )
    def test_router_from_hf_chooses_what_the_layer_does(self, block: str) -> None:
        hf_block, config, moe = make(hf.Case(block))
        router = families.router_from_hf(hf_block, config=config, layer_idx=5)
        hidden_states = inputs()[0].flatten(0, 1)
        for actual, expected in zip(router(hidden_states), moe.router(hidden_states), strict=True):
            assert_bits_equal(actual, expected)
        assert router.weight.data_ptr() not in {parameter.data_ptr() for parameter in hf_block.parameters()}


QWEN = REAL["Qwen3-30B-A3B"][0] | {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4,
                                  "num_experts_per_tok": 2}  # fmt: skip


NOTE = {"model_type": "dots3_note_vision_encoder", "num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in QWEN.items() if key != name}


class TestErrors:
    @pytest.mark.parametrize(
        ("config", "layer_idx", "message"),
        [
            ({"hidden_size": 3}, None, "the config has no model_type"),
            ({"model_type": "llama"}, None, "there is no family 'llama'; choose one of afmoe, "),
            (without("num_experts"), None, "the config of 'qwen3_moe' has no num_experts or num_local_experts or"),
            (QWEN | {"num_local_experts": 5}, None, "different values for one setting: {'num_experts': 4, 'num_local"),
            (QWEN | {"hidden_act": "cosine"}, None, "there is no activation 'cosine'"),
            (QWEN | {"mlp_only_layers": [2]}, 2, "layer_idx = 2 of this 'qwen3_moe' is a dense layer"),
            (QWEN, 48, "layer_idx must be a whole number from 0 to 47, but is 48"),
            (QWEN, -1, "layer_idx must be a whole number from 0 to 47, but is -1"),
            ({"model_type": "deepseek_v4"}, None, "layer_idx is needed: the first layers"),
            (
                {"model_type": "qwen3_omni_moe", "thinker_config": {}},
                None,
                "the config of 'qwen3_omni_moe' holds several text models",
            ),
            (
                {"model_type": "ernie4_5_vl_moe_text", "moe_intermediate_size": [8, 4]},
                None,
                "has experts for text and for images, of sizes [8, 4]",
            ),
            (
                NOTE | {"per_layer_config": [8]},
                0,
                "per_layer_config must map the indices of layers to entries, but is [8",
            ),
            (NOTE | {"per_layer_config": {"0": 8}}, 0, "per_layer_config must have an object for layer 0, but has 8"),
        ],
    )
    def test_configs(self, config: dict[str, object], layer_idx: int | None, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            MoE.from_config(config, layer_idx)

    def test_what_is_no_config(self) -> None:
        with pytest.raises(TypeError, match="config must be a transformers config, a mapping or a path, but is int"):
            MoE.from_config(3)

    def test_a_block_that_does_not_hold_its_config(self) -> None:
        config = hf.tiny_config(hf.Case("jetmoe.JetMoeMoE"))
        block = hf.tiny_block(hf.Case("jetmoe.JetMoeMoE"), config)
        with pytest.raises(ValueError, match=r"JetMoeMoE does not hold its config; give config=model\.config"):
            MoE.from_hf(block)

    def test_a_module_that_is_not_the_block(self) -> None:
        block = hf.tiny_block(hf.Case(SUPPORTED_QWEN), hf.tiny_config(hf.Case(SUPPORTED_QWEN)))
        with pytest.raises(ValueError, match=r"there is no tensor gate\.weight \(3 are missing\)"):
            MoE.from_hf(block.experts)
        with pytest.raises(ValueError, match=r"bias belongs to no part of this layer \(1 tensors are left over\)"):
            block.register_parameter("bias", nn.Parameter(torch.zeros(3)))
            MoE.from_hf(block)

    def test_a_config_of_other_sizes(self) -> None:
        case = hf.Case(SUPPORTED_QWEN)
        config = hf.tiny_config(case)
        block = hf.tiny_block(case, config)
        config.hidden_size = 48
        with pytest.raises(
            ValueError, match=r"experts\.gate_up_proj must have shape \(8, 48, 48\), but has \(8, 48, 32\)"
        ):
            MoE.from_hf(block)

    def test_weights_that_do_not_fit_are_not_copied(self) -> None:
        case = hf.Case(SUPPORTED_QWEN)
        block = hf.tiny_block(case, hf.tiny_config(case))
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        config = hf.tiny_config(case)
        config.hidden_size = 48
        with pytest.raises(ValueError, match=r"is \(8, 48, 32\), but the layer has \(8, 48, 48\)"):
            MoE.from_config(config).to_hf(block)
        for name, tensor in block.state_dict().items():
            assert_bits_equal(tensor, before[name])

    def test_layers_with_parts_that_the_family_lacks(self) -> None:
        case = hf.Case(SUPPORTED_QWEN)
        config = hf.tiny_config(case)
        moe = MoE.from_config(config)
        moe.shared_expert = moe_npu.SharedExpert(32, 8)
        with pytest.raises(
            ValueError, match=r"shared_expert\.down_proj\.weight has no place in a block of this config"
        ):
            families.hf_state_dict(moe, config)


class TestCopies:
    def test_frozen_parameters_stay_frozen_and_nothing_is_shared(self) -> None:
        case = hf.Case("qwen2_moe.Qwen2MoeSparseMoeBlock")
        block = hf.tiny_block(case, hf.tiny_config(case))
        block.experts.requires_grad_(False)
        moe = MoE.from_hf(block.train())
        assert moe.training
        trained = {name for name, parameter in moe.named_parameters() if parameter.requires_grad}
        assert trained == {name for name in moe.state_dict() if not name.startswith("experts.")}
        pointers = {tensor.data_ptr() for tensor in block.state_dict().values()}
        assert not pointers & {tensor.data_ptr() for tensor in moe.state_dict().values()}

    @pytest.mark.parametrize("name", SUPPORTED)
    def test_what_is_trained_is_what_the_block_trains(self, name: str) -> None:
        case = hf.Case(name, "bias") if hf.Case(name, "bias") in CASES else hf.Case(name)
        config = hf.tiny_config(case)
        block = hf.tiny_block(case, config)
        parameters = dict(block.named_parameters())
        becomes = {}  # the parameter of ours that one of theirs goes into
        for theirs, parameter in parameters.items():
            for other in block.state_dict().values():
                other.zero_()
            parameter.data.fill_(1)
            ours = [one for one, tensor in native(case, block, config).named_parameters() if tensor.any()]
            assert len(ours) <= 1
            becomes.update(dict.fromkeys([theirs] if ours else [], *ours))
        for ours in set(becomes.values()):
            block.requires_grad_(False)
            parts = [parameters[theirs] for theirs in becomes if becomes[theirs] == ours]
            for part in parts:
                part.requires_grad_(True)
            trained = [one for one, tensor in native(case, block, config).named_parameters() if tensor.requires_grad]
            assert trained == [ours]
            if len(parts) > 1:
                parts[-1].requires_grad_(False)
                with pytest.raises(ValueError, match=f"has one parameter {re.escape(ours)} for them"):
                    native(case, block, config)

    @pytest.mark.parametrize("block", ["gpt_oss.GptOssMLP", "muse_spark.MuseSparkMoE", "llama4.Llama4TextMoe"])
    def test_one_graph(self, block: str) -> None:
        _, _, moe = make(hf.Case(block))
        hidden_states, _ = inputs()
        compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
        assert_close(compiled(hidden_states), moe(hidden_states).double(), reduction=64)

    def test_layers_of_one_model_by_index(self) -> None:
        config = hf.tiny_config(hf.Case("hunyuan_v1_moe.HunYuanMoEV1Moe"))
        serialized = {**config.to_dict(), "num_experts": [4, 6], "moe_topk": [1, 2], "num_hidden_layers": 2}
        layers = [MoE.from_config(serialized, index) for index in range(2)]
        assert [(layer.num_experts, layer.router.top_k) for layer in layers] == [(4, 1), (6, 2)]
        with pytest.raises(ValueError, match=re.escape("layer_idx is needed: num_experts is [4, 6]")):
            MoE.from_config(serialized)


QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    ("changes", "layer_idx", "message"),
    [
        ({"num_experts": 256.0}, None, "num_experts of the config must be a whole number of at least 0, but is 256.0"),
        ({"num_experts": True}, None, "num_experts of the config must be a whole number"),
        ({"hidden_size": "x"}, None, "hidden_size of the config must be a whole number of at least 1, but is 'x'"),
        ({"hidden_size": 0}, None, "hidden_size of the config must be .* at least 1, but is 0"),
        ({"moe_intermediate_size": -3}, None, "moe_intermediate_size of the config must be .* but is -3"),
        ({}, "a", "layer_idx must be a whole number from 0 to .* but is 'a'"),
        ({}, -1, "layer_idx must be a whole number from 0 to .* but is -1"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], layer_idx: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_npu.MoE.from_config(QWEN | changes, layer_idx)


def test_a_factor_is_a_number() -> None:
    config = {**transformers.DeepseekV3Config().to_dict(), "routed_scaling_factor": float("nan")}
    with pytest.raises(ValueError, match="routed_scaling_factor of the config must be a finite number, but is nan"):
        moe_npu.MoE.from_config(config, 3, device="meta")


def test_a_block_on_meta_takes_no_weights() -> None:
    moe = moe_npu.MoE.from_config(QWEN)
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(**QWEN))
    with pytest.raises(ValueError, match="on meta"):
        moe.to_hf(block)


def test_a_router_alone_is_no_block() -> None:
    config = transformers.Qwen3MoeConfig(**QWEN)
    block = Qwen3MoeSparseMoeBlock(config)
    with pytest.raises(ValueError, match=r"module must be a MoE block|no native layer"):
        families.router_from_hf(block.gate, config=config)
