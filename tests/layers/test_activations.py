"""Activations of experts against their formulas in float64."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_npu import ops
from moe_npu.layers.activations import (
    clamped_swiglu,
    clipped_swiglu,
    gated,
    get_activation,
    softcapped_swiglu,
)
from tests.helpers.assertions import assert_close
from tests.helpers.reference import experts as reference


def clipped(alpha: float, limit: float, bias: float) -> Callable[[Tensor], Tensor]:
    def act(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        gate, up = torch.where(gate > limit, limit, gate), torch.where(up.abs() > limit, limit * up.sign(), up)
        return gate / (1 + torch.exp(-alpha * gate)) * (up + bias)

    return act


def softcapped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return 1.5 * torch.tanh(gate / 1.5) / (1 + torch.exp(-gate)) * 2.5 * torch.tanh(up / 2.5)


UNGATED = reference.ELEMENTWISE
GATED = {name: reference.gated(function) for name, function in UNGATED.items()}
FACTORIES = {
    "clipped": (clipped_swiglu(), clipped(1.702, 7.0, 1.0)),
    "clipped-numbers": (clipped_swiglu(alpha=0.9, limit=1.25), clipped(0.9, 1.25, 1.0)),
    "clamped": (clamped_swiglu(limit=1.25), clipped(1.0, 1.25, 0.0)),
    "softcapped": (softcapped_swiglu(gate_softcap=1.5, up_softcap=2.5), softcapped),
    "float32-silu": (get_activation("silu"), reference.gated(reference.silu)),
    "float32-gelu": (gated(F.gelu, in_float32=True), reference.gated(reference.gelu)),
    "own-function": (gated(torch.sigmoid, in_float32=True), reference.gated(lambda x: 1 / (1 + torch.exp(-x)))),
}


def names_of_error(has_gate: bool) -> list[str]:
    with pytest.raises(ValueError, match="there is no activation 'sillu'; choose one of ") as info:
        get_activation("sillu", has_gate=has_gate)
    return str(info.value).split("choose one of ")[1].split(", ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_gate", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("name", sorted(UNGATED))
def test_names(name: str, has_gate: bool, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(40, 12)).to(dtype)
    actual = get_activation(name, has_gate=has_gate)(x)
    assert actual.dtype == dtype
    assert actual.shape == (40, 6 if has_gate else 12)
    assert_close(actual, (GATED if has_gate else UNGATED)[name](x.double()))


def test_the_error_lists_all_names() -> None:
    assert names_of_error(True) == names_of_error(False) == sorted(UNGATED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_factories_round_once(name: str, dtype: torch.dtype) -> None:
    activation, formula = FACTORIES[name]
    x = (3 * torch.randn(64, 32)).to(dtype)
    assert_close(activation(x), formula(x.double()))


def test_in_float32_rounds_the_product_only() -> None:
    x = torch.randn(64, 32).bfloat16()
    gate, up = x.float().chunk(2, -1)
    in_float32 = gated(F.gelu, in_float32=True)(x)
    assert torch.equal(in_float32, (F.gelu(gate) * up).bfloat16())
    assert not torch.equal(in_float32, get_activation("gelu")(x))


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_gradients_of_factories(name: str) -> None:
    activation, formula = FACTORIES[name]
    x = (3 * torch.randn(30, 16, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(30, 8, dtype=torch.float64)
    (actual,) = torch.autograd.grad(activation(x), x, grad)
    (expected,) = torch.autograd.grad(formula(x), x, grad)
    assert_close(actual, expected, reduction=4)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_factories_compile_and_work_on_meta_and_for_no_rows(name: str) -> None:
    torch._dynamo.reset()  # its limit of compilations counts those of other cases
    activation, x = FACTORIES[name][0], torch.randn(6, 8)
    compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), activation(x))
    assert activation(x.to("meta")).shape == (6, 4)
    assert activation(x[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("activation", "operator"),
    [
        pytest.param(get_activation("silu"), "npu_swiglu", id="silu"),
        pytest.param(clipped_swiglu(), "npu_clipped_swiglu", id="clipped"),
        pytest.param(clamped_swiglu(limit=7.0), "npu_clipped_swiglu", id="clamped"),
    ],
)
def test_is_one_operator(activation: Callable[[Tensor], Tensor], operator: str) -> None:
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 8)
    with Record():
        activation(x)
    assert calls[0] == f"moe_npu::{operator}"


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_can_be_pickled(name: str) -> None:
    activation, x = FACTORIES[name][0], torch.randn(3, 8)
    assert torch.equal(pickle.loads(pickle.dumps(activation))(x), activation(x))


@pytest.mark.parametrize(
    "activation",
    [F.silu, F.relu, nn.SiLU(), nn.GELU(), get_activation("relu2", has_gate=False)],
    ids=["silu", "relu", "SiLU", "GELU", "by-name"],
)
def test_elementwise_ones_are_refused_for_experts_with_a_gate(activation: Callable[[Tensor], Tensor]) -> None:
    assert get_activation(activation, has_gate=False) is activation
    with pytest.raises(ValueError, match=r"with a gate take .* make it gated"):
        get_activation(activation)


@pytest.mark.parametrize(
    "activation", [ops.npu_swiglu, clipped_swiglu(), softcapped_swiglu(gate_softcap=1, up_softcap=1), gated(F.relu)]
)
def test_gated_ones_are_refused_for_experts_without(activation: Callable[[Tensor], Tensor]) -> None:
    assert get_activation(activation) is activation
    with pytest.raises(ValueError, match="experts without a gate take"):
        get_activation(activation, has_gate=False)
    with pytest.raises(ValueError, match="is a gated activation already"):
        gated(activation)


def test_own_callables_are_taken_as_they_are() -> None:
    def own(rows: Tensor) -> Tensor:
        return rows

    assert get_activation(own) is get_activation(own, has_gate=False) is own


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: clipped_swiglu(limit=value), "limit"),
        (lambda value: clamped_swiglu(limit=value), "limit"),
        (lambda value: softcapped_swiglu(gate_softcap=value, up_softcap=1.0), "gate_softcap"),
        (lambda value: softcapped_swiglu(gate_softcap=1.0, up_softcap=value), "up_softcap"),
    ],
)
def test_bounds_must_be_positive(make: Callable[[float], object], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, but is {value}"):
        make(value)
