"""Every NPU kernel on fake tensors of the device: torch_npu's schemas, and its shape functions against ours."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_npu import ops
from moe_npu.ops._library import REGISTRATIONS
from tests.npu.test_operators import has_float64
from tests.ops.samples import SAMPLES
from tests.ops.samples.base import Sample
from tests.ops.test_battery import operator_calls, over

pytestmark = [
    pytest.mark.npu,
    pytest.mark.usefixtures("npu"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*"),  # quint4x2 of a shape function
]

REGISTERED = {registration.op: (name, registration) for name, registration in REGISTRATIONS.items()}
# operators that torch_npu has no shape function for; the last has no device kernel
WITHOUT_SHAPE_FUNCTION = {name for name, registration in REGISTRATIONS.items() if not registration.is_lowered} | {
    "npu_moe_distribute_combine_grad"
}
# shape functions of torch_npu that refuse or contradict what its eager mode accepts and allocates
WRONG_SHAPE_FUNCTIONS = {
    "npu_grouped_matmul_swiglu_quant_v2": {"int4-groups"},  # no result
    "npu_dynamic_quant": {"perchannel-int4"},  # eight times the rows
    "npu_dynamic_quant_asymmetric": {"perchannel-int4"},
    "npu_quant_matmul": {"int4-batch", "int4-groups", "int4-groups-along-k"},  # refused
    "npu_swiglu_quant": {"int4-dynamic", "int4-by-group", "int4-static"},  # quint4x2 instead of pairs in bytes
    "npu_moe_distribute_combine": {"shared-rows", "shared-rows-3d", "bfloat16", "rounded", "integers"},  # no shared_x
    "npu_moe_distribute_combine_v2": {"integers"},  # the dtype of int32 rows
    "npu_moe_distribute_combine_add_rms_norm": {"integers"},
}
# results that eager mode allocates in another size than the shape function says: [experts] counts although they are
# not asked for, and the scales of as many rows as there may be
OTHER_SIZES = {"npu_moe_distribute_dispatch": 6, "npu_moe_distribute_dispatch_v2": 6}
COUNTS, COUNTS_FLAG = 2, list(inspect.signature(ops.npu_moe_init_routing_v2).parameters).index("expert_tokens_num_flag")


def shapes(results: Any) -> list[Any]:
    return [
        (tuple(leaf.shape), leaf.dtype, leaf.stride(), leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves(results)
    ]


@over([s for s in SAMPLES if not has_float64(s) and s.op_name not in WITHOUT_SHAPE_FUNCTION])
def test_shapes_are_those_of_torch_npu(sample: Sample) -> None:
    for operator, args in operator_calls(sample, with_grad=bool(sample.differentiable)):
        name, registration = REGISTERED[operator]
        if name in WITHOUT_SHAPE_FUNCTION:  # the backward of another operator
            continue
        with FakeTensorMode(), torch.no_grad():
            fake = tree_map_only(
                Tensor, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="npu:0"), args
            )
            expected = shapes(operator(*fake))
            if sample.op_name == name and sample.id in WRONG_SHAPE_FUNCTIONS.get(name, ()):
                with contextlib.suppress(RuntimeError, TypeError):
                    assert shapes(registration.npu(*fake)) != expected, "the shape function has been mended"
                continue
            actual = shapes(registration.npu(*fake))
        ignored = OTHER_SIZES.get(name)
        if name == "npu_moe_init_routing_v2" and not args[COUNTS_FLAG]:
            ignored = COUNTS
        if ignored is not None:
            del actual[ignored], expected[ignored]
        assert actual == expected
