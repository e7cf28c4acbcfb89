"""Every operator on the simulated device, through torch_npu's own adapters, against the same call on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.helpers.assertions import assert_bits_equal
from tests.ops.samples import SAMPLES, distribute
from tests.ops.samples.base import Sample
from tests.ops.test_battery import bind, call, over

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


def to_npu(value: Any) -> Any:
    """The same arguments on the device, with the strides, gaps and overlaps that they have."""

    def move(tensor: Tensor) -> Tensor:
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
        moved = memory.to("npu").as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        return moved.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, move, value)


# the groups of these have other names on a device: test_distributed.py
COMMUNICATE = {sample.op_name for sample in distribute.SAMPLES}


def has_float64(sample: Sample) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_leaves(sample.make()))


def is_on_device(sample: Sample) -> bool:
    return sample.op_name not in COMMUNICATE and not has_float64(sample)


SAMPLES_ON_DEVICE = [sample for sample in SAMPLES if is_on_device(sample)]


# equal within the bounds of torch.testing, or by one code, not to the bit: samples and why
ROUNDED_OTHERWISE = {
    "grouped_mm_weight_grad-transposed": "the device gets its operands in another layout, which orders the sums anew",
    "npu_weight_quant_batchmatmul-int8": "torch_npu makes words of quant_scale, which cut its mantissa to ten bits",
}


def assert_same(results: list[Any], expected: list[Any], *, exactly: bool = True) -> None:
    for result, wanted in zip(results, expected, strict=True):
        if not isinstance(wanted, Tensor):
            assert result == wanted
            continue
        assert result.device.type == "npu"
        assert result.stride() == wanted.stride()
        if exactly:
            assert_bits_equal(result.detach().cpu(), wanted.detach())
        elif wanted.is_floating_point():
            torch.testing.assert_close(result.detach().cpu(), wanted.detach())
        else:
            torch.testing.assert_close(result.cpu(), wanted, rtol=0, atol=1)


@over(SAMPLES_ON_DEVICE)
def test_computes_the_same_as_on_cpu(sample: Sample) -> None:
    results, expected = call(sample, to_npu(sample.make())), call(sample, sample.make())
    assert_same(results, expected, exactly=sample.name not in ROUNDED_OTHERWISE)


@over([sample for sample in SAMPLES_ON_DEVICE if sample.differentiable])
def test_has_the_same_gradients_as_on_cpu(sample: Sample) -> None:
    gradients = []
    for move in (to_npu, lambda value: value):
        named, leaves = bind(sample, sample.make())
        moved_leaves = [move(leaf) for leaf in leaves]
        replace = {id(leaf): moved for leaf, moved in zip(leaves, moved_leaves, strict=True)}
        named = tree_map_only(Tensor, lambda t: replace[id(t)] if id(t) in replace else move(t), named)  # noqa: B023
        results = call(sample, ((), named)) if "self" not in named else []
        wanted = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
        generator = torch.Generator().manual_seed(1)
        grads = [move(torch.randn(result.shape, generator=generator).to(result.dtype)) for result in wanted]
        gradients.append(list(torch.autograd.grad(wanted, moved_leaves, grads, allow_unused=True)))
    assert_same(*gradients, exactly=sample.name not in ROUNDED_OTHERWISE)
