"""What the simulated device needs on this machine, and what it must not find there."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

_CANN_LIBRARIES = ("libascendcl.so", "libhccl.so")


class SimulatorError(RuntimeError):
    """This machine cannot, or must not, simulate a device."""


def require_platform() -> None:
    """Raise :class:`SimulatorError` unless this is Linux on x86-64 or aarch64 (the latter is untested)."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SimulatorError(
            f"the simulated device needs Linux on x86-64 or aarch64, not {platform.system()} on {platform.machine()}"
        )


def torch_npu_folder() -> Path:
    """Where torch_npu is installed.

    Raises:
        SimulatorError: it is not installed.
    """
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        raise SimulatorError(
            "torch_npu is not installed; pip install --no-deps torch-npu==2.13.0 brings it, without CANN or an NPU"
        )
    return Path(spec.submodule_search_locations[0])


def compiler() -> list[str]:
    """The C++ compiler and its first arguments: ``$CXX``, or ``g++``.

    Raises:
        SimulatorError: there is none, or no binutils.
    """
    command = shlex.split(os.environ.get("CXX") or "g++")
    for program in (command[0], "nm", "ldd"):
        if shutil.which(program) is None:
            raise SimulatorError(f"{program} is not installed; apt-get install g++ binutils libc-bin brings it")
    return [str(shutil.which(command[0])), *command[1:]]


def find_cann() -> Path | None:
    """A library of CANN that programs of this process would load, or None."""
    for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep):
        for name in _CANN_LIBRARIES:
            if folder and (Path(folder) / name).exists():
                return Path(folder) / name
    found = ctypes.util.find_library("ascendcl")
    return None if found is None else Path(found)


def is_forced(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether these environment variables ask for a simulated device although CANN is installed."""
    return variables.get("MOE_NPU_SIM_FORCE", "") not in ("", "0")


def refuse_cann() -> None:
    """Keep away from a real NPU.

    Raises:
        SimulatorError: CANN is on the library path, and ``MOE_NPU_SIM_FORCE`` is not set.
    """
    cann = None if is_forced() else find_cann()
    if cann is not None:
        raise SimulatorError(
            f"CANN is installed here ({cann}), so programs run on its NPU; "
            "to simulate one all the same use --force, or MOE_NPU_SIM_FORCE=1"
        )
