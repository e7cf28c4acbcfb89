"""Conversions of expert weights against the definition of every layout, and back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_npu
from moe_npu.layers.weight_layouts import (
    ExpertLayout,
    get_layout,
    layout_names,
    load_expert_weights,
    stack_experts,
    unstack_experts,
)

E, H, INTER = 3, 5, 4
SIZES = {"num_experts": E, "hidden_size": H, "intermediate_size": INTER}
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
LAYOUT = pytest.mark.parametrize("name", layout_names())


def parts(bias: bool) -> dict[str, Tensor]:
    """gate, up ``[E, I, H]``, down ``[E, H, I]`` and their biases, all numbers different."""
    shapes = {"gate": (E, INTER, H), "up": (E, INTER, H), "down": (E, H, INTER)}
    if bias:
        shapes |= {"gate_bias": (E, INTER), "up_bias": (E, INTER), "down_bias": (E, H)}
    out, start = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        out[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    return out


def alternate(a: Tensor, b: Tensor) -> Tensor:
    """Rows of a and b, along dim 1, one of each in turn."""
    return torch.stack([x[:, row] for row in range(a.size(1)) for x in (a, b)], 1)


def stored(name: str, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layout stores, spelled out for each."""
    gate, up, down = p["gate"], p["up"], p["down"]
    has_bias = "gate_bias" in p
    joined = torch.cat([gate, up], 1)
    t = {
        "stacked": lambda: {"gate_up_proj": joined, "down_proj": down},
        "stacked_transposed": lambda: {"gate_up_proj": joined.transpose(1, 2), "down_proj": down.transpose(1, 2)},
        "stacked_ungated": lambda: {"up_proj": up, "down_proj": down},
        "interleaved": lambda: {"gate_up_proj": alternate(gate, up), "down_proj": down},
        "interleaved_transposed": lambda: {
            "gate_up_proj": alternate(gate, up).transpose(1, 2),
            "down_proj": down.transpose(1, 2),
        },
        "separate": lambda: {"gate_proj": gate, "up_proj": up, "down_proj": down},
        "w13": lambda: {"w13_weight": joined, "w2_weight": down},
        "w31": lambda: {"w13_weight": torch.cat([up, gate], 1), "w2_weight": down},
        "dbrx": lambda: {
            "w1": gate.reshape(E * INTER, H),
            "v1": up.reshape(E * INTER, H),
            "w2": down.transpose(1, 2).reshape(E * INTER, H),
        },
        "jetmoe": lambda: {"input_linear.weight": joined, "output_linear.weight": down},
    }
    per_expert = {
        "per_expert": (("gate_proj", gate), ("up_proj", up), ("down_proj", down)),
        "per_expert_ungated": (("up_proj", up), ("down_proj", down)),
        "per_expert_transposed": (
            ("gate_proj", gate.transpose(1, 2)),
            ("up_proj", up.transpose(1, 2)),
            ("down_proj", down.transpose(1, 2)),
        ),
        "per_expert_w123": (("w1", gate), ("w3", up), ("w2", down)),
    }
    if name in per_expert:
        out = {f"{e}.{key}.weight": tensor[e] for key, tensor in per_expert[name] for e in range(E)}
        if has_bias:
            source = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
            out |= {f"{e}.{key}.bias": p[f"{source[key]}_bias"][e] for key, _ in per_expert[name] for e in range(E)}
        return out
    out = t[name]()
    if has_bias:
        gate_up = torch.cat([p["gate_bias"], p["up_bias"]], 1)
        out |= {
            "stacked": lambda: {"gate_up_proj_bias": gate_up, "down_proj_bias": p["down_bias"]},
            "stacked_transposed": lambda: {"gate_up_proj_bias": gate_up, "down_proj_bias": p["down_bias"]},
            "stacked_ungated": lambda: {"up_proj_bias": p["up_bias"], "down_proj_bias": p["down_bias"]},
            "interleaved": lambda: {
                "gate_up_proj_bias": alternate(p["gate_bias"], p["up_bias"]),
                "down_proj_bias": p["down_bias"],
            },
            "interleaved_transposed": lambda: {
                "gate_up_proj_bias": alternate(p["gate_bias"], p["up_bias"]),
                "down_proj_bias": p["down_bias"],
            },
            "separate": lambda: {
                "gate_proj_bias": p["gate_bias"],
                "up_proj_bias": p["up_bias"],
                "down_proj_bias": p["down_bias"],
            },
            "w13": lambda: {"w13_bias": gate_up, "w2_bias": p["down_bias"]},
            "w31": lambda: {"w13_bias": torch.cat([p["up_bias"], p["gate_bias"]], 1), "w2_bias": p["down_bias"]},
            "dbrx": lambda: {
                "w1_bias": p["gate_bias"].flatten(),
                "v1_bias": p["up_bias"].flatten(),
                "w2_bias": p["down_bias"].flatten(),
            },
            "jetmoe": lambda: {"input_linear.bias": gate_up, "output_linear.bias": p["down_bias"]},
        }[name]()
    return out


