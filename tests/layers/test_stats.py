"""Expert load counters, their report and their picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_npu
from moe_npu.layers.stats import (
    ExpertLoad,
    count_expert_tokens,
    load_report,
    plot_expert_load,
    track_expert_load,
)

E, H, K = 6, 16, 2
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def qwen(implementation: str = "moe_npu") -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=8, norm_topk_prob=True)
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation=implementation)


def gpt_oss(implementation: str = "moe_npu") -> GptOssForCausalLM:
    config = GptOssConfig(**TINY, num_local_experts=8)
    return GptOssForCausalLM._from_config(config, experts_implementation=implementation)


def expected_counts(ids: Tensor, num_experts: int) -> list[int]:
    flat = ids.flatten().tolist()
    return [flat.count(expert) for expert in range(num_experts)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_counts(dtype: torch.dtype) -> None:
    ids = torch.randint(-1, E + 2, (20, K), dtype=dtype)
    counts = count_expert_tokens(ids, E)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected_counts(ids, E)
    mask = torch.arange(20).view(4, 5) % 3 == 0
    assert count_expert_tokens(ids, E, mask=mask).tolist() == expected_counts(ids[mask.flatten()], E)
    assert count_expert_tokens(ids[:0], E).tolist() == [0] * E


class TestExpertLoad:
    def test_adds_up_until_it_is_reset(self) -> None:
        load, ids = ExpertLoad(E), torch.randint(0, E, (20, K))
        for part in ids.split(7):
            load(part)
        load.eval()(ids)
        assert load.counts.tolist() == [2 * count for count in expected_counts(ids, E)]
        load.reset()
        assert load.counts.tolist() == [0] * E

    def test_is_no_part_of_the_state(self) -> None:
        load = ExpertLoad(E)
        assert not load.state_dict()
        assert not load.bfloat16().counts.is_floating_point()

    def test_starts_at_zero_after_meta(self) -> None:
        with torch.device("meta"):
            load = ExpertLoad(E)
        load(torch.zeros(3, K, dtype=torch.int32, device="meta"))
        load.to_empty(device="cpu")
        assert load.counts.tolist() == [0] * E
        load(torch.zeros(3, K, dtype=torch.int32))
        load.to("cpu")
        assert load.counts.tolist() == [6, 0, 0, 0, 0, 0]


class Block(nn.Module):
    """Counts within what is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, E)
        self.load = ExpertLoad(E)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x).sigmoid()
        values, ids = scores.topk(K, -1)
        self.load(ids)
        return (values * values).sum(-1)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.block = Block()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("compiled", ["eager", "outside", "inside"])
def test_a_repeated_forward_is_counted_once(compiled: str, use_reentrant: bool) -> None:
    module = Checkpointed(use_reentrant)
    run: Callable[[Tensor], Tensor] = module
    if compiled == "outside":
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    elif compiled == "inside":
        module.block = torch.compile(module.block, fullgraph=True, backend="aot_eager")
    total = torch.zeros(E, dtype=torch.int64)
    for _ in range(2):
        x = torch.randn(9, H, requires_grad=True)
        total += torch.tensor(expected_counts(module.block.linear(x).topk(K, -1).indices, E))
        run(x).sum().backward()
    assert torch.equal(module.block.load.counts, total)


def test_counting_compiles_with_a_dynamic_shape() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    total = [0] * E
    for num_tokens in (5, 9, 6):
        x = torch.randn(num_tokens, H)
        ids = block.linear(x).topk(K, -1).indices
        total = [a + b for a, b in zip(total, expected_counts(ids, E), strict=True)]
        compiled(x).sum().backward()
    assert block.load.counts.tolist() == total


def test_a_moe_layer_counts_in_its_slot() -> None:
    layer = moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True),
        moe_npu.GroupedExperts(E, H, 8),
        expert_load=ExpertLoad(E),
    )
    _, routing = layer.forward_with_routing(torch.randn(10, H))
    assert layer.expert_load.counts.tolist() == expected_counts(routing.topk_ids, E)
    assert [line.num_pairs for line in load_report(layer).layers] == [20]


