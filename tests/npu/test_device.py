"""What a kernel on the simulated device may do wrong, and how that arrives in the program."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu import ops, sim
from moe_npu.sim import device

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


@pytest.fixture
def swiglu_computes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Replaces the function that computes ``aclnnSwiGlu``."""

    def replace(compute: Callable[..., Any]) -> None:
        kernels = [k._replace(compute=compute) if k.name == "aclnnSwiGlu" else k for k in device._kernels]
        monkeypatch.setattr(device, "_kernels", kernels)

    return replace


def launch() -> Tensor:
    return ops.npu_swiglu(torch.ones(2, 8).npu())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(2, 5), r"output out was allocated as \[2, 4\] of torch.float32, but the kernel computes \[2, 5\]"),
        (torch.ones(2, 4).half(), r"allocated as \[2, 4\] of torch.float32, but .* \[2, 4\] of torch.float16"),
        ((torch.ones(2, 4), torch.ones(1)), "the kernel gives 2 results for 1 outputs"),
    ],
    ids=["shape", "dtype", "number"],
)
def test_results_are_what_the_adapter_allocated(
    result: Any, message: str, swiglu_computes: Callable[[Callable[..., Any]], None]
) -> None:
    swiglu_computes(lambda **_: result)
    with pytest.raises(RuntimeError, match=f"aclnnSwiGlu: .*{message}"):
        launch()


def test_an_interrupt_stops_the_program(swiglu_computes: Callable[[Callable[..., Any]], None]) -> None:
    swiglu_computes(lambda **_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        try:
            launch()
        except RuntimeError as error:  # as a program catches what a device refuses
            raise AssertionError("the program goes on") from error


def test_a_process_gets_its_devices_once() -> None:
    sim.activate()
    with pytest.raises(sim.SimulatorError, match="already and cannot get 64"):
        sim.activate(devices=64)


def test_runtime_functions_that_cannot_do_what_they_say_are_refused() -> None:
    import torch_npu

    with pytest.raises(NotImplementedError, match="aclmdlInitDump"):
        torch_npu.npu.init_dump()


def test_the_profiler_of_torch_shows_the_host() -> None:
    x = torch.ones(8, 8, device="npu")
    with torch.profiler.profile() as profile:
        (x @ x).sum().item()
    assert "aten::matmul" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("1,0", 1), ("", 0)])
def test_visible_devices(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    number = ctypes.c_uint32()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    device.runtime().aclrtGetDeviceCount(ctypes.byref(number))
    assert number.value == count  # this process has one