def own(name: str, p: dict[str, Tensor]) -> dict[str, Tensor]:
    return stored("stacked" if get_layout(name).has_gate else "stacked_ungated", p)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key


def empty_experts(name: str, bias: bool, dtype: torch.dtype = torch.float32) -> Any:
    return moe_npu.GroupedExperts(E, H, INTER, bias=bias, has_gate=get_layout(name).has_gate, dtype=dtype)


@BIAS
@LAYOUT
def test_stack(name: str, bias: bool) -> None:
    p = parts(bias)
    assert_same(stack_experts(stored(name, p), layout=name, bias=bias, **SIZES), own(name, p))


@BIAS
@LAYOUT
def test_unstack(name: str, bias: bool) -> None:
    p = parts(bias)
    actual = unstack_experts(own(name, p), layout=name)
    assert_same(actual, stored(name, p))
    assert all(tensor.is_contiguous() for tensor in actual.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 6, 3), (7, 3, 6), (4, 8, 4)], ids=str)
@BIAS
@LAYOUT
def test_there_and_back_is_exact(name: str, bias: bool, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    experts, hidden, inter = sizes
    first, rows = ("gate_up_proj", 2 * inter) if get_layout(name).has_gate else ("up_proj", inter)
    shapes = {first: (experts, rows, hidden), "down_proj": (experts, hidden, inter)}
    if bias:
        shapes |= {f"{first}_bias": (experts, rows), "down_proj_bias": (experts, hidden)}
    state = {key: (50 * torch.randn(shape)).to(dtype) for key, shape in shapes.items()}
    tensors = unstack_experts(state, layout=name)
    numbers = {"num_experts": experts, "hidden_size": hidden, "intermediate_size": inter}
    assert_same(stack_experts(tensors, layout=name, bias=bias, **numbers), state)


@BIAS
@LAYOUT
def test_load_copies_into_the_memory_of_the_parameters(name: str, bias: bool) -> None:
    p, experts = parts(bias), empty_experts(name, bias)
    pointers = {key: parameter.data_ptr() for key, parameter in experts.named_parameters()}
    load_expert_weights(experts, stored(name, p), layout=name)
    assert_same({key: parameter.detach() for key, parameter in experts.named_parameters()}, own(name, p))
    assert {key: parameter.data_ptr() for key, parameter in experts.named_parameters()} == pointers
    assert all(parameter.requires_grad for parameter in experts.parameters())
    assert_same(unstack_experts(experts.state_dict(), layout=name), stored(name, p))


@LAYOUT
def test_loading_allocates_nothing(name: str) -> None:
    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {
                x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)
            }
            out = func(*args, **(kwargs or {}))
            new.extend(x for x in torch.utils._pytree.tree_leaves(out) if x.untyped_storage().data_ptr() not in known)
            return out

    new: list[Tensor] = []
    tensors = stored(name, parts(True))
    experts = empty_experts(name, True)
    with Allocations():
        torch.zeros(1)
        assert len(new) == 1
        load_expert_weights(experts, {key: tensor.detach() for key, tensor in tensors.items()}, layout=name)
    assert len(new) == 1


def test_a_lazy_mapping_is_read_one_tensor_at_a_time() -> None:
    alive, most = 0, 0

    class Lazy(Mapping[str, Tensor]):
        tensors = stored("per_expert", parts(False))

        def __getitem__(self, key: str) -> Tensor:
            nonlocal alive, most
            tensor = self.tensors[key].clone()
            alive += 1
            most = max(most, alive)

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(tensor, gone)
            return tensor

        def __iter__(self) -> Iterator[str]:
            return iter(self.tensors)

        def __len__(self) -> int:
            return len(self.tensors)

        def __contains__(self, key: object) -> bool:
            return key in self.tensors

    experts = empty_experts("per_expert", False)
    load_expert_weights(experts, Lazy(), layout="per_expert")
    assert most <= 3  # the first, whose dtype is compared with, the last and the next
    assert_same(experts.state_dict(), own("per_expert", parts(False)))