class TestTrackExpertLoad:
    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "moe_npu"])
    @pytest.mark.parametrize("make", [qwen, gpt_oss])
    def test_counts_what_the_router_chose(self, make: Callable[[str], Any], implementation: str) -> None:
        model, ids = make(implementation).eval(), torch.randint(1, 64, (2, 9))
        with torch.no_grad(), track_expert_load(model) as loads:
            model(ids)
            logits = model(ids, output_router_logits=True).router_logits
        assert list(loads) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        for load, layer in zip(loads.values(), logits, strict=True):
            expected = expected_counts(layer.topk(2, -1).indices, 8)
            assert load.counts.tolist() == [2 * count for count in expected]

    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_gradient_checkpointing(self, use_reentrant: bool) -> None:
        model, ids = qwen().train(), torch.randint(1, 64, (2, 9))
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        with track_expert_load(model) as loads:
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert [int(load.counts.sum()) for load in loads.values()] == [36, 36]

    def test_keyword_arguments(self) -> None:
        experts = qwen().model.layers[0].mlp.experts
        ids = torch.randint(0, 8, (3, 2))
        with track_expert_load(nn.ModuleDict({"experts": experts})) as loads:
            experts(hidden_states=torch.randn(3, 32), top_k_weights=torch.rand(3, 2), top_k_index=ids)
        assert loads[""].counts.tolist() == expected_counts(ids, 8)

    def test_native_layers_have_the_name_of_their_block(self) -> None:
        torch.compiler.reset()

        def layer() -> moe_npu.MoE:
            return moe_npu.MoE(moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True), moe_npu.GroupedExperts(E, H, 8))

        model = nn.ModuleDict({"first": layer(), "second": torch.compile(layer(), backend="aot_eager")})
        x = torch.randn(7, H)
        with track_expert_load(nn.ModuleDict({"module": model})) as loads:
            model["second"](model["first"](x).detach())
        assert list(loads) == ["first", "second"]
        assert loads["first"].counts.tolist() == expected_counts(model["first"].router(x).topk_ids, E)
        assert loads["second"].counts.sum() == 14

    def test_the_model_is_left_as_it_was(self) -> None:
        model = qwen()
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        with pytest.raises(KeyError, match="mine"), track_expert_load(model) as loads:
            model(torch.randint(1, 64, (1, 3)))
            raise KeyError("mine")
        assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
        model(torch.randint(1, 64, (1, 3)))
        assert loads["model.layers.0.mlp"].counts.sum() == 6

    def test_compiled_inside_and_before(self) -> None:
        torch.compiler.reset()
        block, x = qwen().model.layers[0].mlp, torch.randn(1, 5, 32)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        with track_expert_load(block) as loads:
            for _ in range(10):  # more often than the limit of recompilations
                compiled(x)
        assert loads[""].counts.sum() == 100
        torch.compiler.reset()
        compiled(x)
        message = r"no token was counted in Qwen3MoeSparseMoeBlock: .*compiled before"
        with pytest.raises(RuntimeError, match=message), track_expert_load(block):
            compiled(x)

    def test_a_model_without_experts(self) -> None:
        with pytest.raises(ValueError, match="Linear has no MoE layer"), track_expert_load(nn.Linear(2, 2)):
            pass


class TestReport:
    LOADS: ClassVar = {
        "even": torch.tensor([5, 5, 5, 5]),
        "longer name": torch.tensor([8, 4, 0, 0]),
        "idle": torch.zeros(3).long(),
    }

    def test_numbers(self) -> None:
        even, uneven, idle = load_report(self.LOADS).layers
        assert (even.num_pairs, even.max_over_mean, even.variation, even.dead_experts) == (20, 1, 0, ())
        assert even.entropy == pytest.approx(1)
        assert uneven.max_over_mean == pytest.approx(8 / 3)
        assert uneven.variation == pytest.approx(math.sqrt((25 + 1 + 9 + 9) / 4) / 3)
        assert uneven.entropy == pytest.approx((math.log(3) - 2 / 3 * math.log(2)) / math.log(4))
        assert uneven.dead_experts == (2, 3)
        assert idle.dead_experts == (0, 1, 2)
        assert math.isnan(idle.max_over_mean)

    def test_table_is_aligned(self) -> None:
        lines = str(load_report(self.LOADS)).splitlines()
        assert len(lines) == 4
        assert lines[0].split() == ["layer", "experts", "pairs", "max/mean", "variation", "entropy", "dead", "experts"]
        assert lines[2].split() == ["longer", "name", "4", "12", "2.667", "1.106", "0.459", "2", "(2,", "3)"]
        ends = [lines[0].index("max/mean") + len("max/mean")] * 3
        assert [
            line.index(value) + len(value) for line, value in zip(lines[1:], ("1.000", "2.667", "nan"), strict=True)
        ] == ends

    def test_many_dead_experts_are_cut(self) -> None:
        table = str(load_report({"layer": torch.tensor([1] + [0] * 20)}))
        assert "20 (1, 2, 3, 4, 5, 6, 7, 8, ...)" in table

    @pytest.mark.parametrize("function", [load_report, lambda loads: plot_expert_load(loads, "never.png")])
    def test_errors(self, function: Callable[[Any], object]) -> None:
        with pytest.raises(ValueError, match="no expert loads"):
            function(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"loads\['a'\] must be integers of shape \[E\]"):
            function({"a": torch.ones(3)})


class TestPlot:
    @pytest.mark.parametrize("num_experts", [8, 128])
    def test_writes_a_picture(self, num_experts: int, tmp_path: Path) -> None:
        from matplotlib.image import imread

        loads = {f"model.layers.{i}.mlp": torch.randint(0, 99, (num_experts,)) for i in range(4)}
        plot_expert_load(loads, tmp_path / "load.png")
        picture = imread(tmp_path / "load.png")
        assert picture.shape[0] > 200
        assert picture.shape[1] > 800
        assert picture.std() > 0.05

    def test_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'moe-npu\[plot\]'"):
            plot_expert_load({"a": torch.ones(3).long()}, tmp_path / "load.png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExpertLoad(0), "num_experts must be positive, but is 0"),
        (lambda: ExpertLoad(2)(torch.zeros(3).int()), r"topk_ids must have shape \[T, K\], but has shape \(3,\)"),
        (lambda: count_expert_tokens(torch.zeros(3).int(), 2), r"topk_ids must have shape \[T, K\]"),
        (
            lambda: count_expert_tokens(torch.zeros(3, 1).int(), 2, mask=torch.ones(2)),
            "3 tokens of topk_ids, but has 2",
        ),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
