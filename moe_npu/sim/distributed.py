"""HCCL between processes with simulated devices: the collectives of torch_npu's process groups, computed by gloo.

torch_npu's own ``ProcessGroupHCCL`` is at work; what it asks of HCCL arrives here through native/collectives.cpp. A
communicator is a gloo group over the loopback interface, with a thread that does its collectives one after the other.
A stream that has collectives under way is not idle; whoever waits for it, or for an event recorded on it, waits here.

Rows travel as bytes. Sums and other reductions are computed in the order of the ranks, half precision in float32 and
rounded once, so all ranks get the same bits.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d as c10d

from moe_npu.sim import outcome
from moe_npu.sim.descriptors import memory

_LOOPBACK = "127.0.0.1"
_ASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int)
_Work = Callable[[], object]
# HcclDataType
_DTYPES = {
    0: torch.int8,
    1: torch.int16,
    2: torch.int32,
    3: torch.float16,
    4: torch.float32,
    5: torch.int64,
    6: torch.uint64,
    7: torch.uint8,
    8: torch.uint16,
    9: torch.uint32,
    10: torch.float64,
    11: torch.bfloat16,
    15: torch.float8_e4m3fn,
    16: torch.float8_e5m2,
    17: torch.float8_e8m0fnu,
}
# HcclReduceOp: sum, product, maximum, minimum
_REDUCTIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.add, torch.mul, torch.maximum, torch.minimum)
# what a device reduces, and the dtype in which it is computed here
_REDUCED_IN = {
    torch.int8: torch.int8,
    torch.int16: torch.int16,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
}

_runtime: ctypes.CDLL | None = None
_handles = itertools.count(64, 64)
_communicators: dict[int, _Communicator] = {}
_stores: dict[str, TCPStore] = {}  # of the communicators whose first rank this process is, by name
_lock = threading.Lock()
_streams: dict[int, list[futures.Future[None]]] = {}  # what is under way on each, or has failed
_events: dict[int, tuple[futures.Future[None], ...]] = {}  # what had been under way when each was recorded


def install(runtime: ctypes.CDLL) -> None:
    """Let the device's library ask here for collectives."""
    global _runtime
    _runtime = runtime
    runtime.moe_npu_sim_add_unfinished.argtypes = [ctypes.c_int64]
    runtime.moe_npu_sim_add_unfinished.restype = None
    runtime.moe_npu_sim_connect_collectives(_answer_callback)
    atexit.register(_uninstall)


def _uninstall() -> None:
    """Threads of torch_npu live longer than Python."""
    assert _runtime is not None
    for communicator in list(_communicators.values()):
        communicator.drain(timeout=60.0)
    _runtime.moe_npu_sim_connect_collectives(None)


def process_group(name: str, argument: str = "group") -> str:
    """The name of a gloo group with the ranks of a communicator; all ranks ask for it at the same time.

    Args:
        name: of the communicator, as ``get_hccl_comm_name`` gives it.
        argument: what the operator calls it.

    Raises:
        ValueError: this process has no communicator of that name.
    """
    for communicator in _communicators.values():
        if communicator.name == name:
            return communicator.process_group()
    raise ValueError(
        f"{argument} {name!r} is not the name of an HCCL communicator here; "
        "group._get_backend(torch.device('npu')).get_hccl_comm_name(rank) gives it"
    )


def _answer(function: bytes, values: Any, number: int) -> int:
    assert _runtime is not None
    try:
        _FUNCTIONS[function.decode()](*values[:number])
    except BaseException as error:
        return outcome.failure(_runtime, f"HCCL, {function.decode()}", error)
    return outcome.DONE


_answer_callback = _ASK(_answer)


# ---- streams and events ----------------------------------------------------------------------------------------------


