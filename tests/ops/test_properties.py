"""Random legal calls equal the reference; random illegal ones are refused, never by an error from inside a kernel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moe_npu import ops
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.ops.samples import ROWS, Sample, contiguous, int64, matmul_inputs, sliced, transposed
from tests.ops.test_battery import assert_equals_reference

repeatable = settings(
    derandomize=True, max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

SCENARIOS = ("sss", "sms", "mms", "mmm", "k-split", "ints-sms", "ints-smm", "ints-mms", "ints-mmm")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64)

counts_of = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@st.composite
def matmul_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `matmul_inputs` for a legal call."""
    row_name = draw(st.sampled_from(list(ROWS)))
    row = ROWS[row_name]
    scenario = draw(st.sampled_from(SCENARIOS))
    if row.per_token_scale:
        scenario = draw(st.sampled_from(("sss", "sms")))
    elif row.weight != "float":
        scenario = draw(st.sampled_from([name for name in SCENARIOS if name != "k-split"]))
    is_ints = scenario.startswith("ints-")
    call: dict[str, Any] = {"scenario": scenario, "row": row_name, "counts": draw(counts_of)}
    call |= {"k": draw(st.integers(1, 12)), "n": draw(st.integers(1, 12)), "bias": draw(st.booleans())}
    if row.weight == "int4":
        call["layout"] = draw(st.sampled_from((contiguous, transposed)))
        # words along K: at least two, or one per row and several columns, since [1, 1] does not tell along which axis
        call |= {"k": 16} if call["layout"] is transposed else {"n": draw(st.sampled_from((8, 16)))}
        lengths = [n for n in range(1, call["k"] + 1) if call["k"] % n == 0 and (n % 2 == 0 or call["k"] != 16)]
        call["group_length"] = draw(st.sampled_from((0, *lengths)))
    elif scenario != "k-split":
        call["layout"] = draw(st.sampled_from((contiguous, transposed, sliced)))
    if scenario == "k-split":
        call["bias"] = False
    if row.bias == torch.bfloat16:
        call["counts"].append(1)  # an empty per-token scale counts as none, which this bias needs
    if scenario in ("sss", "sms") and draw(st.booleans()):
        call["rows"] = sum(call["counts"]) + draw(st.integers(0, 3))
    if not is_ints and scenario not in ("mmm", "k-split"):
        call["group_list_type"] = draw(st.sampled_from((0, 1)))
    if not is_ints and row.scale is not None and row.output_dtype not in (None, torch.int32):
        call["act_type"] = draw(st.sampled_from((0, 1, 2, 4, 5, None)))
    if scenario in ("mmm", "ints-mmm", "ints-smm"):
        call["split_item"] = draw(st.sampled_from((0, 1, None)))
    else:
        call["split_item"] = draw(st.sampled_from((2, 3)))
    return call


def as_sample(inputs: Any) -> Sample:
    return Sample("npu_grouped_matmul", "drawn", lambda: inputs, reduction=24)


@repeatable
@given(call=matmul_calls())
def test_legal_matmuls_equal_the_reference(call: dict[str, Any]) -> None:
    assert_equals_reference(as_sample(matmul_inputs(**call)))


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
        return draw(st.sampled_from((None, 1, "tensor", [tensor])))
    if tensor.dim() == 0:
        return tensor
    if kind == "transposed":
        return tensor.transpose(0, -1)
    dim = draw(st.integers(0, tensor.dim() - 1))
    if kind == "longer":
        return torch.cat([tensor, tensor[(slice(None),) * dim + (slice(0, 1),)]], dim)
    return tensor.narrow(dim, 0, 0 if kind == "empty" else max(tensor.size(dim) - 1, 0))


def _broken_value(draw: st.DrawFn, name: str, value: Any) -> Any:
    if name in ("split_item", "group_type", "group_list_type", "act_type"):
        return draw(st.sampled_from((None, -2, -1, 0, 1, 2, 3, 4, 5, 6)))
    if name == "output_dtype":
        return draw(st.sampled_from((None, *DTYPES, 1, 3, 5, 15, 99)))
    if name == "group_list":
        entries = draw(st.lists(st.integers(-1, 9), max_size=4))
        return draw(st.sampled_from((None, entries, int64(entries), int64(entries).int(), int64([entries]), 3, "1")))
    if not isinstance(value, list) or not value:
        return draw(st.sampled_from((None, [], (), 1, torch.zeros(2), torch.zeros(()), [torch.zeros(0)])))
    kind = draw(st.sampled_from(("none", "drop", "repeat", "tuple", "tensor", "one", "one")))
    if kind == "one":
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _broken_tensor(draw, value[index]), *value[index + 1 :]]
    return {"none": None, "drop": value[1:], "repeat": [*value, value[-1]], "tuple": tuple(value), "tensor": value[0]}[
        kind
    ]


@settings(repeatable, max_examples=400)
@given(call=matmul_calls(), data=st.data())
def test_changed_matmuls_are_refused_or_right(call: dict[str, Any], data: st.DataObject) -> None:
    args, kwargs = matmul_inputs(**call)
    signature = inspect.signature(ops.npu_grouped_matmul)
    named = dict(signature.bind(*args, **kwargs).arguments)
    names = [name for name in signature.parameters if not name.endswith("_dtype") or name == "output_dtype"]
    draw = data.draw
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        if name == "tuning_config":
            named[name] = draw(st.sampled_from(([], [1], [-1], None)))
        else:
            named[name] = _broken_value(draw, name, named.get(name))
    bound = signature.bind(**named)
    try:
        ops.npu_grouped_matmul(*bound.args, **bound.kwargs)
    except ops.OperatorError:
        return
    assert_equals_reference(as_sample((bound.args, bound.kwargs)))


@repeatable
@given(call=matmul_calls().filter(lambda call: call["scenario"] in ("sss", "sms")))
def test_counts_and_cumulative_sums_are_the_same(call: dict[str, Any]) -> None:
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
def test_dynamic_quantisation_reconstructs_within_half_a_step(shape: list[int], mode: str, exponent: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2.0**exponent).half()
    y, scale = ops.npu_dynamic_quant(values, quant_mode=mode)
    steps = {"pertoken": scale.unsqueeze(-1), "perchannel": scale.unsqueeze(-2), "pertensor": scale}[mode]
    assert all(leaf.is_contiguous() for leaf in tree_leaves((y, scale)))
    assert ((y * steps - values.float()).abs() <= 0.5001 * steps).all()
