"""Runs when a Python process starts under ``moe-npu sim``: ``import torch_npu`` shall find the simulated device.

This folder is first on ``PYTHONPATH`` there, so that child processes have the device, too. Nothing is imported before
the program imports torch_npu, or torch, which does so by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@contextmanager
def _with_device() -> Iterator[None]:
    # torch must not import torch_npu by itself in the middle of its import
    autoload = os.environ.get(_AUTOLOAD)
    os.environ[_AUTOLOAD] = "0"
    try:
        from moe_npu.sim import device
    finally:
        os.environ.pop(_AUTOLOAD)
        if autoload is not None:
            os.environ[_AUTOLOAD] = autoload
    device.load()
    with device.quiet_import():
        yield
    device.connect()


@contextmanager
def _after_torch_npu() -> Iterator[None]:
    # transformers imports torch_npu from within its modules; moe_npu, which comes with the device, extends some of
    # them and needs them whole
    importlib.import_module("torch_npu")
    yield


_AROUND: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "torch_npu": _with_device,
    "transformers": _after_torch_npu,
}


class _AroundLoader(Loader):
    """The regular loader of a module, within a context."""

    def __init__(self, loader: Loader, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._loader = loader
        self._around = around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # inspect and pickle see the regular one
        with self._around():
            self._loader.exec_module(module)


class _AroundFinder(MetaPathFinder):
    """Finds the modules of ``_AROUND`` as usual, as often as somebody asks, and gives them an `_AroundLoader`."""

    _is_searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AROUND or self._is_searching:
            return None
        self._is_searching = True  # the search below asks this finder, too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _AroundLoader(spec.loader, _AROUND[fullname])
        return spec


def _run_next_sitecustomize() -> None:
    """Run the one that this file hides."""
    here = Path(__file__).parent
    for folder in sys.path:
        if folder and Path(folder).resolve() != here.resolve() and (Path(folder) / "sitecustomize.py").is_file():
            spec = importlib.util.spec_from_file_location("sitecustomize", Path(folder) / "sitecustomize.py")
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


sys.meta_path.insert(0, _AroundFinder())
_run_next_sitecustomize()
