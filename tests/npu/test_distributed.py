"""Process groups of simulated devices, through torch_npu's own ProcessGroupHCCL, and the operators that communicate."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_npu import ops
from moe_npu.ops._library import REGISTRATIONS
from tests.helpers.assertions import assert_bits_equal
from tests.helpers.gloo import NUM_WORKERS, SUBGROUPS, Pool, single_rank_group
from tests.npu import distributed_jobs as jobs
from tests.npu.distributed_jobs import values
from tests.npu.test_operators import assert_same, to_npu
from tests.ops.samples import distribute
from tests.ops.samples.base import Sample, relayout
from tests.ops.test_battery import bind, call, over

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu"), pytest.mark.distributed]

RANKS = range(NUM_WORKERS)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(jobs.join_hccl)
    yield pool
    pool.close()


def run(pool: Pool, job: Any, *arguments: Any) -> list[Any]:
    """The job with the same arguments on all ranks."""
    return pool.run(job, [arguments for _ in RANKS])


def reduced(parts: list[Tensor], op: Any = torch.add) -> Tensor:
    """In the order of the ranks, and rounded once."""
    wide = [part.float() if part.dtype in (F16, BF16) else part for part in parts]
    return functools.reduce(op, wide).to(parts[0].dtype)


# --- collectives -----------------------------------------------------------------------------------------------------

OPERATIONS = {"SUM": torch.add, "PRODUCT": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum}


class TestAllReduce:
    @pytest.mark.parametrize("dtype", [F32, F16, BF16, torch.int8, torch.int16, torch.int32, torch.int64])
    @pytest.mark.parametrize("op", OPERATIONS)
    def test_in_the_order_of_the_ranks(self, pool: Pool, dtype: torch.dtype, op: str) -> None:
        expected = reduced([values(rank, 7, dtype=dtype) for rank in RANKS], OPERATIONS[op])
        for result in run(pool, jobs.all_reduce, "all", dtype, op):
            assert_bits_equal(result, expected)

    def test_mean(self, pool: Pool) -> None:
        expected = reduced([values(rank, 7) for rank in RANKS]) / NUM_WORKERS
        for result in run(pool, jobs.all_reduce, "all", F32, "AVG"):
            assert_bits_equal(result, expected)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
    def test_dtypes_that_torch_npu_converts(self, pool: Pool, dtype: torch.dtype) -> None:
        expected = reduced(
            [values(rank, 7).to(dtype) for rank in RANKS], operator.or_ if dtype == torch.bool else torch.add
        )
        for result in run(pool, jobs.all_reduce, "all", dtype, "SUM"):
            assert_bits_equal(result, expected)

    def test_in_groups(self, pool: Pool) -> None:
        for name, ranks in SUBGROUPS.items():
            expected = reduced([values(rank, 7) for rank in ranks])
            if ranks[0] == 0 and ranks == tuple(range(len(ranks))):
                for result in pool.run(jobs.all_reduce, [(name, F32, "SUM") for _ in ranks]):
                    assert_bits_equal(result, expected)

    def test_many_at_once(self, pool: Pool) -> None:
        for results in run(pool, jobs.many_at_once):
            for i, result in enumerate(results):
                expected = reduced([values(rank + 10 * i, 1000) for rank in RANKS])
                assert_bits_equal(result, reduced([expected] * NUM_WORKERS) if i < 2 else expected)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64, torch.uint8, torch.bool])
def test_gathers(pool: Pool, dtype: torch.dtype) -> None:
    everyone = [values(rank, 5, dtype=dtype) for rank in RANKS]
    for rank, results in enumerate(run(pool, jobs.gathers, dtype)):
        assert_bits_equal(results["single"], torch.cat(everyone))
        assert_bits_equal(torch.stack(results["list"]), torch.stack(everyone))
        assert_bits_equal(torch.cat(results["uneven"]), torch.cat([values(r, r + 1, dtype=dtype) for r in RANKS]))
        assert (results["at root"] is None) == (rank != 1)
        if rank == 1:
            assert_bits_equal(torch.stack(results["at root"]), torch.stack(everyone))
        assert_bits_equal(results["scattered"], values(10 + rank, 5, dtype=dtype))
        assert_bits_equal(results["broadcast"], everyone[3])
        assert results["objects"] == [{"rank": r} for r in RANKS]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reductions_to_one_rank(pool: Pool, dtype: torch.dtype) -> None:
    total = reduced([values(rank, 12, dtype=dtype) for rank in RANKS])
    for rank, results in enumerate(run(pool, jobs.reductions, dtype)):
        if rank == 1:
            assert_bits_equal(results["root"], total)
        assert_bits_equal(results["scattered"], total.split(3)[rank])
        assert_bits_equal(results["list"], total.split(3)[rank])
        assert_bits_equal(results["uneven"], total.split([2, 4, 1, 5])[rank])


@pytest.mark.parametrize("dtype", [F32, BF16, torch.int64])
def test_exchanges_with_uneven_splits(pool: Pool, dtype: torch.dtype) -> None:
    counts = [[0, 3, 1, 2], [2, 0, 0, 5], [0, 0, 0, 0], [1, 1, 0, 4]]
    rows = [values(rank, sum(counts[rank]), 2, dtype=dtype).split(counts[rank]) for rank in RANKS]
    for rank, (single, parts, even) in enumerate(run(pool, jobs.exchanges, counts, dtype)):
        expected = torch.cat([rows[source][rank] for source in RANKS])
        assert_bits_equal(single, expected)
        assert_bits_equal(parts, expected)
        assert_bits_equal(even, torch.stack([values(source, 4, 2, dtype=dtype)[rank] for source in RANKS]))


def test_messages_between_two_ranks(pool: Pool) -> None:
    for rank, received in enumerate(run(pool, jobs.ring)):
        for message in received[:3]:
            assert_bits_equal(message, values((rank - 1) % NUM_WORKERS, 5))
        if rank == 0:
            assert_bits_equal(received[3], values(7, 5) * NUM_WORKERS)


def test_gradients_of_functional_collectives(pool: Pool) -> None:
    factors = torch.arange(1.0, 5.0)
    for rank, (y, first, second) in enumerate(run(pool, jobs.differentiable)):
        assert_bits_equal(y, torch.stack([values(source, 4, 2)[rank] for source in RANKS]))
        assert_bits_equal(first, factors.view(4, 1).expand(4, 2))
        assert_bits_equal(second, factors.sum().expand(4, 2))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training_of_two_replicas(pool: Pool, how: str) -> None:
    net = jobs.model()
    loss = sum(net(jobs.batch(rank)).square().mean() for rank in range(2)) / 2
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for grads in run(pool, jobs.train, how):
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("float64", "Unsupported data type at::kDouble"),
        ("strides", "Tensors must be contiguous"),
        ("name", "is not the name of an HCCL communicator here"),
        ("rank", "ep_rank_id must be the rank in group_ep"),
    ],
)
def test_refusals(pool: Pool, what: str, words: str) -> None:
    for error in run(pool, jobs.refusal, what):
        assert words in error or "refused its arguments" in error


# --- operators on several ranks --------------------------------------------------------------------------------------


def same_on_device(pool: Pool, job: str, arguments: list[tuple[Any, ...]]) -> None:
    on_device = pool.run(jobs.on_device, [(job, *args) for args in arguments])
    on_cpu = pool.run(jobs.on_cpu, [(job, *args) for args in arguments])
    for results, expected in zip(on_device, on_cpu, strict=True):
        assert not isinstance(expected, str), expected
        assert not isinstance(results, str), results
        single = isinstance(results, Tensor)
        for result, wanted in zip([results] if single else results, [expected] if single else expected, strict=True):
            if wanted is None:
                assert result is None
            else:
                assert_bits_equal(result, wanted)


def tokens(rank: int, num_tokens: int = 5, k: int = 2, experts: int = 8, h: int = 6, **options: Any) -> dict[str, Any]:
    ids = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(50 * rank + t))[:k] for t in range(num_tokens)]
    )
    return {"x": values(rank, num_tokens, h, dtype=BF16), "expert_ids": ids.int(), "moe_expert_num": experts, **options}


DISPATCH_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"quant_mode": 2},
    "cumulative": {"expert_token_nums_type": 0, "global_bs": 40},
}


@pytest.mark.parametrize("options", DISPATCH_OPTIONS.values(), ids=DISPATCH_OPTIONS)
@pytest.mark.parametrize("version", ["", "_v2"])
@pytest.mark.parametrize(("group", "size"), [("pair", 2), ("all", 4)])
def test_dispatch(pool: Pool, group: str, size: int, version: str, options: dict[str, Any]) -> None:
    name = f"npu_moe_distribute_dispatch{version}"
    same_on_device(pool, "call", [(name, group, size, tokens(rank, **options)) for rank in range(size)])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("group", "size", "shared"), [("pair", 2, 0), ("all", 4, 0), ("three", 3, 1)])
def test_there_and_back(pool: Pool, group: str, size: int, shared: int, version: int) -> None:
    arguments = [
        (version, group, size, tokens(rank, shared_expert_rank_num=shared), values(rank, 5, 2).abs())
        for rank in range(size)
    ]
    same_on_device(pool, "round_trip", arguments)


def test_there_and_back_with_masks_and_special_experts(pool: Pool) -> None:
    arguments = []
    for rank in RANKS:
        options = tokens(rank, x_active_mask=torch.arange(5) < 5 - rank, zero_expert_num=2)
        options["expert_ids"][0, 0] = 9
        arguments.append((2, "all", 4, options, values(rank, 5, 2).abs()))
    same_on_device(pool, "round_trip", arguments)


@pytest.mark.parametrize("size", [2, 4])
def test_all_to_all_with_grouped_matmul(pool: Pool, size: int) -> None:
    counts = torch.arange(size * size * 2).view(size, size, 2) * 3 % 5  # [from][to][expert]
    group = {2: "pair", 4: "all"}[size]
    for name in ("npu_alltoallv_gmm", "npu_gmm_alltoallv"):
        arguments = []
        for rank in range(size):
            sent, received = counts[rank].flatten().tolist(), counts[:, rank].flatten().tolist()
            options = {
                "gmm_x": values(rank, sum(sent), 4, dtype=BF16),
                "gmm_weight": values(10 + rank, 2, 4, 3, dtype=BF16),
                "ep_world_size": size,
                "send_counts": sent,
                "recv_counts": received,
            }
            arguments.append((name, group, "hcom", options))
        same_on_device(pool, "call_by_group", arguments)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_of_all_to_all_with_grouped_matmul(pool: Pool, size: int) -> None:
    same_on_device(pool, "exchange_gradients", [_exchange_gradient_arguments(rank, size) for rank in range(size)])


def _exchange_gradient_arguments(rank: int, size: int) -> tuple[Any, ...]:
    counts = torch.arange(size * size * 2).view(size, size, 2) * 3 % 5
    sent, received = counts[rank].flatten().tolist(), counts[:, rank].flatten().tolist()
    options = {
        "gmm_x": values(rank, sum(sent), 4, dtype=BF16) / 8,
        "gmm_weight": values(10 + rank, 2, 4, 3, dtype=BF16) / 8,
        "send_counts": sent,
        "recv_counts": received,
    }
    back = {"gmm_weight": values(20 + rank, 2, 4, 3, dtype=BF16) / 8, "trans_gmm_weight": True}
    return {2: "pair", 4: "all"}[size], size, options, back


def test_barrier(pool: Pool) -> None:
    arguments = [
        ("_npu_distribute_barrier", "all", "group", {"x_ref": values(rank, 3), "world_size": 4}) for rank in RANKS
    ]
    same_on_device(pool, "call_by_group", arguments)


# --- the samples, on one rank ----------------------------------------------------------------------------------------

# arguments that are float32 in samples; a device takes them in half precision only
_COMBINED = (
    *("expand_x", "shared_expert_x", "residual_x", "gamma", "ori_x"),
    *("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"),
)
HALF = {
    distribute.V1: ("x",),
    distribute.V2: ("x",),
    distribute.COMBINE_V1: _COMBINED,
    distribute.COMBINE_V2: _COMBINED,
    distribute.NORM: _COMBINED,
    distribute.TO_EXPERTS: ("gmm_x", "gmm_weight", "mm_x", "mm_weight"),
    distribute.TO_TOKENS: ("gmm_x", "gmm_weight", "mm_x", "mm_weight"),
    distribute.BARRIER: (),
}
# samples that a device does not compute, and words of the error
REFUSED = {
    "npu_moe_distribute_combine-shared-rows": "shared_expert_x must be None on a device",
    "npu_moe_distribute_combine-shared-rows-3d": "shared_expert_x must be None on a device",
    "npu_moe_distribute_combine-bfloat16": "shared_expert_x must be None on a device",
    "npu_moe_distribute_combine-rounded": "shared_expert_x must be None on a device",
    # torch_npu allocates one scale for each row
    "npu_moe_distribute_dispatch_v2-scales-without-effect": "output dynamic_scales was allocated as",
}
NAMES_A_GROUP = ("group_ep", "hcom", "group")


def half(sample: Sample) -> dict[str, Any]:
    """The arguments of a sample by name."""
    args, kwargs = sample.make()
    named = dict(inspect.signature(getattr(ops, sample.op_name)).bind(*args, **kwargs).arguments)
    for name in HALF[sample.op_name]:
        if named.get(name) is not None and named[name].dtype == F32:
            named[name] = relayout(named[name], BF16)
    return named


def on_device(named: dict[str, Any]) -> dict[str, Any]:
    return to_npu({name: communicator() if name in NAMES_A_GROUP else value for name, value in named.items()})


@functools.cache
def communicator() -> str:
    """What the device calls a group of this process alone."""
    single_rank_group()
    return jobs.communicator(dist.new_group([0], backend="hccl"))


def has_device_dtypes(sample: Sample) -> bool:
    args, kwargs = sample.make()
    return not any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in (*args, *kwargs.values()))


SAMPLES = [sample for sample in distribute.SAMPLES if has_device_dtypes(sample)]


@over([sample for sample in SAMPLES if sample.name not in REFUSED])
def test_one_rank_computes_the_same_as_on_cpu(sample: Sample) -> None:
    assert_same(call(sample, ((), on_device(half(sample)))), call(sample, ((), half(sample))))


@over([sample for sample in SAMPLES if sample.name in REFUSED])
def test_refused_samples(sample: Sample) -> None:
    with pytest.raises(RuntimeError, match=REFUSED[sample.name]):
        call(sample, ((), on_device(half(sample))))


def on_device_only(sample: Sample) -> Sample:
    """The sample without the gradients that are there on CPU only."""
    cpu_gradient = REGISTRATIONS[sample.op_name].cpu_gradient
    return dataclasses.replace(sample, differentiable=tuple(n for n in sample.differentiable if n not in cpu_gradient))


@over([s for s in map(on_device_only, SAMPLES) if s.differentiable and s.name not in REFUSED])
def test_one_rank_has_the_same_gradients_as_on_cpu(sample: Sample) -> None:
    gradients = []
    for move in (on_device, lambda named: named):
        named, leaves = bind(sample, ((), half(sample)))
        moved_leaves = leaves if move is not on_device else [to_npu(leaf) for leaf in leaves]
        replace = {id(leaf): moved for leaf, moved in zip(leaves, moved_leaves, strict=True)}
        rest = move({name: value for name, value in named.items() if id(value) not in replace})
        given = {name: replace[id(value)] for name, value in named.items() if id(value) in replace}
        results = call(sample, ((), {**rest, **given}))
        wanted = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(result.shape, generator=generator).to(result.dtype).to(result.device) for result in wanted]
        gradients.append(list(torch.autograd.grad(wanted, moved_leaves, grads, allow_unused=True)))
    assert_same(*gradients)