def test_the_dtype_changes_on_request_only() -> None:
    tensors, experts = stored("w13", parts(True)), empty_experts("w13", True, torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
    with pytest.raises(ValueError, match=r"float32 but the parameters are torch.bfloat16; cast=True"):
        load_expert_weights(experts, tensors, layout="w13")
    assert_same(experts.state_dict(), before)
    load_expert_weights(experts, tensors, layout="w13", cast=True)
    assert_same(experts.state_dict(), {key: x.bfloat16() for key, x in own("w13", parts(True)).items()})


def test_own_layouts() -> None:
    layout = ExpertLayout(gate_up="{expert}.in", down="{expert}.out", order="up_first", is_transposed=True)
    p = parts(False)
    tensors = {f"{e}.in": torch.cat([p["up"][e], p["gate"][e]]).T for e in range(E)}
    tensors |= {f"{e}.out": p["down"][e] for e in range(E)}
    assert_same(stack_experts(tensors, layout=layout, **SIZES), own("stacked", p))
    assert_same(unstack_experts(own("stacked", p), layout=layout), tensors)


def test_meta_tensors_are_checked_and_stay_on_meta() -> None:
    tensors = {key: tensor.to("meta") for key, tensor in stored("dbrx", parts(False)).items()}
    state = stack_experts(tensors, layout="dbrx", **SIZES)
    assert {key: (tuple(x.shape), x.device.type) for key, x in state.items()} == {
        "gate_up_proj": ((E, 2 * INTER, H), "meta"),
        "down_proj": ((E, H, INTER), "meta"),
    }


def test_loaded_experts_compute_the_same_whatever_the_layout() -> None:
    state = {key: torch.randn_like(tensor) for key, tensor in own("stacked", parts(True)).items()}
    x, counts, results = torch.randn(6, H), torch.tensor([1, 3, 2]), []
    for name in layout_names():
        if get_layout(name).has_gate:
            experts = empty_experts(name, True)
            load_expert_weights(experts, unstack_experts(state, layout=name), layout=name)
            results.append(experts(x, counts))
    assert len(results) == 12
    assert all(torch.equal(result, results[0]) for result in results)


# ---------------------------------------------------------------- mistakes


@LAYOUT
def test_wrong_shapes_name_the_tensor_and_what_it_must_be(name: str) -> None:
    tensors = stored(name, parts(True))
    experts = empty_experts(name, True)
    before = {key: tensor.clone() for key, tensor in experts.state_dict().items()}
    for key, tensor in tensors.items():
        wrong = {**tensors, key: torch.cat([tensor, tensor])}
        with pytest.raises(ValueError, match="must have shape") as info:
            stack_experts(wrong, layout=name, bias=True, **SIZES)
        assert str(info.value) == f"{key} must have shape {tuple(tensor.shape)}, but has {tuple(wrong[key].shape)}"
        with pytest.raises(ValueError, match="must have shape"):
            load_expert_weights(experts, wrong, layout=name)
        missing = {other: value for other, value in tensors.items() if other != key}
        with pytest.raises(ValueError, match=f"{key} is missing, of shape"):
            stack_experts(missing, layout=name, bias=True, **SIZES)
    assert_same(experts.state_dict(), before)


def test_a_transposed_weight_is_not_taken_for_one_that_is_not() -> None:
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \(3, 5, 8\), but has \(3, 8, 5\)"):
        stack_experts(stored("stacked", parts(False)), layout="stacked_transposed", **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"w1": torch.zeros(2)}, "w1 is not a tensor of this layout", id="unexpected"),
        pytest.param({"w2_weight": torch.zeros(E, H, INTER).half()}, "w2_weight is torch.float16 on cpu", id="dtype"),
        pytest.param({"w2_weight": torch.zeros(E, H, INTER, device="meta")}, "float32 on meta", id="device"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_experts({**stored("w13", parts(False)), **change}, layout="w13", **SIZES)


def test_a_bias_is_never_dropped() -> None:
    with pytest.raises(ValueError, match="w13_bias is not a tensor of this layout"):
        stack_experts(stored("w13", parts(True)), layout="w13", **SIZES)
    state = own("stacked", parts(True))
    del state["gate_up_proj_bias"]
    with pytest.raises(ValueError, match="gate_up_proj_bias is missing"):
        unstack_experts(state, layout="w13")


@pytest.mark.parametrize(
    ("state", "message"),
    [({}, "down_proj must be there"), ({"down_proj": torch.zeros(2, 3)}, r"but is of shape \(2, 3\)")],
    ids=["missing", "two-dims"],
)
def test_unstack_needs_the_down_projection(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unstack_experts(state, layout="w13")


def test_unstack_to_a_layout_of_other_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="up_proj is missing"):
        unstack_experts(own("stacked", parts(False)), layout="per_expert_ungated")
    with pytest.raises(ValueError, match="gate_up_proj is missing"):
        unstack_experts(own("stacked_ungated", parts(False)), layout="per_expert")


def test_loading_into_the_wrong_thing_is_refused() -> None:
    tensors = stored("stacked", parts(False))
    with pytest.raises(TypeError, match="must be GroupedExperts, but are Linear"):
        load_expert_weights(torch.nn.Linear(2, 2), tensors, layout="stacked")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of experts with a gate, but the experts are without one"):
        load_expert_weights(empty_experts("stacked_ungated", False), tensors, layout="stacked")
    with pytest.raises(ValueError, match="to_empty"):
        load_expert_weights(empty_experts("stacked", False).to("meta"), tensors, layout="stacked")


def test_unknown_layouts_are_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="there is no expert layout 'w12'; choose one of dbrx, interleaved"):
        get_layout("w12")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_positive(size: str) -> None:
    with pytest.raises(ValueError, match=f"{size} must be positive, but is 0"):
        stack_experts({}, layout="stacked", **{**SIZES, size: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down": "d"}, "a layout names gate_up"),
        ({"down": "d", "gate": "g"}, "a layout names gate_up"),
        ({"down": "d", "gate_up": "gu", "up": "u"}, "cannot name gate or up as well"),
        ({"down": "d", "gate_up": "gu", "order": "up"}, "order must be gate_first, up_first or interleaved"),
    ],
)
def test_layouts_that_describe_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLayout(**options)
