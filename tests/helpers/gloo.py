"""Process groups on CPU: one of a single rank inside the test process, and a pool of workers that are several ranks."""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

NUM_WORKERS = 4
# ranks of the groups that exist in the pool besides the one of all
SUBGROUPS = {
    "pair": (0, 1),
    "other-pair": (2, 3),
    "first-and-third": (0, 2),
    "second-and-fourth": (1, 3),
    "three": (0, 1, 2),
}
GROUP_TIMEOUT = timedelta(seconds=60)


def single_rank_group() -> str:
    """The name of the default group, which is made at the first call and has this process for its only rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    assert dist.group.WORLD is not None
    assert dist.group.WORLD.size() == 1
    return dist.group.WORLD.group_name


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class World(NamedTuple):
    """What a job is told of its place: the names of groups, by the keys of `SUBGROUPS` and "all", and its rank."""

    rank: int
    groups: dict[str, str]

    def lane_groups(self) -> dict[str, Any]:
        """Arguments of two lanes of two ranks each: lane 0 is ranks 0 and 1, lane 1 is ranks 2 and 3."""
        lane, rank = divmod(self.rank, 2)
        return {
            "group_ep": self.groups[("pair", "other-pair")[lane]],
            "ep_world_size": 2,
            "ep_rank_id": rank,
            "group_tp": self.groups[("first-and-third", "second-and-fourth")[rank]],
            "tp_world_size": 2,
            "tp_rank_id": lane,
        }


Job = Callable[..., Any]


class Pool:
    """Workers that run the same job at the same time. The first error ends the wait for the others, and the pool."""

    def __init__(self, join: Callable[[int, str], World] | None = None) -> None:
        """``join`` makes the groups in a worker, from its rank and a path for their store."""
        self._join = join or join_gloo
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: str | None = None

    def run(self, job: Job, arguments: Sequence[tuple[Any, ...]], *, timeout: float = 60.0) -> list[Any]:
        """Results of ``job(world, *arguments[rank])`` on as many ranks as there are arguments.

        Args:
            job: a function of a module, which a worker can import.
            arguments: for each rank.
            timeout: seconds after which the workers are killed.

        Raises:
            AssertionError: a job raised, a worker died, or it took too long. The next call starts new workers.
        """
        if not self._workers:
            self._start()
        for rank, values in enumerate(arguments):
            # plain pickles: torch would hand tensors over as shared memory
            self._pipes[rank].send_bytes(pickle.dumps((job, values)))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < len(arguments):
            pending = [pipe for rank, pipe in enumerate(self._pipes[: len(arguments)]) if rank not in results]
            ready = wait(pending, max(deadline - time.monotonic(), 0.0))
            if not ready:
                self._fail(f"no answer within {timeout} seconds from {len(pending)} of {len(arguments)} ranks")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    succeeded, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionError):
                    self._fail("the connection closed")
                if not succeeded:
                    self._fail(f"rank {rank} raised\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(arguments))]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp()
        for rank in range(NUM_WORKERS):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_serve, args=(self._join, rank, f"{self._folder}/store", theirs), daemon=True
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def _fail(self, message: str) -> NoReturn:
        # a dead rank makes the others raise, and they may be heard first
        ended = wait([worker.sentinel for worker in self._workers], 0.5)
        dead = [f"rank {rank} died" for rank, worker in enumerate(self._workers) if worker.sentinel in ended]
        self.close()
        raise AssertionError("; ".join([*dead, message]))

    def close(self) -> None:
        """Kill the workers, whatever they do."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
            worker.close()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._workers, self._pipes, self._folder = [], [], None


def join_gloo(rank: int, store: str) -> World:
    """Groups on CPU."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_WORKERS, timeout=GROUP_TIMEOUT
    )
    assert dist.group.WORLD is not None
    groups = {"all": dist.group.WORLD.group_name}
    for name, ranks in SUBGROUPS.items():
        group = dist.new_group(list(ranks), timeout=GROUP_TIMEOUT)
        if rank in ranks:
            groups[name] = group.group_name
    return World(rank, groups)


def _serve(join: Callable[[int, str], World], rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    world = join(rank, store)
    while True:
        try:
            job, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (True, job(world, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
