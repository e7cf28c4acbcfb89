"""Dispatch and combine on two, three and four ranks: worked examples, random calls, lanes, gradients, disagreement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import jobs
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.helpers.gloo import Pool
from tests.helpers.reference import distribute
from tests.helpers.reference.common import Codes, Float

pytestmark = pytest.mark.distributed

BF16, F64, I32 = torch.bfloat16, torch.float64, torch.int32
GROUPS = {2: "pair", 3: "three", 4: "all"}
Options = dict[str, Any]


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=BF16).view(-1, 1)


def ids(*values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=I32)


def dispatch(pool: Pool, version: int, calls: list[Options]) -> list[Any]:
    operator = "npu_moe_distribute_dispatch" + ("_v2" if version == 2 else "")
    return pool.run(jobs.call, [(operator, GROUPS[len(calls)], len(calls), call) for call in calls])


def equal(results: list[Any], expected: list[Any]) -> None:
    for actual, wanted in zip(results, expected, strict=True):
        assert not isinstance(actual, str), actual
        for result, reference in zip(actual, wanted, strict=True):
            if isinstance(reference, Codes):
                assert ((result.double() - reference.values).abs() < 0.5001).all()
            elif isinstance(reference, Float):
                assert_close(result, reference.values)
            else:
                assert_bits_equal(result, reference)


# --- the worked examples ---------------------------------------------------------------------------------------------

EXAMPLE = [
    {"x": rows(1, 2), "expert_ids": ids([0, 2], [3, 0]), "moe_expert_num": 4},
    {"x": rows(3, 4), "expert_ids": ids([2, 3], [0, 1]), "moe_expert_num": 4},
]
WEIGHTS = [torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[1.0, 2.0], [0.1, 0.9]])]
PAIR_MASKS = [torch.tensor([[True, True], [True, True]]), torch.tensor([[True, False], [True, True]])]


def triples(*values: tuple[int, int, int]) -> list[int]:
    return [number for triple in values for number in triple]


class TestExample:
    def test_rows_counts_and_triples(self, pool: Pool) -> None:
        first, second = dispatch(pool, 2, EXAMPLE)
        assert first[0].shape == (8, 1)
        assert first[0].flatten().tolist() == [1, 2, 4, 4, 0, 0, 0, 0]
        assert second[0].flatten()[:4].tolist() == [1, 3, 2, 3]
        assert first[2].shape == (1024,)
        assert first[2][:12].tolist() == triples((0, 0, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1))
        assert second[2][:12].tolist() == triples((0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1))
        assert (first[3].tolist(), second[3].tolist()) == ([3, 1], [2, 2])
        assert (first[4].tolist(), second[4].tolist()) == ([2, 3, 3, 4], [1, 2, 3, 4])
        assert first[5].shape == (0,)

    def test_first_version(self, pool: Pool) -> None:
        first, second = dispatch(pool, 1, [{**call, "expert_token_nums_type": 0} for call in EXAMPLE])
        assert (first[2].tolist(), second[2].tolist()) == ([0, 0, 0, 1], [0, 0, 0, 0])
        assert (first[3].tolist(), second[3].tolist()) == ([3, 4], [2, 4])
        assert first[0].flatten()[:4].tolist() == [1, 2, 4, 4]

    def test_mask_of_pairs(self, pool: Pool) -> None:
        masked = [{**call, "x_active_mask": mask} for call, mask in zip(EXAMPLE, PAIR_MASKS, strict=True)]
        first, second = dispatch(pool, 2, masked)
        assert second[0].flatten().tolist() == [1, 3, 2, 0, 0, 0, 0, 0]
        assert second[3].tolist() == [2, 1]
        assert second[4].tolist() == [1, 2, 3, 3]
        assert first[0].flatten()[:4].tolist() == [1, 2, 4, 4]

    @pytest.mark.parametrize("version", [1, 2])
    def test_combine(self, pool: Pool, version: int) -> None:
        wide = [{**call, "x": call["x"].float()} for call in EXAMPLE]
        args = [(version, "pair", 2, call, weights) for call, weights in zip(wide, WEIGHTS, strict=True)]
        first, second = pool.run(jobs.round_trip, args)
        torch.testing.assert_close(first.flatten(), torch.tensor([2.0, 3.5]))
        torch.testing.assert_close(second.flatten(), torch.tensor([33.0, 7.6]))

    def test_combine_with_a_mask(self, pool: Pool) -> None:
        args = [
            (2, "pair", 2, {**call, "x": call["x"].float(), "x_active_mask": mask}, weights)
            for call, mask, weights in zip(EXAMPLE, PAIR_MASKS, WEIGHTS, strict=True)
        ]
        _, second = pool.run(jobs.round_trip, args)
        torch.testing.assert_close(second.flatten(), torch.tensor([9.0, 7.6]))

    def test_a_rank_for_the_shared_expert(self, pool: Pool) -> None:
        third = {"x": rows(5, 6), "expert_ids": ids([1, 0], [3, 2]), "moe_expert_num": 4}
        calls = [{**call, "shared_expert_rank_num": 1} for call in [*EXAMPLE, third]]
        zero, one, two = dispatch(pool, 2, calls)
        assert zero[0].flatten().tolist() == [1, 2, 3, 4, 5, 6]
        assert zero[2][:18].tolist() == triples(*[(rank, token, 2) for rank in range(3) for token in range(2)])
        assert (zero[3].tolist(), zero[4].tolist()) == ([6], [2, 4, 6])
        assert one[0].flatten()[:6].tolist() == [1, 2, 4, 5, 4, 5]
        expected = triples((0, 0, 0), (0, 1, 1), (1, 1, 0), (2, 0, 1), (1, 1, 1), (2, 0, 0))
        assert one[2][:18].tolist() == expected
        assert (one[3].tolist(), one[4].tolist()) == ([4, 2], [2, 3, 4, 4, 5, 6])
        assert two[0].flatten()[:6].tolist() == [1, 3, 6, 2, 3, 6]
        expected = triples((0, 0, 1), (1, 0, 0), (2, 1, 1), (0, 1, 0), (1, 0, 1), (2, 1, 0))
        assert two[2][:18].tolist() == expected
        assert (two[3].tolist(), two[4].tolist()) == ([3, 3], [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("version", "world", "options", "rank", "shapes"),
    [
        (1, 4, {}, 0, {0: (64, 5), 2: (24,), 4: (8,)}),
        (1, 4, {"shared_expert_rank_num": 1, "moe_expert_num": 6}, 0, {0: (32, 5), 3: (1,), 4: (4,)}),
        (1, 4, {"shared_expert_rank_num": 1, "moe_expert_num": 6}, 1, {0: (64, 5)}),
        (2, 4, {"shared_expert_rank_num": 2}, 0, {0: (16, 5), 2: (2048,)}),
    ],
)
def test_shapes(pool: Pool, version: int, world: int, options: Options, rank: int, shapes: dict[int, Any]) -> None:
    call = {"x": torch.zeros(8, 5), "expert_ids": ids(*[[0, 1, 2]] * 8), "moe_expert_num": 8, **options}
    results = dispatch(pool, version, [call] * world)[rank]
    assert not isinstance(results, str), results
    assert {index: tuple(results[index].shape) for index in shapes} == shapes


# --- against the reference -------------------------------------------------------------------------------------------

SPECIAL = {"zero_expert_num": 1, "copy_expert_num": 1, "const_expert_num": 2}
CASES: dict[str, tuple[int, list[int], int, int, Options]] = {
    # ranks, tokens of each, K, H, attributes
    "two-ranks": (2, [3, 3], 2, 4, {"moe_expert_num": 4}),
    "uneven": (2, [4, 1], 2, 3, {"moe_expert_num": 6, "global_bs": 8}),
    "a-rank-without-tokens": (4, [3, 0, 2, 1], 3, 2, {"moe_expert_num": 4, "global_bs": 12}),
    "one-expert-per-rank": (4, [2] * 4, 2, 2, {"moe_expert_num": 4}),
    "all-experts": (2, [2] * 2, 4, 2, {"moe_expert_num": 4, "expert_token_nums_type": 0}),
    "shared": (4, [3] * 4, 2, 3, {"moe_expert_num": 6, "shared_expert_rank_num": 1}),
    "replicated-shared": (4, [2] * 4, 2, 3, {"moe_expert_num": 4, "shared_expert_rank_num": 2}),
    "two-shared": (4, [2] * 4, 3, 3, {"moe_expert_num": 4, "shared_expert_num": 2, "shared_expert_rank_num": 2}),
    "special": (2, [3] * 2, 3, 3, {"moe_expert_num": 2, **SPECIAL}),
    "weights-travel": (2, [2] * 2, 2, 3, {"moe_expert_num": 4, "expert_scales": True}),
    "int8": (2, [3] * 2, 2, 8, {"moe_expert_num": 4, "quant_mode": 2}),
    "int8-smoothed": (2, [3] * 2, 2, 8, {"moe_expert_num": 4, "quant_mode": 2, "scales": 4}),
    "int8-shared": (4, [2] * 4, 2, 8, {"moe_expert_num": 6, "shared_expert_rank_num": 1, "quant_mode": 2, "scales": 7}),
}  # fmt: skip
MASKED = {
    "prefix": (2, [3] * 2, 2, 3, {"moe_expert_num": 4, "x_active_mask": "tokens"}),
    "pairs": (4, [3] * 4, 2, 3, {"moe_expert_num": 6, "shared_expert_rank_num": 1, "x_active_mask": "pairs"}),
    "special-pairs": (2, [4] * 2, 3, 3, {**CASES["special"][4], "x_active_mask": "pairs"}),
}


def make_calls(
    world: int, tokens: list[int], top_k: int, columns: int, attributes: Options, dtype: torch.dtype = BF16
) -> list[Options]:
    generator = torch.Generator().manual_seed(world + columns)
    special = sum(attributes.get(f"{kind}_expert_num", 0) for kind in ("zero", "copy", "const"))
    calls = []
    for rank, num_tokens in enumerate(tokens):
        call = {**attributes, "x": torch.randn(num_tokens, columns, generator=generator).to(dtype)}
        experts = attributes["moe_expert_num"] + special
        chosen = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(num_tokens)]
        call["expert_ids"] = (torch.stack(chosen) if chosen else torch.zeros(0, top_k)).to(I32)
        if attributes.get("expert_scales"):
            call["expert_scales"] = torch.rand(num_tokens, top_k, generator=generator)
        if attributes.get("scales"):
            smooth = torch.Generator().manual_seed(0)
            call["scales"] = torch.rand(attributes["scales"], columns, generator=smooth) + 0.5
        if attributes.get("x_active_mask") == "tokens":
            call["x_active_mask"] = torch.arange(num_tokens) < num_tokens - 1 - rank
        elif attributes.get("x_active_mask"):
            call["x_active_mask"] = torch.rand(num_tokens, top_k, generator=generator) < 0.6
            call["x_active_mask"][rank % num_tokens] = False
        calls.append(call)
    return calls


@pytest.mark.parametrize("name", [*CASES, *MASKED])
def test_dispatch_equals_the_reference(pool: Pool, name: str) -> None:
    calls = make_calls(*{**CASES, **MASKED}[name])
    versions = (2,) if name in MASKED or name in ("special", "two-shared") else (1, 2)
    for version in versions:
        results, expected = dispatch(pool, version, calls), distribute.dispatch(version, calls)
        equal(results, expected)
        # every active pair arrives once
        pairs = sum(len(row) for row in distribute.received(calls))
        nums = [result[3] for result in results]
        if calls[0].get("expert_token_nums_type", 1) == 1:
            assert sum(int(counts.sum()) for counts in nums) == pairs


def test_room_of_the_first_version_for_two_shared_experts(pool: Pool) -> None:
    for words in dispatch(pool, 1, make_calls(*CASES["two-shared"])):
        assert "rank 0 would receive 8 rows but has room for 4" in words


def combine_calls(case: tuple[int, list[int], int, int, Options], version: int) -> tuple[list[Options], list[Options]]:
    """Arguments of combine for random rows, NaN where nothing was received; and those that the reference takes."""
    calls = make_calls(*case)
    generator = torch.Generator().manual_seed(5)
    arguments = []
    for call, result in zip(calls, distribute.dispatch(version, calls), strict=True):
        handle, counts = result[2], result[4]
        expand_x = torch.randn(result[0].shape, generator=generator).to(BF16)
        expand_x[int(counts[-1]) :] = float("nan")
        num_tokens, top_k = call["expert_ids"].shape
        options = {name: value for name, value in call.items() if name not in ("x", "expert_token_nums_type")}
        options |= {"expand_x": expand_x, "ep_send_counts": counts}
        options["expert_scales"] = torch.rand(num_tokens, top_k, generator=generator)
        options["expand_idx" if version == 1 else "assist_info_for_combine"] = handle
        if call.get("const_expert_num"):
            options["ori_x"] = call["x"]
            for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
                options[name] = torch.randn(call["const_expert_num"], expand_x.size(1), generator=generator).to(BF16)
        if not call.get("shared_expert_rank_num"):
            options["shared_expert_x"] = torch.randn(num_tokens, expand_x.size(1), generator=generator).to(BF16)
        arguments.append(options)
    return arguments, [{**options} for options in arguments]


PLAIN = [name for name in CASES if not name.startswith(("int8", "weights"))]


@pytest.mark.parametrize("name", [*PLAIN, *MASKED])
def test_combine_equals_the_reference(pool: Pool, name: str) -> None:
    case = {**CASES, **MASKED}[name]
    for version in (2,) if name in MASKED or name in ("special", "two-shared") else (1, 2):
        arguments, calls = combine_calls(case, version)
        operator = "npu_moe_distribute_combine" + ("_v2" if version == 2 else "")
        results = pool.run(jobs.call, [(operator, GROUPS[case[0]], case[0], options) for options in arguments])
        for result, expected in zip(results, distribute.combine(calls), strict=True):
            assert not isinstance(result, str), result
            assert_close(result, expected, reduction=5)


def test_combine_add_rms_norm_equals_the_reference(pool: Pool) -> None:
    case = MASKED["special-pairs"]
    arguments, calls = combine_calls(case, 2)
    generator = torch.Generator().manual_seed(6)
    norms = []
    for options in arguments:
        options["expand_idx"] = options.pop("assist_info_for_combine")
        tokens, columns = options["ori_x"].shape
        norms.append({"residual_x": torch.randn(tokens, 1, columns, generator=generator).to(BF16)})
        norms[-1]["gamma"] = torch.rand(columns, generator=generator).to(BF16)
        options |= norms[-1]
    operator = "npu_moe_distribute_combine_add_rms_norm"
    results = pool.run(jobs.call, [(operator, "pair", 2, options) for options in arguments])
    for result, combined, norm in zip(results, distribute.combine(calls), norms, strict=True):
        expected = distribute.add_rms_norm(combined, BF16, **norm, norm_eps=1e-6)
        for part, wanted in zip(result, expected, strict=True):
            assert_close(part, wanted.values, reduction=8)


# --- invariants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["uneven", "a-rank-without-tokens", "one-expert-per-rank"])
def test_both_ways_agree_with_plain_all_to_all(pool: Pool, name: str, version: int) -> None:
    world, *_, attributes = CASES[name]
    calls = make_calls(*CASES[name], dtype=torch.float16)
    for call in calls:
        call["x"] = (4 * call["x"]).round()  # times the number of an expert it is exact
    weights = [torch.rand(call["expert_ids"].shape) for call in calls]
    group = GROUPS[world]
    fused = pool.run(jobs.round_trip, [(version, group, world, *pair) for pair in zip(calls, weights, strict=True)])
    experts = attributes["moe_expert_num"]
    plain = pool.run(
        jobs.by_all_to_all,
        [(group, world, call["x"], call["expert_ids"], experts, w) for call, w in zip(calls, weights, strict=True)],
    )
    for actual, expected, call, w in zip(fused, plain, calls, weights, strict=True):
        assert_bits_equal(actual, expected)
        factors = ((call["expert_ids"] + 1) * w.double()).sum(1, keepdim=True)
        assert_close(actual, call["x"].double() * factors, reduction=w.size(1))


# --- two lanes -------------------------------------------------------------------------------------------------------


class TestLanes:
    """Ranks 0 and 1 are lane 0, ranks 2 and 3 lane 1; partners are 0 and 2, 1 and 3."""

    calls = make_calls(4, [2] * 4, 2, 3, {"moe_expert_num": 4})

    def lanes(self, results: list[Any]) -> list[list[Any]]:
        return [results[:2], results[2:]]

    @pytest.mark.parametrize("version", [1, 2])
    def test_rows_of_the_own_lane_come_first(self, pool: Pool, version: int) -> None:
        operator = "npu_moe_distribute_dispatch" + ("_v2" if version == 2 else "")
        results = pool.run(jobs.call_in_lanes, [(operator, call) for call in self.calls])
        single = [result for lane in self.lanes(self.calls) for result in distribute.dispatch(version, lane)]
        for rank, result in enumerate(results):
            own, other = single[rank], single[(rank + 2) % 4]
            num_own, num_other = int(own[4][-1]), int(other[4][-1])
            room = own[0].size(0)
            assert result[0].shape == (2 * room, 3)
            assert_bits_equal(result[0][:num_own], own[0][:num_own])
            assert_bits_equal(result[0][num_own : num_own + num_other], other[0][:num_other])
            assert not result[0][num_own + num_other :].any()
            assert result[1].shape == (2 * room,)
            for index in (2, 3, 6):
                assert_bits_equal(result[index], own[index])
            assert result[4].shape == (8,)
            assert_bits_equal(result[4][:4], own[4])
            assert result[5].tolist() == ([num_own, num_other] if rank < 2 else [num_other, num_own])

    def test_int8_rows_and_their_scales(self, pool: Pool) -> None:
        calls = [{**call, "quant_mode": 2} for call in self.calls]
        results = pool.run(jobs.call_in_lanes, [("npu_moe_distribute_dispatch_v2", call) for call in calls])
        single = pool.run(jobs.call, [("npu_moe_distribute_dispatch_v2", "pair", 2, call) for call in calls[:2]])
        for rank in (0, 1):
            num_own, num_other = (int(results[index][4][3]) for index in (rank, rank + 2))
            for index in (0, 1):
                assert_bits_equal(results[rank][index][:num_own], single[rank][index][:num_own])
                other = results[rank + 2][index]
                assert_bits_equal(results[rank][index][num_own : num_own + num_other], other[:num_other])

    @pytest.mark.parametrize("version", [1, 2])
    def test_combine_adds_what_partners_have(self, pool: Pool, version: int) -> None:
        suffix = "_v2" if version == 2 else ""
        dispatched = pool.run(
            jobs.call_in_lanes, [("npu_moe_distribute_dispatch" + suffix, call) for call in self.calls]
        )
        generator = torch.Generator().manual_seed(0)
        arguments, summed = [], []
        for call, result in zip(self.calls, dispatched, strict=True):
            arguments.append(
                {
                    "expand_x": torch.randn(result[0].shape, generator=generator).to(BF16),
                    "expert_ids": call["expert_ids"],
                    "expand_idx" if version == 1 else "assist_info_for_combine": result[2],
                    "ep_send_counts": result[4][:4],
                    "expert_scales": torch.rand(2, 2, generator=generator),
                    "tp_send_counts": result[5],
                    "moe_expert_num": 4,
                }
            )
        totals = [int(result[4][3]) for result in dispatched]
        for rank, options in enumerate(arguments):
            partner = (rank + 2) % 4
            theirs = arguments[partner]["expand_x"][totals[partner] : totals[partner] + totals[rank]]
            summed.append({**options, "expand_x": options["expand_x"][: totals[rank]] + theirs})
        results = pool.run(
            jobs.call_in_lanes, [("npu_moe_distribute_combine" + suffix, options) for options in arguments]
        )
        expected = [value for lane in self.lanes(summed) for value in distribute.combine(lane)]
        for actual, wanted in zip(results, expected, strict=True):
            assert not isinstance(actual, str), actual
            assert_close(actual, wanted, reduction=2)

    def test_everybody_learns_of_one_bad_argument(self, pool: Pool) -> None:
        calls = [{**call} for call in self.calls]
        calls[3] = {**calls[3], "expert_ids": calls[3]["expert_ids"] + 4}
        words = pool.run(jobs.call_in_lanes, [("npu_moe_distribute_dispatch_v2", call) for call in calls])
        assert "expert_ids must be 0 to 3" in words[3]
        assert all("refused its arguments" in text for text in words[:3])

    def test_lanes_of_different_length_need_global_bs(self, pool: Pool) -> None:
        calls = [
            {**call, **({"x": call["x"][:1], "expert_ids": call["expert_ids"][:1]} if rank > 1 else {})}
            for rank, call in enumerate(self.calls)
        ]
        words = pool.run(jobs.call_in_lanes, [("npu_moe_distribute_dispatch_v2", call) for call in calls])
        assert all("number of tokens, with global_bs 0" in message for message in words)

    def test_lanes_of_different_shape(self, pool: Pool) -> None:
        calls = [{**call, "x": call["x"][:, : 3 - rank // 2].contiguous()} for rank, call in enumerate(self.calls)]
        words = pool.run(jobs.call_in_lanes, [("npu_moe_distribute_dispatch_v2", call) for call in calls])
        assert all("must have the same columns of x" in text or "refused its arguments" in text for text in words)


# --- gradients -------------------------------------------------------------------------------------------------------


def reference_gradients(
    version: int, calls: list[Options], weights: list[Tensor], experts: list[Tensor], extra: list[Options]
) -> list[list[Tensor]]:
    """What `jobs.layer_gradients` computes, in one process."""
    leaves = []
    for call, weight, expert, more in zip(calls, weights, experts, extra, strict=True):
        leaves.append([tensor.clone().requires_grad_() for tensor in (call["x"], weight, expert, *more.values())])
    calls = [{**call, "x": leaf[0]} for call, leaf in zip(calls, leaves, strict=True)]
    combined = []
    shared = calls[0].get("shared_expert_rank_num", 0)
    for rank, (call, result) in enumerate(zip(calls, distribute.dispatch(version, calls), strict=True)):
        rows, nums = result[0], result[3].tolist()
        if rank >= shared:
            parts = rows[: sum(nums)].split(nums)
            products = [part @ leaves[rank][2][index] for index, part in enumerate(parts)]
            results = torch.cat([*products, rows.new_zeros(rows.size(0) - sum(nums), rows.size(1))])
        else:
            results = rows.square()
        more = dict(zip(extra[rank], leaves[rank][3:], strict=True))
        combined.append({**call, "expand_x": results, "expert_scales": leaves[rank][1], **more})
    outputs = distribute.combine(combined)
    loss = sum((y.square() * torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)).sum() for y in outputs)
    flat = [leaf for group in leaves for leaf in group]
    grads = torch.autograd.grad(loss, flat, create_graph=True, allow_unused=True, materialize_grads=True)
    again = sum(grad.square().sum() for grad in grads)
    second = torch.autograd.grad(again, flat, allow_unused=True, materialize_grads=True)
    size = len(leaves[0])
    return [
        [outputs[rank], *grads[rank * size : (rank + 1) * size], *second[rank * size : (rank + 1) * size]]
        for rank in range(len(calls))
    ]


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("two-ranks", 1),
        ("two-ranks", 2),
        ("a-rank-without-tokens", 2),
        ("shared", 1),
        ("replicated-shared", 2),
        ("two-shared", 2),
        ("special", 2),
        ("pairs", 2),
        ("special-pairs", 2),
    ],
)
def test_gradients_equal_those_of_one_process(pool: Pool, name: str, version: int) -> None:
    case = {**CASES, **MASKED}[name]
    world, _, top_k, columns, attributes = case
    calls = make_calls(*case, dtype=F64)
    shared = attributes.get("shared_expert_rank_num", 0)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    weights = [normal(call["x"].size(0), top_k) for call in calls]
    experts = [normal(attributes["moe_expert_num"] // (world - shared), columns, columns) for _ in calls]
    extra: list[Options] = [{} for _ in calls]
    for call, more in zip(calls, extra, strict=True):
        if not shared:
            more["shared_expert_x"] = normal(*call["x"].shape)
        if attributes.get("const_expert_num"):
            more["ori_x"] = normal(*call["x"].shape)
            for table in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
                more[table] = normal(attributes["const_expert_num"], columns)
    everything = zip(calls, weights, experts, extra, strict=True)
    results = pool.run(jobs.layer_gradients, [(version, GROUPS[world], world, *rest) for rest in everything])
    expected = reference_gradients(version, calls, weights, experts, extra)
    for actual, wanted in zip(results, expected, strict=True):
        for result, reference in zip(actual, wanted, strict=True):
            torch.testing.assert_close(result, reference)


# --- ranks that disagree ---------------------------------------------------------------------------------------------


def plain(**changes: Any) -> Options:
    return {"x": torch.zeros(2, 3), "expert_ids": ids([0, 1], [2, 3]), "moe_expert_num": 4, **changes}


DISAGREEMENTS = {
    "tokens": (
        plain(x=torch.zeros(1, 3), expert_ids=ids([0, 1])),
        "global_bs must not be 0 where ranks have",
    ),
    "columns": (plain(x=torch.zeros(2, 4)), "all ranks must have the same columns of x"),
    "dtype": (plain(x=torch.zeros(2, 3, dtype=BF16)), "the same dtype, but in the order of their ranks they have"),
    "top-k": (plain(expert_ids=ids([0], [1])), "all ranks must have the same columns of expert_ids"),
    "experts": (plain(moe_expert_num=6), "all ranks must have the same moe_expert_num"),
    "quantized": (plain(quant_mode=2), "all ranks must have the same quant_mode"),
    "global-bs": (plain(global_bs=4), "all ranks must have the same global_bs"),
    "special": (plain(zero_expert_num=1), "all ranks must have the same number of zero, copy and constant experts"),
    "weights": (plain(expert_scales=torch.ones(2, 2)), "all ranks must have the same use of expert_scales"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_disagreement_is_an_error_on_all_ranks(pool: Pool, name: str) -> None:
    other, message = DISAGREEMENTS[name]
    for words in dispatch(pool, 2, [plain(), other]):
        assert isinstance(words, str)
        assert message in words


def test_one_bad_argument_is_an_error_on_all_ranks(pool: Pool) -> None:
    words = dispatch(pool, 2, [plain(), plain(expert_ids=ids([0, 1], [2, 9])), plain(), plain()])
    assert "expert_ids must be 0 to 3, but are 0 to 9" in words[1]
    assert all("rank 1 refused its arguments" in words[rank] for rank in (0, 2, 3))


def test_repeated_ids_that_do_not_fit_are_an_error_on_all_ranks(pool: Pool) -> None:
    calls = [plain(moe_expert_num=2, expert_ids=ids([0, 0], [0, 0])) for _ in range(2)]
    for words in dispatch(pool, 2, calls):
        assert "rank 0 would receive 8 rows but has room for 4" in words


def test_counts_of_another_dispatch_are_an_error_on_all_ranks(pool: Pool) -> None:
    arguments, _ = combine_calls(CASES["two-ranks"], 2)
    arguments[1]["ep_send_counts"] = torch.tensor([0, 0, 0, 1], dtype=I32)
    results = pool.run(jobs.call, [("npu_moe_distribute_combine_v2", "pair", 2, options) for options in arguments])
    for words in results:
        assert "ep_send_counts of rank 1 does not belong to these expert_ids and masks" in words


def test_different_operators_are_an_error_on_all_ranks(pool: Pool) -> None:
    for words in pool.run(jobs.other_operator, [("pair", 2, plain())] * 2):
        assert "calls another operator" in words


def test_wrong_place_in_the_group(pool: Pool) -> None:
    options = {**plain(), "ep_world_size": 2, "ep_rank_id": 0}
    words = pool.run(jobs.call_by_group, [("npu_moe_distribute_dispatch_v2", "pair", "group_ep", options)] * 2)
    assert "ep_rank_id must be the rank in group_ep, which is 1, but is 0" in words[1]
    assert "rank 1 refused its arguments" in words[0]


# --- barrier ---------------------------------------------------------------------------------------------------------


def test_nobody_passes_the_barrier_before_everybody_arrived(pool: Pool) -> None:
    times = pool.run(jobs.late, [("all", 4)] * 4)
    assert min(passed for _, passed in times) >= max(arrived for arrived, _ in times)