class _Worker:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[futures.Future[None], _Work] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, work: _Work) -> futures.Future[None]:
        future: futures.Future[None] = futures.Future()
        self._queue.put((future, work))
        return future

    def close(self) -> None:
        """End the thread after what has been submitted."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            future, work = task
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del task, future, work  # a group must not end in this thread


def _enqueue(stream: int, worker: _Worker, work: _Work) -> futures.Future[None]:
    """Do something on a stream, after what is under way there."""
    assert _runtime is not None
    with _lock:
        under_way = _streams.setdefault(stream, [])
        earlier = tuple(under_way)

        def work_in_order() -> None:
            _wait(earlier)
            work()

        future = worker.submit(work_in_order)
        under_way.append(future)
    _runtime.moe_npu_sim_add_unfinished(1)
    future.add_done_callback(lambda done: _leave(stream, done))
    return future


def _leave(stream: int, future: futures.Future[None]) -> None:
    # a failure stays, so whatever comes after it on the stream fails
    if future.exception() is None:
        _forget(stream, future)


def _forget(stream: int, future: futures.Future[None]) -> None:
    assert _runtime is not None
    with _lock:
        under_way = _streams.get(stream, [])
        if future in under_way:
            under_way.remove(future)
            _runtime.moe_npu_sim_add_unfinished(-1)
            if not under_way:
                del _streams[stream]


def wait_for_current_stream() -> None:
    """Wait for the collectives that an operator would come after, if it ran on the current stream now."""
    if _streams:
        from torch_npu import _C

        _wait_for_stream(int(_C._npu_getCurrentRawStream(_C._npu_getDevice())))


def _wait(under_way: Sequence[futures.Future[None]]) -> None:
    for future in under_way:
        future.result()


def _record_event(event: int, stream: int) -> None:
    with _lock:
        _events[event] = tuple(_streams.get(stream, ()))


def _wait_for_event(event: int) -> None:
    _wait(_events.get(event, ()))


def _wait_for_stream(stream: int) -> None:
    with _lock:
        under_way = tuple(_streams.get(stream, ()))
    _wait(under_way)


def _wait_for_all() -> None:
    for stream in list(_streams):
        _wait_for_stream(stream)


def _answer_whether_done(under_way: Sequence[futures.Future[None]], answer: int) -> None:
    ctypes.c_int64.from_address(answer).value = all(future.done() for future in under_way)


def _query_event(event: int, answer: int) -> None:
    _answer_whether_done(_events.get(event, ()), answer)


def _query_stream(stream: int, answer: int) -> None:
    _answer_whether_done(tuple(_streams.get(stream, ())), answer)


# ---- communicators ---------------------------------------------------------------------------------------------------


def _seconds(variable: str, default: int) -> timedelta:
    return timedelta(seconds=int(os.environ.get(variable) or default))


def _gloo(store: Store, rank: int, size: int) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    options._timeout = _seconds("HCCL_EXEC_TIMEOUT", 1836)
    return dist.ProcessGroupGloo(store, rank, size, options)


class _Communicator:
    """The ranks of one HCCL communicator."""

    def __init__(self, name: str, store: Store, rank: int, size: int) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self._store = store
        self._gloo = _gloo(PrefixStore("collectives", store), rank, size)
        self._worker = _Worker()
        self._senders: dict[int, tuple[_Worker, list[futures.Future[None]]]] = {}
        self._started: list[tuple[int, futures.Future[None]]] = []
        self._process_group: dist.ProcessGroup | None = None

    def start(self, stream: int, work: _Work) -> None:
        """Do a collective on a stream."""
        self._started = [(where, future) for where, future in self._started if not future.done() or future.exception()]
        future = _enqueue(stream, self._worker, work)
        self._started.append((stream, future))

    def all_gather(self, part: Tensor) -> Tensor:
        """``[W, N]``: the bytes ``[N]`` of all ranks."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._gloo.allgather([parts], [part]).wait()
        return torch.stack(parts)

    def all_to_all(self, part: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Bytes grouped by destination to bytes grouped by source."""
        received = part.new_empty(sum(receive))
        self._gloo.alltoall_base(received, part, receive, send).wait()
        return received

    def broadcast(self, data: Tensor, root: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._gloo.broadcast([data], options).wait()

    def barrier(self) -> None:
        self._gloo.barrier().wait()

    def send(self, data: Tensor, peer: int) -> None:
        """Send a copy when the peer is ready; to the stream it is sent at once, as by a device that buffers."""
        worker, sent = self._senders.setdefault(peer, (_Worker(), []))
        sent[:] = [future for future in sent if not future.done() or future.exception()]
        sent.append(worker.submit(lambda: self._gloo.send([data], peer, 0).wait()))

    def receive(self, data: Tensor, peer: int) -> None:
        self._gloo.recv([data], peer, 0).wait()

    def process_group(self) -> str:
        """The name of a torch.distributed group of its ranks on CPU, for operators that communicate by themselves."""
        if self._process_group is None:
            store = PrefixStore("operators", self._store)
            backend = _gloo(store, self.rank, self.size)
            group = dist.ProcessGroup(store, self.rank, self.size)
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
            group._set_group_name(self.name)  # type: ignore[arg-type]
            self._process_group = group
        try:
            c10d._resolve_process_group(self.name)  # type: ignore[attr-defined, arg-type]
        except RuntimeError:  # new, or forgotten when the default group was destroyed
            c10d._register_process_group(self.name, self._process_group)  # type: ignore[attr-defined, arg-type]
            c10d._world.pg_map[self._process_group] = ("gloo", self._store)
        return self.name

    def drain(self, timeout: float | None = None) -> None:
        """Wait for what has been sent to arrive."""
        sent = [future for _, pending in self._senders.values() for future in pending]
        futures.wait(sent, timeout)

    def close(self) -> None:
        self._worker.close()
        self.drain()
        for worker, _ in self._senders.values():
            worker.close()
        for stream, future in self._started:
            if future.done():
                _forget(stream, future)
        if self._process_group is not None:
            c10d._world.pg_map.pop(self._process_group, None)
            with contextlib.suppress(RuntimeError):  # it goes with the default group
                c10d._unregister_process_group(self.name)  # type: ignore[attr-defined, arg-type]


def _root_info(info: int) -> None:
    name = f"{_LOOPBACK}%lo_{os.getpid()}_{secrets.token_hex(8)}"
    store = TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    _stores[name] = store
    text = f"{store.port} {name}".encode() + b"\0"
    ctypes.memmove(info, text, len(text))


def _init(size: int, info: int, rank: int, chosen_name: int, result: int) -> None:
    port, _, name = ctypes.string_at(info).decode().partition(" ")
    store = _stores.pop(name, None) or TCPStore(
        _LOOPBACK, int(port), is_master=False, timeout=_seconds("HCCL_CONNECT_TIMEOUT", 120)
    )
    store.set_timeout(_seconds("HCCL_CONNECT_TIMEOUT", 120))
    if chosen_name:
        name = ctypes.string_at(chosen_name).decode() or name
    handle = next(_handles)
    _communicators[handle] = _Communicator(name, store, rank, size)
    ctypes.c_int64.from_address(result).value = handle


def _destroy(handle: int) -> None:
    communicator = _communicators.pop(handle, None)
    if communicator is not None:
        communicator.close()


def _name(handle: int, result: int) -> None:
    text = _communicators[handle].name.encode() + b"\0"
    ctypes.memmove(result, text, len(text))


# ---- collectives -----------------------------------------------------------------------------------------------------
# each gets the communicator, then the arguments of HCCL without stream; addresses and dtypes are numbers


def _dtype(number: int) -> torch.dtype:
    if number not in _DTYPES:
        raise NotImplementedError(f"HcclDataType {number} is not implemented")
    return _DTYPES[number]


def _counts(address: int, number: int) -> list[int]:
    return list((ctypes.c_uint64 * number).from_address(address))


def _reduced(parts: Tensor, dtype: torch.dtype, op: int) -> Tensor:
    """Bytes ``[N]`` of the reduction of ``[W, N]``."""
    values = [part.view(dtype).to(_REDUCED_IN[dtype]) for part in parts]
    result = values[0]
    for value in values[1:]:
        result = _REDUCTIONS[op](result, value)
    return result.to(dtype).view(torch.uint8)


def _require_reducible(number: int, op: int) -> torch.dtype:
    dtype = _dtype(number)
    if dtype not in _REDUCED_IN or not 0 <= op < len(_REDUCTIONS):
        raise NotImplementedError(f"a device does not reduce {dtype} with HcclReduceOp {op}")
    return dtype


def _all_reduce(comm: _Communicator, send: int, receive: int, count: int, number: int, op: int) -> _Work:
    dtype = _require_reducible(number, op)
    source, target = (memory(address, count * dtype.itemsize) for address in (send, receive))
    return lambda: target.copy_(_reduced(comm.all_gather(source), dtype, op))


def _reduce(comm: _Communicator, send: int, receive: int, count: int, number: int, op: int, root: int) -> _Work:
    dtype = _require_reducible(number, op)
    source, target = (memory(address, count * dtype.itemsize) for address in (send, receive))

    def work() -> None:
        parts = comm.all_gather(source)
        if comm.rank == root:
            target.copy_(_reduced(parts, dtype, op))

    return work


def _broadcast(comm: _Communicator, data: int, count: int, number: int, root: int) -> _Work:
    target = memory(data, count * _dtype(number).itemsize)
    return lambda: comm.broadcast(target, root)


def _all_gather(comm: _Communicator, send: int, receive: int, count: int, number: int) -> _Work:
    size = count * _dtype(number).itemsize
    source, target = memory(send, size), memory(receive, comm.size * size)
    return lambda: target.copy_(comm.all_gather(source).flatten())


def _all_gather_v(
    comm: _Communicator, send: int, count: int, receive: int, counts: int, offsets: int, number: int
) -> _Work:
    itemsize, ranks = _dtype(number).itemsize, comm.size
    receives = _Blocks(receive, _counts(counts, ranks), _counts(offsets, ranks), itemsize)
    source = memory(send, count * itemsize)
    sizes = [source.numel()] * ranks
    return lambda: receives.write(comm.all_to_all(source.repeat(ranks), sizes, receives.sizes))


def _reduce_scatter(comm: _Communicator, send: int, receive: int, count: int, number: int, op: int) -> _Work:
    dtype, ranks = _require_reducible(number, op), comm.size
    size = count * dtype.itemsize
    source, target = memory(send, ranks * size), memory(receive, size)

    def work() -> None:
        parts = comm.all_to_all(source, [size] * ranks, [size] * ranks)
        target.copy_(_reduced(parts.view(ranks, size), dtype, op))

    return work


def _reduce_scatter_v(
    comm: _Communicator, send: int, counts: int, offsets: int, receive: int, count: int, number: int, op: int
) -> _Work:
    dtype, ranks = _require_reducible(number, op), comm.size
    sends = _Blocks(send, _counts(counts, ranks), _counts(offsets, ranks), dtype.itemsize)
    target = memory(receive, count * dtype.itemsize)

    def work() -> None:
        parts = comm.all_to_all(sends.read(), sends.sizes, [target.numel()] * ranks)
        target.copy_(_reduced(parts.view(ranks, -1), dtype, op))

    return work


def _scatter(comm: _Communicator, send: int, receive: int, count: int, number: int, root: int) -> _Work:
    size, ranks = count * _dtype(number).itemsize, comm.size
    is_root = comm.rank == root
    source, target = memory(send, ranks * size if is_root else 0), memory(receive, size)
    receive_sizes = [size if rank == root else 0 for rank in range(ranks)]
    return lambda: target.copy_(comm.all_to_all(source, [size if is_root else 0] * ranks, receive_sizes))


def _all_to_all(
    comm: _Communicator, send: int, send_count: int, send_type: int, receive: int, receive_count: int, receive_type: int
) -> _Work:
    ranks = range(comm.size)
    sends = _Blocks(send, [send_count for _ in ranks], [r * send_count for r in ranks], _dtype(send_type).itemsize)
    receives = _Blocks(
        receive, [receive_count for _ in ranks], [r * receive_count for r in ranks], _dtype(receive_type).itemsize
    )
    return lambda: receives.write(comm.all_to_all(sends.read(), sends.sizes, receives.sizes))


def _all_to_all_v(
    comm: _Communicator, send: int, send_counts: int, send_offsets: int, send_type: int,
    receive: int, receive_counts: int, receive_offsets: int, receive_type: int,
) -> _Work:  # fmt: skip
    ranks = comm.size
    sends = _Blocks(send, _counts(send_counts, ranks), _counts(send_offsets, ranks), _dtype(send_type).itemsize)
    receives = _Blocks(
        receive, _counts(receive_counts, ranks), _counts(receive_offsets, ranks), _dtype(receive_type).itemsize
    )
    return lambda: receives.write(comm.all_to_all(sends.read(), sends.sizes, receives.sizes))


def _all_to_all_vc(
    comm: _Communicator, send: int, matrix: int, send_type: int, receive: int, receive_type: int
) -> _Work:
    ranks = comm.size
    counts = _counts(matrix, ranks * ranks)  # [from][to]
    sent, received = counts[comm.rank * ranks : (comm.rank + 1) * ranks], counts[comm.rank :: ranks]
    sends = _Blocks(send, sent, _offsets(sent), _dtype(send_type).itemsize)
    receives = _Blocks(receive, received, _offsets(received), _dtype(receive_type).itemsize)
    return lambda: receives.write(comm.all_to_all(sends.read(), sends.sizes, receives.sizes))


def _offsets(counts: list[int]) -> list[int]:
    return [0, *itertools.accumulate(counts[:-1])]


class _Blocks:
    """A piece of memory for each rank."""

    def __init__(self, address: int, counts: list[int], offsets: list[int], itemsize: int) -> None:
        self.sizes = [count * itemsize for count in counts]
        self._blocks = [
            memory(address + offset * itemsize, size) for offset, size in zip(offsets, self.sizes, strict=True)
        ]

    def read(self) -> Tensor:
        return torch.cat(self._blocks)

    def write(self, data: Tensor) -> None:
        for block, part in zip(self._blocks, data.split(self.sizes), strict=True):
            block.copy_(part)


def _barrier(comm: _Communicator) -> _Work:
    return comm.barrier


def _receive(comm: _Communicator, data: int, count: int, number: int, peer: int) -> _Work:
    target = memory(data, count * _dtype(number).itemsize)
    return lambda: comm.receive(target, peer)


def _send(handle: int, stream: int, data: int, count: int, number: int, peer: int) -> None:
    # not after a receive that is under way on the stream: in a group of calls, this is the call that the peer waits for
    wait_for_current_stream()
    _communicators[handle].send(memory(data, count * _dtype(number).itemsize).clone(), peer)


def _collective(prepare: Callable[..., _Work]) -> Callable[..., None]:
    def start(handle: int, stream: int, *arguments: int) -> None:
        communicator = _communicators[handle]
        communicator.start(stream, prepare(communicator, *arguments))

    return start


_FUNCTIONS: dict[str, Callable[..., None]] = {
    "record_event": _record_event,
    "wait_for_event": _wait_for_event,
    "wait_for_stream": _wait_for_stream,
    "wait_for_all": _wait_for_all,
    "query_event": _query_event,
    "query_stream": _query_stream,
    "root_info": _root_info,
    "init": _init,
    "destroy": _destroy,
    "name": _name,
    "send": _send,
    **{
        prepare.__name__[1:]: _collective(prepare)
        for prepare in (
            *(_all_reduce, _reduce, _broadcast, _all_gather, _all_gather_v, _reduce_scatter, _reduce_scatter_v),
            *(_scatter, _all_to_all, _all_to_all_v, _all_to_all_vc, _barrier, _receive),
        )
    },
}
