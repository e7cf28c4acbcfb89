"""What every operator passes, from its entries in the table of samples alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from moe_npu import ops
from moe_npu.ops import _numerics
from tests.helpers import reference
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.ops.samples import F64, SAMPLES, Inputs, Sample, relayout

REFERENCES: dict[str, Callable[..., Any]] = {
    "grouped_mm": reference.grouped_mm,
    "grouped_mm_weight_grad": reference.grouped_mm_weight_grad,
    "npu_convert_weight_to_int4pack": reference.pack_int4,
    "npu_dynamic_quant": reference.dynamic_quant,
    "npu_grouped_matmul": reference.grouped_matmul,
    "npu_moe_gating_top_k_softmax": reference.moe_gating_top_k_softmax,
    "npu_moe_token_permute": reference.moe_token_permute,
    "npu_moe_token_unpermute": reference.moe_token_unpermute,
    "npu_swiglu": reference.swiglu,
    "npu_swiglu_backward": reference.swiglu_backward,
}


def over(samples: list[Sample]) -> Any:
    return pytest.mark.parametrize("sample", samples, ids=lambda sample: sample.name)


def call(sample: Sample, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs
    return tree_leaves(getattr(ops, sample.op_name)(*args, **kwargs))


def test_the_table_covers_every_operator() -> None:
    operators = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and name in REFERENCES}
    assert {sample.op_name for sample in SAMPLES} == operators == set(REFERENCES)
    assert len({sample.name for sample in SAMPLES}) == len(SAMPLES)
    assert {sample.op_name for sample in SAMPLES if sample.with_rows} == operators


# --- values ----------------------------------------------------------------------------------------------------------


def assert_equals_reference(sample: Sample) -> None:
    args, kwargs = sample.make()
    results = call(sample, (args, kwargs))
    kwargs = {name: value for name, value in kwargs.items() if name not in ("tuning_config", "restore_shape")}
    if kwargs.get("output_dtype") == 3:
        kwargs["output_dtype"] = torch.int32
    expected = tree_leaves(REFERENCES[sample.op_name](*args, **kwargs))
    assert len(results) == len(expected)
    float_dtype = kwargs.get("output_dtype") or tree_leaves(args)[0].dtype
    if sample.op_name == "npu_dynamic_quant":
        float_dtype = torch.float32
    for result, wanted in zip(results, expected, strict=True):
        if wanted.dtype == F64:
            assert result.dtype == float_dtype
            assert_close(result, wanted, reduction=sample.reduction)
        else:
            assert_bits_equal(result, wanted)
        assert result.is_contiguous()


@over(SAMPLES)
def test_equals_reference(sample: Sample) -> None:
    assert_equals_reference(sample)


@over([sample for sample in SAMPLES if "grouped" in sample.op_name])
def test_equals_reference_on_a_cpu_with_half_precision_instructions(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numerics, "_has_int8_dot_product", lambda: True)
    monkeypatch.setattr(_numerics, "_native_half_rows", lambda: 64)
    assert_equals_reference(sample)


@over(SAMPLES)
def test_leaves_its_inputs_alone(sample: Sample) -> None:
    inputs = sample.make()
    call(sample, inputs)
    for used, fresh in zip(tree_leaves(inputs), tree_leaves(sample.make()), strict=True):
        if isinstance(used, Tensor):
            assert_bits_equal(used, fresh)
