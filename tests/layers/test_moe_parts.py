"""What a MoE layer has around its experts: latent projections, identity experts, scaled inputs, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_npu
from moe_npu import sim
from moe_npu.layers.activations import clamped_swiglu
from moe_npu.layers.dispatch import CapacityDispatcher
from moe_npu.layers.routers import Llama4Router
from moe_npu.layers.stats import ExpertLoad
from tests.helpers.assertions import assert_close
from tests.helpers.reference import experts as reference

E, H, LATENT, INTER, K, ZERO = 5, 16, 8, 6, 3, 3
F64 = torch.float64


class Scale(nn.Module):
    """An output transform with a parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(H, dtype=dtype).uniform_(0.5, 1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.weight


class Load(nn.Module):
    """Counts what it is called with."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_experts))

    def forward(self, topk_ids: Tensor) -> None:
        ids = topk_ids.flatten().long()
        self.counts.index_add_(0, ids, torch.ones_like(ids, dtype=self.counts.dtype))


def make(
    dtype: torch.dtype = torch.float32,
    *,
    latent: bool = False,
    zero: int = 0,
    scales_input: bool = False,
    has_gate: bool = True,
    **options: Any,
) -> moe_npu.MoE:
    torch.manual_seed(5)
    if scales_input:
        router: Any = Llama4Router(H, E + zero, K, dtype=dtype)
    else:
        router = moe_npu.SoftmaxTopKRouter(H, E + zero, K, norm_topk_prob=True, dtype=dtype)
    size = LATENT if latent else H
    experts = moe_npu.GroupedExperts(E, size, INTER, has_gate=has_gate, dtype=dtype, bias=not scales_input)
    return moe_npu.MoE(
        router,
        experts,
        latent_down_proj=nn.Linear(H, LATENT, dtype=dtype) if latent else None,
        latent_up_proj=nn.Linear(LATENT, H, dtype=dtype) if latent else None,
        num_zero_experts=zero,
        **options,
    )


def expected_of(layer: moe_npu.MoE, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Token by token, with the ids of the experts that were chosen."""
    act = reference.gated(reference.silu) if layer.experts.has_gate else reference.silu
    out, chosen = [], []
    for token in x.double().reshape(-1, H):
        logits = layer.router.weight.double() @ token
        ids = sorted(range(logits.numel()), key=lambda i, logits=logits: -float(logits[i].detach()))[:K]
        if layer.router.scales_input:
            weights = 1 / (1 + torch.exp(-logits[ids]))
        else:
            weights = torch.exp(logits[ids]) / torch.exp(logits[ids]).sum()
        latent = token
        if layer.latent_down_proj is not None:
            latent = layer.latent_down_proj.weight.double() @ token + layer.latent_down_proj.bias.double()
        total = torch.zeros_like(latent)
        for weight, index in zip(weights, ids, strict=True):
            if index >= E:
                total = total + weight * latent
            elif layer.router.scales_input:
                total = total + reference.expert(layer.experts, act, index, weight * latent)
            else:
                total = total + weight * reference.expert(layer.experts, act, index, latent)
        if layer.latent_up_proj is not None:
            total = layer.latent_up_proj.weight.double() @ total + layer.latent_up_proj.bias.double()
        total = total * layer.routed_scaling_factor
        if layer.shared_expert is not None:
            total = total + reference.mlp(layer.shared_expert, reference.gated(reference.silu), token[None])[0]
        out.append(total if layer.output_transform is None else total * layer.output_transform.weight.double())
        chosen.append(ids)
    return torch.stack(out).view(x.shape), chosen


def everything(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent": True,
        "zero": ZERO,
        "routed_scaling_factor": 2.5,
        "shared_expert": moe_npu.SharedExpert(H, 4, dtype=dtype),
        "output_transform": Scale(dtype),
    }


PARTS = {
    "plain": lambda dtype: {},
    "ungated": lambda dtype: {"has_gate": False},
    "latent": lambda dtype: {"latent": True},
    "latent-ungated-shared": lambda dtype: {
        "latent": True,
        "has_gate": False,
        "shared_expert": moe_npu.SharedExpert(H, 4, dtype=dtype),
    },
    "zero-experts": lambda dtype: {"zero": ZERO},
    "scaled-after": lambda dtype: {
        "routed_scaling_factor": 2.5,
        "shared_expert": moe_npu.SharedExpert(H, 4, dtype=dtype),
    },
    "output-transform": lambda dtype: {"output_transform": Scale(dtype)},
    "scaled-input": lambda dtype: {"scales_input": True},
    "scaled-input-zero-experts": lambda dtype: {"scales_input": True, "zero": ZERO},
    "everything": everything,
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_equals_the_per_token_loop(parts: Any) -> None:
    layer, x = make(**parts(torch.float32)), torch.randn(3, 7, H)
    y, routing = layer.forward_with_routing(x)
    expected, chosen = expected_of(layer, x)
    assert routing.topk_ids.tolist() == chosen
    assert_close(y, expected, reduction=4 * H)
    if layer.num_zero_experts:
        assert any(index >= E for ids in chosen for index in ids)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gradients_equal_those_of_the_loop(parts: Any) -> None:
    layer, x = make(F64, **parts(F64)), torch.randn(9, H, dtype=F64, requires_grad=True)
    inputs, grad = [x, *layer.parameters()], torch.randn(9, H, dtype=F64)
    actual = torch.autograd.grad(layer(x), inputs, grad)
    expected = torch.autograd.grad(expected_of(layer, x)[0], inputs, grad)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, reduction=64 * H)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_bfloat16_keeps_its_dtype_and_is_near(parts: Any) -> None:
    layer, x = make(F64, **parts(F64)), torch.randn(2, 9, H, dtype=torch.bfloat16)
    routing = layer.forward_with_routing(x.double())[1]
    expected = layer(x.double())
    layer.to(torch.bfloat16)
    # rounded logits may choose another expert; compare where they do not
    y, rounded = layer.forward_with_routing(x)
    same = (routing.topk_ids == rounded.topk_ids).all(-1).view(2, 9)
    assert y.dtype == torch.bfloat16
    assert int(same.sum()) >= 12
    assert (y[same].double() - expected[same]).norm() <= 3e-2 * expected[same].norm()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_compiles_to_one_graph(parts: Any) -> None:
    torch._dynamo.reset()  # its limit of compilations counts those of other cases
    layer, x = make(**parts(torch.float32)), torch.randn(9, H, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = [x, *layer.parameters()]
    actual, expected = compiled(x), layer(x)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual.square().sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_no_tokens_meta_and_autocast(parts: Any) -> None:
    layer = make(**parts(torch.float32))
    x = torch.randn(0, H, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, H)
    x = torch.randn(5, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.isfinite().all()
    assert (y.float() - layer(x)).abs().max() <= 1.0
    assert layer.to("meta")(x.to("meta")).shape == (5, H)


@pytest.mark.npu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_on_the_device_nothing_is_read_back(parts: Any, dtype: torch.dtype, npu: torch.device) -> None:
    layer, x = make(dtype, **parts(dtype)), torch.randn(9, H, dtype=dtype)
    if layer.experts.has_gate:
        layer.experts.activation = clamped_swiglu(limit=0.5)
    outcomes = []
    for device in (torch.device("cpu"), npu):
        moved = x.to(device).requires_grad_()
        layer.to(device)
        with sim.trace() as record:
            y = layer(moved)
            grads = torch.autograd.grad(y, [moved, *layer.parameters()], torch.ones_like(y))
        outcomes.append([y.detach().cpu(), *(grad.cpu() for grad in grads)])
    assert record.num_synchronizations == 0
    assert record.num_copies_to_host == 0
    bound = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for actual, expected in zip(outcomes[1], outcomes[0], strict=True):
        assert (actual.double() - expected.double()).norm() <= bound * expected.double().norm()


@pytest.mark.parametrize("top_k", [1, 3])
def test_scaled_inputs_are_scaled_before_they_are_rounded_to_int8(top_k: int) -> None:
    torch.manual_seed(6)
    experts = moe_npu.GroupedExperts(E, 64, 32, dtype=torch.bfloat16)
    router = Llama4Router(64, E, top_k, dtype=torch.bfloat16)
    quantized = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme("w8a8"))
    assert quantized.takes_quantized_rows
    x = torch.randn(11, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        actual, expected = moe_npu.MoE(router, quantized)(x).float(), moe_npu.MoE(router, experts)(x).float()
    assert (actual - expected).norm() <= 0.03 * expected.norm()


def test_zero_experts_work_with_quantized_rows() -> None:
    torch.manual_seed(7)
    experts = moe_npu.GroupedExperts(E, 64, 32, dtype=torch.bfloat16)
    router = moe_npu.SoftmaxTopKRouter(64, E + ZERO, K, norm_topk_prob=False, dtype=torch.bfloat16)
    quantized = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme("w8a8"))
    x = torch.randn(11, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        actual = moe_npu.MoE(router, quantized, num_zero_experts=ZERO)(x).float()
        expected = moe_npu.MoE(router, experts, num_zero_experts=ZERO)(x).float()
    assert (actual - expected).norm() <= 0.03 * expected.norm()


def test_only_zero_experts_chosen() -> None:
    layer = make(zero=ZERO)
    x = torch.randn(6, H)
    x[:, 0] = 1
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[E:, 0] = 10
    torch.testing.assert_close(layer(x), x)


def test_expert_load_sees_every_choice() -> None:
    layer = make(expert_load=Load(E))
    _, routing = layer.forward_with_routing(torch.randn(2, 8, H))
    layer(torch.randn(3, H))
    assert layer.expert_load.counts.sum() == (16 + 3) * K
    first = make(expert_load=Load(E))
    torch.manual_seed(8)
    x = torch.randn(7, H)
    _, routing = first.forward_with_routing(x)
    assert first.expert_load.counts.tolist() == [int((routing.topk_ids == index).sum()) for index in range(E)]


def test_token_ids_reach_the_router() -> None:
    seen = []

    class ByToken(moe_npu.SoftmaxTopKRouter):
        def forward(self, hidden_states: Tensor, **options: Any) -> moe_npu.RouterOutput:
            seen.append(options)
            return super().forward(hidden_states)

    layer = make()
    layer.router = ByToken(H, E, K, norm_topk_prob=True)
    ids = torch.arange(6).view(2, 3)
    layer(torch.randn(2, 3, H), token_ids=ids)
    assert seen[0]["token_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    layer.forward_with_routing(torch.randn(6, H), token_ids=ids.view(6))
    assert seen[1]["token_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"token_ids must be one id per token, of shape \(6,\)"):
        layer(torch.randn(6, H), token_ids=ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"latent_up_proj": nn.Linear(LATENT, H)}, "latent_up_proj is given without latent_down", id="up"),
        pytest.param({"latent_down_proj": nn.Linear(H, LATENT)}, "latent_down_proj is given without", id="down"),
        pytest.param({"num_zero_experts": E}, "num_zero_experts must leave some of the 5", id="all-zero"),
        pytest.param({"num_zero_experts": -1}, "num_zero_experts must leave some", id="negative"),
        pytest.param({"expert_load": ExpertLoad(4)}, "counts 4 experts, but the router has 5", id="expert-load"),
        pytest.param({"num_zero_experts": 1}, "5 experts, 1 of them zero experts, but there are 5", id="too-few"),
        pytest.param(
            {"dispatcher": moe_npu.LocalDispatcher(E), "num_zero_experts": 1}, "has_absent_experts=True", id="no-absent"
        ),
        pytest.param(
            {"dispatcher": CapacityDispatcher(E - 1, capacity=2)},
            "dispatcher is made for 4 experts, but .* 5",
            id="fewer",
        ),
        pytest.param(
            {"dispatcher": moe_npu.LocalDispatcher(E + 1)}, "dispatcher is made for 6 experts, but .* 5", id="more"
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    router = moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True)
    with pytest.raises(ValueError, match=message):
        moe_npu.MoE(router, moe_npu.GroupedExperts(E, H, INTER), **options)
