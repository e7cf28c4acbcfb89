"""Runs a Python program on the simulated device, and checks whether this machine can."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from moe_npu.sim.build import build
from moe_npu.sim.installation import SimulatorError, compiler, find_cann, is_forced, refuse_cann, torch_npu_folder

_SITE = Path(__file__).with_name("site")
_SMOKE_TEST = """
import torch, torch_npu
x, weight = torch.randn(6, 16).half(), torch.randn(3, 16, 8).half()
counts = torch.tensor([1, 0, 5])
how = dict(group_list=counts.npu(), group_list_type=1, group_type=0, split_item=3)
(y,) = torch_npu.npu_grouped_matmul([x.npu()], [weight.npu()], **how)
expected = torch.cat([rows.float() @ w.float() for rows, w in zip(x.split(counts.tolist()), weight)])
torch.testing.assert_close(y.cpu().float(), expected, rtol=1e-2, atol=1e-2)
print(torch.npu.get_device_name())
"""


class Finding(NamedTuple):
    """One line of ``moe-npu sim --check``."""

    what: str
    value: str
    is_fine: bool


def environment(*, devices: int = 1, compat: bool = False, force: bool = False) -> dict[str, str]:
    """The environment in which a Python process, and its children, have the simulated device.

    Args:
        devices: how many.
        compat: accept calls written for earlier releases of torch_npu, as ``MOE_NPU_SIM_COMPAT=1`` does.
        force: simulate a device although CANN is installed, as ``MOE_NPU_SIM_FORCE=1`` does.
    """
    variables = dict(os.environ)
    variables.update(MOE_NPU_SIM="1", MOE_NPU_SIM_DEVICES=str(devices), TASK_QUEUE_ENABLE="0")
    for name, is_set in (("MOE_NPU_SIM_COMPAT", compat), ("MOE_NPU_SIM_FORCE", force)):
        if is_set:
            variables[name] = "1"
    # torch may import torch_npu by itself again: it succeeds there
    variables.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    variables["PYTHONPATH"] = os.pathsep.join([str(_SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables


def run(arguments: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Replace this process by ``python arguments...`` in the environment of :func:`environment`.

    Raises:
        SimulatorError: torch_npu or a compiler is missing, the platform is not supported, or
            CANN is installed.
    """
    if not is_forced(variables):
        refuse_cann()
    build()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], dict(variables))


def check(variables: Mapping[str, str]) -> list[Finding]:
    """What is installed, and whether a grouped matmul on the simulated device gives the right numbers."""
    findings = [
        Finding("Python", sys.version.split()[0], True),
        Finding("torch", torch.__version__, True),
    ]
    findings.append(_look("torch_npu", _torch_npu))
    findings.append(_look("compiler", lambda: " ".join(compiler())))
    findings.append(_look("stand-ins for CANN", lambda: str(build())))
    cann = find_cann()
    value = "not on the library path" if cann is None else f"{cann}: not to be replaced without --force"
    findings.append(Finding("CANN", value, cann is None or is_forced(variables)))
    if not all(finding.is_fine for finding in findings):
        return [*findings, Finding("smoke test", "not run", False)]
    done = subprocess.run(
        [sys.executable, "-c", _SMOKE_TEST], env=dict(variables), capture_output=True, text=True, check=False
    )
    passed = done.returncode == 0
    value = f"passed on {done.stdout.split()[-1]} (simulated)" if passed else f"failed:\n{done.stderr.strip()}"
    return [*findings, Finding("smoke test", value, passed)]


def _look(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look(), True)
    except SimulatorError as error:
        return Finding(what, str(error), False)


def _torch_npu() -> str:
    folder = torch_npu_folder()  # says how to install it, where it is not
    return f"{importlib.metadata.version('torch_npu')} in {folder}"
