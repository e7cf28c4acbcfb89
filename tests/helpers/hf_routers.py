"""Every router of the installed transformers: how it is called, and which of our routers computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from moe_npu.layers import routers as ours

FP32 = torch.float32
Config = SimpleNamespace

# ---------------------------------------------------------------- which there are


def router_classes() -> list[str]:
    """``family.ClassName`` of each class that is called a router, or is part of an MoE layer and chooses experts."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for definition in re.split(r"^(?=class )", path.read_text(), flags=re.MULTILINE)[1:]:  # parsing would be slow
            name = re.match(r"class (\w+)", definition)[1]
            is_named_so = re.search(r"(Router|Gating)$", name)
            is_in_a_layer = re.search(r"(MoE|Moe|Gate|FFN|Experts|SparseMLP)(V\d+)?(Gate|Block|Layer|MLP)?$", name)
            if is_named_so or (is_in_a_layer and re.search(r"\b(topk|argmax)\(", definition)):
                found.append(f"{path.parent.name}.{name}")
    return found


NOT_COVERED = {
    "dbrx.DbrxRouter": "the linear map alone; DbrxFFN chooses",
    "doge.DogeCDMoE": "splits the logits across tokens: not a function of the token",
    "granite_docling.GraniteDoclingDensityRouter": "chooses no experts",
    "inkling.InklingTopkRouter": "weighs the shared experts too, which is one more result",
    "nllb_moe.NllbMoeTop2Router": "drops tokens over capacity: depends on the other tokens",
    "switch_transformers.SwitchTransformersTop1Router": "drops tokens over capacity: depends on the other tokens",
    "zaya.ZayaRouter": "has a state that goes from layer to layer",
}

# ---------------------------------------------------------------- how they are built and called


def make_config(hidden_size: int, num_experts: int, top_k: int, **options: Any) -> Config:
    """A configuration under all the names that routers read."""
    config = Config(
        hidden_size=hidden_size,
        **dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"), num_experts),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k"), top_k),
        **dict.fromkeys(("route_scale", "routed_scaling_factor", "router_scaling_factor"), 1.0),
        zero_expert_num=0,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        scoring_func="sqrtsoftplus",
        expert_selection_fn="softmax",
        rms_norm_eps=1e-6,
        moe_norm_min=1e-12,
        moe_router_logit_softcapping=0.0,
        use_expert_bias=True,
        output_multiplier=1.0,
        router_jitter_noise=0.1,
        input_jitter_noise=0.0,
        vocab_size=11,
        moe_normalize_expert_weights=1.0,
        moe_jitter_eps=None,
        ffn_hidden_size=4,
        ffn_act_fn={"name": "silu"},
        mean_of_bias=0.0,  # read by make_pair
    )
    config.ffn_config = config
    vars(config).update(options)
    return config


class Routed(NamedTuple):
    logits: Tensor
    weights: Tensor
    ids: Tensor


