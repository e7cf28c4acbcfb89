"""What workers with a device each run: functions of a place in the world and picklable arguments."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moe_npu import ops
from tests.distributed import jobs
from tests.helpers.gloo import GROUP_TIMEOUT, NUM_WORKERS, SUBGROUPS, World

GROUPS: dict[str, dist.ProcessGroup] = {}


def join_hccl(rank: int, store: str) -> World:
    """Groups of devices, which have the names of HCCL's communicators; gloo is there for tensors on CPU."""
    os.environ["MOE_NPU_SIM_DEVICES"] = str(NUM_WORKERS)
    torch.npu.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,npu:hccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=NUM_WORKERS,
        timeout=GROUP_TIMEOUT,
    )
    assert dist.group.WORLD is not None
    GROUPS["all"] = dist.group.WORLD
    for name, ranks in SUBGROUPS.items():
        group = dist.new_group(list(ranks), timeout=GROUP_TIMEOUT)
        if rank in ranks:
            GROUPS[name] = group
    return World(rank, {name: communicator(group) for name, group in GROUPS.items()})


def communicator(group: dist.ProcessGroup) -> str:
    """What the device calls a group."""
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank(group))


def _to_npu(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.npu(), value)


def _to_cpu(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def on_device(world: World, job: str, *arguments: Any) -> Any:
    """A job of tests/distributed with its tensors on the device, and its results on CPU."""
    return _to_cpu(getattr(jobs, job)(world, *_to_npu(arguments)))


def on_cpu(world: World, job: str, *arguments: Any) -> Any:
    """The same job on CPU."""
    groups = {name: group.group_name for name, group in GROUPS.items()}
    return _to_cpu(getattr(jobs, job)(World(world.rank, groups), *arguments))


# ---- collectives -----------------------------------------------------------------------------------------------------


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a rank contributes."""
    generator = torch.Generator().manual_seed(rank)
    return torch.empty(shape).uniform_(-9, 9, generator=generator).to(dtype)


def all_reduce(world: World, group: str, dtype: torch.dtype, op: str) -> Tensor:
    x = values(world.rank, 7, dtype=dtype).npu()
    dist.all_reduce(x, getattr(dist.ReduceOp, op), GROUPS[group])
    return x.cpu()


def many_at_once(world: World) -> list[Tensor]:
    group = GROUPS["all"]
    tensors = [values(world.rank + 10 * i, 1000).npu() for i in range(6)]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all(work.is_completed() for work in works)
    with dist._coalescing_manager(device=torch.device("npu", world.rank), async_ops=True) as coalesced:
        for tensor in tensors[:2]:
            dist.all_reduce(tensor)
    coalesced.wait()
    return _to_cpu(tensors)


def gathers(world: World, dtype: torch.dtype) -> dict[str, Any]:
    world_size, rank = dist.get_world_size(), world.rank
    mine = values(rank, 5, dtype=dtype).npu()
    results: dict[str, Any] = {"single": mine.new_empty(5 * world_size)}
    dist.all_gather_into_tensor(results["single"], mine)
    results["list"] = [mine.new_empty(5) for _ in range(world_size)]
    dist.all_gather(results["list"], mine)
    results["uneven"] = [mine.new_empty(n + 1) for n in range(world_size)]
    dist.all_gather(results["uneven"], values(rank, rank + 1, dtype=dtype).npu())
    at_root = [mine.new_empty(5) for _ in range(world_size)] if rank == 1 else None
    dist.gather(mine, at_root, 1)
    results["at root"] = at_root
    results["scattered"] = mine.new_empty(5)
    rows = [values(10 + n, 5, dtype=dtype).npu() for n in range(world_size)] if rank == 2 else None
    dist.scatter(results["scattered"], rows, 2)
    results["broadcast"] = mine.clone()
    dist.broadcast(results["broadcast"], 3)
    results["objects"] = [None] * world_size
    dist.all_gather_object(results["objects"], {"rank": rank})
    return _to_cpu(results)


def reductions(world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    world_size, rank = dist.get_world_size(), world.rank
    mine = values(rank, 3 * world_size, dtype=dtype).npu()
    results = {"root": mine.clone(), "scattered": mine.new_empty(3), "list": mine.new_empty(3)}
    dist.reduce(results["root"], 1)
    dist.reduce_scatter_single(results["scattered"], mine)
    dist.reduce_scatter(results["list"], list(mine.split(3)))
    sizes = [2, 4, 1, 5]
    results["uneven"] = mine.new_empty(sizes[rank])
    dist.reduce_scatter(results["uneven"], list(mine.split(sizes)))
    return _to_cpu(results)


def exchanges(world: World, counts: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    rank = world.rank
    send, receive = counts[rank], [row[rank] for row in counts]
    rows = values(rank, sum(send), 2, dtype=dtype).npu()
    single = rows.new_empty(sum(receive), 2)
    dist.all_to_all_single(single, rows, receive, send)
    parts = [rows.new_empty(count, 2) for count in receive]
    dist.all_to_all(parts, list(rows.split(send)))
    even = rows.new_empty(4, 2)
    dist.all_to_all_single(even, values(rank, 4, 2, dtype=dtype).npu())
    return _to_cpu([single, torch.cat(parts), even])


def ring(world: World) -> list[Tensor]:
    after, before = (world.rank + 1) % NUM_WORKERS, (world.rank - 1) % NUM_WORKERS
    received = [torch.empty(5, device="npu") for _ in range(4)]
    if world.rank % 2 == 0:
        dist.send(values(world.rank, 5).npu(), after)
        dist.recv(received[0], before)
    else:
        dist.recv(received[0], before)
        dist.send(values(world.rank, 5).npu(), after)
    for index, is_receive_first in ((1, False), (2, True)):
        transfers = [
            dist.P2POp(dist.isend, values(world.rank, 5).npu(), after),
            dist.P2POp(dist.irecv, received[index], before),
        ]
        for work in dist.batch_isend_irecv(transfers[::-1] if is_receive_first else transfers):
            work.wait()
    # a receive does not hold up what is not waited for
    if world.rank == 0:
        work = dist.irecv(received[3], 1)
        x = torch.ones(1, device="npu")
        dist.all_reduce(x)
        dist.send(x, 1)
        work.wait()
    else:
        x = torch.ones(1, device="npu")
        dist.all_reduce(x)
        received[3].fill_(0)
        if world.rank == 1:
            dist.recv(x, 0)
            dist.send(values(7, 5).npu() * x, 0)
    dist.barrier()
    return _to_cpu(received)


def differentiable(world: World) -> list[Tensor]:
    x = values(world.rank, 4, 2).npu().requires_grad_()
    y = functional.all_to_all_single_autograd(x, [1] * 4, [1] * 4, GROUPS["all"])
    (first,) = torch.autograd.grad((y * (world.rank + 1)).sum(), x)
    gathered = functional.all_gather_single_autograd(x, 0, GROUPS["all"])
    (second,) = torch.autograd.grad((gathered * (world.rank + 1)).sum(), x)
    return _to_cpu([y, first, second])


def refusal(world: World, what: str) -> str:
    """The words of the error."""
    x = torch.ones(2, 3, device="npu")
    ids = torch.zeros(2, 1, dtype=torch.int32, device="npu")
    try:
        if what == "float64":
            dist.all_reduce(torch.ones(2, dtype=torch.float64).npu())
        elif what == "strides":
            dist.all_reduce(x.t())
        elif what == "name":
            ops.npu_moe_distribute_dispatch_v2(x.half(), ids, GROUPS["all"].group_name, 4, world.rank, 4)
        elif what == "rank":
            ops.npu_moe_distribute_dispatch_v2(x.half(), ids, world.groups["all"], 4, 3 - world.rank, 4)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return "nothing was refused"


# ---- training --------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def batch(rank: int) -> Tensor:
    return values(100 + rank, 5, 6)


def train(world: World, how: str) -> list[Tensor]:
    """Gradients of the mean over two ranks of what `model` gives for their batches."""
    net = model().npu()
    group = GROUPS["pair" if world.rank < 2 else "other-pair"]
    if how == "ddp":
        net = nn.parallel.DistributedDataParallel(net, device_ids=[world.rank], process_group=group)
    else:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "npu")
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    net(batch(world.rank % 2).npu()).square().mean().backward()
    grads = [parameter.grad for parameter in net.parameters()]
    full = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return _to_cpu(full)
