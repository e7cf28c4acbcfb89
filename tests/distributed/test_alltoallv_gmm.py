"""All-to-all with the grouped matmul on two and four ranks: worked example, random counts, gradients, disagreement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import jobs
from tests.helpers.assertions import assert_bits_equal, assert_close
from tests.helpers.gloo import Pool
from tests.helpers.reference import distribute

pytestmark = pytest.mark.distributed

BF16, F64 = torch.bfloat16, torch.float64
GROUPS = {2: "pair", 4: "all"}
Options = dict[str, Any]


def run(pool: Pool, operator: str, calls: list[Options]) -> list[Any]:
    world = len(calls)
    options = [{**call, "ep_world_size": world} for call in calls]
    return pool.run(jobs.call_by_group, [(operator, GROUPS[world], "hcom", call) for call in options])


def example(dtype: torch.dtype = BF16) -> list[Options]:
    """Two experts on each of two ranks; expert e multiplies by e + 1."""
    values = [torch.arange(4.0), torch.arange(10.0, 14.0)]
    counts = [[1, 2, 0, 1], [2, 0, 1, 1]]
    received = [[1, 2, 2, 0], [0, 1, 1, 1]]
    return [
        {
            "gmm_x": values[rank].view(-1, 1).to(dtype),
            "gmm_weight": torch.tensor([2.0 * rank + 1, 2.0 * rank + 2]).view(2, 1, 1).to(dtype),
            "send_counts": counts[rank],
            "recv_counts": received[rank],
        }
        for rank in range(2)
    ]


def test_example(pool: Pool) -> None:
    calls = [{**call, "permute_out_flag": True} for call in example()]
    (y, beside, rows), (other_y, _, other_rows) = run(pool, "npu_alltoallv_gmm", calls)
    assert rows.flatten().tolist() == [0, 10, 11, 1, 2]
    assert other_rows.flatten().tolist() == [12, 3, 13]
    assert y.flatten().tolist() == [0, 10, 11, 2, 4]
    assert other_y.flatten().tolist() == [36, 12, 52]
    assert beside is None


def test_example_on_its_way_back(pool: Pool) -> None:
    rows = ([0, 10, 11, 1, 2], [12, 3, 13])
    calls = [
        {
            **call,
            "gmm_x": torch.tensor(own, dtype=BF16).view(-1, 1),
            "send_counts": call["recv_counts"],
            "recv_counts": call["send_counts"],
        }
        for call, own in zip(example(), rows, strict=True)
    ]
    (y, _), (other_y, beside) = run(pool, "npu_gmm_alltoallv", calls)
    assert y.flatten().tolist() == [0, 2, 4, 12]
    assert other_y.flatten().tolist() == [10, 11, 36, 52]
    assert beside is None


def random_calls(world: int, experts: int, h: int, n: int, dtype: torch.dtype, *, back: bool = False) -> list[Options]:
    generator = torch.Generator().manual_seed(world * 10 + experts)
    counts = torch.randint(0, 4, (world, world, experts), generator=generator)  # from, to, expert there
    counts[world - 1] = 0
    counts[:, 0, -1] = 0
    calls = []
    for rank in range(world):
        send, receive = counts[rank].flatten().tolist(), counts[:, rank].flatten().tolist()
        if back:
            send, receive = receive, send
        calls.append(
            {
                "gmm_x": torch.randn(sum(send), h, generator=generator, dtype=F64).to(dtype),
                "gmm_weight": torch.randn(experts, h, n, generator=generator, dtype=F64).to(dtype),
                "send_counts": send,
                "recv_counts": receive,
            }
        )
    return calls


@pytest.mark.parametrize(("world", "experts"), [(2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("trans", [False, True])
def test_random_counts_equal_the_reference(pool: Pool, world: int, experts: int, trans: bool) -> None:
    for back in (False, True):
        calls = random_calls(world, experts, 8, 5, BF16, back=back)
        for rank, call in enumerate(calls):
            if trans:
                call |= {"gmm_weight": call["gmm_weight"].mT.contiguous(), "trans_gmm_weight": True}
            if rank:  # the dense product is no business of the others
                call |= {"mm_x": torch.randn(3, 4).to(BF16), "mm_weight": torch.randn(4, 2).to(BF16)}
        if back:
            results, expected = run(pool, "npu_gmm_alltoallv", calls), distribute.gmm_alltoallv_ranks(calls)
        else:
            calls = [{**call, "permute_out_flag": True} for call in calls]
            results, expected = run(pool, "npu_alltoallv_gmm", calls), distribute.alltoallv_gmm_ranks(calls)
        for actual, wanted in zip(results, expected, strict=True):
            assert not isinstance(actual, str), actual
            assert_close(actual[0], wanted[0], reduction=8)
            assert (actual[1] is None) == (wanted[1] is None)
            if wanted[1] is not None:
                assert_close(actual[1], wanted[1], reduction=4)
            if not back:
                assert_bits_equal(actual[2], wanted[2])


@pytest.mark.parametrize(("world", "experts"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("trans", [False, True])
def test_gradients_equal_those_of_one_process(pool: Pool, world: int, experts: int, trans: bool) -> None:
    calls = random_calls(world, experts, 3, 4, F64)
    if trans:
        calls = [{**call, "gmm_weight": call["gmm_weight"].mT.contiguous(), "trans_gmm_weight": True} for call in calls]
    generator = torch.Generator().manual_seed(1)
    shape = (experts, 3, 4) if trans else (experts, 4, 3)
    backs = [{"gmm_weight": torch.randn(shape, generator=generator, dtype=F64), "trans_gmm_weight": trans}] * world
    results = pool.run(
        jobs.exchange_gradients,
        [(GROUPS[world], world, call, back) for call, back in zip(calls, backs, strict=True)],
    )

    leaves: list[Tensor] = []
    there, again = [], []
    for call, back in zip(calls, backs, strict=True):
        own = [tensor.clone().requires_grad_() for tensor in (call["gmm_x"], call["gmm_weight"], back["gmm_weight"])]
        leaves += own
        there.append({**call, "gmm_x": own[0], "gmm_weight": own[1], "permute_out_flag": True})
        again.append(
            {**back, "gmm_weight": own[2], "send_counts": call["recv_counts"], "recv_counts": call["send_counts"]}
        )
    hidden = distribute.alltoallv_gmm_ranks(there)
    again = [{**back, "gmm_x": products.square()} for back, (products, *_) in zip(again, hidden, strict=True)]
    outputs = [y for y, _ in distribute.gmm_alltoallv_ranks(again)]
    loss = sum((y.square() * torch.linspace(-1, 2, y.numel()).view(y.shape).to(F64)).sum() for y in outputs)
    loss = loss + sum(rows.pow(3).sum() for *_, rows in hidden)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
    for rank, actual in enumerate(results):
        own = slice(3 * rank, 3 * rank + 3)
        wanted = [outputs[rank], hidden[rank][2], *grads[own], *second[own]]
        for result, reference in zip(actual, wanted, strict=True):
            torch.testing.assert_close(result, reference)


def test_counts_that_disagree_are_an_error_on_all_ranks(pool: Pool) -> None:
    calls = example()
    calls[1]["recv_counts"] = [0, 2, 1, 0]
    for operator in ("npu_alltoallv_gmm", "npu_gmm_alltoallv"):
        for words in run(pool, operator, calls):
            assert "rank 0 has send_counts [0, 1] for rank 1, which has recv_counts [0, 2] for it" in words


def test_shapes_that_disagree_are_an_error_on_all_ranks(pool: Pool) -> None:
    calls = example()
    calls[1] |= {"gmm_x": torch.zeros(4, 2, dtype=BF16), "gmm_weight": torch.zeros(2, 2, 1, dtype=BF16)}
    for words in run(pool, "npu_alltoallv_gmm", calls):
        assert "all ranks must have the same columns of the rows that travel" in words
    calls = [*example()[:1], *example(torch.float16)[1:]]
    for words in run(pool, "npu_gmm_alltoallv", calls):
        assert "the same dtype, but in the order of their ranks they have ['bfloat16', 'float16']" in words


def test_a_world_of_another_size_is_an_error_on_all_ranks(pool: Pool) -> None:
    calls = [{**call, "ep_world_size": 2} for call in example()]
    calls[1] |= {"ep_world_size": 1, "send_counts": [2, 2], "recv_counts": [2, 2]}
    words = pool.run(jobs.call_by_group, [("npu_alltoallv_gmm", "pair", "hcom", call) for call in calls])
    assert "ep_world_size must be the size of hcom, which is 2, but is 1" in words[1]
    assert "rank 1 refused its arguments" in words[0]
