"""Random legal calls equal the reference; random illegal ones are refused, never by an error from inside a kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.ops.samples import DRAWS, SAMPLES
from tests.ops.samples.base import Inputs, Sample, relayout
from tests.ops.samples.grouped_matmul import matmul_calls, matmul_inputs
from tests.ops.test_battery import assert_equals_reference

repeatable = settings(
    derandomize=True, max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# a few examples of each operator by default, many in a nightly run
EXAMPLES = pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.nightly, id="nightly")])


def run(property: Callable[[st.DataObject], None], examples: int) -> None:
    settings(repeatable, max_examples=examples)(given(data=st.data())(property))()


def as_sample(name: str, inputs: Inputs) -> Sample:
    # a copy at each call: the operator may work in place
    return Sample(name, "drawn", lambda: tree_map_only(Tensor, lambda t: relayout(t, t.dtype), inputs), reduction=24)


@EXAMPLES
@pytest.mark.parametrize("name", sorted(DRAWS))
def test_legal_calls_equal_the_reference(name: str, examples: int) -> None:
    def property(data: st.DataObject) -> None:
        assert_equals_reference(as_sample(name, DRAWS[name](data.draw)))

    run(property, examples)


# --- illegal calls ---------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool)


def _broken_tensor(draw: st.DrawFn, tensor: Tensor) -> Any:
    kind = draw(
        st.sampled_from(("dtype", "unsqueeze", "flatten", "longer", "shorter", "empty", "transposed", "object"))
    )
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from(DTYPES)))
    if kind == "unsqueeze":
        return tensor.unsqueeze(draw(st.integers(0, tensor.dim())))
    if kind == "flatten":
        return tensor.flatten()
    if kind == "object":
        return draw(st.sampled_from((None, 1, "tensor", [tensor], tensor.to("meta"))))
    if tensor.dim() == 0:
        return tensor
    if kind == "transposed":
        return tensor.transpose(0, -1)
    dim = draw(st.integers(0, tensor.dim() - 1))
    if kind == "longer":
        return torch.cat([tensor, tensor[(slice(None),) * dim + (slice(0, 1),)]], dim)
    return tensor.narrow(dim, 0, 0 if kind == "empty" else max(tensor.size(dim) - 1, 0))


def _broken_list(draw: st.DrawFn, values: list[Any]) -> Any:
    kind = draw(st.sampled_from(("none", "drop", "repeat", "tuple", "first", "one", "one")))
    if kind == "one" and values:
        index = draw(st.integers(0, len(values) - 1))
        return [*values[:index], _broken(draw, values[index]), *values[index + 1 :]]
    kinds = {"none": None, "drop": values[1:], "repeat": [*values, *values[-1:]], "tuple": tuple(values)}
    return kinds.get(kind, values[0] if values else None)


def _broken(draw: st.DrawFn, value: Any) -> Any:
    """Something else than `value`, often of its kind."""
    if isinstance(value, Tensor):
        return _broken_tensor(draw, value)
    if isinstance(value, (list, tuple)):
        return _broken_list(draw, list(value))
    if isinstance(value, bool):
        return draw(st.sampled_from((not value, None, "yes")))
    if isinstance(value, int):
        return draw(st.sampled_from((None, -2, -1, 0, 1, 2, 3, 4, 5, 6, value + 1, value - 1, 1.5, "1")))
    if isinstance(value, float):
        return draw(st.sampled_from((None, 0.0, -value, value + 1, 2, "1.0")))
    if isinstance(value, str):
        return draw(st.sampled_from((None, "", value + "x", 1)))
    if isinstance(value, torch.dtype):
        return draw(st.sampled_from((None, *DTYPES, torch.quint4x2, 1, 3, 5, 15, 99)))
    # an optional argument that was left out
    return draw(
        st.sampled_from(
            (None, [], (), 1, 0, -1, True, "a", torch.zeros(2), torch.zeros(()), [torch.zeros(0)], torch.float16, [1])
        )
    )


BY_OPERATOR = {name: [sample for sample in SAMPLES if sample.op_name == name] for name in DRAWS}


@EXAMPLES
@pytest.mark.parametrize("name", sorted(DRAWS))
def test_changed_calls_are_refused_or_right(name: str, examples: int) -> None:
    signature = inspect.signature(getattr(ops, name))

    def property(data: st.DataObject) -> None:
        draw = data.draw
        inputs = DRAWS[name](draw) if draw(st.booleans()) else draw(st.sampled_from(BY_OPERATOR[name])).make()
        named = dict(signature.bind(*inputs[0], **inputs[1]).arguments)
        chosen = draw(st.lists(st.sampled_from(list(signature.parameters)), min_size=1, max_size=2, unique=True))
        for argument in chosen:
            default = signature.parameters[argument].default
            named[argument] = _broken(draw, named.get(argument, default))
        bound = signature.bind(**named)
        try:
            results = tree_leaves(getattr(ops, name)(*bound.args, **bound.kwargs))
        except ops.OperatorError:
            return
        if any(isinstance(result, Tensor) and result.is_meta for result in results):
            return  # legal, for tensors that all happen to be without values
        assert_equals_reference(as_sample(name, (bound.args, bound.kwargs)))

    run(property, 3 * examples)


# --- relations between operators -------------------------------------------------------------------------------------


@repeatable
@given(data=st.data())
def test_counts_and_cumulative_sums_are_the_same(data: st.DataObject) -> None:
    # int8 x int4 takes counts only
    legal = matmul_calls().filter(lambda call: call["scenario"] in ("sss", "sms") and "a8w4" not in call["row"])
    call = data.draw(legal)
    (x, weight), options = matmul_inputs(**{**call, "group_list_type": 1})
    (by_counts,) = ops.npu_grouped_matmul(x, weight, **options)
    ends = options["group_list"].cumsum(0)
    (by_ends,) = ops.npu_grouped_matmul(x, weight, **{**options, "group_list": ends, "group_list_type": 0})
    assert_bits_equal(by_ends, by_counts)
    if x[0].is_floating_point() and weight[0].dim() == 3 and weight[0].is_floating_point():
        bias = options.get("bias")
        result = ops.grouped_mm(x[0], weight[0], options["group_list"], bias=None if bias is None else bias[0])
        assert_bits_equal(result, by_counts)


@st.composite
def routings(draw: st.DrawFn) -> Tensor:
    """Expert ids ``[T, K]``."""
    num_tokens, top_k, experts = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(0, experts - 1), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(ids, dtype=draw(st.sampled_from((torch.int32, torch.int64)))).view(num_tokens, top_k)


@repeatable
@given(ids=routings(), keep=st.integers(-30, 30))
def test_permutation_sorts_by_expert_and_goes_back(ids: Tensor, keep: int) -> None:
    num_tokens, top_k = ids.shape
    tokens = torch.randn(num_tokens, 3, generator=torch.Generator().manual_seed(0))
    permuted, sorted_indices = ops.npu_moe_token_permute(tokens, ids)
    pairs = torch.arange(ids.numel())
    assert_bits_equal(sorted_indices.sort().values, pairs.int())
    # in row order the pairs ascend by expert, and within an expert by their own index
    order = torch.empty_like(pairs).index_put_((sorted_indices.long(),), pairs)
    keys = ids.flatten()[order] * max(ids.numel(), 1) + order
    assert (keys.diff() > 0).all()
    assert_bits_equal(permuted, tokens[order // top_k])

    assert_bits_equal(ops.npu_moe_token_unpermute(permuted, sorted_indices), tokens.repeat_interleave(top_k, 0))
    probs = torch.softmax(torch.randn(num_tokens, top_k, generator=torch.Generator().manual_seed(1)), 1)
    assert_close(ops.npu_moe_token_unpermute(permuted, sorted_indices, probs), tokens.double(), reduction=top_k)

    part, same_indices = ops.npu_moe_token_permute(tokens, ids, num_out_tokens=keep)
    assert_bits_equal(same_indices, sorted_indices)
    kept = ids.numel() if keep == 0 else min(keep, ids.numel()) if keep > 0 else max(ids.numel() + keep, 0)
    assert_bits_equal(part, permuted[:kept])
    weights = probs.masked_fill(sorted_indices.view(ids.shape) >= kept, 0)
    whole = ops.npu_moe_token_unpermute(permuted, sorted_indices, weights)
    assert_bits_equal(ops.npu_moe_token_unpermute(part, sorted_indices, probs), whole)


@repeatable
@given(ids=routings(), experts=st.integers(1, 6), dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
def test_gating_chooses_distinct_experts_in_descending_order(ids: Tensor, experts: int, dtype: torch.dtype) -> None:
    logits = torch.randn(ids.size(0), experts, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = min(ids.size(1), experts)
    y, chosen, rows = ops.npu_moe_gating_top_k_softmax(logits, k=k)
    assert (y.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in chosen.tolist())
    flipped, *_ = ops.npu_moe_gating_top_k_softmax(logits.flip(1), k=experts)
    torch.testing.assert_close(flipped[:, :k], y)
    assert_bits_equal(rows.t().flatten(), torch.arange(ids.size(0) * k, dtype=torch.int32))


@repeatable
@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=3),
    mode=st.sampled_from(("pertoken", "perchannel", "pertensor")),
    exponent=st.integers(-20, 4),
)
def test_dynamic_quantization_reconstructs_within_half_a_step(shape: list[int], mode: str, exponent: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2.0**exponent).half()
    y, scale = ops.npu_dynamic_quant(values, quant_mode=mode)
    steps = {"pertoken": scale.unsqueeze(-1), "perchannel": scale.unsqueeze(-2), "pertensor": scale}[mode]
    assert all(leaf.is_contiguous() for leaf in tree_leaves((y, scale)))
    assert ((y * steps - values.float()).abs() <= 0.5001 * steps).all()
