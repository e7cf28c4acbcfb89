"""What the layers launch on a device, forward and backward: the exact sequence of kernels, and none that copies.

The layers are traced on fake tensors and every operator of ours is replaced by the `torch.ops.npu` calls of its NPU
kernel. A read on the host would end the trace. Views cost nothing; everything else is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_npu
from moe_npu.layers import hf, hf_quantizer
from moe_npu.ops._library import npu_lowerings
from tests.npu.test_lowerings import _torch_npu_operators  # noqa: F401 - a fixture of every test here

T, K, H, INTER, E = 6, 2, 32, 16, 8
BF16 = torch.bfloat16

# ---------------------------------------------------------------- sequences

EXPERTS = ["npu.npu_grouped_matmul", "npu.npu_swiglu", "npu.npu_grouped_matmul"]
INT8_EXPERTS = ["npu.npu_grouped_matmul", "npu.npu_dequant_swiglu_quant", "npu.npu_grouped_matmul"]
DISPATCH = ["npu.npu_moe_init_routing_v2"]
COMBINE = ["npu.npu_moe_token_unpermute"]
LOGITS = ["aten.mm"]
GATING = ["npu.npu_moe_gating_top_k_softmax_v2"]
# pairs of absent experts have no row: find them, give each a row of the end, and no weight
ABSENT = ["aten.lt", "aten.cumsum", "aten.rsub", "aten.where", "aten.masked_fill"]

COMBINE_BACKWARD = ["npu.npu_moe_token_unpermute_grad_v2"]
EXPERTS_BACKWARD = [
    "npu.npu_grouped_matmul",  # of the rows
    "npu.npu_grouped_matmul",  # of down_proj
    "npu.npu_swiglu_backward",
    "npu.npu_grouped_matmul",
    "npu.npu_grouped_matmul",
]
# the weight itself, since no kernel multiplies by transposed int4 groups
DEQUANTIZED = [
    "aten.arange",
    "aten.bitwise_left_shift",
    "aten.bitwise_right_shift",
    "aten._to_copy",
    "aten._to_copy",
    "aten.add",
    "aten._to_copy",
    "aten.mul",
    "aten._to_copy",
]
INT4_EXPERTS_BACKWARD = [
    *DEQUANTIZED,
    "npu.npu_grouped_matmul",
    "npu.npu_swiglu_backward",
    *DEQUANTIZED,
    "npu.npu_grouped_matmul",
]
DISPATCH_BACKWARD = ["aten.bitwise_and", "npu.npu_moe_token_permute_grad_v2"]
GATING_BACKWARD = [
    "aten._to_copy",
    "aten.gather",
    "aten._to_copy",
    "aten._softmax",
    "aten._to_copy",
    "aten._softmax_backward_data",
    "aten.zeros_like",
    "aten._to_copy",
    "aten.scatter",
]
LOGITS_BACKWARD = ["aten.mm", "aten.mm", "aten.add"]

# ---------------------------------------------------------------- layers


def moe(scheme: str | None = None, **options: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    experts: nn.Module = moe_npu.GroupedExperts(E, H, INTER, dtype=BF16)
    if scheme is not None:
        experts = moe_npu.QuantizedExperts.from_float(experts, moe_npu.get_scheme(scheme, **options))
    router = moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=BF16)
    return moe_npu.MoE(router, experts), (torch.randn(T, H, dtype=BF16),)


def transformers_experts(
    scheme: str | None = None, is_expert_parallel: bool = False, **options: Any
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INTER, num_experts=E, num_experts_per_tok=K)
    experts = Qwen3MoeExperts(config).to(BF16)
    experts.config._experts_implementation = hf.NAME
    experts._is_expert_parallel = is_expert_parallel
    if scheme is not None:
        chosen = moe_npu.get_scheme(scheme, **options)
        hf_quantizer._quantize_parameters(experts, chosen)
        hf_quantizer.prepare_quantized_weights(experts, chosen)
    return experts, (torch.randn(T, H, dtype=BF16), torch.randint(0, E, (T, K)), torch.rand(T, K, dtype=BF16))


class Case(NamedTuple):
    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    forward: list[str]
    backward: list[str] | None = None


CASES = [
    Case(
        "moe",
        moe,
        [*LOGITS, *GATING, *DISPATCH, *EXPERTS, *COMBINE],
        [*COMBINE_BACKWARD, *EXPERTS_BACKWARD, *DISPATCH_BACKWARD, *GATING_BACKWARD, *LOGITS_BACKWARD],
    ),
    Case("moe-w8a8", lambda: moe("w8a8"), [*LOGITS, *GATING, *DISPATCH, *INT8_EXPERTS, *COMBINE]),
    Case(
        "moe-w4a16",
        lambda: moe("w4a16", group_size=8),
        [*LOGITS, *GATING, *DISPATCH, *EXPERTS, *COMBINE],
        [*COMBINE_BACKWARD, *INT4_EXPERTS_BACKWARD, *DISPATCH_BACKWARD, *GATING_BACKWARD, *LOGITS_BACKWARD],
    ),
    Case(
        "transformers",
        transformers_experts,
        ["aten._to_copy", *DISPATCH, *EXPERTS, *COMBINE],  # transformers' own router gives int64 ids
        [*COMBINE_BACKWARD, *EXPERTS_BACKWARD, *DISPATCH_BACKWARD],
    ),
    Case(
        "transformers-absent-experts",
        lambda: transformers_experts(is_expert_parallel=True),
        ["aten._to_copy", *DISPATCH, *ABSENT, *EXPERTS, *COMBINE],
        [*COMBINE_BACKWARD, *EXPERTS_BACKWARD, "aten.masked_fill", *DISPATCH_BACKWARD],
    ),
    Case(
        "transformers-w8a8",
        lambda: transformers_experts("w8a8"),
        ["aten._to_copy", *DISPATCH, *INT8_EXPERTS, *COMBINE],
    ),
    Case(
        "transformers-w4a16",
        lambda: transformers_experts("w4a16", group_size=8),
        ["aten._to_copy", *DISPATCH, *EXPERTS, *COMBINE],
        [*COMBINE_BACKWARD, *INT4_EXPERTS_BACKWARD, *DISPATCH_BACKWARD],
    ),
]

# ---------------------------------------------------------------- tracing


def trace(case: Case, with_backward: bool) -> GraphModule:
    layer, inputs = case.make()
    state = {name: tensor.detach() for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
    if with_backward:
        inputs = tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs)
        for name, parameter in layer.named_parameters():
            state[name].requires_grad_(parameter.requires_grad)

    def run(inputs: tuple[Tensor, ...], state: dict[str, Tensor], grad: Tensor) -> Any:
        y = functional_call(layer, state, inputs)
        leaves = [tensor for tensor in (*inputs, *state.values()) if tensor.requires_grad]
        return (y, torch.autograd.grad(y, leaves, grad)) if leaves else y

    tracer = make_fx(run, decomposition_table=npu_lowerings(), tracing_mode="fake")
    return tracer(inputs, state, torch.randn(T, H, dtype=BF16))


def launched(graph: GraphModule) -> list[Node]:
    def is_launch(node: Node) -> bool:
        operator = node.target
        if not isinstance(operator, torch._ops.OpOverload):
            return False
        # a view that autograd does not know as one
        return not operator.is_view and operator is not torch.ops.aten._unsafe_view.default

    return [node for node in graph.graph.nodes if is_launch(node)]


def names(nodes: list[Node]) -> list[str]:
    return [str(node.target).rsplit(".", 1)[0] for node in nodes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_launches_exactly(case: Case) -> None:
    assert names(launched(trace(case, with_backward=False))) == case.forward
    assert len([name for name in case.forward if name not in LOGITS]) <= (11 if "absent" in case.name else 6)


@pytest.mark.parametrize("case", [case for case in CASES if case.backward is not None], ids=lambda case: case.name)
def test_forward_and_backward_launch_exactly(case: Case) -> None:
    assert names(launched(trace(case, with_backward=True))) == [*case.forward, *(case.backward or [])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_argument_has_to_be_copied(case: Case) -> None:
    """The adapters of torch_npu make copies of what is not contiguous; grouped matmuls read transposed operands."""
    for node in launched(trace(case, with_backward=case.backward is not None)):
        if not str(node.target).startswith("npu."):
            continue
        is_matmul = str(node.target) == "npu.npu_grouped_matmul.default"
        operands = tree_leaves(node.args) if is_matmul else []
        for argument in tree_leaves((node.args, node.kwargs)):
            if not isinstance(argument, Node):
                continue
            tensor = argument.meta["val"]
            is_read_as_it_is = argument in operands and tensor.mT.is_contiguous()
            assert tensor.is_contiguous() or is_read_as_it_is, f"{node.target} gets {tuple(tensor.stride())}"


def test_a_launch_more_is_seen() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).mT.contiguous()

    case = Case("twice", lambda: (Twice(), (torch.randn(T, H),)), [])
    assert names(launched(trace(case, with_backward=False))) == ["aten.add", "aten.clone"]
