"""The simulated device of this process: loads the stand-ins for CANN and computes what torch_npu launches."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moe_npu.sim import aten, compat, distributed, graph, outcome, tiles, trace
from moe_npu.sim.build import LIBRARIES, build
from moe_npu.sim.descriptors import Slot, read_arguments
from moe_npu.sim.installation import SimulatorError, refuse_cann
from moe_npu.sim.kernels import KERNELS, Kernel

_RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Slot))
_kernels = list(KERNELS.values())
_runtime: ctypes.CDLL | None = None
_libraries: list[ctypes.CDLL] = []
_is_connected = False


def is_active() -> bool:
    """Whether this process has the simulated device."""
    return _is_connected


def runtime() -> ctypes.CDLL:
    """The library of the device.

    Raises:
        SimulatorError: the device is not active.
    """
    if _runtime is None:
        raise SimulatorError("there is no simulated device in this process; use moe-npu sim, or moe_npu.sim.activate()")
    return _runtime


def activate(*, devices: int = 1, compat: bool = False, force: bool = False) -> None:
    """Give this process simulated devices and import torch_npu, which then finds an Ascend910B1.

    Call it before anything else imports torch_npu. Where torch_npu is installed and CANN is not, torch itself can only
    be imported with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` in the environment, or by importing moe_npu first.

    Args:
        devices: how many there are.
        compat: accept calls written for earlier releases of torch_npu, with a warning.
        force: simulate a device although CANN is installed.

    Raises:
        SimulatorError: torch_npu or a compiler is missing, the platform is not supported, CANN is installed,
            torch_npu is imported already, or this process has fewer simulated devices already.
    """
    if is_active():
        number = torch.npu.device_count()  # type: ignore[attr-defined]
        if devices > number:
            raise SimulatorError(f"this process has {number} simulated device(s) already and cannot get {devices}")
        return
    if "torch_npu" in sys.modules:
        raise SimulatorError("torch_npu is imported already; activate the simulated device before it")
    os.environ["MOE_NPU_SIM_DEVICES"] = str(devices)
    for name, is_set in (("MOE_NPU_SIM_COMPAT", compat), ("MOE_NPU_SIM_FORCE", force)):
        if is_set:
            os.environ[name] = "1"
    load()
    with quiet_import():
        import torch_npu  # noqa: F401 - must find the stand-ins, hence not at the top
    connect()


def load() -> None:
    """Load the stand-ins for CANN, so that ``import torch_npu`` finds them.

    Raises:
        SimulatorError: they cannot be built, or CANN is installed.
    """
    global _runtime
    if _runtime is not None:
        return
    refuse_cann()
    folder = build()
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # operators run when they are called, in the thread that calls them
    # a library that is loaded under the name that torch_npu asks for is not searched for
    _libraries.extend(ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES)
    _runtime = ctypes.CDLL(str(folder / "libmoe_npu_sim.so"))
    _runtime.moe_npu_sim_connect(_run_callback)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Leave out what torch_npu prints about the environment of CANN while it is imported."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            if "ASCEND_HOME_PATH" not in line:
                print(line)


def connect() -> None:
    """Complete the device after torch_npu has been imported."""
    global _is_connected
    if _is_connected:
        return
    _is_connected = True
    aten.install()
    distributed.install(runtime())
    graph.install()
    if compat.is_requested():
        compat.install()


def _run(operator_id: int, slots: Any) -> int:
    kernel = _kernels[operator_id]
    try:
        launch(kernel, slots)
    except BaseException as error:
        return outcome.failure(runtime(), kernel.name, error)
    return outcome.DONE


_run_callback = _RUN(_run)


def launch(kernel: Kernel, slots: Any) -> None:
    """Compute one operator on its arguments and store the results in the memory of its outputs."""
    distributed.wait_for_current_stream()
    arguments = read_arguments(kernel, slots)
    inputs = {argument.name: value for argument, value in arguments if argument.is_passed}
    outputs = [(argument.name, value) for argument, value in arguments if argument.is_output]
    results = kernel.compute(**inputs)
    if trace.is_recording():
        written = [value for argument, value in arguments if argument.is_output or argument.is_changed]
        trace.record_launch(
            kernel.name,
            map(
                tiles.stored,
                _tensors([v for argument, v in arguments if argument.is_passed and not argument.is_output]),
            ),
            map(tiles.stored, _tensors(written)),
        )
    if outputs:
        if not isinstance(results, tuple):
            results = (results,)
        if len(results) != len(outputs):
            raise AssertionError(f"the kernel gives {len(results)} results for {len(outputs)} outputs")
        for (name, output), result in zip(outputs, results, strict=True):
            _store(name, output, result)
    for tensor in _tensors([value for argument, value in arguments if argument.is_output or argument.is_changed]):
        tiles.encode(tensor)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _store(name: str, output: Any, result: Any) -> None:
    if output is None:
        return
    if result is None:  # the device leaves it unwritten, and whoever uses it shall notice
        for part in _tensors(output):
            part.fill_(
                float("nan")
                if part.is_floating_point()
                else 1
                if part.dtype == torch.bool
                else torch.iinfo(part.dtype).min
            )
        return
    if isinstance(output, list):
        for i, (part, value) in enumerate(zip(output, result, strict=True)):
            _store(f"{name}[{i}]", part, value)
        return
    assert isinstance(output, Tensor)
    if (output.shape, output.dtype) != (result.shape, result.dtype):
        raise AssertionError(
            f"output {name} was allocated as {list(output.shape)} of {output.dtype}, but the kernel computes "
            f"{list(result.shape)} of {result.dtype}"
        )
    output.copy_(result)