def _plain(router: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    return Routed(*router(hidden_states))


def _takes_bias(router: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    return Routed(*router(hidden_states, bias))


def _afmoe(router: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    return Routed(*router(hidden_states[None], bias))


def _hash(router: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    return Routed(*router(hidden_states, token_ids))


def _dbrx(ffn: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    logits = ffn.router(hidden_states)
    return Routed(logits, *ffn.route_tokens_to_experts(logits))


def _llama4(router: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    scores, logits = router(hidden_states)
    weights, ids = scores.sort(descending=True, stable=True)  # those that were not chosen are 0
    return Routed(logits, weights[:, : router.top_k], ids[:, : router.top_k])


def _jetmoe(router: nn.Module, hidden_states: Tensor, bias: Tensor, token_ids: Tensor) -> Routed:
    order, _, weights, counts, logits = router(hidden_states)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    undo = order.argsort()
    shape = (-1, router.top_k)
    return Routed(logits, weights[undo].view(shape), experts[undo].view(shape))


# ---------------------------------------------------------------- which of ours is the same

Build = Callable[[Config], ours.LinearRouter]


class Case(NamedTuple):
    """One or more classes that compute the same, and our router that does."""

    classes: str
    build: Build
    variants: tuple[dict[str, Any], ...] = ({},)  # options of the configuration
    call: Callable[[nn.Module, Tensor, Tensor, Tensor], Routed] = _plain
    is_probability: bool = False  # what it returns for logits
    has_order: bool = True  # random numbers aside


def sizes(c: Config) -> tuple[int, int, int]:
    return c.hidden_size, c.num_experts, c.num_experts_per_tok


def _softmax(c: Config, **options: Any) -> ours.LinearRouter:
    return ours.SoftmaxTopKRouter(*sizes(c), **{"norm_topk_prob": c.norm_topk_prob, **options})


def _sigmoid(c: Config, **options: Any) -> ours.LinearRouter:
    return ours.SigmoidTopKRouter(
        *sizes(c), **{"norm_topk_prob": True, "has_correction_bias": True, "norm_eps": 1e-20, **options}
    )


def _groups(c: Config, **options: Any) -> ours.LinearRouter:
    defaults = {
        "score_function": "sigmoid",
        "group_score": "top2_sum",
        "norm_topk_prob": c.norm_topk_prob,
        "has_correction_bias": True,
        "routed_scaling_factor": c.routed_scaling_factor,
        "num_groups": c.n_group or 1,
        "topk_groups": c.topk_group if c.n_group else 1,
        "scores_dtype": None,
    }
    return ours.GroupLimitedRouter(*sizes(c), **{**defaults, **options})


def _deepseek_v2(c: Config) -> ours.LinearRouter:
    options = {
        "norm_topk_prob": False,
        "routed_scaling_factor": c.routed_scaling_factor,
        "logits_dtype": FP32,
        "weights_dtype": FP32,
    }
    if c.topk_method == "greedy":
        return _softmax(c, **options)
    return _groups(
        c,
        **options,
        score_function="softmax",
        group_score="max",
        has_correction_bias=False,
        group_fill=0.0,
        scores_dtype=FP32,
    )


def _deepseek_v4(c: Config, **options: Any) -> ours.LinearRouter:
    kind = ours.SqrtSoftplusRouter if c.scoring_func == "sqrtsoftplus" else ours.SigmoidTopKRouter
    return kind(
        *sizes(c),
        norm_topk_prob=True,
        norm_eps=1e-20,
        has_correction_bias=True,
        routed_scaling_factor=c.routed_scaling_factor,
        scores_dtype=None,
        **options,
    )


def _hashed(c: Config) -> ours.LinearRouter:
    return ours.HashRouter(
        *sizes(c),
        vocab_size=c.vocab_size,
        score_function={"sqrtsoftplus": "sqrt_softplus"}.get(c.scoring_func, c.scoring_func),
        routed_scaling_factor=c.routed_scaling_factor,
        scores_dtype=None,
    )


def _cohere2(c: Config) -> ours.LinearRouter:
    if c.expert_selection_fn == "softmax":
        return ours.TopKSoftmaxRouter(*sizes(c), weights_dtype="input")
    return ours.SigmoidTopKRouter(
        *sizes(c), norm_topk_prob=c.norm_topk_prob, selects_by="logits", scores_dtype=None, weights_dtype="input"
    )


def _top_k_softmax(c: Config, **options: Any) -> ours.LinearRouter:
    return ours.TopKSoftmaxRouter(*sizes(c), **options)


def _scaled_sigmoid(scale: str, **options: Any) -> Build:
    return lambda c: _sigmoid(c, routed_scaling_factor=getattr(c, scale), **options)


NORM = ({"norm_topk_prob": True}, {"norm_topk_prob": False})
SCALE = 2.5
SCALED = ({"route_scale": SCALE, "routed_scaling_factor": SCALE, "router_scaling_factor": SCALE},)
GROUPS = (
    {"n_group": 1, "topk_group": 1},
    {"n_group": 4, "topk_group": 2, "routed_scaling_factor": SCALE},
    {"n_group": 4, "topk_group": 3, "norm_topk_prob": False},
    {
        "n_group": 4,
        "topk_group": 2,
        "mean_of_bias": -0.5,
    },  # what is left out of the best groups may be better than they
)

CASES = [
    Case(
        "flex_olmo.FlexOlmoTopKRouter mellum.MellumTopKRouter olmoe.OlmoeTopKRouter qwen2_moe.Qwen2MoeTopKRouter "
        "qwen3_moe.Qwen3MoeTopKRouter qwen3_next.Qwen3NextTopKRouter qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter "
        "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter qwen4_exp.Qwen4ExpTextTopKRouter",
        _softmax,
        NORM,
    ),
    Case(
        "qwen3_5_moe.Qwen3_5MoeTopKRouter qwen3_omni_moe.Qwen3OmniMoeTextTopKRouter "
        "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter",
        _softmax,
    ),
    Case("minimax.MiniMaxTopKRouter mixtral.MixtralTopKRouter", lambda c: _softmax(c, weights_dtype=FP32)),
    Case("hunyuan_v1_moe.HunYuanMoEV1Gate", lambda c: _softmax(c, dtype=FP32)),
    Case("jamba.JambaTopKRouter", lambda c: _softmax(c, norm_topk_prob=False, weights_dtype="input")),
    Case(
        "lara_mini.LaraMiniTopKRouter",
        lambda c: _softmax(c, logits_dtype=FP32, scores_dtype=None, weights_dtype="input"),
        NORM,
    ),
    Case(
        "dbrx.DbrxFFN",
        lambda c: _softmax(c, norm_topk_prob=c.moe_normalize_expert_weights is not None, scores_dtype=None),
        ({"moe_normalize_expert_weights": 1.0}, {"moe_normalize_expert_weights": None}),
        _dbrx,
    ),
    Case(
        "ernie4_5_moe.Ernie4_5_MoeTopKRouter ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter",
        lambda c: _softmax(
            c,
            norm_min=c.moe_norm_min,
            has_correction_bias=True,
            logits_dtype=FP32,
            weights_dtype="input",
            follows_autocast=False,
        ),
        ({"moe_norm_min": 1e-12}, {"moe_norm_min": 0.5}),
    ),
    Case(
        "longcat_flash.LongcatFlashTopkRouter",
        lambda c: _softmax(
            c,
            norm_topk_prob=False,
            routed_scaling_factor=c.routed_scaling_factor,
            has_correction_bias=True,
            logits_dtype=FP32,
            scores_dtype=None,
        ),
        SCALED,
    ),
    Case(
        "diffusion_gemma.DiffusionGemmaTextRouter gemma4.Gemma4TextRouter",
        lambda c: ours.Gemma4Router(*sizes(c), rms_norm_eps=c.rms_norm_eps),
        is_probability=True,
    ),
    Case(
        "deepseek_ocr2.DeepseekOcr2TextTopkRouter deepseek_v2.DeepseekV2TopkRouter "
        "unlimited_ocr.UnlimitedOcrTextTopkRouter",
        _deepseek_v2,
        (*SCALED, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    ),
    Case(
        "axk1.AXK1TopkRouter bailing_hybrid.BailingHybridTopkRouter deepseek_v3.DeepseekV3TopkRouter "
        "deepseek_v32.DeepseekV32TopkRouter dots1.Dots1TopkRouter dots3_note.Dots3NoteTextTopkRouter "
        "glm4_moe.Glm4MoeTopkRouter glm4_moe_lite.Glm4MoeLiteTopkRouter glm4v_moe.Glm4vMoeTextTopkRouter "
        "glm5_next.Glm5NextTextTopkRouter glm_moe_dsa.GlmMoeDsaTopkRouter hy_v4.HYV4TopkRouter "
        "hy_v4_vl.HYV4VLTopkRouter kimi_linear.KimiLinearTopkRouter mimo_v2_flash.MiMoV2FlashTopkRouter "
        "nemotron_h.NemotronHTopkRouter solar_open.SolarOpenTopkRouter exaone_moe.ExaoneMoeTopkRouter",
        _groups,
        GROUPS,
    ),
    Case("beam.BeamTopKRouter", lambda c: _groups(c, routed_scaling_factor=1.0), GROUPS),
    Case("axk2.AXK2TopkRouter", lambda c: _groups(c, group_fill=0.0), (*GROUPS, {"n_group": None, "topk_group": None})),
    Case(
        "mistral4.Mistral4TopkRouter",
        lambda c: _groups(c, score_function="softmax", has_correction_bias=False, group_fill=0.0, logits_dtype=None),
        GROUPS,
    ),
    Case(
        "mistral_large4.MistralLarge4TextTopkRouter",
        lambda c: _groups(c, score_function="softmax", has_correction_bias=False, group_fill=0.0, norm_topk_prob=True),
        GROUPS,
    ),
    Case("afmoe.AfmoeTokenChoiceRouter", _scaled_sigmoid("route_scale", weights_dtype=FP32), SCALED, _afmoe),
    Case(
        "dots3_note.Dots3NoteVisionTopKRouter hy_v3.HYV3TopKRouter",
        _scaled_sigmoid("router_scaling_factor", logits_dtype=FP32, scores_dtype=None),
        SCALED,
        _takes_bias,
    ),
    Case(
        "flint.FlintTopKRouter",
        lambda c: _sigmoid(
            c,
            norm_topk_prob=c.norm_topk_prob,
            norm_eps=0.0,
            has_correction_bias=False,
            logits_dtype=FP32,
            follows_autocast=False,
        ),
        NORM,
    ),
    Case(
        "kolibri1.Kolibri1TopKRouter",
        lambda c: _sigmoid(
            c,
            norm_topk_prob=c.norm_topk_prob,
            norm_eps=0.0,
            selects_by="logits",
            logits_dtype=FP32,
            scores_dtype=None,
        ),
        NORM,
    ),
    Case(
        "laguna.LagunaTopKRouter",
        lambda c: _sigmoid(
            c, norm_eps=0.0, logit_softcap=c.moe_router_logit_softcapping or None, weights_dtype="input"
        ),
        ({}, {"moe_router_logit_softcapping": 1.5}),
    ),
    Case(
        "lfm2_moe.Lfm2MoeTopKRouter",
        lambda c: _sigmoid(
            c,
            norm_topk_prob=c.norm_topk_prob,
            norm_eps=1e-6,
            has_correction_bias=c.use_expert_bias,
            routed_scaling_factor=c.routed_scaling_factor,
            scores_dtype=None,
        ),
        (*NORM, *SCALED, {"use_expert_bias": False}),
        _takes_bias,
    ),
    Case("minimax_m2.MiniMaxM2TopKRouter", lambda c: _sigmoid(c, norm_eps=0.0, weights_dtype=FP32), call=_takes_bias),
    Case(
        "minimax_m3_vl.MiniMaxM3VLTopKRouter step3p7.Step3p7TopKRouter",
        lambda c: _sigmoid(c, norm_eps=0.0, weights_dtype=FP32),
    ),
    Case(
        "muse_spark.MuseSparkTopkRouter",
        lambda c: _sigmoid(
            c,
            norm_eps=1e-15,
            routed_scaling_factor=c.routed_scaling_factor,
            logit_scale=c.output_multiplier,
            logits_dtype=FP32,
            scores_dtype=None,
        ),
        ({"output_multiplier": 1.7, "routed_scaling_factor": SCALE},),
    ),
    Case("deepseek_v4.DeepseekV4TopKRouter", _deepseek_v4, ({}, {"scoring_func": "sigmoid", **SCALED[0]})),
    Case(
        "inkling2.Inkling2TopKRouter inkling2_loop.Inkling2LoopTopKRouter",
        lambda c: _deepseek_v4(c, logits_dtype=FP32),
        SCALED,
    ),
    Case(
        "deepseek_v4.DeepseekV4HashRouter",
        _hashed,
        ({}, {"scoring_func": "sigmoid", **SCALED[0]}),
        _hash,
        has_order=False,
    ),
    Case("aria.AriaTextTopKRouter", _top_k_softmax),
    Case("gpt_oss.GptOssTopKRouter", lambda c: _top_k_softmax(c, bias=True)),
    Case(
        "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
        lambda c: _top_k_softmax(
            c, bias=True, logits_dtype=FP32, scores_dtype=None, routed_scaling_factor=1 / c.num_experts_per_tok
        ),
    ),
    Case(
        "granitemoe.GraniteMoeTopKRouter granitemoe_swa.GraniteMoeSWATopKRouter "
        "granitemoehybrid.GraniteMoeHybridTopKRouter granitemoeshared.GraniteMoeSharedTopKRouter",
        lambda c: _top_k_softmax(c, weights_dtype="input"),
    ),
    Case("jetmoe.JetMoeTopKGating", lambda c: _top_k_softmax(c, weights_dtype="input"), call=_jetmoe),
    Case(
        "cohere2_moe.Cohere2MoeTopKRouter",
        _cohere2,
        ({}, *({"expert_selection_fn": "sigmoid", **norm} for norm in NORM)),
    ),
    Case("llama4.Llama4Router", lambda c: ours.Llama4Router(*sizes(c)), call=_llama4),
    Case(
        "phimoe.PhimoeTopKRouter",
        lambda c: ours.SparseMixerRouter(*sizes(c), jitter_eps=c.router_jitter_noise),
        has_order=False,
    ),
]
