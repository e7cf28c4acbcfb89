"""Records what a program asks of the simulated device: launches and their bytes, copies, synchronisations."""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# aclrtMemcpyKind
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3
_MEMCPY, _SYNCHRONIZE = 0, 1  # enum Event of runtime.cpp
_OBSERVER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
_HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Region(NamedTuple):
    """Device memory that a launch reads or writes.

    Attributes:
        address: of the first byte.
        num_bytes: of the elements; those that a broadcast repeats count once.
    """

    address: int
    num_bytes: int


class Launch(NamedTuple):
    """One operator on the device.

    Attributes:
        name: the kernel, e.g. ``aclnnGroupedMatmulV5``, or the operator of torch that the simulator computes itself.
        reads: memory of its inputs, those included that it changes.
        writes: memory of its outputs.
    """

    name: str
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs."""
        return sum(region.num_bytes for region in self.reads)

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs."""
        return sum(region.num_bytes for region in self.writes)


@dataclass(eq=False)
class Trace:
    """What happened inside ``with trace()``.

    Attributes:
        launches: kernels in the order in which they ran, copies from device to device included.
        bytes_to_device: bytes copied from the host.
        bytes_to_host: bytes copied to the host.
        num_copies_to_device: number of these copies.
        num_copies_to_host: number of these copies.
        num_synchronizations: times that the host waited for the device, e.g. for the value of ``.item()``.
    """

    launches: list[Launch] = field(default_factory=list)
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    num_copies_to_device: int = 0
    num_copies_to_host: int = 0
    num_synchronizations: int = 0

    @property
    def names(self) -> list[str]:
        """Names of the launches, in order."""
        return [launch.name for launch in self.launches]

    @property
    def num_launches(self) -> int:
        """Number of launches."""
        return len(self.launches)

    @property
    def bytes_read(self) -> int:
        """Bytes that all launches read."""
        return sum(launch.bytes_read for launch in self.launches)

    @property
    def bytes_written(self) -> int:
        """Bytes that all launches wrote."""
        return sum(launch.bytes_written for launch in self.launches)

    def __str__(self) -> str:
        """A table of the kernels, the totals below."""
        lines = [f"{'launches':>8}  {'read [MB]':>10}  {'written [MB]':>12}  kernel"]
        for name, number in Counter(self.names).most_common():
            launches = [launch for launch in self.launches if launch.name == name]
            read = sum(launch.bytes_read for launch in launches) / 1e6
            written = sum(launch.bytes_written for launch in launches) / 1e6
            lines.append(f"{number:8}  {read:10.3f}  {written:12.3f}  {name}")
        lines.append(f"{self.num_launches:8}  {self.bytes_read / 1e6:10.3f}  {self.bytes_written / 1e6:12.3f}  total")
        lines.append(
            f"copied to the device: {self.bytes_to_device / 1e6:.3f} MB in {self.num_copies_to_device}, "
            f"to the host: {self.bytes_to_host / 1e6:.3f} MB in {self.num_copies_to_host}; "
            f"synchronisations: {self.num_synchronizations}"
        )
        return "\n".join(lines)


_traces: list[Trace] = []


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Record what is launched, copied and waited for inside the block, by every thread.

    Launches of the operators of torch count as one each, also where a real device needs several.

    Example:
        with moe_npu.sim.trace() as record:
            model(inputs).sum().backward()
        print(record)

    Raises:
        SimulatorError: the simulated device is not active.
    """
    from moe_npu.sim import device  # which imports this module

    runtime = device.runtime()
    record = Trace()
    _traces.append(record)
    runtime.moe_npu_sim_observe(_observer)
    try:
        yield record
    finally:
        _traces.remove(record)
        if not _traces:
            runtime.moe_npu_sim_observe(None)


def is_recording() -> bool:
    """Whether a trace is open."""
    return bool(_traces)


def record_launch(name: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
    """Add a launch to the open traces."""
    launch = Launch(name, tuple(map(_region, reads)), tuple(map(_region, writes)))
    for record in _traces:
        record.launches.append(launch)


def record_aten(operator: torch._ops.OpOverload, arguments: object, results: object) -> None:
    """Add an operator that the simulator computed itself to the open traces."""
    inputs = [value for value in tree_leaves(arguments) if isinstance(value, Tensor) and value.device.type != "cpu"]
    outputs = [value for value in tree_leaves(results) if isinstance(value, Tensor)]
    record_launch(str(operator), inputs, outputs)
    if _HOST_READS & set(operator.tags) or any(isinstance(value, bool | int | float) for value in tree_leaves(results)):
        _observe_synchronization()


def _region(tensor: Tensor) -> Region:
    # an axis of stride 0 repeats the same memory
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride != 0 or size == 0 else 1
    return Region(tensor.data_ptr(), elements * tensor.element_size())


def _observe_synchronization() -> None:
    for record in _traces:
        record.num_synchronizations += 1


def _observe(event: int, kind: int, num_bytes: int, source: int | None, destination: int | None) -> None:
    if event == _SYNCHRONIZE:
        _observe_synchronization()
        return
    for record in _traces:
        if kind == _TO_DEVICE:
            record.num_copies_to_device += 1
            record.bytes_to_device += num_bytes
        elif kind == _TO_HOST:
            record.num_copies_to_host += 1
            record.bytes_to_host += num_bytes
        elif kind == _ON_DEVICE:
            read, written = Region(source or 0, num_bytes), Region(destination or 0, num_bytes)
            record.launches.append(Launch("aclrtMemcpyAsync (device to device)", (read,), (written,)))


_observer = _OBSERVER(_observe)
