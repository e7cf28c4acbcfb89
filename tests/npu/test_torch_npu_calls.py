"""torch_npu's own functions, called as its documentation writes them, against our operators on CPU.

Without the repairs of our NPU kernels: what torch_npu refuses or leaves unwritten stands in the tables here.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from moe_npu import ops
from tests.npu.test_operators import assert_same, is_on_device, to_npu
from tests.ops.samples import SAMPLES as ALL_SAMPLES
from tests.ops.samples.base import Sample
from tests.ops.test_battery import call, over

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

# ours alone
NOT_OF_TORCH_NPU = ("grouped_mm", "grouped_mm_weight_grad")
# layouts of weights in memory have tests of their own
FORMATS = ("npu_format_cast", "npu_format_cast_", "npu_convert_weight_to_int4pack")
REFUSED = {
    "npu_swiglu_quant-static-smooth-alone": "smooth_scales and offsets should have the same shape when quant_mode is 0",
    "npu_swiglu_quant-static-offset-alone": "smooth_scales and offsets should have the same shape when quant_mode is 0",
    "npu_swiglu_quant-transposed": "smooth_scales and offsets should have the same shape when quant_mode is 0",
    "npu_moe_init_routing_v2-range-without-number": "Trying to create tensor with negative dimension -1",
    # the adapters count words instead of values
    "npu_grouped_matmul-mmm-int4-weight-float16": "output y[0] was allocated as [2, 2, 2]",
    "npu_grouped_matmul-mmm-int4-weight-bfloat16": "output y[0] was allocated as [2, 2, 2]",
    "npu_grouped_matmul-ints-smm-int4-weight-float16": "output y[0] was allocated as [2, 2]",
    "npu_grouped_matmul-ints-smm-int4-weight-bfloat16": "output y[0] was allocated as [2, 2]",
    "npu_weight_quant_batchmatmul-int4-along-k": "The k of x and weight should be equal",
    "npu_weight_quant_batchmatmul-int4-along-k-groups": "The k of x and weight should be equal",
    "npu_moe_re_routing-own-dtype-number": "tokens_dtype only supports hifloat8, float4_e2m1fn_x2, float4_e1m2fn_x2",
}
ONLY_SIGMOID = "the device has this gradient for norm_type 1 (sigmoid) only"
# torch_npu launches nothing, or does not set what nothing reads: which results
UNWRITTEN = {
    "npu_moe_gating_top_k_softmax_v2-no-expert-chosen": (2,),
    "npu_moe_init_routing_v2-padded-no-tokens": (0, 1, 2, 3),
    "_npu_moe_token_unpermute-without-probs": (1,),
}
# torch_npu divides by the number of tokens, which ends the process
CRASHES = ("npu_moe_token_permute_with_routing_map-no-tokens",)
# other results than ours: strides, and a scale that torch_npu always cuts to the precision of a word
OTHER = ("npu_grouped_matmul_add-input-transposed", "npu_weight_quant_batchmatmul-int8")

SAMPLES = [
    sample
    for sample in ALL_SAMPLES
    if sample.op_name not in (*FORMATS, *NOT_OF_TORCH_NPU)
    and sample.name not in (*CRASHES, *OTHER)
    and is_on_device(sample)
]


def arguments(sample: Sample) -> dict[str, Any]:
    """All arguments by name, on the device."""
    args, kwargs = to_npu(sample.make())
    named = dict(inspect.signature(getattr(ops, sample.op_name)).bind(*args, **kwargs).arguments)
    if sample.op_name == "npu_moe_init_routing_v2" and not named.get("active_expert_range"):
        # torch_npu keeps the range of the first call without one for all later ones
        named["active_expert_range"] = [0, named["expert_num"]]
    return named


def refusal(sample: Sample, named: dict[str, Any]) -> str | None:
    if sample.op_name == "npu_moe_gating_top_k_backward" and named.get("norm_type", 0) != 1:
        return ONLY_SIGMOID
    return REFUSED.get(sample.name)


@over(SAMPLES)
def test_computes_the_same_as_our_operator(sample: Sample) -> None:
    import torch_npu

    function = getattr(torch_npu, sample.op_name)
    named = arguments(sample)
    message = refusal(sample, named)
    if message is not None:
        with pytest.raises((RuntimeError, NotImplementedError), match=re.escape(message)):
            function(**named)
        return
    results, expected = tree_leaves(function(**named)), call(sample, sample.make())
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if index in UNWRITTEN.get(sample.name, ()):
            assert result is None or result.shape == wanted.shape
        elif wanted is None:
            # a gradient without its tensor comes as one number without meaning
            assert result is None or result.dim() == 0
        else:
            assert_same([result], [wanted])


@pytest.mark.parametrize("name", [*REFUSED, *UNWRITTEN])
def test_the_tables_name_samples(name: str) -> None:
    assert name in {sample.name for sample in SAMPLES}


def test_a_range_that_is_left_out_is_all_experts() -> None:
    import torch_npu

    x, expert_idx = torch.randn(3, 4), torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32)
    options = {"expert_num": 3, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    given = {**options, "active_expert_range": [0, 3]}
    results = torch_npu.npu_moe_init_routing_v2(x.npu(), expert_idx.npu(), **given)
    assert_same(list(results), list(ops.npu_moe_init_routing_v2(x, expert_idx, **options)))
