"""The pool of workers: results in the order of the ranks, and no failure that makes anybody wait."""

from __future__ import annotations

import time

import pytest

from tests.distributed import jobs
from tests.helpers.gloo import NUM_WORKERS, Pool

pytestmark = pytest.mark.distributed


def test_results_come_in_the_order_of_the_ranks(pool: Pool) -> None:
    assert pool.run(jobs.echo, [("a",), ("b",), ("c",)]) == [(0, "a"), (1, "b"), (2, "c")]
    assert pool.run(jobs.echo, [(rank,) for rank in range(NUM_WORKERS)]) == [
        (rank, rank) for rank in range(NUM_WORKERS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message", "timeout"),
    [("raises", "rank 1 raised\n.*ValueError: as told", 30), ("dies", "rank 1 died", 30), ("sleeps", "no answer", 1)],
)
def test_a_failure_ends_the_pool_at_once(how: str, message: str, timeout: float) -> None:
    pool = Pool()
    try:
        pool.run(jobs.echo, [(0,)] * NUM_WORKERS)
        start = time.monotonic()
        with pytest.raises(AssertionError, match=f"(?s){message}"):
            pool.run(jobs.fail, [(1, how)] * NUM_WORKERS, timeout=timeout)
        assert time.monotonic() - start < 15
    finally:
        pool.close()
