"""Seeds every test, fills what the library allocates without initializing, and gives `npu` tests their device."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch_npu is imported below, with a device

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_npu import sim
from moe_npu.sim import launcher

NO_DEVICE = "torch_npu is not installed; pip install --no-deps torch-npu==2.13.0 brings it"
if importlib.util.find_spec("torch_npu") is not None:
    # for the whole session: autograd knows the devices that exist when it runs for the first time. And for child
    # processes: transformers imports torch_npu where it is installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch_npu says while it is imported
            sim.activate()
        os.environ.update(launcher.environment())
        os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD")
    except sim.SimulatorError as error:  # no compiler, or CANN: everything else can be tested
        NO_DEVICE = str(error)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores already


# `with torch.device(...)` remembers the allocation functions at its first use: let it see the real ones
with torch.device("meta"):
    torch.empty(0)


def pytest_configure(config: pytest.Config) -> None:
    if sim.is_active():  # what torch_npu says of its own, once per process, whatever runs first
        for message in (
            "TypedStorage is deprecated",
            "triton-ascend is not installed",
            "Cannot create tensor with int",
        ):
            config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def npu() -> torch.device:
    """The device of `npu` tests: the simulated one."""
    if not sim.is_active():
        pytest.skip(NO_DEVICE)
    return torch.device("npu", 0)


def _fill(tensor: Tensor) -> Tensor:
    """NaN, or an integer no kernel would compute by chance."""
    if type(tensor) is not Tensor or tensor.device.type == "meta":
        return tensor  # fake and functional tensors have no memory
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        info = torch.iinfo(tensor.dtype)
        tensor.fill_(info.min if info.min < 0 else 0xA5)
    return tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        # the first test folds to a constant while Dynamo traces, which cannot look at frames
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        module = sys._getframe(1).f_globals.get("__name__", "")
        tensor = allocate(*args, **kwargs)
        return _fill(tensor) if module == "moe_npu" or module.startswith("moe_npu.") else tensor

    return wrapper


# one wrapper each for the whole session: Dynamo builds its table of known functions once
_ALLOCATORS = [
    (owner, name, _poisoned(getattr(owner, name)))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
]


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for owner, name, wrapper in _ALLOCATORS:
            patch.setattr(owner, name, wrapper)
        yield
