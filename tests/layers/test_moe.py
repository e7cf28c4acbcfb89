"""The native layers against a per-token loop over the experts, written here from the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_npu
from tests.helpers.assertions import assert_close

E, H, INTER, K = 6, 16, 8, 2


def gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
    return act(gate) * up


def reference(layer: moe_npu.MoE, hidden_states: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """``sum_k p_k * down(act(gate) * up)`` token by token in float64."""
    router, experts = layer.router, layer.experts
    tokens = hidden_states.double().reshape(-1, hidden_states.size(-1))
    probabilities = torch.softmax(tokens @ router.weight.double().T, -1)
    out = []
    for token, p in zip(tokens, probabilities, strict=True):
        weights, ids = p.topk(router.top_k)
        if router.norm_topk_prob:
            weights = weights / weights.sum()
        total = torch.zeros_like(token)
        for weight, expert in zip(weights, ids.tolist(), strict=True):
            gate_up = experts.gate_up_proj[expert].double() @ token
            if experts.gate_up_proj_bias is not None:
                gate_up = gate_up + experts.gate_up_proj_bias[expert].double()
            y = experts.down_proj[expert].double() @ gated(activation, *gate_up.chunk(2))
            if experts.down_proj_bias is not None:
                y = y + experts.down_proj_bias[expert].double()
            total = total + weight * y
        out.append(total)
    return torch.stack(out).view(hidden_states.shape)


def make(
    dtype: torch.dtype = torch.float32, *, norm: bool = True, bias: bool = False, activation: str = "silu"
) -> moe_npu.MoE:
    torch.manual_seed(0)
    return moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=norm, dtype=dtype),
        moe_npu.GroupedExperts(E, H, INTER, activation=activation, bias=bias, dtype=dtype),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("norm", [False, True], ids=["raw-weights", "normalized"])
def test_equals_the_per_token_loop(norm: bool, bias: bool, activation: str) -> None:
    layer, x = make(norm=norm, bias=bias, activation=activation), torch.randn(3, 5, H)
    assert_close(layer(x), reference(layer, x, activation), reduction=H)


def test_gradients_equal_those_of_the_loop() -> None:
    layer = make(torch.float64, bias=True)
    x = torch.randn(7, H, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    grad = torch.randn(7, H, dtype=torch.float64)
    actual = torch.autograd.grad(layer(x), inputs, grad)
    expected = torch.autograd.grad(reference(layer, x), inputs, grad)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, reduction=H)


def test_no_tokens() -> None:
    layer = make()
    x = torch.randn(0, H, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, H)
    assert x.grad is not None
    assert x.grad.shape == (0, H)
    assert torch.equal(layer.experts.down_proj.grad, torch.zeros(E, H, INTER))


def test_result_keeps_shape_and_dtype() -> None:
    layer = make(torch.bfloat16)
    y, routing = layer.forward_with_routing(torch.randn(2, 3, H, dtype=torch.bfloat16))
    assert (y.shape, y.dtype, type(y)) == ((2, 3, H), torch.bfloat16, torch.Tensor)
    assert routing.router_logits.shape == (6, E)
    assert (routing.topk_ids.dtype, routing.topk_weights.dtype) == (torch.int32, torch.bfloat16)


def test_shared_expert_is_added_for_every_token() -> None:
    layer, x = make(), torch.randn(4, H)
    shared = moe_npu.SharedExpert(H, 12, has_output_gate=True)
    without = layer(x)
    layer.shared_expert = shared
    torch.testing.assert_close(layer(x), without + shared(x))


def test_meta_construction_then_load() -> None:
    source = make(bias=True)
    with torch.device("meta"):
        layer = make(bias=True)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.randn(3, H, device="meta")).shape == (3, H)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(3, H)
    assert torch.equal(layer(x), source(x))


def test_compiles_to_one_graph_and_trains() -> None:
    layer, x = make(), torch.randn(9, H)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(x).square().mean().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x).square().mean().backward()
    for actual, parameter in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad)


def test_a_few_steps_of_training_lower_the_loss() -> None:
    layer, x, target = make(), torch.randn(64, H), torch.randn(64, H)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_dispatcher_can_be_replaced() -> None:
    class Recording(moe_npu.LocalDispatcher):
        def dispatch(self, *args: torch.Tensor, quantize: bool = False) -> moe_npu.layers.Dispatched:
            self.dispatched = super().dispatch(*args, quantize=quantize)
            return self.dispatched

    layer = make()
    layer.dispatcher = Recording(E)
    layer(torch.randn(4, H))
    assert layer.dispatcher.dispatched.expert_tokens.sum() == 4 * K


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("num_experts", [1, 2, 128])
def test_rows_of_present_experts_come_sorted_and_counted(num_experts: int, quantize: bool) -> None:
    x, ids = torch.randn(50, H), torch.randint(0, num_experts + 2, (50, 4))
    dispatcher = moe_npu.LocalDispatcher(num_experts, has_absent_experts=True)
    rows, expert_tokens, state = dispatcher.dispatch(x, ids, torch.rand(50, 4), quantize=quantize)
    assert expert_tokens.dtype == torch.int64
    assert expert_tokens.tolist() == [int((ids == expert).sum()) for expert in range(num_experts)]
    expected = torch.cat([x[(ids == expert).nonzero()[:, 0]] for expert in range(num_experts)])
    if quantize:
        assert (rows.codes.dtype, rows.scale.dtype, rows.dtype) == (torch.int8, torch.float32, x.dtype)
        rows = rows.codes * rows.scale.unsqueeze(1)
        assert (rows[: len(expected)] - expected).abs().max() <= 0.51 * x.abs().max() / 127
    else:
        assert torch.equal(rows[: len(expected)], expected)
    # in the gradient of combine each pair writes a row: no two may share one
    assert state.sorted_indices.sort().values.tolist() == list(range(200))


def test_absent_experts_contribute_nothing_even_if_their_rows_are_nan() -> None:
    """What a device leaves in the rows beyond the last group is undefined, in both directions."""

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, covered):
            ctx.covered = covered
            return torch.cat([rows[:covered], torch.full_like(rows[covered:], torch.nan)])

        @staticmethod
        def backward(ctx, grad):
            return torch.cat([grad[: ctx.covered], torch.full_like(grad[ctx.covered :], torch.nan)]), None

    x = torch.randn(5, H, requires_grad=True)
    weights = torch.rand(5, K, requires_grad=True)
    ids = torch.tensor([[0, E], [E, E], [2, 1], [E, 3], [4, 0]])
    dispatcher = moe_npu.LocalDispatcher(E, has_absent_experts=True)
    dispatched = dispatcher.dispatch(x, ids, weights)
    covered = int(dispatched.expert_tokens.sum())
    y = dispatcher.combine(Poison.apply(dispatched.rows, covered), dispatched.state)
    expected = x * torch.where(ids < E, weights, 0).sum(-1, keepdim=True)
    torch.testing.assert_close(y, expected)
    grad = torch.randn(5, H)
    actual = torch.autograd.grad(y, (x, weights), grad)
    for a, b in zip(actual, torch.autograd.grad(expected, (x, weights), grad), strict=True):
        torch.testing.assert_close(a, b)


class TestQuantizedExperts:
    """Quantized experts against float experts with the dequantized weights."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_equals_float_experts_with_the_restored_weights(self, scheme: str, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        experts = moe_npu.GroupedExperts(E, 64, 32, dtype=dtype)
        quantized = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme(scheme))
        for name in ("gate_up_proj", "down_proj"):
            restored = quantized.scheme.dequantize(
                moe_npu.quant.QuantizedWeight(getattr(quantized, name), getattr(quantized, f"{name}_scale"))
            )
            getattr(experts, name).data.copy_(restored)
        x, expert_tokens = torch.randn(20, 64, dtype=dtype), torch.tensor([5, 0, 7, 1, 0, 7])
        with torch.no_grad():
            actual, expected = quantized(x, expert_tokens).double(), experts(x, expert_tokens).double()
        # w4a16 differs by roundings only; w8a8 rounds its activations to 8 bits as well
        bound = {"w4a16": 4 * torch.finfo(dtype).eps, "w8a8": 0.02}[scheme]
        assert (actual - expected).norm() <= bound * expected.norm()

    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_parameters_are_integers_with_experts_first(self, scheme: str) -> None:
        with torch.device("meta"):
            experts = moe_npu.QuantizedExperts(E, 64, 32, scheme=moe_npu.get_scheme(scheme))
        assert {parameter.size(0) for parameter in experts.parameters()} == {E}
        assert experts.gate_up_proj.dtype in (torch.int8, torch.int32)
        assert not any(parameter.requires_grad for parameter in experts.parameters())

    def test_w4a16_passes_the_gradient_of_its_rows(self) -> None:
        experts = moe_npu.GroupedExperts(2, 32, 16, dtype=torch.bfloat16)
        quantized = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme("w4a16", group_size=16))
        x = torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True)
        counts, grad = torch.tensor([2, 4]), torch.randn(6, 32, dtype=torch.bfloat16)
        (actual,) = torch.autograd.grad(quantized(x, counts), x, grad)
        for name in ("gate_up_proj", "down_proj"):
            parts = moe_npu.quant.QuantizedWeight(getattr(quantized, name), getattr(quantized, f"{name}_scale"))
            getattr(experts, name).data.copy_(quantized.scheme.dequantize(parts))
        (expected,) = torch.autograd.grad(experts(x, counts), x, grad)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_a_whole_layer_equals_its_float_twin(self, scheme: str, dtype: torch.dtype) -> None:
        torch.manual_seed(2)
        layer = moe_npu.MoE(
            moe_npu.SoftmaxTopKRouter(64, E, K, norm_topk_prob=True, dtype=dtype),
            moe_npu.GroupedExperts(E, 64, 32, dtype=dtype),
        )
        experts = moe_npu.QuantizedExperts.from_float(layer.experts, moe_npu.get_scheme(scheme))
        assert experts.takes_quantized_rows == (scheme == "w8a8")
        x = torch.randn(3, 7, 64, dtype=dtype)
        with torch.no_grad():
            for name in ("gate_up_proj", "down_proj"):
                parts = moe_npu.quant.QuantizedWeight(getattr(experts, name), getattr(experts, f"{name}_scale"))
                getattr(layer.experts, name).copy_(experts.scheme.dequantize(parts))
            actual, expected = moe_npu.MoE(layer.router, experts)(x), layer(x)
        assert actual.dtype == dtype
        assert (actual - expected).norm() <= 0.02 * expected.norm()

    def test_experts_with_another_activation_take_float_rows(self) -> None:
        experts = moe_npu.GroupedExperts(E, H, INTER, activation="gelu", dtype=torch.bfloat16)
        layer = moe_npu.MoE(
            moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=torch.bfloat16),
            moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme("w8a8")),
        )
        x = torch.randn(5, H, dtype=torch.bfloat16)
        with torch.no_grad():
            actual, expected = layer(x), moe_npu.MoE(layer.router, experts)(x)
        assert (actual - expected).norm() <= 0.04 * expected.norm()

    @pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_meta_construction_then_load(self, scheme: str, assign: bool) -> None:
        scheme = moe_npu.get_scheme(scheme)
        source = moe_npu.QuantizedExperts.from_float(moe_npu.GroupedExperts(2, 32, 16, dtype=torch.bfloat16), scheme)
        assert set(source.state_dict()) == set(dict(source.named_parameters()))
        with torch.device("meta"):
            experts = moe_npu.QuantizedExperts(2, 32, 16, scheme=scheme)
        if not assign:
            experts.to_empty(device="cpu")
            for buffer in experts.buffers():
                buffer.fill_(torch.nan)
        experts.load_state_dict(source.state_dict(), assign=assign)
        assert {tensor.size(0) for tensor in (*experts.parameters(), *experts.buffers())} == {2}
        x, expert_tokens = torch.randn(4, 32, dtype=torch.bfloat16), torch.tensor([1, 3])
        with torch.no_grad():
            assert torch.equal(experts(x, expert_tokens), source(x, expert_tokens))

    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_compiles_to_one_graph(self, scheme: str) -> None:
        experts = moe_npu.QuantizedExperts.from_float(
            moe_npu.GroupedExperts(E, 32, 16, dtype=torch.bfloat16), moe_npu.get_scheme(scheme)
        )
        layer = moe_npu.MoE(moe_npu.SoftmaxTopKRouter(32, E, K, norm_topk_prob=False, dtype=torch.bfloat16), experts)
        x = torch.randn(6, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
            assert torch.equal(compiled(x), layer(x))

    def test_w8a8_refuses_to_lose_a_gradient(self) -> None:
        experts = moe_npu.QuantizedExperts.from_float(
            moe_npu.GroupedExperts(2, 16, 8, dtype=torch.bfloat16), moe_npu.get_scheme("w8a8")
        )
        x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
        with pytest.raises(ValueError, match="no gradient"):
            experts(x, torch.tensor([1, 1]))
        layer = moe_npu.MoE(moe_npu.SoftmaxTopKRouter(16, 2, 1, norm_topk_prob=True, dtype=torch.bfloat16), experts)
        with pytest.raises(ValueError, match="no gradient"):
            layer(x)

    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_float32_rows_are_computed_in_bfloat16(self, scheme: str) -> None:
        experts = moe_npu.QuantizedExperts.from_float(moe_npu.GroupedExperts(2, 16, 8), moe_npu.get_scheme(scheme))
        x, expert_tokens = torch.randn(2, 16), torch.tensor([1, 1])
        with torch.no_grad():
            y = experts(x, expert_tokens)
            assert y.dtype == torch.float32
            assert torch.equal(y, experts(x.bfloat16(), expert_tokens).float())

    @pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
    def test_schemes_themselves_refuse_float32(self, scheme: str) -> None:
        scheme = moe_npu.get_scheme(scheme)
        with pytest.raises(ValueError, match="bfloat16 or float16 rows"):
            scheme.grouped_mm(torch.randn(2, 16), scheme.quantize(torch.randn(2, 8, 16)), torch.tensor([1, 1]))


def test_autocast_computes_like_linear_layers_do() -> None:
    layer, x = make(bias=True), torch.randn(6, H)
    layer.shared_expert = moe_npu.SharedExpert(H, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        rows = layer.experts(x, torch.tensor([6, 0, 0, 0, 0, 0]))
    assert rows.dtype == torch.bfloat16
    assert (y.float() - layer(x)).norm() <= 2e-2 * layer(x).norm()
    y.float().square().mean().backward()
    assert layer.experts.gate_up_proj.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: moe_npu.SoftmaxTopKRouter(H, 4, 5, norm_topk_prob=True), "top_k must be", id="top-k"),
        pytest.param(lambda: moe_npu.GroupedExperts(2, H, 8, activation="tanhh"), "no activation 'tanhh'", id="name"),
        pytest.param(
            lambda: moe_npu.QuantizedExperts.from_float(
                moe_npu.GroupedExperts(2, H, 8, bias=True), moe_npu.get_scheme("w8a8")
            ),
            "a bias cannot be quantized",
            id="bias",
        ),
    ],
)
def test_mistakes_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_shows_the_sizes() -> None:
    layer = make()
    assert "num_experts=6, hidden_size=16, intermediate_size=8" in repr(layer)
    assert isinstance(layer.experts, nn.Module)
