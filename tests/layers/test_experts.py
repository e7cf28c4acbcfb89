"""Grouped experts against a loop over their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_npu
from moe_npu.layers.activations import clipped_swiglu
from tests.helpers.assertions import assert_close
from tests.helpers.reference import experts as reference

E, H, INTER = 5, 12, 8
COUNTS = {
    "mixed": [3, 1, 4, 1, 2],
    "empty-experts": [0, 6, 0, 5, 0],
    "one-busy-expert": [0, 0, 11, 0, 0],
    "no-rows": [0, 0, 0, 0, 0],
}
KINDS = {
    "gated": {},
    "gated-bias": {"bias": True},
    "gated-norm": {"norm": True},
    "ungated": {"has_gate": False, "activation": "relu2"},
    "ungated-bias": {"has_gate": False, "activation": "silu", "bias": True},
    "ungated-norm": {"has_gate": False, "activation": "gelu", "bias": True, "norm": True},
}


class Norm(nn.Module):
    """``nn.RMSNorm`` without its warning where rows and weight differ in dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.empty(H, dtype=dtype).uniform_(0.5, 1.5))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows / (rows.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight).to(rows.dtype)


def make(num_experts: int = E, *, norm: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return moe_npu.GroupedExperts(
        num_experts, H, INTER, post_norm=Norm(dtype) if norm else None, dtype=dtype, **options
    )


def expected_of(experts: Any, x: Tensor, counts: list[int], activation: str = "silu", **_: Any) -> Tensor:
    act = reference.ELEMENTWISE[activation]
    return reference.sorted_rows(experts, reference.gated(act) if experts.has_gate else act, x, counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_equals_the_loop(options: dict[str, Any], counts: list[int]) -> None:
    experts, x = make(**options), torch.randn(sum(counts), H)
    actual = experts(x, torch.tensor(counts))
    assert actual.shape == (sum(counts), H)
    assert_close(actual, expected_of(experts, x, counts, **options), reduction=4 * H)


@pytest.mark.parametrize("has_gate", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("activation", sorted(reference.ELEMENTWISE))
def test_all_activations(activation: str, has_gate: bool) -> None:
    experts, x = make(activation=activation, has_gate=has_gate), torch.randn(11, H)
    actual = experts(x, torch.tensor(COUNTS["mixed"]))
    assert_close(actual, expected_of(experts, x, COUNTS["mixed"], activation), reduction=4 * H)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_one_expert(options: dict[str, Any]) -> None:
    experts, x = make(1, **options), torch.randn(4, H)
    assert_close(experts(x, torch.tensor([4])), expected_of(experts, x, [4], **options), reduction=4 * H)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_gradients_equal_those_of_the_loop(options: dict[str, Any]) -> None:
    experts = make(dtype=torch.float64, **options)
    x, counts = torch.randn(11, H, dtype=torch.float64, requires_grad=True), COUNTS["empty-experts"]
    inputs, grad = [x, *experts.parameters()], torch.randn(11, H, dtype=torch.float64)
    actual = torch.autograd.grad(experts(x, torch.tensor(counts)), inputs, grad)
    expected = torch.autograd.grad(expected_of(experts, x, counts, **options), inputs, grad)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, reduction=16 * H)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_bfloat16_rounds_between_the_steps_only(options: dict[str, Any]) -> None:
    experts = make(dtype=torch.bfloat16, **options)
    x = torch.randn(11, H, dtype=torch.bfloat16)
    actual = experts(x, torch.tensor(COUNTS["mixed"]))
    expected = expected_of(experts, x, COUNTS["mixed"], **options)
    assert actual.dtype == torch.bfloat16
    # one rounding after each of projection, activation, its product, projection and norm
    assert (actual.double() - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_autocast(options: dict[str, Any]) -> None:
    experts, x, counts = make(**options), torch.randn(11, H), torch.tensor(COUNTS["mixed"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = experts(x, counts)
    half = make(dtype=torch.bfloat16, **options)
    half.load_state_dict(experts.state_dict())
    expected = half(x.bfloat16(), counts)
    assert (actual.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()
    actual.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in experts.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()  # its limit of compilations counts those of other cases
    experts, x, counts = make(**options), torch.randn(11, H, requires_grad=True), torch.tensor(COUNTS["mixed"])
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = [x, *experts.parameters()]
    actual, expected = compiled(x, counts), experts(x, counts)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual.square().sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_parameters_have_experts_first_and_live_on_meta_too(options: dict[str, Any]) -> None:
    source = make(**options)
    with torch.device("meta"):
        experts = make(**options)
    own = dict(experts.named_parameters(recurse=False))
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = {first, "down_proj"}
    assert set(own) == names | ({f"{name}_bias" for name in names} if options.get("bias") else set())
    assert {parameter.size(0) for parameter in own.values()} == {E}
    assert experts.weight_names == (first, "down_proj")
    x, counts = torch.randn(11, H), torch.tensor(COUNTS["mixed"])
    assert experts(x.to("meta"), counts.to("meta")).shape == (11, H)
    experts.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(experts(x, counts), source(x, counts))


@pytest.mark.parametrize("has_gate", [False, True], ids=["ungated", "gated"])
def test_undefined_rows_do_not_reach_the_gradient_of_the_norm(has_gate: bool) -> None:
    """A device leaves anything in the rows beyond the last group; so may the gradient that comes for them."""
    experts = make(norm=True, has_gate=has_gate, bias=True)
    x, counts, grad = torch.randn(7, H), torch.tensor([2, 0, 1, 0, 1]), torch.randn(7, H)
    x[4:], grad[4:] = torch.nan, 0
    parameters = list(experts.parameters())

    seen = []
    experts.post_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    original = experts._linear

    def poisoned(name: str, *args: Any) -> Tensor:
        y = original(name, *args)
        return torch.cat([y[:4], torch.full_like(y[4:], torch.nan)]) if name == "down_proj" else y

    experts._linear = poisoned
    y = experts(x, counts)
    actual = torch.autograd.grad(y, parameters, grad)
    experts._linear = original
    assert torch.equal(seen[0][4:], torch.zeros(3, H))
    expected = torch.autograd.grad(experts(x[:4], counts), parameters, grad[:4])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"activation": "sillu"}, "no activation 'sillu'", id="unknown"),
        pytest.param({"activation": nn.SiLU()}, "with a gate take", id="elementwise-for-gated"),
        pytest.param(
            {"activation": clipped_swiglu(), "has_gate": False}, "without a gate take", id="gated-for-ungated"
        ),
    ],
)
@pytest.mark.parametrize(
    "module", [lambda **o: moe_npu.GroupedExperts(E, H, INTER, **o), lambda **o: moe_npu.SharedExpert(H, INTER, **o)]
)
def test_a_wrong_activation_is_refused_at_once(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_wrong_activation_of_ones_own_is_refused_when_it_is_used() -> None:
    experts = make(activation=lambda rows: rows)
    with pytest.raises(ValueError, match="grouped_mm"):
        experts(torch.randn(11, H), torch.tensor(COUNTS["mixed"]))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("has_output_gate", [False, True], ids=["plain", "output-gate"])
@pytest.mark.parametrize("has_gate", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_shared_expert(activation: str, has_gate: bool, has_output_gate: bool, bias: bool) -> None:
    shared = moe_npu.SharedExpert(
        H, 7, activation=activation, has_gate=has_gate, has_output_gate=has_output_gate, bias=bias
    )
    x, act = torch.randn(9, H), reference.ELEMENTWISE[activation]
    expected = reference.mlp(shared, reference.gated(act) if has_gate else act, x)
    assert_close(shared(x), expected, reduction=4 * H)
    assert len(list(shared.parameters())) == 2 + has_output_gate + 2 * bias


def test_several_shared_experts_are_one_of_the_sum_of_their_sizes() -> None:
    shared = [moe_npu.SharedExpert(H, size) for size in (4, 6)]
    fused = moe_npu.SharedExpert(H, 10)
    gates, ups = zip(*(one.gate_up_proj.weight.detach().chunk(2) for one in shared), strict=True)
    fused.gate_up_proj.weight.data = torch.cat([*gates, *ups])
    fused.down_proj.weight.data = torch.cat([one.down_proj.weight.detach() for one in shared], 1)
    x = torch.randn(5, H)
    torch.testing.assert_close(fused(x), shared[0](x) + shared[1](x))


@pytest.mark.parametrize("scheme", moe_npu.quant.scheme_names())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"bias": True}, "experts with a bias cannot", id="bias"),
        pytest.param({"has_gate": False}, "experts with no gate cannot", id="ungated"),
        pytest.param({"norm": True}, "experts with a post_norm cannot", id="norm"),
        pytest.param({"bias": True, "has_gate": False}, "a bias and no gate", id="two"),
    ],
)
def test_what_quantized_experts_cannot_hold_is_refused(options: dict[str, Any], message: str, scheme: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_npu.QuantizedExperts.from_float(make(**options), moe_npu.get_scheme(scheme))


def test_quantized_experts_keep_the_activation() -> None:
    torch.manual_seed(3)
    experts = moe_npu.GroupedExperts(2, 64, 32, activation=clipped_swiglu(limit=0.25), dtype=torch.bfloat16)
    quantized = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme("w8a8"))
    x, counts = torch.randn(9, 64, dtype=torch.bfloat16), torch.tensor([4, 5])
    with torch.no_grad():
        actual, expected = quantized(x, counts).float(), experts(x, counts).float()
    assert not quantized.takes_quantized_rows
    assert (actual - expected).norm() <= 0.04 * expected.norm()
