"""The gradients that torch_npu itself defines, computed on the simulated device, against our operators on CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_npu import ops
from tests.npu.test_operators import assert_same, is_on_device, to_npu
from tests.npu.test_torch_npu_calls import CRASHES, ONLY_SIGMOID
from tests.ops.samples import SAMPLES
from tests.ops.samples.base import Sample
from tests.ops.test_battery import bind, over

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

# all that torch_npu can differentiate
OPERATORS = (
    "npu_moe_gating_top_k",
    "npu_moe_token_permute",
    "npu_moe_token_permute_with_routing_map",
    "npu_moe_token_unpermute",
    "npu_moe_token_unpermute_with_routing_map",
    "npu_swiglu",
)
DIFFERENTIABLE = [
    sample
    for sample in SAMPLES
    if sample.op_name in OPERATORS and sample.differentiable and sample.name not in CRASHES and is_on_device(sample)
]
NEEDS_SCORES = "which needs out_flag=True"


def gradients(sample: Sample, library: Any, move: Callable[[Any], Any]) -> list[Tensor | None]:
    """Of all differentiable arguments, for random gradients of the results."""
    named, leaves = bind(sample, sample.make())
    moved = {id(leaf): move(leaf) for leaf in leaves}
    named = tree_map_only(Tensor, lambda tensor: moved[id(tensor)] if id(tensor) in moved else move(tensor), named)
    results = [
        result
        for result in tree_leaves(getattr(library, sample.op_name)(**named))
        if isinstance(result, Tensor) and result.is_floating_point() and result.requires_grad
    ]
    # torch_npu also marks the scores of gating, which no gradient passes
    results = results[:1] if sample.op_name == "npu_moe_gating_top_k" else results
    generator = torch.Generator().manual_seed(1)
    grads = [move(torch.randn(result.shape, generator=generator).to(result.dtype)) for result in results]
    return list(torch.autograd.grad(results, [moved[id(leaf)] for leaf in leaves], grads, allow_unused=True))


def refusal(sample: Sample) -> str | None:
    named, _ = bind(sample, sample.make())
    if sample.op_name != "npu_moe_gating_top_k":
        return None
    if named.get("norm_type", 0) != 1:
        return ONLY_SIGMOID
    return None if named.get("out_flag", False) or named["x"].size(0) == 0 else NEEDS_SCORES


@over(DIFFERENTIABLE)
def test_has_the_same_gradients_as_our_operator(sample: Sample) -> None:
    import torch_npu

    message = refusal(sample)
    if message is not None:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            gradients(sample, torch_npu, to_npu)
        return
    assert_same(gradients(sample, torch_npu, to_npu), gradients(sample, ops, lambda value: value))


def test_a_layer_trains() -> None:
    """Permute, SwiGLU and unpermute in one graph, with the sums of `backward`."""
    import torch_npu

    def loss(library: Any, device: str) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(5, 8, generator=generator).to(device).requires_grad_()
        probs = torch.rand(5, 2, generator=generator).to(device).requires_grad_()
        ids = torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2], [0, 1]], device=device)
        rows, index = library.npu_moe_token_permute(tokens, ids)
        out = library.npu_moe_token_unpermute(library.npu_swiglu(rows, dim=-1), index, probs)
        out.square().sum().backward()
        return [tokens.grad, probs.grad]

    assert_same(loss(torch_npu, "npu"), loss(ops, "cpu"))
