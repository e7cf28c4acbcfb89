"""Our routers against those of transformers: experts, weights, ties, dtypes and gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_npu.layers import routers
from tests.helpers import hf_routers
from tests.helpers.assertions import assert_close
from tests.helpers.hf_router_pairs import Choices, Pair, make_pair
from tests.helpers.hf_routers import CASES, Case, Routed, make_config

T, H, E, K = 24, 16, 12, 3
ALL = [(case, name, variant) for case in CASES for name in case.classes.split() for variant in case.variants]
ONE_OF_EACH = [(case, case.classes.split()[0], variant) for case in CASES for variant in case.variants]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": torch.float32}


def label(value: Any) -> str | None:
    if isinstance(value, Case):
        return ""
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items()) or "default"
    return None


def config_of(case: Case, variant: dict[str, Any]) -> Any:
    top_k = 2 if "phimoe" in case.classes else K
    return make_config(H, E, top_k, **variant)


class Results(NamedTuple):
    theirs: Routed
    ours: routers.RouterOutput
    choices: Choices


def run(case: Case, pair: Pair, x: Tensor, is_autocast: bool = False) -> Results:
    token_ids = torch.arange(len(x)) * 7 % 11
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        with Choices() as choices:
            theirs = case.call(pair.theirs, x.clone(), pair.bias, token_ids)
        return Results(theirs, pair.ours(x, token_ids=token_ids), choices)


def dense(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    return weights.new_zeros(len(ids), num_experts).scatter(1, ids.long(), weights)


def assert_same_choice(case: Case, results: Results) -> Tensor:
    """Returns the tokens for which transformers, too, chose these experts: all but those with ties."""
    theirs, ours, choices = results
    assert ours.topk_ids.dtype == torch.int32
    if not case.has_order:
        assert torch.equal(ours.topk_ids.long(), theirs.ids)
        return torch.ones(len(theirs.ids), dtype=torch.bool)
    decided = ~choices.has_group_tie()
    assert torch.equal(ours.topk_ids[decided].long(), choices.expected_ids()[decided])
    return decided & (ours.topk_ids.long().sort().values == theirs.ids.sort().values).all(-1)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("case", "name", "variant"), ALL, ids=label)
def test_equals_transformers(case: Case, name: str, variant: dict[str, Any], kind: str) -> None:
    config, dtype = config_of(case, variant), DTYPES[kind]
    pair = make_pair(case, name, config, dtype)
    x = torch.randn(T, H, dtype=dtype)
    theirs, ours, _ = results = run(case, pair, x, kind == "autocast")
    same = assert_same_choice(case, results)
    assert same.float().mean() > 0.5

    logits = torch.softmax(ours.router_logits, -1, dtype=torch.float32) if case.is_probability else ours.router_logits
    assert torch.equal(logits.float(), theirs.logits.float())
    assert ours.topk_weights.dtype == theirs.weights.dtype
    assert_close(
        dense(ours.topk_weights, ours.topk_ids, E)[same],
        dense(theirs.weights, theirs.ids, E)[same].double(),
        reduction=K,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        replayed = pair.ours(x, topk_ids=theirs.ids)
    assert_close(replayed.topk_weights, theirs.weights.double(), reduction=K)
    assert torch.equal(replayed.topk_ids.long(), theirs.ids)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "name", "variant"), ONE_OF_EACH, ids=label)
def test_gradients_equal_those_of_transformers(case: Case, name: str, variant: dict[str, Any], kind: str) -> None:
    dtype = DTYPES[kind]
    pair = make_pair(case, name, config_of(case, variant), dtype)
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    theirs, ours, _ = results = run(case, pair, x)
    same = assert_same_choice(case, results)
    grad = torch.randn(T, E) * same[:, None]

    def gradients(weights: Tensor, ids: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
        loss = (dense(weights, ids, E).float() * grad).sum()
        return torch.autograd.grad(loss, [x, *parameters], retain_graph=True)

    expected = gradients(theirs.weights, theirs.ids, [their for their, _ in pair.shared.values()])
    mine = [our for _, our in pair.shared.values()]
    replayed = pair.ours(x, topk_ids=ours.topk_ids)
    for actual in (gradients(ours.topk_weights, ours.topk_ids, mine), gradients(*replayed[1:], mine)):
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b.double(), reduction=T)


@pytest.mark.parametrize(("case", "name", "variant"), ONE_OF_EACH, ids=label)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    num_tokens=st.integers(1, 9),
    hidden_size=st.integers(1, 9),
    group_size=st.integers(2, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_ties=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_equals_transformers_for_any_size_and_for_ties(
    case: Case,
    name: str,
    variant: dict[str, Any],
    num_tokens: int,
    hidden_size: int,
    group_size: int,
    dtype: torch.dtype,
    has_ties: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    num_groups, topk_groups = variant.get("n_group") or 1, variant.get("topk_group") or 1
    num_experts = num_groups * group_size
    top_k = 2 if "phimoe" in case.classes else data.draw(st.integers(1, topk_groups * group_size))
    torch.manual_seed(seed)
    config = make_config(hidden_size, num_experts, top_k, **variant)
    pair = make_pair(case, name, config, dtype, has_ties)
    x = torch.randn(num_tokens, hidden_size).to(dtype)
    if has_ties:
        x = x.round()
    theirs, ours, _ = results = run(case, pair, x)
    same = assert_same_choice(case, results)
    assert ours.topk_weights.dtype == theirs.weights.dtype
    assert_close(
        dense(ours.topk_weights, ours.topk_ids, num_experts)[same],
        dense(theirs.weights, theirs.ids, num_experts)[same].double(),
        reduction=top_k,
    )
    assert_close(pair.ours(x, topk_ids=theirs.ids).topk_weights, theirs.weights.double(), reduction=top_k)


def test_every_router_is_known() -> None:
    covered = [name for case in CASES for name in case.classes.split()]
    assert len(covered) == len(set(covered))
    installed = set(hf_routers.router_classes())
    unknown = installed - set(covered) - set(hf_routers.NOT_COVERED)
    assert not unknown, f"transformers has new routers, give each a Case or a reason in NOT_COVERED: {sorted(unknown)}"
    gone = (set(covered) | set(hf_routers.NOT_COVERED)) - installed
    assert not gone, f"transformers no longer has these routers: {sorted(gone)}"
    print(f"routers of transformers with one of ours that is tested to agree: {len(covered)} / {len(installed)}")
    assert len(covered) == len(installed) - len(hf_routers.NOT_COVERED)
