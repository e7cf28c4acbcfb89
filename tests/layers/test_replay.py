"""Record and replay of routing: in one process and through a file, across precisions, checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_npu
from moe_npu.layers import replay
from moe_npu.layers.replay import force_balanced, record_routing, replay_routing
from moe_npu.layers.routers import RouterOutput
from moe_npu.layers.routing_record import LayerRouting, RoutingRecord
from tests.helpers import hf_moe_blocks as blocks

E, H, K, VOCAB = 8, 32, 2, 64
IS_OLDEST = transformers.__version__.startswith("5.0.")
NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]
TINY: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_experts_per_tok": K,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # routers that have an opinion
}


def qwen(implementation: str = "moe_npu", seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=E, norm_topk_prob=True)
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation=implementation)


def gpt_oss(implementation: str = "moe_npu", seed: int = 0) -> GptOssForCausalLM:
    torch.manual_seed(seed)
    config = GptOssConfig(**TINY, num_local_experts=E)
    return GptOssForCausalLM._from_config(config, experts_implementation=implementation)


class Native(nn.Module):
    """Two native layers, named as those of a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            moe_npu.MoE(
                moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True), moe_npu.GroupedExperts(E, H, 8, bias=True)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class SometimesNone(moe_npu.SoftmaxTopKRouter):
    """Every other token has no expert in its last slot: the id E, as in Zaya."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> RouterOutput:
        output = super().forward(hidden_states, **kwargs)
        topk_ids = output.topk_ids.clone()
        topk_ids[::2, -1] = self.num_experts
        return output._replace(topk_ids=topk_ids)


def prompt(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length))


def random_record(shapes: list[int], names: list[str] = NAMES, top_k: int = K) -> RoutingRecord:
    """A record that no router would choose."""
    return RoutingRecord(
        {
            name: LayerRouting(
                E,
                [torch.stack([torch.randperm(E)[:top_k] for _ in range(size)]).to(torch.uint8) for size in shapes],
                [torch.rand(size, top_k) for size in shapes],
            )
            for name in names
        }
    )


def assert_ids_equal(actual: RoutingRecord, expected: RoutingRecord) -> None:
    assert actual.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        assert len(actual.layers[name].topk_ids) == len(layer.topk_ids)
        for a, b in zip(actual.layers[name].topk_ids, layer.topk_ids, strict=True):
            assert torch.equal(a, b)


def hooks(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in model.modules()
    ]


@pytest.fixture
def _nothing_compiled() -> None:
    torch.compiler.reset()


class TestRecord:
    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "moe_npu"])
    @pytest.mark.parametrize("make", [qwen, gpt_oss])
    def test_holds_what_the_router_chose(self, make: Callable[[str], Any], implementation: str) -> None:
        model, ids = make(implementation).eval(), prompt()
        with torch.no_grad():
            expected = model(ids, output_router_logits=True)
            with record_routing(model) as record:
                result = model(ids).logits
        assert torch.equal(result, expected.logits)
        assert list(record.layers) == NAMES
        for layer, logits in zip(record.layers.values(), expected.router_logits, strict=True):
            values, chosen = logits.topk(K, -1)
            if IS_OLDEST and make is qwen:
                values = values.log()  # there, what Qwen3 calls logits are probabilities
            assert layer.topk_ids[0].dtype == torch.uint8
            assert torch.equal(layer.topk_ids[0].long(), chosen)
            torch.testing.assert_close(layer.topk_weights[0], values.softmax(-1))

    def test_native_layers(self) -> None:
        model, x = Native(), torch.randn(5, H)
        with record_routing(model) as record:
            model(x)
        routing = model.layers[0].router(x)
        assert list(record.layers) == ["layers.0", "layers.1"]
        assert torch.equal(record.layers["layers.0"].topk_ids[0].int(), routing.topk_ids)
        assert torch.equal(record.layers["layers.0"].topk_weights[0], routing.topk_weights)
        assert not record.layers["layers.0"].topk_weights[0].requires_grad

    def test_ids_are_as_small_as_they_can_be(self) -> None:
        sizes = {255: torch.uint8, 256: torch.int16, 2**15 - 1: torch.int16, 2**15: torch.int32}
        assert {size: LayerRouting(size).ids_dtype for size in sizes} == sizes

    @pytest.mark.parametrize("num_experts", [255, 256, 2**15 - 1, 2**15])
    def test_the_id_of_no_expert_is_kept(self, num_experts: int, tmp_path: Path) -> None:
        router, x = SometimesNone(4, num_experts, K, norm_topk_prob=True), torch.randn(6, 4)
        with record_routing(router) as record:
            expected = router(x).topk_ids
        assert (expected == num_experts).any()
        record.save(tmp_path / "routing.safetensors")
        for found in (record, RoutingRecord.load(tmp_path / "routing.safetensors")):
            assert torch.equal(found.layers[""].topk_ids[0].int(), expected)
            with replay_routing(router, found, weights="recorded"):
                assert torch.equal(router(torch.randn(6, 4)).topk_ids, expected)

    def test_prefill_and_decoding_are_one_forward(self) -> None:
        model, ids = qwen().eval(), prompt(3, 5)
        with record_routing(model, offload=True) as record, torch.no_grad():
            sequences = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert [call.shape[0] for call in record.layers[NAMES[0]].topk_ids] == [15, 3, 3, 3]
        with record_routing(model) as again, torch.no_grad():
            model(sequences[:, :-1])
        assert_ids_equal(record.concatenate(batch_size=3), again)

    def test_save_and_load(self, tmp_path: Path) -> None:
        record = random_record([3, 1], ["", "a.b"])
        record.save(tmp_path / "routing.safetensors")
        loaded = RoutingRecord.load(tmp_path / "routing.safetensors")
        assert list(loaded.layers) == ["", "a.b"]
        assert_ids_equal(loaded, record)
        for name, layer in record.layers.items():
            assert loaded.layers[name].num_experts == E
            assert all(map(torch.equal, loaded.layers[name].topk_weights, layer.topk_weights))


class TestReplay:
    def test_rollout_in_bfloat16_and_training_in_float32(self, tmp_path: Path) -> None:
        ids, path = prompt(2, 12), tmp_path / "routing.safetensors"
        rollout = qwen("eager").to(torch.bfloat16).eval()
        with record_routing(rollout, offload=True) as record, torch.no_grad():
            rollout(ids)
        record.save(path)

        trained = qwen("moe_npu").train()
        with record_routing(trained) as natural:
            trained(ids)
        recorded = RoutingRecord.load(path)
        different = [
            bool((natural.layers[name].topk_ids[0] != recorded.layers[name].topk_ids[0]).any()) for name in NAMES
        ]
        assert any(different), "the precisions must disagree for this test to show anything"
        with replay_routing(trained, recorded, weights="router"), record_routing(trained) as again:
            trained(ids, labels=ids, use_cache=False).loss.backward()
        assert_ids_equal(again, recorded)
        for layer in trained.model.layers:
            assert layer.mlp.gate.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("make", [qwen, gpt_oss])
    def test_recorded_weights(self, make: Callable[[], Any]) -> None:
        model, ids, record = make().train(), prompt(), random_record([14])
        with replay_routing(model, record, weights="recorded"), record_routing(model) as again:
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert_ids_equal(again, record)
        for name in NAMES:
            assert torch.equal(again.layers[name].topk_weights[0], record.layers[name].topk_weights[0])
        router = model.model.layers[0].mlp.gate if make is qwen else model.model.layers[0].mlp.router
        assert router.weight.grad is None

    @pytest.mark.parametrize("model", [qwen(), Native()], ids=["transformers", "native"])
    def test_weights_of_the_router_are_its_probabilities(self, model: nn.Module) -> None:
        is_native = isinstance(model, Native)
        layer = model.layers[0] if is_native else model.model.layers[0].mlp
        record, x = random_record([6], [""]), torch.randn(1, 6, H)
        with replay_routing(layer, record, weights="router"), record_routing(layer) as again:
            y = layer(x)
        forced = record.layers[""].topk_ids[0].long()
        weight = layer.router.weight if is_native else layer.gate.weight
        weights = (x[0] @ weight.T).softmax(-1).gather(1, forced)
        weights = weights / weights.sum(1, keepdim=True)
        assert_ids_equal(again, record)
        torch.testing.assert_close(again.layers[""].topk_weights[0], weights.detach())
        experts = layer.experts if not is_native else Grouped(layer)
        expected = experts(x[0], forced, weights)
        grad = torch.randn(6, H)
        for a, b in zip(*(torch.autograd.grad(out.view(6, H), weight, grad) for out in (y, expected)), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("weights", ["recorded", "router"])
    def test_a_record_of_a_transformers_layer_in_the_native_one(self, weights: Any) -> None:
        block, x = qwen().model.layers[0].mlp, torch.randn(1, 9, H)
        layer = moe_npu.MoE(moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True), moe_npu.GroupedExperts(E, H, 16))
        with torch.no_grad():
            layer.router.weight.copy_(block.gate.weight)
            layer.experts.gate_up_proj.copy_(block.experts.gate_up_proj)
            layer.experts.down_proj.copy_(block.experts.down_proj)
        record = random_record([9], [""])
        outputs = []
        for model in (block, layer):
            with replay_routing(model, record, weights=weights):
                outputs.append(model(x))
        torch.testing.assert_close(outputs[0], outputs[1])

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # what peft asks for
    def test_adapters_and_wrappers_leave_the_names_alone(self) -> None:
        peft = pytest.importorskip("peft")
        record, ids = random_record([14]), prompt()
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
        model = nn.ModuleDict({"module": peft.get_peft_model(qwen(), config)})
        experts = dict(model.named_modules())["module.base_model.model.model.layers.0.mlp.experts.base_layer"]
        assert type(experts).__name__ == "Qwen3MoeExperts"
        with replay_routing(model, record, weights="router"), record_routing(model) as again:
            model["module"](ids, labels=ids).loss.backward()
        assert_ids_equal(again, record)

    def test_calls_in_their_order(self) -> None:
        model, record = qwen().eval(), random_record([14, 3, 3])
        with replay_routing(model, record, weights="router"), record_routing(model) as again, torch.no_grad():
            for shape in ((2, 7), (1, 3), (3, 1)):
                model(prompt(*shape))
        assert_ids_equal(again, record)

    def test_the_model_is_left_as_it_was(self) -> None:
        model, ids, record = qwen().eval(), prompt(), random_record([14])
        before, expected = hooks(model), model(ids).logits
        for context in (
            lambda: record_routing(model),
            lambda: replay_routing(model, record, weights="recorded"),
            lambda: replay_routing(model, record, weights="router"),
            lambda: force_balanced(model, weights="router"),
        ):
            with context():
                model(ids)
            with pytest.raises(KeyError, match="mine"), context():
                model(ids)
                raise KeyError("mine")
            handle = model.model.layers[1].mlp.experts.register_forward_hook(_fail)
            with pytest.raises(KeyError, match="inside"), context():
                model(ids)
            handle.remove()
            assert hooks(model) == before
            assert torch.equal(model(ids).logits, expected)
        assert not replay._VISITORS
        assert not torch.overrides._get_current_function_mode_stack()


class Grouped(nn.Module):
    """The experts of a native layer with the arguments of those of transformers."""

    def __init__(self, layer: moe_npu.MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatched = self.layer.dispatcher.dispatch(x, ids, weights)
        rows = self.layer.experts(dispatched.rows, dispatched.expert_tokens)
        return self.layer.dispatcher.combine(rows, dispatched.state)


def _fail(*_: object) -> None:
    raise KeyError("inside")


class TestCheckpointing:
    """A forward that is repeated in backward is replayed alike and recorded once."""

    @pytest.mark.parametrize("weights", ["recorded", "router"])
    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_gradients_are_those_without(self, use_reentrant: bool, weights: Any) -> None:
        ids, grads = prompt(), []
        record = random_record([14])
        for is_checkpointed in (False, True):
            model = qwen().train()
            if is_checkpointed:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            with replay_routing(model, record, weights=weights), record_routing(model) as again:
                model(ids, labels=ids, use_cache=False).loss.backward()
            assert_ids_equal(again, record)
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            assert torch.equal(grads[1][name], grad), name

    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_several_forwards_before_the_first_backward(self, order: tuple[int, ...], use_reentrant: bool) -> None:
        layer = qwen().model.layers[0].mlp
        record = random_record([5, 5, 5], [""])
        inputs = [torch.randn(1, 5, H, requires_grad=True) for _ in range(3)]
        grads = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
            with replay_routing(layer, record, weights="router"):
                outputs = [run(x) for x in inputs]
                found = [torch.zeros(0)] * 3
                for i in order:
                    inputs[i].grad = None
                    outputs[i].square().sum().backward()
                    found[i] = inputs[i].grad
                grads.append(found)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_step_at_a_time_never_reads_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay._Player, "_is_like", _fail)
        layer, record = qwen().model.layers[0].mlp, random_record([5, 5, 5], [""])
        with replay_routing(layer, record, weights="router"):
            for _ in range(3):
                x = torch.randn(1, 5, H, requires_grad=True)
                checkpoint(layer, x, use_reentrant=False).sum().backward()

    def test_a_repeated_forward_that_routes_otherwise(self) -> None:
        layer, record = qwen().model.layers[0].mlp, random_record([5, 5], [""])
        x, y = (torch.randn(1, 5, H, requires_grad=True) for _ in range(2))
        with replay_routing(layer, record, weights="router"):
            losses = [checkpoint(layer, value, use_reentrant=False).sum() for value in (x, y)]
            with torch.no_grad():
                layer.gate.weight.neg_()
            with pytest.raises(RuntimeError, match="repeated in backward, but routes unlike in any of its 2 calls"):
                losses[0].backward()


@pytest.mark.usefixtures("_nothing_compiled")
class TestCompiled:
    @pytest.mark.parametrize("weights", ["recorded", "router"])
    @pytest.mark.parametrize("make", [lambda: qwen().model.layers[0].mlp, Native], ids=["transformers", "native"])
    def test_records_and_replays_without_compiling_again(self, make: Callable[[], nn.Module], weights: Any) -> None:
        model = make()
        names = ["layers.0", "layers.1"] if isinstance(model, Native) else [""]
        record, inputs = random_record([6] * 12, names), [torch.randn(1, 6, H, requires_grad=True) for _ in range(12)]
        results = []
        for compiles in (False, True):
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
            with replay_routing(model, record, weights=weights), record_routing(model) as again:
                outputs = [run(x) for x in inputs]  # more often than the limit of recompilations
                results.append([*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs)])
            assert_ids_equal(again, record)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(run(inputs[0]), model(inputs[0]))  # and nothing is left in compiled code

    def test_compiled_before(self) -> None:
        layer, x = qwen().model.layers[0].mlp, torch.randn(1, 5, H)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x)
        with pytest.raises(RuntimeError, match=r"nothing was recorded of .*: .*compiled before"), record_routing(layer):
            compiled(x)
        context = replay_routing(layer, random_record([5], [""]), weights="recorded")
        with pytest.raises(RuntimeError, match=r"nothing was replayed in .*: .*compiled before"), context:
            compiled(x)
        torch.compiler.reset()
        with record_routing(layer) as record:
            compiled(x)
        assert len(record.layers[""].topk_ids) == 1


class TestForceBalanced:
    @pytest.mark.parametrize("weights", ["uniform", "router"])
    @pytest.mark.parametrize("model", [qwen(), gpt_oss()], ids=["qwen", "gpt-oss"])
    def test_transformers(self, model: Any, weights: Any) -> None:
        with force_balanced(model, weights=weights), record_routing(model) as record:
            model(prompt(2, 8))
        for layer in record.layers.values():
            assert layer.topk_ids[0].flatten().tolist() == [i % E for i in range(32)]
            is_uniform = torch.equal(layer.topk_weights[0], torch.full((16, K), 0.5))
            assert is_uniform == (weights == "uniform")

    @pytest.mark.parametrize("weights", ["uniform", "router"])
    def test_native(self, weights: Any) -> None:
        model, x = Native(), torch.randn(8, H)
        with force_balanced(model, weights=weights), record_routing(model) as record:
            model(x)
        layer = record.layers["layers.0"]
        assert torch.bincount(layer.topk_ids[0].flatten().int()).tolist() == [2] * E
        expected = model.layers[0].router(x, topk_ids=layer.topk_ids[0].int()).topk_weights
        if weights == "uniform":
            expected = torch.full_like(expected, 0.5)
        torch.testing.assert_close(layer.topk_weights[0], expected.detach())


# blocks of transformers whose experts are not decorated, cannot be made here, or choose outside of the block
ABSENT = {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
ABSENT |= {"vitpose_backbone"}
PARTS = {"ernie4_5_vl_moe.Ernie4_5_VLMoeMoeBlock"}  # of two blocks, which are here
CASES = [
    case
    for case in blocks.cases(blocks.block_names())
    if case.block.partition(".")[0] not in ABSENT and case.block not in PARTS
]
# why there is nothing to record in transformers 5.0
ABSENT_IN_OLDEST = {
    **dict.fromkeys(
        ("afmoe", "aria", "granitemoe", "granitemoehybrid", "granitemoeshared"), "its experts are not decorated"
    ),
    "hunyuan_v1_moe": "it hands the weights of all experts to its experts, not those of the chosen ones",
    "deepseek_v2-groups": "it fails by itself: its block has no num_experts",
}


class Branch(nn.Module):
    """A block as a module whose forward is the whole of it, as decoder layers of Gemma 4 do more."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = block.router, block.experts
        self.pre_feedforward_layernorm_2 = block.pre_feedforward_layernorm_2
        self.post_feedforward_layernorm_2 = block.post_feedforward_layernorm_2

    def forward(self, hidden_states: Tensor) -> Tensor:
        return blocks.run_block(self, hidden_states, torch.zeros(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family(case: blocks.Case) -> None:
    model = case.block.partition(".")[0]
    reason = ABSENT_IN_OLDEST.get(model) or ABSENT_IN_OLDEST.get(f"{model}-{case.variant}")
    if IS_OLDEST and reason is not None:
        pytest.skip(f"transformers {transformers.__version__}: {reason}")
    block, x = blocks.tiny_block(case, blocks.tiny_config(case)), torch.randn(2, 6, 32)
    if hasattr(block, "pre_feedforward_layernorm_2"):
        block = Branch(block)
    tokens = torch.randint(0, 50, (2, 6))

    def run(x: Tensor) -> Tensor:
        return block(x) if isinstance(block, Branch) else blocks.run_block(block, x, tokens)

    with record_routing(block) as record:
        expected = run(x)
    with replay_routing(block, record, weights="recorded"):
        assert torch.equal(run(x), expected)
    if case.variant == "hash" or case.block.startswith("phimoe."):
        message = r"does not choose by torch\.topk over 8 experts"
        with pytest.raises(RuntimeError, match=message), replay_routing(block, record, weights="router"):
            run(x)
        return
    with replay_routing(block, record, weights="router"):
        assert torch.equal(run(x), expected)
    # the model's own code weighs experts that it has not chosen
    with force_balanced(block, weights="router"), record_routing(block) as balanced:
        x.requires_grad_()
        y = run(x)
    ((layer,), (natural,)) = (list(found.layers.values()) for found in (balanced, record))
    assert not torch.equal(layer.topk_ids[0], natural.topk_ids[0])
    counts = torch.bincount(layer.topk_ids[0].flatten().int(), minlength=layer.num_experts)
    assert counts.max() - counts.min() <= 1
    assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()


def test_a_group_score_that_looks_like_a_choice() -> None:
    """With one group, DeepSeek-V3 takes the two best of all experts first."""
    (case,) = (case for case in CASES if str(case) == "deepseek_v3.DeepseekV3MoE-unnormalized")
    config, x = blocks.tiny_config(case), torch.randn(2, 6, 32)
    block, record = blocks.tiny_block(case, config), random_record([12], [""], top_k=3)
    with replay_routing(block, record, weights="router"), record_routing(block) as again:
        block(x)
    assert_ids_equal(again, record)
    scores = (x.view(12, 32) @ block.gate.weight.T).sigmoid()
    expected = scores.gather(1, record.layers[""].topk_ids[0].long()) * config.routed_scaling_factor
    torch.testing.assert_close(again.layers[""].topk_weights[0], expected.detach())


class TestErrors:
    def test_arguments(self) -> None:
        model, record = qwen(), random_record([14])
        nine = random_record([14])
        nine.layers[NAMES[1]].num_experts = 9
        for context, message in (
            (replay_routing(model, record, weights="mine"), "must be 'recorded' or 'router', but is 'mine'"),
            (force_balanced(model, weights="mine"), "weights must be 'uniform' or 'router', but is 'mine'"),
            (
                replay_routing(model, random_record([14], [NAMES[0], "x"]), weights="router"),
                r"only the model has \['model.layers.1.mlp'\] and only the record has \['x'\]",
            ),
            (replay_routing(model, nine, weights="router"), "'model.layers.1.mlp' has 8 and its record 9"),
            (record_routing(nn.Linear(2, 2)), "Linear has no MoE layer"),
        ):
            with pytest.raises(ValueError, match=message), context:
                pass
        assert not replay._VISITORS

    @pytest.mark.parametrize("weights", ["recorded", "router"])
    def test_calls_that_are_not_in_the_record(self, weights: Any) -> None:
        model = qwen().eval()
        message = r"layer 'model.layers.0.mlp' routes \[T, K\] = \(6, 2\) in call 1, but the record has \(14, 2\)"
        with pytest.raises(ValueError, match=message), replay_routing(model, random_record([14]), weights=weights):
            model(prompt(2, 3))
        message = "layer 'model.layers.0.mlp' runs for call 2, but its record has 1 calls"
        with pytest.raises(RuntimeError, match=message), replay_routing(model, random_record([14]), weights=weights):
            model(prompt())
            model(prompt())

    def test_expert_parallelism(self) -> None:
        layer = qwen().model.layers[0].mlp
        layer.experts._is_expert_parallel = True
        with pytest.raises(ValueError, match="has its experts on several ranks"), record_routing(layer):
            pass

    def test_records(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="batch_size = 2 must divide the tokens of every call of ''"):
            random_record([4, 3], [""]).concatenate(batch_size=2)
        with pytest.raises(ValueError, match="at least one"):
            random_record([], [""]).concatenate()
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"must be a file of format moe_npu.routing.1, but is None"):
            RoutingRecord.load(tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        ("ids", "weights", "layers", "message"),
        [
            pytest.param([[9]], torch.ones(1, 1), '{"a": [8, 1]}', "must have ids up to 8, but has 9 to 9", id="ids"),
            pytest.param([[1]], torch.ones(1, 2), '{"a": [8, 1]}', "must have a weight for each id", id="shape"),
            pytest.param([1], torch.ones(1), '{"a": [8, 1]}', r"must have ids \[T, K\] of torch.uint8", id="rank"),
            pytest.param([[1]], torch.ones(1, 1), '{"a": [300, 1]}', "of torch.int16", id="dtype"),
            pytest.param([[1]], torch.ones(1, 1), '{"a": [8, 2]}', "is not a whole record of routing", id="calls"),
            pytest.param([[1]], torch.ones(1, 1), '{"a": ["8", 1]}', "must say the numbers of experts", id="number"),
            pytest.param([[1]], torch.ones(1, 1), "[1]", "must say the numbers of experts", id="layers"),
        ],
    )
    def test_files(self, ids: Any, weights: torch.Tensor, layers: str, message: str, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {"a.0.topk_ids": torch.tensor(ids, dtype=torch.uint8), "a.0.topk_weights": weights}
        save_file(tensors, tmp_path / "a.safetensors", {"format": "moe_npu.routing.1", "layers": layers})
        with pytest.raises(ValueError, match=message):
            RoutingRecord.load(tmp_path / "a.safetensors")

    def test_file_that_is_not_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"no safetensors")
        with pytest.raises(ValueError, match="is not a whole record of routing"):
            RoutingRecord.load(tmp_path / "a.safetensors")

    def test_nothing_was_balanced(self) -> None:
        with pytest.raises(RuntimeError, match="nothing was balanced in"), force_balanced(qwen()):
            pass

    def test_another_top_k(self) -> None:
        model = qwen()
        record = random_record([14], top_k=K + 1)
        with pytest.raises(ValueError, match=f"record has {K + 1}"), replay_routing(model, record, weights="router"):
            model(prompt())

    def test_repeated_calls_that_only_the_record_tells_apart(self) -> None:
        model, ids = qwen().train(), prompt()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        record = random_record([14, 14])
        with replay_routing(model, record, weights="recorded"):
            losses = [model(ids, labels=ids, use_cache=False).loss for _ in range(2)]
            with pytest.raises(RuntimeError, match="route the same but are recorded differently"):
                losses[0].backward()
