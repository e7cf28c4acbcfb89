"""The NPU kernels, called through torch_npu's schemas with our CPU operators in the place of the device.

Where torch_npu is not installed, its operators are defined here from the schemas that it ships: a call with a wrong
name, order or type fails as it would there. Computing them on CPU shows that what a kernel does around the call
(views, slices, copies, modes) leaves the result the same; running them on fake tensors shows that nothing is read on
the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import tests.ops
from moe_npu import ops
from moe_npu.ops._library import REGISTRATIONS
from tests.helpers.assertions import assert_bits_equal
from tests.ops.samples import SAMPLES
from tests.ops.samples.base import Sample, relayout
from tests.ops.test_battery import operator_calls, over

HAS_TORCH_NPU = "torch_npu" in sys.modules
SCHEMAS = Path(tests.ops.__file__).with_name("torch_npu_schemas.txt").read_text().splitlines()
# refused on a device, in words
CPU_ONLY = {REGISTRATIONS["npu_moe_distribute_combine_grad"].op}
CPU_ONLY_ARGUMENTS = {REGISTRATIONS["npu_moe_distribute_combine"].op: "shared_expert_x"}
REGISTERED = {registration.op: registration for registration in REGISTRATIONS.values()}


@pytest.fixture(scope="module", autouse=True)
def _torch_npu_operators() -> Iterator[None]:
    library = torch.library.Library("npu", "FRAGMENT")
    for schema in SCHEMAS:
        if not HAS_TORCH_NPU:
            library.define(schema)
        name = schema.split("(", 1)[0]
        public = name.split(".", 1)[0]

        def compute(*args: Any, _public: str = public, **kwargs: Any) -> Any:
            result = getattr(ops, _public)(*args, **kwargs)
            if type(result) is not tuple:
                return result
            # a tensor that is switched off: from the device it arrives undefined, which Python cannot return
            return tuple(result[0].new_empty(0) if part is None else part for part in result)

        library.impl(name, compute, "CPU")
        if not HAS_TORCH_NPU:
            library.impl(name, compute, "Meta")
    yield
    library._destroy()


def has_argument(operator: Any, args: tuple[Any, ...], name: str | None) -> bool:
    names = [argument.name for argument in operator._schema.arguments]
    return name is not None and args[names.index(name)] is not None


def calls(sample: Sample) -> list[tuple[Any, tuple[Any, ...]]]:
    return [
        (operator, args)
        for operator, args in operator_calls(sample, with_grad=bool(sample.differentiable))
        # no device has float64, or a way to compute these
        if operator not in CPU_ONLY
        and not has_argument(operator, args, CPU_ONLY_ARGUMENTS.get(operator))
        and not any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_leaves(args))
    ]


@over(SAMPLES)
def test_kernel_computes_the_same(sample: Sample) -> None:
    for operator, args in calls(sample):
        own_args = tree_map_only(Tensor, lambda tensor: relayout(tensor, tensor.dtype), args)
        with torch.no_grad():
            expected = tree_leaves(operator(*args))
            actual = tree_leaves(REGISTERED[operator].npu(*own_args))
        for result, wanted in zip(actual, expected, strict=True):
            if isinstance(wanted, Tensor) and wanted.is_floating_point():
                # another layout is another order of additions
                torch.testing.assert_close(result, wanted, equal_nan=True, check_stride=True)
            elif isinstance(wanted, Tensor):
                assert_bits_equal(result, wanted)


@pytest.mark.skipif(HAS_TORCH_NPU, reason="torch_npu has shape functions of its own; test_contract.py compares them")
@over(SAMPLES)
def test_kernel_reads_nothing_on_the_host(sample: Sample) -> None:
    for operator, args in calls(sample):
        with FakeTensorMode() as mode, torch.no_grad():
            fake = tree_map_only(Tensor, mode.from_tensor, args)
            expected, actual = tree_leaves(operator(*fake)), tree_leaves(REGISTERED[operator].npu(*fake))
        for result, wanted in zip(actual, expected, strict=True):
            if isinstance(wanted, Tensor):
                assert (result.dtype, result.shape, result.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
